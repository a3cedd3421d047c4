"""Held-out quality of many variants, layer by layer.

Hidden states are carried through the model one layer at a time, all variants side by side, so that one layer of
weights is in memory whatever the depth; they are carried for as many sequences at once as fit a stated budget.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compression.activations import RoundedInputs
from compression.compact import CompactFile
from compression.results import Quality
from parallelism.data.batches import TokenBatches
from parallelism.layer_reader import plain_family
from parallelism.models.base import ModelConfig, Observer

HIDDEN_BYTES = 512 << 20
"""Hidden states that are carried between layers, all variants together."""
WORKING_BYTES = 32 << 20
"""Activations inside one layer, or logits: few enough to lie in a CPU's cache in good part."""

Rows = Callable[[Sequence[int]], np.ndarray]
"""Positions → token ids [n, sequence + 1] int64, as :meth:`parallelism.data.batches.TokenBatches.rows` gives them."""


class Weights(Protocol):
    """A model, one layer at a time, in float32 under canonical names; the vocabulary is not padded."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """Layer ``index``, its prefix left off."""

    def outer(self) -> dict[str, Tensor]:
        """Everything outside the layers."""


@dataclass
class Tally:
    """Sums over evaluated tokens: negative log likelihood in nats, and hits of the likeliest token."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def quality(self, name: str, bytes_per_token: float) -> Quality:
        """The measures; ``bytes_per_token`` of the text turns nats per token into bits per byte."""
        loss = self.loss / self.tokens
        return Quality(
            name=name,
            validation_loss=loss,
            perplexity=math.exp(min(loss, 700.0)),  # beyond this no float can hold it
            bits_per_byte=loss / math.log(2) / bytes_per_token,
            accuracy=self.correct / self.tokens,
            tokens=self.tokens,
        )


def tally(
    models: Sequence[Weights],
    rows: Rows,
    sequences: int,
    *,
    device: torch.device | str = "cpu",
    hidden_bytes: int = HIDDEN_BYTES,
) -> list[Tally]:
    """Next-token statistics of every model over positions 0 to ``sequences`` - 1 of ``rows``.

    A variant whose recipe rounds activations is measured with the inputs of its linear layers rounded. Raises
    ``ValueError`` where a model's loss is not finite, naming its place in ``models``.
    """
    totals = [Tally() for _ in models]
    observers = [_observer(model) for model in models]
    with torch.inference_mode():
        for positions in _chunks(models, rows, sequences, hidden_bytes):
            tokens = torch.from_numpy(rows(positions)).to(device)
            states = [_embed(model, tokens[:, :-1]) for model in models]
            for index in range(max(model.config.layers for model in models)):
                for model, hidden, observer in zip(models, states, observers, strict=True):
                    if index < model.config.layers:
                        _advance(model, index, hidden, observer)
            for model, hidden, total in zip(models, states, totals, strict=True):
                _count(model, hidden, tokens[:, 1:], total)
    for place, total in enumerate(totals):
        if not math.isfinite(total.loss):
            raise ValueError(f"the loss of model {place} is {total.loss}: its weights overflow in evaluation")
    return totals


def logits(model: Weights, tokens: Tensor, *, round_activations: bool = True) -> Tensor:
    """Logits [n, S, vocab_size] float32 of a few sequences [n, S], computed as :func:`tally` does.

    Without ``round_activations`` the inputs of linear layers are exact, whatever the recipe says.
    """
    with torch.inference_mode():
        hidden, observer = _embed(model, tokens), _observer(model) if round_activations else None
        for index in range(model.config.layers):
            _advance(model, index, hidden, observer)
        return plain_family(model.config).logits(model.config, model.outer(), hidden)


def held_out_sequences(text: TokenBatches, tokens: int) -> int:
    """Sequences that ``tokens`` tokens of held-out text are measured on: whole ones, at least one, none twice."""
    return min(max(1, tokens // text.sequence_length), text.samples_per_epoch)


def _chunks(models: Sequence[Weights], rows: Rows, sequences: int, hidden_bytes: int) -> Iterable[range]:
    """Positions in runs whose hidden states, of all models together, fit ``hidden_bytes``."""
    length = rows([0]).shape[1] - 1
    per_sequence = sum(4 * length * model.config.hidden for model in models)
    step = max(1, hidden_bytes // per_sequence)
    return (range(start, min(start + step, sequences)) for start in range(0, sequences, step))


def _embed(model: Weights, tokens: Tensor) -> Tensor:
    return plain_family(model.config).embed(model.config, model.outer(), tokens)


def _observer(model: Weights) -> Observer | None:
    """What a variant's recipe does to the inputs of its linear layers."""
    return RoundedInputs.of(model.recipe) if isinstance(model, CompactFile) else None


def _advance(model: Weights, index: int, hidden: Tensor, observer: Observer | None) -> None:
    """Take hidden states [n, S, D] through one layer, in place, a few sequences at a time."""
    weights = model.layer(index)
    family = plain_family(model.config)
    for part in hidden.split(step_sequences(weights, model.config.hidden, hidden.shape[1])):
        part.copy_(family.layer(model.config, weights, part, observer))


def step_sequences(weights: Mapping[str, Tensor], hidden: int, length: int) -> int:
    """Sequences of ``length`` tokens that go through a layer at once: as many as :data:`WORKING_BYTES` hold."""
    # What a block holds at its widest: inputs and outputs of its matrices.
    width = sum(weight.shape[0] for weight in weights.values() if weight.ndim == 2) + 4 * hidden
    return max(1, WORKING_BYTES // (4 * width * length))


def _count(model: Weights, hidden: Tensor, targets: Tensor, total: Tally) -> None:
    """Add the statistics of final hidden states [n, S, D] against targets [n, S]."""
    outer = model.outer()
    family = plain_family(model.config)
    step = max(1, WORKING_BYTES // (8 * model.config.vocab_size))
    flat = hidden.flatten(0, 1)[None]
    for states, wanted in zip(flat.split(step, dim=1), targets.flatten().split(step), strict=True):
        logits = family.logits(model.config, outer, states)[0]
        total.loss += float(cross_entropy(logits, wanted, reduction="none").double().sum())
        total.correct += int((logits.argmax(-1) == wanted).sum())
        total.tokens += wanted.numel()
