"""What all ranks of a process group have to see alike."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from parallelism.device import device


def highest(values: Sequence[float]) -> list[float]:
    """The element-wise maximum over all ranks. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    maxima: list[float] = tensor.tolist()
    return maxima


def rows(values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, by rank. Collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=device())
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return [row.tolist() for row in gathered]


def first_error(action: Callable[[], object], kinds: tuple[type[Exception], ...]) -> str | None:
    """Run ``action`` on every rank; the message of the first rank on which it raised one of ``kinds``, or None.

    All ranks get the same answer, so that none goes on alone. Collective.
    """
    error = None
    try:
        action()
    except kinds as raised:
        error = str(raised) or type(raised).__name__
    if not highest([error is not None])[0]:
        return None
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next(message for message in errors if message)
