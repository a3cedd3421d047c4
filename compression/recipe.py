"""One point of the compression grid, and the grid itself. Torch-free."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, PositiveInt

from compression.config import (
    Allocation,
    Bits,
    CompressionConfig,
    EmbeddingBits,
    Number,
    Pattern,
    PruneConfig,
    QuantizeConfig,
    Scope,
    StructureConfig,
    pattern_of,
)
from compression.registry import PRUNING, QUANTIZATION
from parallelism.options import Options

KEEP_ZEROS, NEAREST = "zeros", "rtn"
"""Methods that a recovered model is compressed with."""


class Structure(Options):
    """What a recipe removes whole, before anything else: fractions of key/value heads, neurons and layers."""

    heads: float = Field(default=0.0, ge=0.0, lt=1.0)
    neurons: float = Field(default=0.0, ge=0.0, lt=1.0)
    layers: float = Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def name(self) -> str:
        """``neurons-s50`` and the like."""
        parts = {"heads": self.heads, "neurons": self.neurons, "layers": self.layers}
        return "-".join(f"{part}-s{fraction * 100:g}" for part, fraction in parts.items() if fraction)


class Pruning(Options):
    """How a recipe prunes every linear weight: to a sparsity, or by a pattern, which implies one."""

    method: str
    sparsity: float = Field(gt=0.0, lt=1.0)
    pattern: Pattern | None = None
    scope: Scope = "matrix"
    allocation: Allocation = "uniform"

    @property
    def name(self) -> str:
        """``wanda-s50``, ``sparsegpt-2of4``."""
        strength = self.pattern.replace(":", "of") if self.pattern else f"s{self.sparsity * 100:g}"
        scope = "" if self.scope == "matrix" else f"-{self.scope}"
        return f"{self.method}-{strength}{scope}{'-bylayer' if self.allocation == 'sensitivity' else ''}"

    @property
    def allocated(self) -> bool:
        """Whether every matrix gets a sparsity of its own, which only a look at all layers tells."""
        return self.pattern is None and (self.scope == "global" or self.allocation == "sensitivity")


class Quantization(Options):
    """How a recipe quantises every linear weight: at ``bits``, or by matrix, to meet an average or a size."""

    method: str
    bits: Bits | None = None
    average_bits: float | None = None
    target_bytes: PositiveInt | None = None
    number: Number = "int"
    group_size: PositiveInt | None = None
    symmetric: bool = True
    act_order: bool = False
    activation_bits: int = 16

    @property
    def name(self) -> str:
        """``gptq-w4g64``, ``rtn-avg3.5``, ``smoothquant-w8a8``."""
        if self.number == "fp8":
            width = "fp8"
        elif self.average_bits:
            width = f"avg{self.average_bits:g}"
        elif self.target_bytes:
            width = f"max{self.target_bytes}b"
        else:
            width = f"w{self.bits}"
        activations = f"a{self.activation_bits}" if self.activation_bits != 16 else ""
        group = f"g{self.group_size}" if self.group_size else ""
        options = f"{'' if self.symmetric else '-asym'}{'-actorder' if self.act_order else ''}"
        return f"{self.method}-{width}{activations}{group}{options}"

    @property
    def allocated(self) -> bool:
        """Whether every matrix gets a width of its own, which only a look at all layers tells."""
        return self.bits is None


class Strength(Options):
    """What an allocated recipe does to one matrix: its own sparsity, its own width; None where the recipe says it."""

    sparsity: float | None = Field(default=None, ge=0.0, lt=1.0)
    bits: Bits | None = None


class Recipe(Options):
    """Structure, pruning and quantisation, in this order; none of them is the dense baseline in bf16."""

    structure: Structure | None = None
    prune: Pruning | None = None
    quantize: Quantization | None = None
    embedding_bits: EmbeddingBits = 16
    recovered: bool = False
    """Finetuned after it was pruned; what is left of it is quantised then."""
    quantization_aware: bool = False
    """Of a recovered recipe: the finetuning computed with rounded weights."""

    @property
    def name(self) -> str:
        """Short, unique within a grid, usable as a file name."""
        parts = [part.name for part in (self.structure, self.prune, self.quantize) if part]
        return ("+".join(parts) or "dense") + ("-recovered" if self.recovered else "")

    @property
    def start(self) -> "Recipe":
        """The recipe whose variant a recovered one is finetuned from: itself, neither quantised nor recovered."""
        unquantized = {"quantize": None, "embedding_bits": 16}
        return self.model_copy(update=unquantized | {"recovered": False, "quantization_aware": False})

    @property
    def as_solved(self) -> "Recipe":
        """What is done to the model at hand; of a recovered recipe, what is left to do to the finetuned model.

        That one's zeros stay, and it is quantised. Weights that were trained as rounded to nearest are rounded to
        nearest.
        """
        if not self.recovered:
            return self
        prune, quantize = self.prune, self.quantize
        if prune is not None:
            prune = Pruning(method=KEEP_ZEROS, sparsity=prune.sparsity)
        if quantize is not None and self.quantization_aware:
            quantize = quantize.model_copy(update={"method": NEAREST, "act_order": False})
        return self.model_copy(update={"structure": None, "prune": prune, "quantize": quantize, "recovered": False})

    @property
    def needs_statistics(self) -> bool:
        """Whether it cannot be carried out without the statistics of the layers' inputs."""
        if self.recovered:
            return self.as_solved.needs_statistics
        by_activations = self.structure is not None or (self.prune and self.prune.allocation == "sensitivity")
        prunes = self.prune is not None and PRUNING[self.prune.method].needs_statistics
        rounds = self.quantize is not None and QUANTIZATION[self.quantize.method].needs_statistics
        by_size = self.quantize is not None and self.quantize.allocated
        return bool(by_activations or by_size or prunes or rounds)

    @property
    def stored_bits(self) -> float:
        """Bits of a linear weight, scales left out; 8 where a target in bytes leaves it open."""
        if self.quantize is None:
            return 16.0
        return self.quantize.bits or self.quantize.average_bits or 8.0

    @property
    def allocated(self) -> bool:
        """Whether layers have to be looked at together before any of them is compressed."""
        if self.recovered:
            return False  # strengths are those of the recipe that it was before
        layers = self.structure is not None and self.structure.layers > 0.0
        return layers or any(part.allocated for part in (self.prune, self.quantize) if part)

    def at(self, strength: Strength | None) -> "Recipe":
        """The recipe of one matrix: uniform, with the strength that was allocated to that matrix."""
        prune, quantize = self.prune, self.quantize
        if prune is not None and prune.allocated:
            assert strength is not None, f"{self.name} has no allocation for this matrix"
            scope: Scope = "matrix" if prune.scope == "global" else prune.scope
            uniform = {"sparsity": strength.sparsity, "scope": scope, "allocation": "uniform"}
            prune = prune.model_copy(update=uniform) if strength.sparsity else None
        if quantize is not None and quantize.allocated:
            assert strength is not None, f"{self.name} has no allocation for this matrix"
            assert strength.bits is not None
            quantize = quantize.model_copy(update={"bits": strength.bits, "average_bits": None, "target_bytes": None})
        return self.model_copy(update={"prune": prune, "quantize": quantize})


