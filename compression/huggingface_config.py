"""A model's shape in the words of Hugging Face Transformers, both ways: ``config.json``. Torch-free.

What is read is refused unless it is known to be the model that Espalier computes: a field that is not understood could
change every output without any error.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from compression.checks import check_exportable
from parallelism.models.gpt.config import Activation, GPTConfig

_LLAMA_FIELDS = {
    "hidden_size": ("hidden", "hidden"),
    "intermediate_size": ("ffn_hidden", "feed_forward"),
    "num_hidden_layers": ("layers", "layers"),
    "num_attention_heads": ("heads", "heads"),
    "num_key_value_heads": ("kv_heads", "query_groups"),
    "head_dim": ("head_dim", "channels"),
    "max_position_embeddings": ("context", "context"),
    "rms_norm_eps": ("norm_epsilon", "norm_epsilon"),
    "attention_dropout": ("dropout", "dropout"),
}
_GPT2_FIELDS = {
    "n_embd": ("hidden", "hidden"),
    "n_inner": ("ffn_hidden", "feed_forward"),
    "n_layer": ("layers", "layers"),
    "n_head": ("heads", "heads"),
    "n_positions": ("context", "context"),
    "layer_norm_epsilon": ("norm_epsilon", "norm_epsilon"),
    "resid_pdrop": ("dropout", "dropout"),
    "embd_pdrop": ("dropout", "dropout"),
    "attn_pdrop": ("dropout", "dropout"),
}
_COMMON_FIELDS = {
    "vocab_size": ("vocab_size", "vocab_size"),
    "tie_word_embeddings": ("tied_embeddings", "tied_embeddings"),
    "initializer_range": ("initializer_std", "initializer_std"),
}
_FIELDS = {
    "llama": _COMMON_FIELDS | _LLAMA_FIELDS,
    "mistral": _COMMON_FIELDS | _LLAMA_FIELDS,
    "gpt2": _COMMON_FIELDS | _GPT2_FIELDS,
}
"""Theirs → the field of :class:`GPTConfig` that it sets, and the attribute that it is written from."""

_LLAMA_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "gpt2": {"tie_word_embeddings": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
}
"""What Transformers takes where a field is left out, where that is not our own default."""

_CONSTANTS: dict[str, dict[str, tuple[Any, Any]]] = {
    "llama": {"hidden_act": ("silu", "silu"), "attention_bias": (False, False), "mlp_bias": (False, False)},
    "mistral": {"hidden_act": ("silu", "silu"), "sliding_window": (None, 4096)},
    "gpt2": {
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, False),
        "reorder_and_upcast_attn": (False, False),
    },
}
"""Field → the only value there is here, and the value that Transformers takes where it is left out."""

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""``activation_function`` of a GPT-2 → ours; the last two are the first of their kind, computed in another order."""

_REQUIRED = {
    "llama": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "mistral": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
}

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gpt2": "GPT2LMHeadModel"}
_STYLES = {"llama": "llama", "mistral": "llama", "gpt2": "gpt2"}

_BOOKKEEPING = {"architectures", "model_type", "_name_or_path", "transformers_version", "espalier"}
_TYPES = {"dtype", "torch_dtype"}
_TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "tokenizer_class", "prefix"}
_TRAINING = {"gradient_checkpointing", "pretraining_tp", "finetuning_task", "task_specific_params", "problem_type"}
_RUNNING = {"use_cache", "return_dict", "chunk_size_feed_forward", "_attn_implementation"}
_OTHER_HEADS = {"id2label", "label2id", "summary_type", "summary_use_proj", "summary_activation", "n_ctx"}
_SUMMARY = {"summary_proj_to_labels", "summary_first_dropout"}
_LENGTHS = {"max_length", "min_length", "max_new_tokens", "length_penalty", "early_stopping", "num_return_sequences"}
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"}
_PENALTIES = {"repetition_penalty", "diversity_penalty", "no_repeat_ngram_size"}
_ROTARY = {"rope_theta", "rope_parameters", "rope_scaling"}
_GENERATION = _LENGTHS | _SAMPLING | _PENALTIES
_HEADS = _OTHER_HEADS | _SUMMARY
_WITHOUT_EFFECT = _BOOKKEEPING | _TYPES | _TOKENS | _TRAINING | _RUNNING | _HEADS | _GENERATION | _ROTARY
"""Fields that change no logits, and those of rotary positions, which are looked at apart."""


