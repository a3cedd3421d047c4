"""Torch-free tables of compression methods: a method is one implementation file plus one line here."""

from parallelism.registry import Entry

PRUNING: dict[str, Entry] = {
    "magnitude": Entry("compression.config:PruneConfig", "compression.methods.magnitude:prune"),
}

QUANTIZATION: dict[str, Entry] = {
    "rtn": Entry("compression.config:QuantizeConfig", "compression.methods.rtn:quantize"),
}

DATA_FREE = frozenset({"magnitude", "rtn"})
"""Methods that look at weights alone: a grid of these needs no calibration, and no budget is kept for it."""
