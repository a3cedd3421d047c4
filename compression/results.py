"""What compression tasks return. Torch-free and JSON-able: these cross process borders and lie in journals."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from compression.recipe import Recipe
from parallelism.options import Options

ExportFormat = Literal["auto", "compressed-tensors", "safetensors"]
"""What exports of quantised variants hold: codes, or dequantised weights; auto: codes where that can be loaded."""


class MatrixFacts(Options):
    """What a recipe did to the linear weights W of one part of the model: sums, so that parts can be added up."""

    weights: NonNegativeInt = 0
    pruned: NonNegativeInt = 0
    squared_error: float = Field(default=0.0, description="|W - W'|²")
    squared_norm: float = Field(default=0.0, description="|W|²")

    def __add__(self, other: "MatrixFacts") -> "MatrixFacts":
        return MatrixFacts(
            weights=self.weights + other.weights,
            pruned=self.pruned + other.pruned,
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
        )

    @property
    def sparsity(self) -> float:
        """Share of the linear weights that pruning set to zero."""
        return self.pruned / self.weights if self.weights else 0.0

    @property
    def relative_error(self) -> float:
        """|W - W'|² / |W|²."""
        return self.squared_error / self.squared_norm if self.squared_norm else 0.0


class Part(Options):
    """One recipe's share of a committed layer: a file in the layer's folder."""

    recipe: Recipe
    file: str
    bytes: PositiveInt
    facts: MatrixFacts


class LayerResult(Options):
    """A committed layer, or (``layer`` None) everything outside the layers. ``inputs`` hashes what it was made of."""

    layer: int | None
    inputs: str
    parts: list[Part]
    seconds: float

    def part(self, recipe: Recipe) -> Part:
        """The recipe's share. Raises ``ValueError`` where the recipe was not in the grid."""
        for part in self.parts:
            if part.recipe == recipe:
                return part
        made = ", ".join(part.recipe.name for part in self.parts)
        raise ValueError(f"recipe {recipe.name} was not compressed: the layers hold {made}")


class VariantFile(Options):
    """A variant's compact file. ``parameters`` counts those of its model, vocabulary unpadded."""

    name: str
    recipe: Recipe
    path: str
    bytes: PositiveInt
    parameters: PositiveInt
    bits_per_parameter: float
    sparsity: float = Field(description="share of the linear weights that pruning set to zero")
    relative_error: float = Field(description="|W - W'|² / |W|² over the linear weights")


class Quality(Options):
    """A variant on held-out text. Loss in nats per token."""

    name: str
    validation_loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: PositiveInt

    def metrics(self) -> dict[str, float]:
        """All measures by name."""
        return {name: value for name, value in self.model_dump().items() if name not in ("name", "tokens")}


class ExportResult(Options):
    """A variant as a Hugging Face directory. ``export_bytes`` counts its weight files, ``checksums`` are SHA-256.

    ``format`` is ``safetensors`` (dense) or one of compressed-tensors; ``note`` says why a quantised variant is dense.
    ``variant`` is the path of the compact file that it was made of.
    """

    name: str
    variant: str
    directory: str
    format: str
    note: str | None = None
    dtype: str
    parameters: PositiveInt
    export_bytes: PositiveInt
    checksums: dict[str, str]


class Verification(Options):
    """An export, loaded again by other software in a fresh process and measured.

    ``reader`` is ``transformers``, or ``streaming`` where the model does not fit the memory at once.
    ``logit_difference`` is the largest difference from our own evaluation of the compact file, over a few sequences and
    without rounding activations, relative to the largest logit.
    """

    name: str
    reader: str
    logit_difference: float
    claimed_loss: float
    measured_loss: float
    tokens: PositiveInt
    export_bytes: PositiveInt
    parameters: PositiveInt
    seconds: float


class Score(Options):
    """The quality by which variants are compared."""

    metric: str = "perplexity"
    value: float
    higher_is_better: bool = False


class Variant(Options):
    """A measured variant: one row of the report and of the job's result (contract 11)."""

    name: str
    candidate: str
    recipe: Recipe
    quality: Score
    metrics: dict[str, float]
    bytes: PositiveInt
    bits_per_parameter: float
    sparsity: float
    export_bytes: PositiveInt | None = None
    on_frontier: bool | None = None
    path: str

    @classmethod
    def measured(cls, candidate: str, file: VariantFile, quality: Quality) -> "Variant":
        """The row of a variant whose file has been evaluated; the frontier is found later, over all candidates."""
        return cls(
            name=f"{candidate}/{file.name}",
            candidate=candidate,
            recipe=file.recipe,
            quality=Score(value=quality.perplexity),
            metrics=quality.metrics(),
            bytes=file.bytes,
            bits_per_parameter=file.bits_per_parameter,
            sparsity=file.sparsity,
            path=file.path,
        )

    def row(self) -> dict[str, Any]:
        """JSON-able, with the fields of contract 11."""
        return self.model_dump(mode="json")
