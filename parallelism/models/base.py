"""What every model family offers. Torch-free: tensors appear in annotations only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, PositiveInt

from parallelism.options import Options

if TYPE_CHECKING:
    import numpy as np
    import torch

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to this multiple in every layout, so that checkpoints move between layouts."""

Batch = dict[str, "torch.Tensor"]
Observer = Callable[[str, "torch.Tensor"], "torch.Tensor | None"]
"""Called with a linear layer's canonical name and its input [..., in] during a plain forward pass.

What it returns, of the same shape, goes into the linear layer in the input's place; None leaves the input as it is.
Linear layers that share their input are called with the same tensor object, one after another, whatever was returned.
"""


class ModelConfig(Options):
    """The part of a model's description that all families share."""

    family: str
    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    vocab_size: PositiveInt = Field(default=1, description="entries of the tokenizer; set from the data when trained")
    context: PositiveInt = Field(default=1024, description="longest sequence the model accepts")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up to :data:`VOCABULARY_MULTIPLE`."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every parameter of the whole model (vocabulary padded, tied weights once)."""
        raise NotImplementedError(f"family {self.family} does not list its parameters")

    def parameter_count(self) -> int:
        """Parameters of the whole model, padding rows included, tied weights counted once."""
        raise NotImplementedError(f"family {self.family} does not count its parameters")

    def forward_flops(self, sequence_length: int) -> float:
        """FLOPs of one sequence's forward pass, attention and output layer included; a multiply-add is 2 FLOPs."""
        raise NotImplementedError(f"family {self.family} does not count its FLOPs")


class Losses(Protocol):
    """What a model is trained for."""

    def losses(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Forward pass of one chunk: per-token losses [batch, sequence] float32 on the last stage, else activations."""


class ShardedFamily(Losses, Protocol):
    """A family on megatron-core, as engines train it. A module of functions satisfies this protocol."""

    def build(self, config: Any, megatron: Any, *, first: bool, last: bool, chunk: int | None) -> torch.nn.Module:
        """One pipeline chunk; ``megatron`` is the ``TransformerConfig`` that :meth:`transformer_config` made."""

    def transformer_config(self, config: Any, layout: Any, training: Any) -> Any:
        """The megatron-core ``TransformerConfig`` of this model at this layout."""

    def collate(self, rows: np.ndarray) -> Batch:
        """Rows of token ids [batch, sequence + 1] int64 → the tensors that :meth:`losses` takes."""

    def logits(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The same chunk's logits [batch, sequence, padded vocabulary / tensor] on the last stage, else activations."""


@dataclass(frozen=True)
class StoredMatrix:
    """A linear layer's weight within a stored one: a view, of the whole or of one tensor-parallel rank's part."""

    name: str
    """Canonical, without ``.weight``: ``attention.q``."""
    view: torch.Tensor
    """[..., in]: all axes but the last, flattened, are the matrix's rows in their order."""
    split_dim: Literal[0, 1]
    """What tensor-parallel ranks divide among themselves: 0 the rows, 1 the columns."""


class PlainFamily(Protocol):
    """A family in torch alone, one layer at a time, as compression streams it. A module of functions satisfies this.

    Canonical names: ``embedding.tokens``, ``embedding.positions``, ``attention.q.weight``, ``mlp.down.bias``,
    ``attention.norm.weight``, ``final_norm.weight``, ``output.weight``; the prefix ``layers.{i}.`` is left off
    inside one layer.
    """

    def split_layer(self, config: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One layer as the checkpoint stores it (``decoder.layers.{i}.`` left off) → canonical names."""

    def split_outer(self, config: Any, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Everything outside the layers as the checkpoint stores it → canonical names, vocabulary unpadded."""

    def join_layer(self, config: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of :meth:`split_layer`."""

    def join_outer(self, config: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of :meth:`split_outer`; what pads the vocabulary is zero."""

    def matrices(self, config: Any, name: str, stored: torch.Tensor) -> list[StoredMatrix]:
        """The linear weights within the stored tensor ``name`` of a layer (``decoder.layers.{i}.`` left off).

        ``stored`` is the whole tensor, or the part of one tensor-parallel rank. What is no linear weight has none.
        """

    def embed(self, config: Any, outer: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, sequence] → hidden states [batch, sequence, hidden]."""

    def layer(
        self, config: Any, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, observe: Observer | None = None
    ) -> torch.Tensor:
        """One layer on hidden states [batch, sequence, hidden]; ``observe`` may replace the input of every linear."""

    def logits(self, config: Any, outer: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and output layer: [batch, sequence, hidden] → [batch, sequence, vocab_size]."""


UnitKind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Units:
    """Equal parts of a layer that can be removed whole: key/value heads with their queries, feed-forward neurons.

    Unit *u* is rows ``u·n`` to ``(u + 1)·n - 1`` (bias included) of every linear layer in ``makers`` (name → n), and
    columns ``u·width`` to ``(u + 1)·width - 1`` of ``reader``, the only linear layer that takes in what they make.
    """

    kind: UnitKind
    count: int
    makers: Mapping[str, int]
    reader: str
    width: int


@dataclass(frozen=True)
class Fold:
    """Channels that only linear layers take in, so that a scale per channel can move from their columns to ``source``.

    ``source`` is a norm (weight [channels]) or a linear layer (weight [channels, in]): dividing its weight and bias by
    s [channels], and multiplying the columns of all ``readers`` by s, changes nothing.
    """

    source: str
    readers: tuple[str, ...]


class Anatomy(Protocol):
    """What of a family's layers can be removed or rescaled. Torch-free; a module of functions satisfies this."""

    def units(self, config: Any) -> tuple[Units, ...]:
        """What can be removed from the layers; a layer has those units whose linear layers it has."""

    def folds(self, config: Any) -> tuple[Fold, ...]:
        """Where scales can be moved within a layer, in the order of the forward pass."""

    def reduced(self, config: Any, kept: Mapping[UnitKind, int], layers: int) -> ModelConfig:
        """The model with ``layers`` layers and ``kept`` (kind → number) units in each; a kind left out stays whole."""
