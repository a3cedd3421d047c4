"""One point of the compression grid, and the grid itself. Torch-free."""

from typing import Literal

from pydantic import Field, PositiveInt

from compression.config import CompressionConfig
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
    recipes = [Recipe()]
    if config is None:
        return recipes
    prunings = [
        Pruning(method=method, sparsity=sparsity)
        for method in (config.prune.methods if config.prune else [])
        for sparsity in (config.prune.sparsity if config.prune else [])
    ]
    quantize = config.quantize
    quantizations = [
        Quantization(method=method, bits=bits, group_size=quantize.group_size, symmetric=quantize.symmetric)
        for method in (quantize.methods if quantize else [])
        for bits in (quantize.bits if quantize else [])
    ] if quantize else []
    embedding_bits = quantize.embedding_bits if quantize else 16
    recipes += [Recipe(prune=pruning) for pruning in prunings]
    recipes += [Recipe(quantize=quantization, embedding_bits=embedding_bits) for quantization in quantizations]
    if config.combine:
        recipes += [
            Recipe(prune=pruning, quantize=quantization, embedding_bits=embedding_bits)
            for pruning in prunings
            for quantization in quantizations
        ]
    return recipes
