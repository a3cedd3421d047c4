"""A model's weights in the words of Hugging Face Transformers, both ways: names and arrangement.

Llama style is ``LlamaForCausalLM`` (or ``MistralForCausalLM``, which has the same names), GPT-2 style is
``GPT2LMHeadModel``, whose linear layers (``Conv1D``) hold their weights as [in, out]. The vocabulary is not padded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallelism.models.gpt.config import GPTConfig
from parallelism.models.gpt.plain import outer_shapes


@dataclass(frozen=True)
class _Row:
    """One norm or linear layer there, and what it is here: several stand one below the other, [out, in]."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


_LAYER = {
    "llama": (
        _Row("input_layernorm", ("attention.norm",)),
        _Row("self_attn.q_proj", ("attention.q",)),
        _Row("self_attn.k_proj", ("attention.k",)),
        _Row("self_attn.v_proj", ("attention.v",)),
        _Row("self_attn.o_proj", ("attention.o",)),
        _Row("post_attention_layernorm", ("mlp.norm",)),
        _Row("mlp.gate_proj", ("mlp.gate",)),
        _Row("mlp.up_proj", ("mlp.up",)),
        _Row("mlp.down_proj", ("mlp.down",)),
    ),
    "gpt2": (
        _Row("ln_1", ("attention.norm",)),
        _Row("attn.c_attn", ("attention.q", "attention.k", "attention.v"), transposed=True),
        _Row("attn.c_proj", ("attention.o",), transposed=True),
        _Row("ln_2", ("mlp.norm",)),
        _Row("mlp.c_fc", ("mlp.up",), transposed=True),
        _Row("mlp.c_proj", ("mlp.down",), transposed=True),
    ),
}
_OUTER = {
    "llama": {
        "embedding.tokens": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    "gpt2": {
        "embedding.tokens": "transformer.wte.weight",
        "embedding.positions": "transformer.wpe.weight",
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
        "output.weight": "lm_head.weight",
    },
}
BASE_PREFIX = {"llama": "model.", "gpt2": "transformer."}
"""Left off in files of the model without its head."""
_LAYERS = {"llama": "layers", "gpt2": "h"}


def layer_tensors(config: GPTConfig, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is given of one layer, by canonical name → by the name and in the arrangement of Transformers."""
    tensors: dict[str, Tensor] = {}
    for row, part, name in _rows(config, index):
        if f"{row.ours[0]}.{part}" not in weights:
            continue
        stacked = [weights[f"{one}.{part}"] for one in row.ours]
        whole = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
        tensors[name] = whole.t() if row.transposed else whole
    return tensors


def layer_weights(config: GPTConfig, index: int, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`layer_tensors`; ``read`` gives a tensor by the name of Transformers."""
    shapes = config.layer_shapes()
    weights: dict[str, Tensor] = {}
    for row, part, name in _rows(config, index):
        whole = read(name).t() if row.transposed else read(name)
        names = [f"{one}.{part}" for one in row.ours]
        pieces = whole.split([shapes[one][0] for one in names])
        weights |= {one: piece.contiguous() for one, piece in zip(names, pieces, strict=True)}
    return weights


def outer_tensors(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands outside the layers, by canonical name → by the names of Transformers."""
    return {_OUTER[config.style][name]: tensor for name, tensor in weights.items()}


def outer_weights(config: GPTConfig, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`outer_tensors`; ``read`` gives a tensor by the name of Transformers."""
    return {name: read(_OUTER[config.style][name]) for name in outer_shapes(config)}


def linear_module(config: GPTConfig, index: int, name: str) -> str | None:
    """The module (``model.layers.0.mlp.up_proj``) that a linear layer (``mlp.up``) is alone and as it is, or None."""
    rows = (row for row in _LAYER[config.style] if row.ours == (name,) and not row.transposed)
    return next((f"{_layer_prefix(config, index)}{row.theirs}" for row in rows), None)


def tensor_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything that Transformers stores of this model."""
    layer = {name: torch.empty(shape, device="meta") for name, shape in config.layer_shapes().items()}
    outer = {name: torch.empty(shape, device="meta") for name, shape in outer_shapes(config).items()}
    tensors = outer_tensors(config, outer)
    for index in range(config.layers):
        tensors |= layer_tensors(config, index, layer)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _rows(config: GPTConfig, index: int) -> list[tuple[_Row, str, str]]:
    """What one layer is made of there: row of the table, ``weight`` or ``bias``, whole name."""
    parts = ("weight", "bias") if config.bias else ("weight",)
    prefix = _layer_prefix(config, index)
    return [(row, part, f"{prefix}{row.theirs}.{part}") for row in _LAYER[config.style] for part in parts]


def _layer_prefix(config: GPTConfig, index: int) -> str:
    return f"{BASE_PREFIX[config.style]}{_LAYERS[config.style]}.{index}."
