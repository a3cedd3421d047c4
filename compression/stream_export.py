"""A second reader of exports, for models that do not fit the memory: one layer at a time, straight from the files.

Written from the definitions of the architectures and of the formats, and sharing no code with what made the files or
with the evaluation whose figures it checks. Shapes: S positions, D hidden, H heads, G key/value heads, C channels.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

HIDDEN_BYTES = 256 << 20
LOGITS_AT_ONCE = 1 << 24
ROWS_AT_ONCE = 256

Function = Callable[[Tensor], Tensor]


class StreamedModel:
    """A Llama, Mistral or GPT-2 model in a Hugging Face directory, in float32.

    ``activations``: the number format (``int``, ``fp8``) that inputs of linear layers are rounded to, where the files
    do not say so themselves.
    """

    def __init__(self, directory: Path, device: torch.device, activations: str | None) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._files = _Files(directory, device)
        self._modules = _Modules(self._files, config.get("quantization_config"), activations)
        self._model = (_Gpt2 if config["model_type"] == "gpt2" else _Llama)(config, self._modules)
        self._vocab_size: int = config["vocab_size"]

    def loss(self, rows: Tensor) -> float:
        """Sum of the negative log likelihoods, in nats, of token ids [n, S + 1] but for the first of each row."""
        self._modules.rounds = True
        total, per_row = 0.0, 4 * rows.shape[1] * self._model.hidden
        for part in rows.split(max(1, HIDDEN_BYTES // per_row)):
            states, targets = self._states(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()
            output, step = self._model.output(), max(1, LOGITS_AT_ONCE // self._vocab_size)
            for some, wanted in zip(states.split(step), targets.split(step), strict=True):
                likelihoods = (some @ output.t()).double().log_softmax(-1)
                total -= float(likelihoods.gather(1, wanted[:, None]).sum())
        return total

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [n, S, vocab_size] of token ids [n, S]; no activations are rounded."""
        self._modules.rounds = False
        return self._states(tokens) @ self._model.output().t()

    def parameters(self) -> int:
        """Parameters in the files; of a packed matrix those that it stands for."""
        return sum(self._files.parameters(name) for name in self._files.names())

    def _states(self, tokens: Tensor) -> Tensor:
        """What the output layer sees [n, S, D]: all sequences go through a layer before the next one is read."""
        states = self._model.embed(tokens)
        for index in range(self._model.layers):
            layer = self._model.layer(index)
            for row in states:
                row.copy_(layer(row))
        return self._model.final(states)


