"""Published models by name, and the one function that turns a spec's ``model`` into a config. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallelism.models.base import ModelConfig
from parallelism.registry import FAMILIES, load
from parallelism.suggest import remedy


class ModelError(ValueError):
    """A model that cannot be built as asked; ``field`` is relative to the spec's ``model``, empty for all of it."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"model{f'.{field}' if field else ''}: {value!r}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem


@dataclass(frozen=True)
class Preset:
    """A published architecture: the fields of its family's config, and where they were published."""

    source: str
    fields: dict[str, Any]


_GPT2_PAPER = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"
_LLAMA2_PAPER = "Touvron et al. 2023, Llama 2"
_LLAMA3_PAPER = "Grattafiori et al. 2024, The Llama 3 Herd of Models"


def _gpt2(source: str, layers: int, hidden: int, heads: int, vocab_size: int = 50257) -> Preset:
    """LayerNorm, learned positions, GELU, biases, tied embeddings. Trained without dropout unless a job asks for it."""
    shape = {"layers": layers, "hidden": hidden, "heads": heads, "vocab_size": vocab_size, "context": 1024}
    return Preset(source, {"family": "gpt", "style": "gpt2", "tied_embeddings": True, **shape})


def _llama(source: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn_hidden: int, **rest: Any) -> Preset:
    """RMSNorm, rotary positions, SwiGLU, no biases; untied embeddings unless ``rest`` says otherwise."""
    shape = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn_hidden": ffn_hidden}
    return Preset(source, {"family": "gpt", "style": "llama", "tied_embeddings": False, **shape, **rest})


_LLAMA2 = {"vocab_size": 32000, "context": 4096, "rope_base": 10000.0, "norm_epsilon": 1e-5}
# Llama 3 was pretrained on 8,192 tokens; the longer contexts of 3.1 and 3.2 need a scaling of the rotary frequencies
# that the family does not have, so they are not claimed here.
_LLAMA3 = {"vocab_size": 128256, "context": 8192, "rope_base": 500000.0, "norm_epsilon": 1e-5}
_SMOLLM2 = {
    "vocab_size": 49152,
    "context": 8192,
    "rope_base": 100000.0,
    "norm_epsilon": 1e-5,
    "tied_embeddings": True,
}

PRESETS: dict[str, Preset] = {
    "gpt2-small": _gpt2(_GPT2_PAPER, 12, 768, 12),
    "gpt2-medium": _gpt2(_GPT2_PAPER, 24, 1024, 16),
    "gpt2-large": _gpt2(_GPT2_PAPER, 36, 1280, 20),
    "gpt2-xl": _gpt2(_GPT2_PAPER, 48, 1600, 25),
    "megatron-8.3b": _gpt2("Shoeybi et al. 2019, Megatron-LM", 72, 3072, 24, vocab_size=51200),
    "turing-nlg-17b": _gpt2("Microsoft 2020, Turing-NLG; vocabulary as in Megatron-LM", 78, 4256, 28, vocab_size=51200),
    "smollm2-135m": _llama("Ben Allal et al. 2025, SmolLM2", 30, 576, 9, 3, 1536, **_SMOLLM2),
    "smollm2-360m": _llama("Ben Allal et al. 2025, SmolLM2", 32, 960, 15, 5, 2560, **_SMOLLM2),
    "tinyllama-1.1b": _llama("Zhang et al. 2024, TinyLlama", 22, 2048, 32, 4, 5632, **_LLAMA2 | {"context": 2048}),
    "llama-2-7b": _llama(_LLAMA2_PAPER, 32, 4096, 32, 32, 11008, **_LLAMA2),
    "llama-2-13b": _llama(_LLAMA2_PAPER, 40, 5120, 40, 40, 13824, **_LLAMA2),
    "llama-2-70b": _llama(_LLAMA2_PAPER, 80, 8192, 64, 8, 28672, **_LLAMA2),
    "llama-3.2-1b": _llama(_LLAMA3_PAPER, 16, 2048, 32, 8, 8192, **_LLAMA3 | {"tied_embeddings": True}),
    "llama-3.2-3b": _llama(_LLAMA3_PAPER, 28, 3072, 24, 8, 8192, **_LLAMA3 | {"tied_embeddings": True}),
    "llama-3.1-8b": _llama(_LLAMA3_PAPER, 32, 4096, 32, 8, 14336, **_LLAMA3),
    "llama-3.1-70b": _llama(_LLAMA3_PAPER, 80, 8192, 64, 8, 28672, **_LLAMA3),
}


def resolve_model(model: Mapping[str, Any], vocab_size: int | None = None, context: int | None = None) -> ModelConfig:
    """The config behind ``{family: gpt, ...}`` or ``{preset: NAME, ...overrides}``.

    ``vocab_size`` is the job's tokenizer's and ``context`` the length of its training sequences; both None describe
    the model as published. A trained model gets its vocabulary from the tokenizer, unless ``model`` gives a larger one,
    and the context that ``model`` or its preset gives, else the sequence length. A preset's context that is too short
    for the sequences is extended; one that ``model`` itself gives is not.

    Raises :class:`ModelError` for unknown names and contradictions and ``pydantic.ValidationError`` for wrong values.
    """
    given = {name: value for name, value in model.items() if name != "preset"}
    fields = _preset_fields(model["preset"]) | given if "preset" in model else dict(given)
    family = fields.setdefault("family", "gpt")
    if family not in FAMILIES:
        raise ModelError("family", family, f"unknown model family; {remedy(family, FAMILIES)}")
    options: type[ModelConfig] = load(FAMILIES[family].options)
    for name in given:
        if name not in options.model_fields:
            hint = remedy(name, [*options.model_fields, "preset"])
            raise ModelError(name, given[name], f"family {family} has no field {name!r}; {hint}")
    fields |= _data_fields(fields, given, vocab_size, context)
    if "vocab_size" not in fields:
        raise ModelError("vocab_size", None, "is missing and there is no tokenizer to take it from; give it")
    return options.model_validate(fields)


def _preset_fields(name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ModelError("preset", name, f"unknown preset; {remedy(name, PRESETS)}")
    return PRESETS[name].fields


def _data_fields(
    fields: Mapping[str, Any], given: Mapping[str, Any], vocab_size: int | None, context: int | None
) -> dict[str, Any]:
    """What the job's data decides about the model. Values of wrong type pass, for pydantic to refuse."""
    decided: dict[str, Any] = {}
    if vocab_size is not None:
        wanted = given.get("vocab_size")
        if isinstance(wanted, int) and wanted < vocab_size:
            problem = (
                f"the tokenizer has {vocab_size} entries; leave vocab_size out, or lower data.tokenizer.vocab_size"
            )
            raise ModelError("vocab_size", wanted, problem)
        if wanted is None:
            decided["vocab_size"] = vocab_size
    if context is not None:
        wanted = given.get("context")
        if isinstance(wanted, int) and wanted < context:
            problem = f"shorter than data.sequence_length {context}; leave context out, or lower data.sequence_length"
            raise ModelError("context", wanted, problem)
        if wanted is None:
            decided["context"] = max(context, fields.get("context", 0))
    return decided
