"""What is left of a model when whole parts are removed: numbers and configs. Torch-free."""

from collections.abc import Sequence

from compression.recipe import Structure
from parallelism.models.base import Anatomy, ModelConfig, Units
from parallelism.registry import FAMILIES, load

NEURON_MULTIPLE = 8
"""A feed-forward width that was a multiple of this stays one: vector units and packed codes go by eights."""


def anatomy(config: ModelConfig) -> Anatomy:
    """What of the model's layers can be removed or rescaled. Raises ``ValueError`` for a family that does not say."""
    dotted = FAMILIES[config.family].anatomy
    if dotted is None:
        able = ", ".join(sorted(name for name, entry in FAMILIES.items() if entry.anatomy))
        raise ValueError(
            f"models of family {config.family} have no parts that can be removed or rescaled (those of {able} have):"
            " leave structure, awq and smoothquant out"
        )
    described: Anatomy = load(dotted)
    return described


def kept_units(units: Units, structure: Structure) -> int:
    """How many units stay in every layer, at least one: a config has one number for all layers."""
    step = NEURON_MULTIPLE if units.kind == "neurons" and units.count % NEURON_MULTIPLE == 0 else 1
    fraction: float = getattr(structure, units.kind)
    return max(1, round(units.count * (1.0 - fraction) / step)) * step


def kept_layers(layers: int, structure: Structure) -> int:
    """How many layers stay, at least one."""
    return max(1, round(layers * (1.0 - structure.layers)))


def reduced_config(config: ModelConfig, structure: Structure | None) -> ModelConfig:
    """The smaller model that is left. Raises ``ValueError`` for a family whose parts cannot be removed."""
    if structure is None:
        return config
    parts = anatomy(config)
    removed = {units.kind: kept_units(units, structure) for units in parts.units(config)}
    kept = {kind: count for kind, count in removed.items() if getattr(structure, kind)}
    return parts.reduced(config, kept, kept_layers(config.layers, structure))


def removed_layers(influences: Sequence[float], structure: Structure | None) -> tuple[int, ...]:
    """Which layers go, ascending: those of smallest *block influence* (Men et al. 2024, ShortGPT).

    ``influences``: of every layer, 1 - mean cos(hidden state before it, after it). Of equal ones the first go.
    """
    if structure is None:
        return ()
    count = len(influences) - kept_layers(len(influences), structure)
    ascending = sorted(range(len(influences)), key=lambda layer: influences[layer])
    return tuple(sorted(ascending[:count]))
