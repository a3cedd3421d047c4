"""Presets against hand counts and published counts, and the errors of wrong models."""

import pytest
from pydantic import ValidationError

from parallelism.models.gpt.config import GPTConfig
from parallelism.presets import PRESETS, ModelError, resolve_model

# Without the rows that pad the vocabulary to 128: counted by hand from the shapes, and equal to the sizes of the
# published checkpoints where there are any. GPT-2: (V + 1024)·h + layers·(12h² + 13h) + 2h.
# Llama: V·h (twice if untied) + layers·(2h² + 2h·kv·d + 3h·f + 2h) + h.
PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "megatron-8.3b": 8_317_040_640,
    "turing-nlg-17b": 17_180_859_136,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
}


def gpt(**fields: object) -> GPTConfig:
    config = resolve_model(fields)
    assert isinstance(config, GPTConfig)
    return config


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_to_the_last_digit(name: str) -> None:
    config = gpt(preset=name)
    copies = 1 if config.tied_embeddings else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.hidden * copies
    assert config.parameter_count() - padding == PUBLISHED[name]
    shapes = config.parameter_shapes().values()
    assert config.parameter_count() == sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


def test_the_missions_models_by_hand() -> None:
    # 72 layers of 3072: 12·3072² = 113,246,208 and 13·3072 = 39,936.
    layers = 72 * (113_246_208 + 39_936)
    assert gpt(preset="megatron-8.3b").parameter_count() == layers + (51_200 + 1_024) * 3_072 + 2 * 3_072
    # 78 layers of 4256: 12·4256² = 217,362,432 and 13·4256 = 55,328.
    layers = 78 * (217_362_432 + 55_328)
    assert gpt(preset="turing-nlg-17b").parameter_count() == layers + (51_200 + 1_024) * 4_256 + 2 * 4_256
    assert gpt(preset="gpt2-xl").padded_vocab_size == 50_304


def test_grouped_query_attention_and_tied_flags() -> None:
    small = gpt(preset="llama-3.2-1b")
    assert (small.query_groups, small.channels, small.feed_forward, small.rope_base) == (8, 64, 8192, 500_000.0)
    assert small.tied_embeddings
    assert not gpt(preset="llama-3.1-8b").tied_embeddings
    assert gpt(preset="turing-nlg-17b").channels == 152


def test_overrides_win() -> None:
    config = gpt(preset="gpt2-xl", heads=20)
    assert (config.heads, config.channels, config.hidden) == (20, 80, 1600)
    assert config.parameter_count() == gpt(preset="gpt2-xl").parameter_count()


def test_family_defaults_to_gpt() -> None:
    assert resolve_model({"layers": 2, "hidden": 128, "heads": 4}, 4096, 256) == GPTConfig(
        layers=2, hidden=128, heads=4, vocab_size=4096, context=256
    )


@pytest.mark.parametrize(
    ("model", "vocab_size", "context"),
    [
        ({"layers": 2, "hidden": 128, "heads": 4}, 4096, 256),  # from the data
        ({"layers": 2, "hidden": 128, "heads": 4, "vocab_size": 8192, "context": 512}, 8192, 512),  # as given
        ({"preset": "gpt2-small"}, 4096, 1024),  # the preset's position table stays
        ({"preset": "gpt2-small", "context": 256}, 4096, 256),
    ],
)
def test_vocabulary_and_context_of_a_trained_model(model: dict, vocab_size: int, context: int) -> None:
    config = resolve_model(model, 4096, 256)
    assert (config.vocab_size, config.context) == (vocab_size, context)


def test_a_presets_context_grows_with_the_sequences() -> None:
    assert resolve_model({"preset": "gpt2-small"}, 4096, 2048).context == 2048


@pytest.mark.parametrize(
    ("model", "field", "hint"),
    [
        ({"preset": "gpt2-xxl"}, "preset", "did you mean 'gpt2-xl'?"),
        ({"preset": 7}, "preset", "available: gpt2-large"),
        ({"family": "gtp", "layers": 2}, "family", "did you mean 'gpt'?"),
        ({"layers": 2, "hiden": 128, "heads": 4}, "hiden", "did you mean 'hidden'?"),
        ({"preset": "gpt2-small", "n_embd": 128}, "n_embd", "available: "),
        ({"layers": 2, "hidden": 128, "heads": 4, "vocab_size": 100}, "vocab_size", "leave vocab_size out"),
        ({"layers": 2, "hidden": 128, "heads": 4, "context": 100}, "context", "lower data.sequence_length"),
    ],
)
def test_wrong_models_name_field_and_remedy(model: dict, field: str, hint: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(model, 4096, 256)
    assert caught.value.field == field
    assert hint in str(caught.value)
    assert repr(caught.value.value) in str(caught.value)


def test_a_model_without_tokenizer_needs_a_vocabulary() -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        resolve_model({"layers": 2, "hidden": 128, "heads": 4})


def test_wrong_types_are_pydantics() -> None:
    with pytest.raises(ValidationError, match="heads 5"):
        resolve_model({"layers": 2, "hidden": 128, "heads": 5}, 4096, 256)
