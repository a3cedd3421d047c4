"""A model in the words of Hugging Face Transformers: weight names and arrangement, and ``config.json``.

Llama style becomes ``LlamaForCausalLM``, GPT-2 style ``GPT2LMHeadModel``, whose linear layers (``Conv1D``) hold their
weights as [in, out]. The vocabulary is not padded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compression.checks import check_exportable
from parallelism.models.gpt.config import GPTConfig

_LLAMA_LAYER = {
    "attention.norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GPT2_NORMS = {"attention.norm": "ln_1", "mlp.norm": "ln_2"}
_GPT2_LINEARS = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def layer_tensors(config: GPTConfig, index: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer by canonical name → by the name and in the arrangement of Transformers."""
    if config.style == "llama":
        prefix = f"model.layers.{index}."
        return {f"{prefix}{_LLAMA_LAYER[_stem(name)]}.weight": tensor for name, tensor in weights.items()}
    prefix = f"transformer.h.{index}."
    tensors = {}
    for part in ("weight", "bias"):
        for name, theirs in _GPT2_NORMS.items():
            tensors[f"{prefix}{theirs}.{part}"] = weights[f"{name}.{part}"]
        for name, theirs in _GPT2_LINEARS.items():
            tensors[f"{prefix}{theirs}.{part}"] = weights[f"{name}.{part}"].t()
        qkv = torch.cat([weights[f"attention.{name}.{part}"] for name in "qkv"])
        tensors[f"{prefix}attn.c_attn.{part}"] = qkv.t()
    return tensors


def outer_tensors(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What stands outside the layers, by the names of Transformers."""
    llama = config.style == "llama"
    names = {
        "embedding.tokens": "model.embed_tokens.weight" if llama else "transformer.wte.weight",
        "embedding.positions": "transformer.wpe.weight",
        "final_norm.weight": "model.norm.weight" if llama else "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
        "output.weight": "lm_head.weight",
    }
    return {names[name]: tensor for name, tensor in weights.items()}


def config_json(config: GPTConfig, dtype: torch.dtype, end_of_document_id: int) -> dict[str, Any]:
    """The content of ``config.json``. Raises ``ValueError`` for shapes that Transformers has no model for."""
    check_exportable(config)
    common = {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.initializer_std,
        "bos_token_id": end_of_document_id,
        "eos_token_id": end_of_document_id,
    }
    return common | (_llama_config(config) if config.style == "llama" else _gpt2_config(config))


def _llama_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.channels,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,  # where readers older than Transformers 5 look
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.dropout,
    }


def _gpt2_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.feed_forward,
        "n_positions": config.context,
        "activation_function": "gelu",  # the exact one; Transformers' default for GPT-2 is the tanh approximation
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _stem(name: str) -> str:
    return name.removesuffix(".weight")
