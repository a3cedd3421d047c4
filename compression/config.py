"""The compression part of a job: which methods at which strengths. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

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


Once = AfterValidator(_once)
Sparsity = Annotated[float, Field(gt=0.0, lt=1.0)]
Bits = Literal[8, 6, 4, 3]


class CalibrationConfig(Options):
    """How much held-in text the statistics are taken from."""

    sequences: PositiveInt = 128
    statistics: Literal["shared"] = "shared"


class PruneConfig(Options):
    """Pruning methods × sparsities."""

    methods: Annotated[list[Annotated[str, _known("pruning", PRUNING)]], Once] = Field(min_length=1)
    sparsity: Annotated[list[Sparsity], Once] = Field(
        min_length=1, description="fraction of each weight matrix set to zero"
    )


class QuantizeConfig(Options):
    """Quantisation methods × bit widths."""

    methods: Annotated[list[Annotated[str, _known("quantisation", QUANTIZATION)]], Once] = Field(min_length=1)
    bits: Annotated[list[Bits], Once] = Field(min_length=1)
    group_size: PositiveInt | None = Field(
        default=None, description="columns that share a scale; none: per output channel"
    )
    symmetric: bool = True
    embedding_bits: Literal[16, 8] = Field(default=8, description="embeddings and output layer; 16 is bfloat16")


class CompressionConfig(Options):
    """The grid of recipes applied to every candidate; the dense bf16 variant always belongs to it."""

    calibration: CalibrationConfig = CalibrationConfig()
    prune: PruneConfig | None = None
    quantize: QuantizeConfig | None = None
    combine: bool = Field(default=False, description="also every prune × quantize pair")
