"""Torch-free tables of what can be named in a spec.

A new model family or engine is one implementation file (or folder) plus one line here. The dotted paths are resolved
by :func:`load`, inside worker processes only, so that specs are validated without importing torch.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One row: the pydantic model of its options (dotted path, torch-free) and its implementation (dotted path)."""

    options: str
    implementation: str


@dataclass(frozen=True)
class FamilyEntry:
    """One model family: its config (torch-free), its sharded form on megatron-core, its plain form in torch alone.

    ``anatomy`` (torch-free) says what can be removed or rescaled; without it, structured pruning is refused.
    """

    options: str
    sharded: str
    plain: str
    anatomy: str | None = None


FAMILIES: dict[str, FamilyEntry] = {
    "gpt": FamilyEntry(
        options="parallelism.models.gpt.config:GPTConfig",
        sharded="parallelism.models.gpt.sharded",
        plain="parallelism.models.gpt.plain",
        anatomy="parallelism.models.gpt.anatomy",
    ),
}

ENGINES: dict[str, Entry] = {
    "megatron": Entry("parallelism.training:TrainingConfig", "parallelism.engines.megatron:MegatronEngine"),
    "deepspeed": Entry("parallelism.training:TrainingConfig", "parallelism.engines.deepspeed:DeepSpeedEngine"),
    "lean": Entry("parallelism.training:TrainingConfig", "parallelism.engines.lean:LeanEngine"),
}


def load(dotted: str) -> Any:
    """The object behind ``package.module:name``, or the module behind ``package.module``."""
    module, _, name = dotted.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)
