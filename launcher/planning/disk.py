"""What a job writes into its directory, in bytes, before it is written. Torch-free."""

from compression.recipe import Recipe, grid
from compression.reduced import reduced_config
from compression.sizes import statistics_bytes
from compression.text import shards
from launcher.spec import JobSpec
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.training import TrainingConfig

FP32 = 4


class CalibrationDisk(Options):
    """What calibration holds at its peak, at most."""

    layers: int = 0
    """Whose statistics lie there at once."""
    statistics_bytes: int = 0
    hidden_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.statistics_bytes + self.hidden_bytes


def checkpoint_bytes(model: ModelConfig, layout: Layout, training: TrainingConfig) -> int:
    """One checkpoint: weights, master weights where they differ, two moments."""
    full = 2 + 12 if training.precision == "bf16" else 4 + 8
    return model.parameter_count() * (4 + 4 if layout.engine == "lean" else full)


def start_bytes(model: ModelConfig) -> int:
    """A checkpoint that a recovery begins with, or learns from: weights alone."""
    return FP32 * model.parameter_count()


def variant_bytes(spec: JobSpec, parameters: int) -> int:
    """Every variant: its layers, the compact file made of them, and the export in two bytes per parameter."""
    total = 0.0
    for recipe in grid(spec.compression):
        compact = (recipe.stored_bits / 8 + 0.25 if recipe.quantize else 2.0) * parameters
        total += 2 * compact + (2.0 * parameters if spec.export.variants != "none" else 0.0)
    return round(total)


def data_bytes(spec: JobSpec, text_bytes: int) -> int:
    """Tokens of two bytes (four for very large vocabularies): one for each byte, or for a few of them."""
    return text_bytes * 2 if spec.data.tokenizer.kind == "bytes" else text_bytes


def calibration_disk(spec: JobSpec, model: ModelConfig, devices: int) -> CalibrationDisk:
    """What calibration of one candidate holds: for its grid, or later for what is recovered, all side by side."""
    recipes = grid(spec.compression)
    first = _calibration(spec, model, [recipe for recipe in recipes if not recipe.recovered], devices)
    later = [
        _calibration(spec, reduced_config(model, recipe.structure), [recipe], devices)
        for recipe in recipes
        if recipe.recovered
    ]
    again = CalibrationDisk(
        layers=sum(one.layers for one in later),
        statistics_bytes=sum(one.statistics_bytes for one in later),
        hidden_bytes=sum(one.hidden_bytes for one in later),
    )
    return max(first, again, key=lambda one: one.bytes)


def _calibration(spec: JobSpec, model: ModelConfig, recipes: list[Recipe], devices: int) -> CalibrationDisk:
    """As :class:`launcher.stages.work.GridWork` does it.

    All shards go through a layer before the next layer begins, and every device may still be compressing an earlier
    one, whose statistics are deleted then. Where strengths are allocated, or layers removed, the statistics of all
    layers stay. Of hidden states there are those before a layer and those behind it. A chain (``statistics:
    sequential``) has hidden states of its own, and no statistics on the disk.
    """
    asking = [recipe for recipe in recipes if recipe.needs_statistics]
    sequential = spec.compression.calibration.statistics == "sequential"
    allocated = [recipe for recipe in recipes if recipe.allocated]
    chains = asking if sequential else []
    together = [recipe for recipe in asking if recipe.allocated or not sequential]
    layers = 0
    if together:
        layers = model.layers if allocated else min(model.layers, devices + 1)
    sequences = spec.compression.calibration.sequences
    states = sequences * spec.data.sequence_length * model.hidden * FP32
    return CalibrationDisk(
        layers=layers,
        statistics_bytes=layers * len(shards(sequences)) * statistics_bytes(model),
        hidden_bytes=2 * states * (len(chains) + bool(together)),
    )
