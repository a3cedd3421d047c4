"""The gpt family in torch alone, against Hugging Face Transformers and its own definitions."""

import math

import pytest
import torch

from parallelism.models.gpt import plain
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made


def _forward(config: GPTConfig, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    cut = {
        name: weights[name][: config.vocab_size] for name in weights if name in ("embedding.tokens", "output.weight")
    }
    outer = {name: value for name, value in weights.items() if not name.startswith("layers.")} | cut
    hidden = plain.embed(config, outer, tokens)
    for index in range(config.layers):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        hidden = plain.layer(config, layer, hidden)
    return plain.logits(config, outer, hidden)


def _tokens(config: GPTConfig) -> torch.Tensor:
    return torch.from_numpy(made.rows(config, 3, length=20))


@pytest.mark.parametrize("name", made.CONFIGS)
def test_a_token_does_not_see_what_follows(name: str) -> None:
    config, tokens = made.CONFIGS[name], _tokens(made.CONFIGS[name])
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % config.vocab_size
    weights = made.weights(config)
    first, second = _forward(config, weights, tokens), _forward(config, weights, changed)
    assert first.shape == (3, 21, config.vocab_size)
    torch.testing.assert_close(first[:, :12], second[:, :12], rtol=0, atol=1e-5)
    assert (first[:, 12:] - second[:, 12:]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_order_of_tokens_matters(name: str) -> None:
    config, tokens = made.CONFIGS[name], _tokens(made.CONFIGS[name])
    swapped = tokens.clone()
    swapped[:, [3, 7]] = tokens[:, [7, 3]]
    weights = made.weights(config)
    assert (_forward(config, weights, tokens)[:, -1] - _forward(config, weights, swapped)[:, -1]).abs().max() > 1e-3


def test_rotation_turns_every_pair_of_channels_by_position_times_frequency() -> None:
    states = torch.randn(1, 2, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = plain.rotate(states, base=100.0)
    for position in range(9):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            first, second = states[0, 1, position, pair], states[0, 1, position, pair + 3]
            assert turned[0, 1, position, pair] == pytest.approx(
                float(first * math.cos(angle) - second * math.sin(angle)), abs=1e-5
            )
            assert turned[0, 1, position, pair + 3] == pytest.approx(
                float(second * math.cos(angle) + first * math.sin(angle)), abs=1e-5
            )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_observers_see_the_input_of_every_linear(name: str) -> None:
    config = made.CONFIGS[name]
    weights = {
        key.removeprefix("layers.0."): value for key, value in made.weights(config).items() if "layers.0." in key
    }
    hidden = torch.randn(2, 5, config.hidden, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    plain.layer(config, weights, hidden, seen.__setitem__)
    assert {key: value.shape[-1] for key, value in seen.items()} == {
        key: shape[1] for key, shape in config.linear_shapes().items()
    }
    assert seen["attention.q"] is seen["attention.k"] is seen["attention.v"]
    norm = plain._normed(config, weights, "attention.norm", hidden)
    torch.testing.assert_close(seen["attention.q"], norm)
    # The last linear's input and output are the feed-forward block: output = hidden after it - hidden before it.
    down = torch.nn.functional.linear(seen["mlp.down"], weights["mlp.down.weight"], weights.get("mlp.down.bias"))
    output = torch.nn.functional.linear(
        seen["attention.o"], weights["attention.o.weight"], weights.get("attention.o.bias")
    )
    torch.testing.assert_close(plain.layer(config, weights, hidden), hidden + output + down)


def test_the_form_of_gelu_is_named_only_where_it_is_not_the_exact_one() -> None:
    """Descriptions, and the fingerprints that are made of them, are those of the time before there were two forms."""
    assert "activation" not in made.GPT2.model_dump(mode="json")
    assert "activation" not in made.GPT2.model_dump_json()
    approximate = made.GPT2.model_copy(update={"activation": "gelu_tanh"})
    assert GPTConfig(**approximate.model_dump(mode="json")) == approximate
    assert GPTConfig(**made.GPT2.model_dump(mode="json")) == made.GPT2
    with pytest.raises(ValueError, match="activation gelu_tanh belongs to style gpt2"):
        GPTConfig(**(made.LLAMA.model_dump() | {"activation": "gelu_tanh"}))


def test_sequences_beyond_the_context_are_refused() -> None:
    config = made.GPT2
    outer = {name: value for name, value in made.weights(config).items() if not name.startswith("layers.")}
    with pytest.raises(ValueError, match="sequence_length 33 is beyond the model's context of 32"):
        plain.embed(config, outer, torch.zeros(1, 33, dtype=torch.long))


def test_missing_tensors_are_named() -> None:
    stored = {"self_attention.linear_qkv.layer_norm_weight": torch.ones(48)}
    with pytest.raises(ValueError, match=r"self_attention\.linear_qkv\.weight is missing"):
        plain.split_layer(made.LLAMA, stored)
