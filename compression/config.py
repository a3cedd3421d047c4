"""The compression part of a job: which methods at which strengths. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from compression.registry import PRUNING, QUANTIZATION
from parallelism.options import Options
from parallelism.registry import Entry


def _known(kind: str, table: Mapping[str, Entry]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown {kind} method {name!r}: available are {', '.join(sorted(table))}")
        return name

    return AfterValidator(check)


def _once(values: list) -> list:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(str, twice))} is listed twice: name every value once")
    return values


def _pattern(text: str) -> str:
    kept, _, width = text.partition(":")
    if not (kept.isdigit() and width.isdigit() and 0 < int(kept) < int(width) <= 32):
        raise ValueError(f"pattern {text!r} is not n:m with 0 < n < m <= 32: write 2:4 to keep 2 of every 4 columns")
    return text


def pattern_of(pattern: str) -> tuple[int, int]:
    """The n and the m of ``n:m``."""
    kept, _, width = pattern.partition(":")
    return int(kept), int(width)


Once = AfterValidator(_once)
Sparsity = Annotated[float, Field(gt=0.0, lt=1.0)]
Pattern = Annotated[str, AfterValidator(_pattern)]
"""``n:m``: of every m neighbouring columns of a row, n weights stay."""
Bits = Literal[8, 6, 4, 3, 2]
EmbeddingBits = Literal[16, 8, 6, 4]
Scope = Literal["matrix", "row", "global"]
Allocation = Literal["uniform", "sensitivity"]
Number = Literal["int", "fp8"]


class CalibrationConfig(Options):
    """How much held-in text the statistics are taken from, and what they describe."""

    sequences: PositiveInt = 128
    statistics: Literal["shared", "sequential"] = Field(
        default="shared",
        description="shared: of the dense model, for all recipes; sequential: of each recipe's own compressed layers",
    )
    damping: float = Field(
        default=0.01, gt=0.0, le=1.0, description="added to the diagonal of H before it is inverted, times its mean"
    )


class StructureConfig(Options):
    """Fractions of whole parts to remove; every fraction is a recipe, and what is left is a smaller dense model."""

    heads: Annotated[list[Sparsity], Once] = Field(default=[], description="key/value heads with their queries")
    neurons: Annotated[list[Sparsity], Once] = Field(default=[], description="of the feed-forward blocks")
    layers: Annotated[list[Sparsity], Once] = Field(default=[], description="those that change their input least")


class PruneConfig(Options):
    """Pruning methods × (sparsities and patterns)."""

    methods: Annotated[list[Annotated[str, _known("pruning", PRUNING)]], Once] = Field(min_length=1)
    sparsity: Annotated[list[Sparsity], Once] = Field(
        default=[], description="fraction of each weight matrix (or, with an allocation, of all of them) set to zero"
    )
    patterns: Annotated[list[Pattern], Once] = Field(default=[], description="n:m, such as 2:4")
    scope: Scope = Field(default="matrix", description="magnitude: among which weights the smallest are found")
    allocation: Allocation = Field(
        default="uniform", description="sensitivity: more where the layer's output suffers less"
    )

    @model_validator(mode="after")
    def _some_strength(self) -> "PruneConfig":
        if not self.sparsity and not self.patterns:
            raise ValueError("give at least one sparsity (such as 0.5) or pattern (such as 2:4)")
        if self.scope == "global" and self.allocation == "sensitivity":
            raise ValueError("scope global finds its own share for every matrix: leave allocation out")
        return self


class QuantizeConfig(Options):
    """Quantisation methods × (bit widths, averages and sizes)."""

    methods: Annotated[list[Annotated[str, _known("quantisation", QUANTIZATION)]], Once] = Field(min_length=1)
    bits: Annotated[list[Bits], Once] = Field(default=[], description="of every linear weight")
    average_bits: Annotated[list[Annotated[float, Field(ge=2.0, le=8.0)]], Once] = Field(
        default=[], description="mixed precision: bits of each linear weight on average, by sensitivity"
    )
    target_bytes: Annotated[list[PositiveInt], Once] = Field(
        default=[], description="mixed precision: bytes of the whole compact file at most"
    )
    number: Number = Field(default="int", description="fp8: e4m3, always 8 bits")
    group_size: PositiveInt | None = Field(
        default=None, description="columns that share a scale; none: per output channel"
    )
    symmetric: bool = True
    act_order: bool = Field(default=False, description="gptq: columns in the order of their inputs' size")
    activation_bits: Literal[16, 8] = Field(default=16, description="8: inputs rounded too, each token by itself")
    embedding_bits: EmbeddingBits = Field(default=8, description="embeddings and output layer; 16 is bfloat16")

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizeConfig":
        if not (self.bits or self.average_bits or self.target_bytes):
            raise ValueError("give at least one of bits (such as 4), average_bits (such as 3.5) or target_bytes")
        if self.number == "fp8" and (set(self.bits) != {8} or self.average_bits or self.target_bytes):
            raise ValueError("number fp8 has 8 bits: set bits: [8]")
        if self.number == "fp8" and not self.symmetric:
            raise ValueError("number fp8 has a sign and no zero point: leave symmetric at true")
        if "smoothquant" in self.methods and self.activation_bits == 16:
            raise ValueError("smoothquant moves the activations' range into the weights: set activation_bits: 8")
        return self


class RecoverConfig(Options):
    """Finetuning of compressed variants, out of the candidate's own budget."""

    budget_fraction: float = Field(gt=0.0, lt=1.0, description="of the candidate's budget, for each recovered variant")
    distill: bool = Field(default=False, description="learn from the dense parent's predictions as well")
    quantization_aware: bool = Field(
        default=False, description="compute with rounded weights while training (straight-through)"
    )
    learning_rate_fraction: float = Field(default=0.3, gt=0.0, le=1.0, description="of the candidate's learning rate")
    recipes: list[str] | Literal["all"] = Field(default="all", description="names of recipes that are recovered")


class CompressionConfig(Options):
    """The grid of recipes applied to every candidate; the dense bf16 variant always belongs to it."""

    calibration: CalibrationConfig = CalibrationConfig()
    structure: StructureConfig | None = None
    prune: PruneConfig | None = None
    quantize: QuantizeConfig | None = None
    combine: bool = Field(default=False, description="also every prune × quantize and structure × quantize pair")
    recover: RecoverConfig | None = None