class _Files:
    """Tensors by name. The files are mapped, so that only what is asked for is read."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._device = device
        self._owner: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._owner |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def names(self) -> list[str]:
        return list(self._owner)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._owner[name].get_tensor(name).to(self._device)
        return tensor

    def parameters(self, name: str) -> int:
        if name.endswith(".weight_shape"):
            return math.prod(self.read(name).tolist())
        stored = name.endswith((".weight", ".bias"))
        return math.prod(self._owner[name].get_slice(name).get_shape()) if stored else 0


class _Modules:
    """What the modules of a model compute, dequantised by the definitions of compressed-tensors."""

    def __init__(self, files: _Files, quantization: dict[str, Any] | None, activations: str | None) -> None:
        self._files = files
        self._groups = list((quantization or {}).get("config_groups", {}).values())
        self._ignored = (quantization or {}).get("ignore", [])
        self._activations = activations
        self.rounds = True

    def tensor(self, name: str) -> Tensor:
        """A parameter that is never quantised, in float32."""
        return self._files.read(name).float()

    def linear(self, module: str, transposed: bool = False) -> Function:
        """x ↦ x Wᵀ + b, with x rounded first where the model has it so; ``transposed``: W is stored as [in, out]."""
        scheme = self._scheme(module)
        weight = self._weight(module, scheme)
        weight = weight if transposed else weight.t()
        bias = self.tensor(f"{module}.bias") if f"{module}.bias" in self._files else None
        activations = (scheme or {}).get("input_activations")
        number = activations["type"] if activations else self._activations
        if not self.rounds:
            number = None

        def apply(inputs: Tensor) -> Tensor:
            product = (rounded(inputs, number) if number else inputs) @ weight
            return product if bias is None else product + bias

        return apply

    def _scheme(self, module: str) -> dict[str, Any] | None:
        if module in self._ignored:
            return None
        targeted = (group for group in self._groups if "Linear" in group["targets"] or module in group["targets"])
        return next(targeted, None)

    def _weight(self, module: str, scheme: dict[str, Any] | None) -> Tensor:
        if scheme is None:
            return self.tensor(f"{module}.weight")
        bits, symmetric = scheme["weights"]["num_bits"], scheme["weights"]["symmetric"]
        scales = self.tensor(f"{module}.weight_scale")
        if f"{module}.weight_packed" in self._files:
            rows, columns = self._files.read(f"{module}.weight_shape").tolist()
            codes = _unpacked(self._files.read(f"{module}.weight_packed"), bits, columns)
            zeros = torch.full_like(scales, 2 ** (bits - 1))
            if not symmetric:
                zeros = _unpacked(self._files.read(f"{module}.weight_zero_point").t(), bits, rows).t()
        else:
            codes = self.tensor(f"{module}.weight")
            zeros = torch.zeros_like(scales) if symmetric else self.tensor(f"{module}.weight_zero_point")
        by_group = codes.unflatten(1, (scales.shape[1], -1)) - zeros[:, :, None]
        return (by_group * scales[:, :, None]).flatten(1)


class _Llama:
    """Llama (Touvron et al. 2023), and Mistral without its sliding window: RMSNorm, rotary positions, SwiGLU."""

    def __init__(self, config: dict[str, Any], modules: _Modules) -> None:
        assert config.get("sliding_window") is None
        self._modules, self._config = modules, config
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]

    def embed(self, tokens: Tensor) -> Tensor:
        return self._modules.tensor("model.embed_tokens.weight")[tokens]

    def final(self, states: Tensor) -> Tensor:
        return self._norm("model.norm")(states)

    def output(self) -> Tensor:
        tied = self._config["tie_word_embeddings"]
        return self._modules.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

    def layer(self, index: int) -> Function:
        """One block on [S, D]."""
        prefix = f"model.layers.{index}"
        q, k, v, o = (self._modules.linear(f"{prefix}.self_attn.{name}_proj") for name in "qkvo")
        gate, up, down = (self._modules.linear(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        before, between = self._norm(f"{prefix}.input_layernorm"), self._norm(f"{prefix}.post_attention_layernorm")
        heads, groups = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        base = self._config["rope_parameters"]["rope_theta"]

        def block(states: Tensor) -> Tensor:
            inputs = before(states)
            queries, keys = _turned(_by_head(q(inputs), heads), base), _turned(_by_head(k(inputs), groups), base)
            states = states + o(_attended(queries, keys, _by_head(v(inputs), groups)))
            inputs = between(states)
            gated = gate(inputs)
            return states + down(gated / (1 + torch.exp(-gated)) * up(inputs))

        return block

    def _norm(self, module: str) -> Function:
        weight, epsilon = self._modules.tensor(f"{module}.weight"), self._config["rms_norm_eps"]
        return lambda states: states / (states.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


class _Gpt2:
    """GPT-2 (Radford et al. 2019): LayerNorm, learned positions, biases, GELU, weights as [in, out]."""

    def __init__(self, config: dict[str, Any], modules: _Modules) -> None:
        self._gelu = {"gelu": _gelu, "gelu_new": _gelu_by_tanh}[config["activation_function"]]
        self._modules, self._config = modules, config
        self.layers, self.hidden = config["n_layer"], config["n_embd"]

    def embed(self, tokens: Tensor) -> Tensor:
        positions = self._modules.tensor("transformer.wpe.weight")[: tokens.shape[1]]
        return self._modules.tensor("transformer.wte.weight")[tokens] + positions

    def final(self, states: Tensor) -> Tensor:
        return self._norm("transformer.ln_f")(states)

    def output(self) -> Tensor:
        tied = self._config["tie_word_embeddings"]
        return self._modules.tensor("transformer.wte.weight" if tied else "lm_head.weight")

    def layer(self, index: int) -> Function:
        """One block on [S, D]."""
        prefix, heads = f"transformer.h.{index}", self._config["n_head"]
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        qkv, o, up, down = (self._modules.linear(f"{prefix}.{name}", transposed=True) for name in names)
        before, between = self._norm(f"{prefix}.ln_1"), self._norm(f"{prefix}.ln_2")

        def block(states: Tensor) -> Tensor:
            queries, keys, values = (_by_head(part, heads) for part in qkv(before(states)).chunk(3, dim=-1))
            states = states + o(_attended(queries, keys, values))
            return states + down(self._gelu(up(between(states))))

        return block

    def _norm(self, module: str) -> Function:
        weight, bias = (self._modules.tensor(f"{module}.{part}") for part in ("weight", "bias"))
        epsilon = self._config["layer_norm_epsilon"]

        def norm(states: Tensor) -> Tensor:
            centred = states - states.mean(-1, keepdim=True)
            return centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias

        return norm


def rounded(inputs: Tensor, number: str) -> Tensor:
    """Activations [..., in] in eight bits, each token by itself: integers from -128 to 127, or (other names) FP8 e4m3.

    The scale is the token's largest magnitude over half the range of the codes, as compressed-tensors has it.
    """
    largest = inputs.abs().amax(-1, keepdim=True)
    if number == "int":
        scale = (largest / 127.5).where(largest > 0, 1.0)
        return (inputs / scale).round().clamp(-128, 127) * scale
    scale = (largest / 448).where(largest > 0, 1.0)
    return (inputs / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(inputs.dtype) * scale


def _gelu(x: Tensor) -> Tensor:
    """x·Φ(x), with the normal distribution's Φ (Hendrycks & Gimpel 2016)."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _gelu_by_tanh(x: Tensor) -> Tensor:
    """The same paper's approximation."""
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _by_head(states: Tensor, heads: int) -> Tensor:
    """[S, heads · C] → [heads, S, C]."""
    return states.view(len(states), heads, -1).transpose(0, 1)


def _turned(states: Tensor, base: float) -> Tensor:
    """Rotary positions on [heads, S, C]: channels c and c + C/2 are a complex number, turned by S · base^(-2c/C)."""
    first, second = states.float().chunk(2, dim=-1)
    steps = torch.arange(first.shape[-1], device=states.device) * 2 / states.shape[-1]
    angles = torch.arange(states.shape[1], device=states.device)[:, None] * base ** -steps[None]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal softmax(QKᵀ/√C)V of queries [H, S, C] and keys, values [G, S, C] → [S, H · C]."""
    shared = len(queries) // len(keys)
    keys, values = keys.repeat_interleave(shared, 0), values.repeat_interleave(shared, 0)
    scores = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
    length = queries.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ values).transpose(0, 1).flatten(1)


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Rows of 32-bit words, each one string of bits, lowest first → float32 codes [rows, count] of ``bits`` bits."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    values = 2.0 ** torch.arange(bits, device=words.device)
    parts = []
    for some in words.split(ROWS_AT_ONCE):
        string = (some[:, :, None] >> places & 1).flatten(1)[:, : count * bits]
        parts.append((string.unflatten(1, (count, bits)) * values).sum(-1))
    return torch.cat(parts)
