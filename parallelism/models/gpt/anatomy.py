"""What of a ``gpt`` layer can be removed or rescaled: protocol :class:`parallelism.models.base.Anatomy`. Torch-free."""

from collections.abc import Mapping

from parallelism.models.base import Fold, UnitKind, Units
from parallelism.models.gpt.config import GPTConfig


def units(config: GPTConfig) -> tuple[Units, ...]:
    """Key/value heads, each with all queries that read it (grouped-query attention); feed-forward neurons."""
    queries = config.heads // config.query_groups * config.channels
    heads = {"attention.q": queries, "attention.k": config.channels, "attention.v": config.channels}
    neurons = {"mlp.gate": 1, "mlp.up": 1} if config.gated else {"mlp.up": 1}
    return (
        Units("heads", config.query_groups, heads, "attention.o", queries),
        Units("neurons", config.feed_forward, neurons, "mlp.down", 1),
    )


def folds(config: GPTConfig) -> tuple[Fold, ...]:
    """The norms; values (attention only averages them), where every query head has its own; the ungated half of a gate.

    Nothing is moved through GELU, which is not homogeneous.
    """
    attention = [Fold("attention.norm", ("attention.q", "attention.k", "attention.v"))]
    if config.heads == config.query_groups:
        attention.append(Fold("attention.v", ("attention.o",)))
    if not config.gated:
        return (*attention, Fold("mlp.norm", ("mlp.up",)))
    return (*attention, Fold("mlp.norm", ("mlp.gate", "mlp.up")), Fold("mlp.up", ("mlp.down",)))


def reduced(config: GPTConfig, kept: Mapping[UnitKind, int], layers: int) -> GPTConfig:
    """The smaller model; what followed from other numbers by default stays as it was, and explicit."""
    changed: dict[str, int] = {"layers": layers}
    if "heads" in kept:
        per_group = config.heads // config.query_groups
        groups = kept["heads"]
        changed |= {"heads": groups * per_group, "kv_heads": groups, "head_dim": config.channels}
    if "neurons" in kept:
        changed["ffn_hidden"] = kept["neurons"]
    return GPTConfig.model_validate(config.model_dump() | changed)
