"""Torch-free tables of compression methods: a method is one implementation file plus one line here."""

from dataclasses import dataclass

from parallelism.registry import Entry


@dataclass(frozen=True)
class PruningEntry(Entry):
    """A pruning method: protocol :class:`compression.methods.base.Pruner`, unless ``by_columns``."""

    needs_statistics: bool = True
    by_columns: bool = False
    """Solved column by column with the inverse of H, together with what else is (:mod:`compression.columns`)."""
    has_scope: bool = False
    """Whether ``prune.scope`` means something to it."""


@dataclass(frozen=True)
class QuantizationEntry(Entry):
    """A quantisation method: protocol :class:`compression.methods.base.Quantizer`, unless ``by_columns``."""

    needs_statistics: bool = True
    by_columns: bool = False
    has_order: bool = False
    """Whether ``quantize.act_order`` means something to it."""
    rescaler: str | None = None
    """Dotted path of a :class:`compression.methods.base.Rescaler` that is applied to the layer before."""


PRUNING: dict[str, PruningEntry] = {
    "magnitude": PruningEntry(
        "compression.config:PruneConfig",
        "compression.methods.magnitude:prune",
        needs_statistics=False,
        has_scope=True,
    ),
    "wanda": PruningEntry("compression.config:PruneConfig", "compression.methods.wanda:prune"),
    "zeros": PruningEntry("compression.config:PruneConfig", "compression.methods.zeros:prune", needs_statistics=False),
    "sparsegpt": PruningEntry(
        "compression.config:PruneConfig", "compression.methods.sparsegpt:keep_in_block", by_columns=True
    ),
}

QUANTIZATION: dict[str, QuantizationEntry] = {
    "rtn": QuantizationEntry(
        "compression.config:QuantizeConfig", "compression.methods.rtn:quantize", needs_statistics=False
    ),
    "gptq": QuantizationEntry(
        "compression.config:QuantizeConfig", "compression.methods.gptq:Rounder", by_columns=True, has_order=True
    ),
    "awq": QuantizationEntry(
        "compression.config:QuantizeConfig",
        "compression.methods.rtn:quantize",
        rescaler="compression.methods.awq:rescale",
    ),
    "smoothquant": QuantizationEntry(
        "compression.config:QuantizeConfig",
        "compression.methods.rtn:quantize",
        rescaler="compression.methods.smoothquant:rescale",
    ),
}