def config_json(config: GPTConfig, dtype: str, end_of_document_id: int) -> dict[str, Any]:
    """The content of ``config.json``. Raises ``ValueError`` for shapes that Transformers has no model for."""
    check_exportable(config)
    kind = _model_type(config)
    document = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "bos_token_id": end_of_document_id,
        "eos_token_id": end_of_document_id,
    }
    document |= {theirs: getattr(config, attribute) for theirs, (_, attribute) in _FIELDS[kind].items()}
    document |= {theirs: value for theirs, (value, _) in _CONSTANTS[kind].items()}
    if config.style == "llama":
        document["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
        document["rope_theta"] = config.rope_base  # where readers older than Transformers 5 look
    else:
        theirs = (name for name, ours in _ACTIVATIONS.items() if ours == config.activation)
        document["activation_function"] = next(theirs)
    return document


def read_config(document: Mapping[str, Any], where: str) -> GPTConfig:
    """The model that a ``config.json`` describes; ``where`` names it in errors.

    Raises ``ValueError`` for another architecture, and for every field that would make it another model than the one
    that is computed here, naming the field.
    """
    kind = _supported_type(document, where)
    _check_present(document, kind, where)
    _check_constants(document, kind, where)
    _check_unknown(document, kind, where)
    fields: dict[str, Any] = {"style": _STYLES[kind]}
    for theirs, (ours, _) in _FIELDS[kind].items():
        value = document.get(theirs, _DEFAULTS[kind].get(theirs))
        if value is not None and fields.setdefault(ours, value) != value:
            raise ValueError(
                f"{where}: {theirs} {value} differs from the other dropouts ({fields[ours]}): set one value"
            )
    if fields["style"] == "llama":
        fields["rope_base"] = _rope_base(document, where)
    else:
        fields["activation"] = _activation(document, where)
    try:
        return GPTConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'shape'}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{where} describes no model that can be computed ({problems}): mend it") from error


def _model_type(config: GPTConfig) -> str:
    """Transformers refuses a Llama whose hidden size is no multiple of its heads; Mistral is the same model."""
    if config.style == "llama" and config.hidden % config.heads:
        return "mistral"
    return config.style


def _supported_type(document: Mapping[str, Any], where: str) -> str:
    kind, classes = document.get("model_type"), document.get("architectures") or []
    if kind not in _ARCHITECTURES or (classes and classes != [_ARCHITECTURES[kind]]):
        raise ValueError(
            f"{where}: model_type {kind!r}, architectures {classes} is not supported: supported are llama"
            " (LlamaForCausalLM), mistral without a sliding window (MistralForCausalLM) and gpt2 (GPT2LMHeadModel)"
        )
    return str(kind)


def _check_present(document: Mapping[str, Any], kind: str, where: str) -> None:
    missing = [name for name in _REQUIRED[kind] if document.get(name) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: take the file that belongs to the model")


def _check_constants(document: Mapping[str, Any], kind: str, where: str) -> None:
    for name, (wanted, absent) in _CONSTANTS[kind].items():
        found = document.get(name, absent)
        if found != wanted:
            left_out = "" if name in document else " (left out, which means this to Transformers)"
            raise ValueError(
                f"{where}: {name} {found!r}{left_out} is not supported, only {wanted!r} is: use a model that has it"
            )


def _check_unknown(document: Mapping[str, Any], kind: str, where: str) -> None:
    known = _WITHOUT_EFFECT | _FIELDS[kind].keys() | _CONSTANTS[kind].keys()
    known |= {"activation_function"} if kind == "gpt2" else set()
    for name, value in document.items():
        if name not in known and value not in (None, False, 0, "", [], {}):
            raise ValueError(
                f"{where}: field {name} ({str(value)[:60]}) is not supported and could change what the model computes:"
                " use another model, or remove the field if the model is the same without it"
            )


def _activation(document: Mapping[str, Any], where: str) -> Activation:
    """Which GELU a GPT-2 has; the tanh approximation where its config does not say."""
    found = document.get("activation_function", "gelu_new")
    if found not in _ACTIVATIONS:
        raise ValueError(
            f"{where}: activation_function {found!r} is not supported, only {', '.join(_ACTIVATIONS)} are: use a model"
            " that has one of them"
        )
    return _ACTIVATIONS[found]


def _rope_base(document: Mapping[str, Any], where: str) -> float:
    """The base of plain rotary positions, from where Transformers 5 or its predecessors put it."""
    stated = (document.get("rope_parameters") or {}) | (document.get("rope_scaling") or {})
    found = dict(stated)
    kind = found.pop("rope_type", found.pop("type", "default"))
    base = found.pop("rope_theta", None) or document.get("rope_theta") or 10000.0
    whole = found.pop("partial_rotary_factor", None) in (None, 1.0)
    if kind != "default" or found or not whole:
        raise ValueError(
            f"{where}: rotary positions {stated} are not supported, only unscaled ones over all channels of a head are:"
            " use a model that has them"
        )
    return float(base)