Strengths = Mapping[str, Mapping[str, Strength]]
"""Recipe's name → linear layer (``attention.q``) → its strength in one layer; of allocated recipes only."""

Allocations = Mapping[str, Mapping[str, Strength]]
"""Recipe's name → matrix (``layers.3.attention.q``) → its strength; of allocated recipes only."""


def grid(config: CompressionConfig | None) -> list[Recipe]:
    """Every recipe of a job, the dense baseline first. Embeddings are quantised where linear weights are.

    Recipes that are to be recovered stand there twice: as they are solved, and (last) recovered.
    """
    if config is None:
        return [Recipe()]
    structures = list(_structures(config.structure)) if config.structure else []
    prunings = list(_prunings(config.prune)) if config.prune else []
    quantizations = list(_quantizations(config.quantize)) if config.quantize else []
    bits: EmbeddingBits = config.quantize.embedding_bits if config.quantize else 16
    recipes = [Recipe(), *(Recipe(structure=one) for one in structures), *(Recipe(prune=one) for one in prunings)]
    recipes += [Recipe(quantize=one, embedding_bits=bits) for one in quantizations]
    if config.combine:
        starts = [Recipe(structure=one) for one in structures] + [Recipe(prune=one) for one in prunings]
        recipes += [
            start.model_copy(update={"quantize": one, "embedding_bits": bits})
            for start in starts
            for one in quantizations
        ]
    return recipes + [_recovered(config, recipe) for recipe in recipes if _recovers(config, recipe)]


def _recovered(config: CompressionConfig, recipe: Recipe) -> Recipe:
    aware = config.recover is not None and config.recover.quantization_aware and recipe.quantize is not None
    return recipe.model_copy(update={"recovered": True, "quantization_aware": aware})


def _recovers(config: CompressionConfig, recipe: Recipe) -> bool:
    wanted = config.recover.recipes if config.recover else []
    return recipe != Recipe() if wanted == "all" else recipe.name in wanted


def _structures(config: StructureConfig) -> Iterator[Structure]:
    for part in ("heads", "neurons", "layers"):
        yield from (Structure(**{part: fraction}) for fraction in getattr(config, part))


def _prunings(config: PruneConfig) -> Iterator[Pruning]:
    for method in config.methods:
        scope = config.scope if PRUNING[method].has_scope else "matrix"
        for sparsity in config.sparsity:
            yield Pruning(method=method, sparsity=sparsity, scope=scope, allocation=config.allocation)
        for pattern in config.patterns:
            kept, width = pattern_of(pattern)
            yield Pruning(method=method, sparsity=1 - kept / width, pattern=pattern)


def _quantizations(config: QuantizeConfig) -> Iterator[Quantization]:
    common = {
        "number": config.number,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "activation_bits": config.activation_bits,
    }
    for method in config.methods:
        act_order = config.act_order and QUANTIZATION[method].has_order
        widths: list[dict[str, Any]] = [{"bits": bits} for bits in config.bits]
        widths += [{"average_bits": bits} for bits in config.average_bits]
        widths += [{"target_bytes": size} for size in config.target_bytes]
        yield from (Quantization(method=method, act_order=act_order, **common, **width) for width in widths)
