"""Family ``gpt`` in torch alone, one layer at a time: protocol :class:`parallelism.models.base.PlainFamily`.

Shapes: B sequences, S positions, D hidden, H heads, G key/value heads, C channels per head, F feed-forward width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, pad, rms_norm, scaled_dot_product_attention, silu

from parallelism.models.base import Observer, StoredMatrix
from parallelism.models.gpt.config import GPTConfig

Weights = Mapping[str, Tensor]


def split_layer(config: GPTConfig, stored: Weights) -> dict[str, Tensor]:
    """One layer as megatron-core stores it → canonical names; q, k, v and gate, up apart.

    ``linear_qkv`` [(H + 2G)·C, D] is interleaved per query group: the group's queries, its key, its value. The first
    matrix of a gated feed-forward [2F, D] holds all gate rows, then all up rows. Raises ``ValueError`` where
    tensors are missing or of another shape.
    """
    weights = _norm(stored, "self_attention.linear_qkv.layer_norm", "attention.norm")
    weights |= _norm(stored, "mlp.linear_fc1.layer_norm", "mlp.norm")
    for part in ("weight", "bias") if config.bias else ("weight",):
        qkv = split_qkv(config, _get(stored, f"self_attention.linear_qkv.{part}"))
        weights |= {f"attention.{name}.{part}": tensor for name, tensor in zip("qkv", qkv, strict=True)}
        weights[f"attention.o.{part}"] = _get(stored, f"self_attention.linear_proj.{part}")
        first = _get(stored, f"mlp.linear_fc1.{part}")
        if config.gated:
            gate, first = first.chunk(2)
            weights[f"mlp.gate.{part}"] = gate.contiguous()
        weights[f"mlp.up.{part}"] = first.contiguous()
        weights[f"mlp.down.{part}"] = _get(stored, f"mlp.linear_fc2.{part}")
    _check_shapes(weights, config.layer_shapes())
    return weights


def split_qkv(config: GPTConfig, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Interleaved [(H + 2G)·C, ...] → queries [H·C, ...], keys [G·C, ...], values [G·C, ...]."""
    groups, per_group = config.query_groups, config.heads // config.query_groups
    rows = tensor.shape[0]
    if rows != groups * (per_group + 2) * config.channels:
        raise ValueError(f"self_attention.linear_qkv has {rows} rows, which does not fit {config!r}")
    grouped = tensor.unflatten(0, (groups, (per_group + 2), config.channels))
    query, key, value = grouped.split((per_group, 1, 1), dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def split_outer(config: GPTConfig, stored: Weights) -> dict[str, Tensor]:
    """What megatron-core stores outside the layers → canonical names; the padding of the vocabulary is cut."""
    weights = {"embedding.tokens": _get(stored, "embedding.word_embeddings.weight")[: config.vocab_size]}
    if config.style == "gpt2":
        weights["embedding.positions"] = _get(stored, "embedding.position_embeddings.weight")
    weights |= {f"final_norm.{part}": _get(stored, f"decoder.final_layernorm.{part}") for part in _norm_parts(config)}
    if not config.tied_embeddings:
        weights["output.weight"] = _get(stored, "output_layer.weight")[: config.vocab_size]
    _check_shapes(weights, outer_shapes(config))
    return weights


def join_layer(config: GPTConfig, weights: Weights) -> dict[str, Tensor]:
    """The inverse of :func:`split_layer`: canonical names → one layer as megatron-core stores it."""
    _check_shapes(weights, config.layer_shapes())
    stored = _stored_norm(weights, "attention.norm", "self_attention.linear_qkv.layer_norm")
    stored |= _stored_norm(weights, "mlp.norm", "mlp.linear_fc1.layer_norm")
    first = ("mlp.gate", "mlp.up") if config.gated else ("mlp.up",)
    for part in ("weight", "bias") if config.bias else ("weight",):
        query, key, value = (weights[f"attention.{name}.{part}"] for name in "qkv")
        stored[f"self_attention.linear_qkv.{part}"] = join_qkv(config, query, key, value)
        stored[f"self_attention.linear_proj.{part}"] = weights[f"attention.o.{part}"]
        stored[f"mlp.linear_fc1.{part}"] = torch.cat([weights[f"{name}.{part}"] for name in first])
        stored[f"mlp.linear_fc2.{part}"] = weights[f"mlp.down.{part}"]
    return stored


def join_qkv(config: GPTConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries [H·C, ...], keys [G·C, ...], values [G·C, ...] → interleaved [(H + 2G)·C, ...]."""
    by_group = [tensor.unflatten(0, (config.query_groups, -1)) for tensor in (query, key, value)]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def join_outer(config: GPTConfig, weights: Weights) -> dict[str, Tensor]:
    """The inverse of :func:`split_outer`; the rows that pad the vocabulary are zero."""
    _check_shapes(weights, outer_shapes(config))
    stored = {"embedding.word_embeddings.weight": _padded(config, weights["embedding.tokens"])}
    if config.style == "gpt2":
        stored["embedding.position_embeddings.weight"] = weights["embedding.positions"]
    stored |= {f"decoder.final_layernorm.{part}": weights[f"final_norm.{part}"] for part in _norm_parts(config)}
    if not config.tied_embeddings:
        stored["output_layer.weight"] = _padded(config, weights["output.weight"])
    return stored


def matrices(config: GPTConfig, name: str, stored: Tensor) -> list[StoredMatrix]:
    """The linear weights within one stored weight of a layer; see :class:`parallelism.models.base.PlainFamily`."""
    if name == "self_attention.linear_qkv.weight":
        key = config.channels
        query = config.heads // config.query_groups * key
        parts = stored.unflatten(0, (-1, query + 2 * key)).split((query, key, key), dim=1)
        return [StoredMatrix(f"attention.{part}", view, 0) for part, view in zip("qkv", parts, strict=True)]
    if name == "mlp.linear_fc1.weight":
        names = ("mlp.gate", "mlp.up") if config.gated else ("mlp.up",)
        return [StoredMatrix(part, view, 0) for part, view in zip(names, stored.chunk(len(names)), strict=True)]
    readers = {"self_attention.linear_proj.weight": "attention.o", "mlp.linear_fc2.weight": "mlp.down"}
    return [StoredMatrix(readers[name], stored, 1)] if name in readers else []


def outer_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names of everything outside the layers → shape, the vocabulary unpadded."""
    shapes = {name: shape for name, shape in config.parameter_shapes().items() if not name.startswith("layers.")}
    for name in {"embedding.tokens", "output.weight"} & shapes.keys():
        shapes[name] = (config.vocab_size, config.hidden)
    return shapes


def embed(config: GPTConfig, outer: Weights, tokens: Tensor) -> Tensor:
    """Token ids [B, S] → hidden states [B, S, D]. Raises ``ValueError`` beyond the model's context."""
    length = tokens.shape[-1]
    if length > config.context:
        raise ValueError(f"sequence_length {length} is beyond the model's context of {config.context}: shorten it")
    hidden = outer["embedding.tokens"][tokens]
    return hidden + outer["embedding.positions"][:length] if config.style == "gpt2" else hidden


def layer(config: GPTConfig, weights: Weights, hidden: Tensor, observe: Observer | None = None) -> Tensor:
    """Pre-norm residual block: [B, S, D] → [B, S, D]; ``observe`` may replace the input [B, S, in] of every linear.

    Inputs that several linears share (q, k, v; gate, up) are the same tensor object.
    """
    see = observe or _ignore
    hidden = hidden + _attention(config, weights, _normed(config, weights, "attention.norm", hidden), see)
    return hidden + _feed_forward(config, weights, _normed(config, weights, "mlp.norm", hidden), see)


def logits(config: GPTConfig, outer: Weights, hidden: Tensor) -> Tensor:
    """Final norm and output layer: [B, S, D] → [B, S, vocab_size]."""
    output = outer["embedding.tokens" if config.tied_embeddings else "output.weight"]
    return linear(_normed(config, outer, "final_norm", hidden), output)


def rotate(states: Tensor, base: float) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) on [B, heads, S, C], the two halves of a head's channels paired.

    Megatron-core's default (``rotary_interleaved=False``) and Hugging Face's ``rotate_half``. Angles in float32.
    """
    length, channels = states.shape[-2:]
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=states.device) / channels
    positions = torch.arange(length, dtype=torch.float32, device=states.device)
    angles = torch.outer(positions, 1.0 / base**exponents).repeat(1, 2)
    first, second = states.chunk(2, dim=-1)
    return states * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def _attention(config: GPTConfig, weights: Weights, inputs: Tensor, see: Observer) -> Tensor:
    query, key, value = (
        _linear(weights, f"attention.{name}", inputs, see).unflatten(-1, (-1, config.channels)).transpose(1, 2)
        for name in "qkv"
    )
    if config.style == "llama":
        query, key = rotate(query, config.rope_base), rotate(key, config.rope_base)
    grouped = config.query_groups != config.heads
    context = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return _linear(weights, "attention.o", context.transpose(1, 2).flatten(2), see)


def _feed_forward(config: GPTConfig, weights: Weights, inputs: Tensor, see: Observer) -> Tensor:
    """SwiGLU (Shazeer 2020, eq. 6) or GELU (Hendrycks & Gimpel 2016) in the model's form."""
    if config.gated:
        middle = silu(_linear(weights, "mlp.gate", inputs, see)) * _linear(weights, "mlp.up", inputs, see)
    else:
        middle = gelu(_linear(weights, "mlp.up", inputs, see), approximate=config.gelu_approximation)
    return _linear(weights, "mlp.down", middle, see)


def _linear(weights: Weights, name: str, inputs: Tensor, see: Observer) -> Tensor:
    replaced = see(name, inputs)
    return linear(inputs if replaced is None else replaced, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _normed(config: GPTConfig, weights: Weights, name: str, hidden: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    if config.style == "llama":
        return rms_norm(hidden, weight.shape, weight, config.norm_epsilon)
    return layer_norm(hidden, weight.shape, weight, weights[f"{name}.bias"], config.norm_epsilon)


def _norm(stored: Weights, prefix: str, name: str) -> dict[str, Tensor]:
    """A norm that megatron-core stores with the linear layer behind it."""
    return {f"{name}.{part}": stored[f"{prefix}_{part}"] for part in ("weight", "bias") if f"{prefix}_{part}" in stored}


def _stored_norm(weights: Weights, name: str, prefix: str) -> dict[str, Tensor]:
    """The inverse of :func:`_norm`."""
    return {f"{prefix}_{part}": weights[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in weights}


def _padded(config: GPTConfig, table: Tensor) -> Tensor:
    """Rows of zeros below [vocab_size, D], up to the padded vocabulary."""
    return pad(table, (0, 0, 0, config.padded_vocab_size - config.vocab_size))


def _norm_parts(config: GPTConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.style == "gpt2" else ("weight",)


def _get(stored: Weights, name: str) -> Tensor:
    if name not in stored:
        raise ValueError(f"{name} is missing from the checkpoint: it holds {', '.join(sorted(stored)) or 'nothing'}")
    return stored[name]


def _check_shapes(weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} has shape {found.get(name)} in the checkpoint, {expected.get(name)} in its manifest: they do not"
            " belong together, use another checkpoint"
        )


def _ignore(name: str, inputs: Tensor) -> None:
    """The observer of a pass that nobody watches."""
