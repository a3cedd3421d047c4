"""One point of the compression grid, and the grid itself. Torch-free."""

from typing import Literal

from pydantic import Field, PositiveInt

from compression.config import CompressionConfig, PruneConfig, QuantizeConfig
from parallelism.options import Options


class Pruning(Options):
    """How a recipe prunes every linear weight."""

    method: str
    sparsity: float = Field(gt=0.0, lt=1.0)


class Quantization(Options):
    """How a recipe quantises every linear weight."""

    method: str
    bits: Literal[8, 6, 4, 3]
    group_size: PositiveInt | None = None
    symmetric: bool = True


class Recipe(Options):
    """Pruning × quantisation; neither is the dense baseline in bf16."""

    prune: Pruning | None = None
    quantize: Quantization | None = None
    embedding_bits: Literal[16, 8] = 16

    @property
    def name(self) -> str:
        """Short, unique within a grid, usable as a file name."""
        parts = []
        if self.prune:
            parts.append(f"{self.prune.method}-s{self.prune.sparsity * 100:g}")
        if self.quantize:
            group = f"g{self.quantize.group_size}" if self.quantize.group_size else ""
            parts.append(f"{self.quantize.method}-w{self.quantize.bits}{group}")
        return "+".join(parts) or "dense"


def grid(config: CompressionConfig | None) -> list[Recipe]:
    """Every recipe of a job, the dense baseline first. Embeddings are quantised where linear weights are."""
    prunings = _prunings(config.prune) if config and config.prune else []
    quantizations = _quantizations(config.quantize) if config and config.quantize else []
    embedding_bits = config.quantize.embedding_bits if config and config.quantize else 16
    recipes = [Recipe()]
    recipes += [Recipe(prune=pruning) for pruning in prunings]
    recipes += [Recipe(quantize=quantization, embedding_bits=embedding_bits) for quantization in quantizations]
    if config and config.combine:
        recipes += [
            Recipe(prune=pruning, quantize=quantization, embedding_bits=embedding_bits)
            for pruning in prunings
            for quantization in quantizations
        ]
    return recipes


def _prunings(config: PruneConfig) -> list[Pruning]:
    return [Pruning(method=method, sparsity=sparsity) for method in config.methods for sparsity in config.sparsity]


def _quantizations(config: QuantizeConfig) -> list[Quantization]:
    return [
        Quantization(method=method, bits=bits, group_size=config.group_size, symmetric=config.symmetric)
        for method in config.methods
        for bits in config.bits
    ]
