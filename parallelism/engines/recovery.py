"""What a start point and gradual pruning ask of an engine, so that engines hold one object instead of many branches.

An exact zero is its own mask. A linear weight that is zero gets no gradient; AdamW with decoupled weight decay
(Loshchilov & Hutter 2019, Algorithm 2) then leaves it where it is, because its moments are zero as well: with g = m =
v = 0 the step is w ← w·(1 - η·λ) - η·m̂/(√v̂ + ε) = 0·(1 - η·λ) - η·0/ε = 0. That holds for the float32 master of a
bfloat16 weight, whose value is the master's, and after a checkpoint, in which nothing but the weights is needed. A
weight that passes through zero by chance misses the gradient of one step; its moments carry it on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Module, Parameter

from parallelism import checkpoint
from parallelism.checkpoint_store import read_info
from parallelism.engines import state
from parallelism.engines.distillation import Objective, Teacher
from parallelism.engines.linear import linear_parameters
from parallelism.engines.rounding import Rounder
from parallelism.engines.sparsity import smallest
from parallelism.engines.state import StoredParameter
from parallelism.models.base import ModelConfig, ShardedFamily
from parallelism.start import StartPoint, check_start
from parallelism.training import TrainTask


class Recovery:
    """Zeros that are held, weights that are rounded, weights that are pruned; without a start point nothing happens.

    Raises ``ValueError`` for a start point that this model cannot have at this layout.
    """

    def __init__(self, task: TrainTask, parameters: Sequence[StoredParameter]) -> None:
        check_start(task.start, task.model, task.layout)
        start = task.start
        self._weights = linear_parameters(task.model, parameters)
        holds = task.training.prune is not None or (start is not None and start.hold_zeros)
        self._held = {weight.parameter for weight in self._weights} if holds else set[Parameter]()
        self._rounder = Rounder(start.rounding, self._weights) if start is not None and start.rounding else None

    def rounded(self) -> AbstractContextManager[None]:
        """Inside, the linear weights have their rounded values, where the start point asks for that."""
        return self._rounder.applied() if self._rounder is not None else nullcontext()

    def restore(self, parameter: Parameter) -> None:
        """Inside :meth:`rounded`: give one parameter, whose gradient is complete, its latent values back."""
        if self._rounder is not None:
            self._rounder.restore(parameter)

    def mask_gradients(self, gradient_of: Callable[[Parameter], Tensor]) -> None:
        """Before the optimizer's step, with latent weights: zeros get no gradient."""
        for parameter in self._held:
            self.mask_gradient(parameter, gradient_of(parameter))

    @torch.no_grad()
    def mask_gradient(self, parameter: Parameter, gradient: Tensor) -> None:
        """The same for one parameter, in place."""
        if parameter in self._held:
            gradient.masked_fill_(parameter == 0.0, 0.0)

    @torch.no_grad()
    def pruned(self, sparsity: float) -> Iterator[tuple[StoredParameter, Tensor]]:
        """What has to become zero now for ``sparsity``: parameter, and bool of its shape. Collective.

        Magnitudes are those of the weights that the model computes with, latent ones where they are rounded.
        """
        masks = [torch.zeros_like(weight.parameter, dtype=torch.bool) for weight in self._weights]
        values = [matrix for weight in self._weights for matrix in weight.matrices(weight.parameter.detach())]
        places = [matrix for weight, mask in zip(self._weights, masks, strict=True) for matrix in weight.matrices(mask)]
        chosen = smallest(values, sparsity, parallel_state.get_tensor_model_parallel_group())
        for place, smallest_here in zip(places, chosen, strict=True):
            place.view.copy_(smallest_here)
        for weight, mask in zip(self._weights, masks, strict=True):
            yield weight.stored, mask & (weight.parameter != 0.0)


def zero(values: Tensor, pruned: Tensor, start: int = 0) -> None:
    """Set to zero, in place, what ``pruned`` (of a parameter's shape) says.

    ``values`` holds the elements from ``start`` on of the flattened parameter, in any shape.
    """
    values.detach().view(-1).masked_fill_(pruned.view(-1)[start : start + values.numel()], 0.0)


def make_objective(
    task: TrainTask, start: StartPoint, family: ShardedFamily, build: Callable[[ModelConfig], list[Module]]
) -> Objective:
    """The loss that the task's start point asks for, its teacher built and filled. Collective.

    ``build`` makes this rank's chunks of another model at the task's layout.
    """
    teacher = None
    if start.teacher is not None:
        info = read_info(start.teacher)
        chunks = build(info.model)
        checkpoint.fill_weights(state.model_pieces(state.stored_parameters(chunks)), info.path)
        teacher = Teacher(family, chunks, task.layout.pipeline)
    return Objective(family, task.model.vocab_size, teacher, start.distill_weight, start.temperature)
