"""Engine ``lean``: tensor × data parallelism in about eight bytes per parameter, for models that fit no other way.

float32 weights are their own master copy, AdamW's moments are bfloat16, and every parameter is updated and its gradient
released as soon as the backward pass has computed it: no more than a few gradients exist at any time.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch.nn import Parameter

from parallelism import device
from parallelism.engines import limits, single_stage, state
from parallelism.engines.base import StepResult
from parallelism.engines.recovery import Recovery, make_objective, zero
from parallelism.models.base import Batch, Losses, ModelConfig, ShardedFamily
from parallelism.registry import FAMILIES, load
from parallelism.training import TrainingConfig, TrainTask

PREVIOUS_NORM_KEY = f"{state.ENGINE_PREFIX}lean.previous_gradient_norm"


@dataclass
class _Moments:
    """AdamW's state of one parameter, bfloat16, in its shape (Kingma & Ba 2015, Algorithm 1: m and v)."""

    average: Tensor
    square: Tensor


class LeanEngine:
    """Trains one model at ``task.layout`` (no pipeline); protocol :class:`parallelism.engines.base.Engine`.

    Because a gradient is used up when it appears, each step is one micro-batch per data rank, and gradients are clipped
    by the norm of the *previous* step, the first step not at all: a single gradient far larger than the one before it
    is damped by AdamW's second moment only. That norm is part of the checkpoint.

    Raises ``ValueError`` where ``task`` asks for gradient accumulation, bfloat16 weights or betas that bfloat16 moments
    cannot follow.
    """

    def __init__(self, task: TrainTask) -> None:
        limits.check(task.layout, task.training)
        self.layout = task.layout
        self.config: ModelConfig = task.model
        self.seed = task.seed
        self.training = task.training
        self._family: ShardedFamily = load(FAMILIES[task.model.family].sharded)
        self.module = single_stage.build_module(self._family, task)
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        self._parameters = state.stored_parameters([self.module])
        self._recovery = Recovery(task, self._parameters)
        self._objective: Losses = self._family
        if task.start is not None:
            build = single_stage.build_other
            self._objective = make_objective(
                task, task.start, self._family, lambda config: [build(self._family, task, config)]
            )
        self._moments = {stored.parameter: _zero_moments(stored.parameter) for stored in self._parameters}
        self._previous_norm = torch.zeros(1, dtype=torch.float64, device=device.device())
        self._squares = torch.zeros(1, dtype=torch.float64, device=device.device())
        self._updated: list[Parameter] = []
        self._step = 0
        self._learning_rate = 0.0
        self._gradient_scale = 1.0
        for parameter in self._moments:
            parameter.register_post_accumulate_grad_hook(self._update)

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step on this data rank's one micro-batch; see :class:`parallelism.engines.base.Engine`.

        The norm in the result is that of this step's gradient before clipping, by which the next step is clipped.
        """
        (batch,) = micro_batches
        self._step += 1
        self._learning_rate = learning_rate
        self._gradient_scale = self._clipping()
        self._squares.zero_()
        with self._recovery.rounded():
            losses = self._objective.losses(self.module, single_stage.to_device(batch))
            # Summed over data ranks, the gradient is that of the mean over the tokens of the global batch.
            (losses.sum() / (losses.numel() * self.layout.data)).backward()
        assert len(self._updated) == len(self._moments), "every parameter has one complete gradient per step"
        self._updated.clear()
        dist.all_reduce(self._squares, group=parallel_state.get_tensor_model_parallel_group())
        self._previous_norm.copy_(self._squares.sqrt())
        return StepResult(single_stage.mean_over_data([losses]), float(self._previous_norm))

    def _update(self, parameter: Parameter) -> None:
        """Use up the gradient of a parameter, complete on this rank; runs within the backward pass."""
        gradient, moments = parameter.grad, self._moments[parameter]
        assert gradient is not None
        if self.layout.data > 1:
            dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        self._recovery.restore(parameter)
        self._recovery.mask_gradient(parameter, gradient)
        if param_is_not_tensor_parallel_duplicate(parameter):
            self._squares += single_stage.square_sum(gradient)
        adamw_in_chunks(
            parameter,
            gradient,
            moments.average,
            moments.square,
            self.training,
            step=self._step,
            learning_rate=self._learning_rate,
            gradient_scale=self._gradient_scale,
        )
        parameter.grad = None
        self._updated.append(parameter)

    def _clipping(self) -> float:
        limit, norm = self.training.gradient_clip, float(self._previous_norm)
        return min(1.0, limit / (norm + 1e-6)) if limit > 0.0 and norm > 0.0 else 1.0

    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Mean loss per token over all data ranks; see :class:`parallelism.engines.base.Engine`."""
        with self._recovery.rounded():
            return single_stage.evaluate(self._objective, self.module, micro_batches)

    def prune(self, sparsity: float) -> None:
        """Zero the smallest linear weights for good; see :class:`parallelism.engines.base.Engine`."""
        for stored, pruned in self._recovery.pruned(sparsity):
            moments = self._moments[stored.parameter]
            for values in (stored.parameter, moments.average, moments.square):
                zero(values, pruned)

    def sharded_state(self) -> list[ShardedTensor]:
        """Pieces that alias this rank's weights and optimizer; see :class:`parallelism.engines.base.Engine`.

        The moments are written as bfloat16; other engines read them into their float32 ones, and the other way round.
        """
        pieces = state.model_pieces(self._parameters)
        for stored in self._parameters:
            moments = self._moments[stored.parameter]
            pieces += state.optimizer_pieces(stored, "exp_avg", moments.average)
            pieces += state.optimizer_pieces(stored, "exp_avg_sq", moments.square)
        return [*state.spread_over_data(pieces, self.data_rank, self.layout.data), self._norm_piece()]

    def _norm_piece(self) -> ShardedTensor:
        """Nothing to clip by where another engine wrote the checkpoint."""
        return ShardedTensor(
            key=PREVIOUS_NORM_KEY,
            data=self._previous_norm,
            dtype=self._previous_norm.dtype,
            local_shape=(1,),
            global_shape=(1,),
            global_offset=(0,),
            axis_fragmentations=None,
            replica_id=(0, parallel_state.get_tensor_model_parallel_rank(), self.data_rank),
        )

    def restored(self, step: int) -> None:
        """The pieces have been filled at optimizer step ``step``; see :class:`parallelism.engines.base.Engine`."""
        self._step = step


def _zero_moments(parameter: Parameter) -> _Moments:
    return _Moments(*(torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False) for _ in range(2)))


@torch.no_grad()
def adamw_in_chunks(
    weight: Tensor,
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    training: TrainingConfig,
    *,
    step: int,
    learning_rate: float,
    gradient_scale: float = 1.0,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) in place, in float32, a cache's worth of elements at a time.

    All four tensors have one shape; ``weight`` and ``gradient`` are float32, the moments bfloat16 or float32. The
    update uses the moments before they are rounded. ``step`` counts from 1. One-dimensional weights do not decay.
    """
    beta1, beta2 = training.beta1, training.beta2
    decay = 1.0 - learning_rate * training.weight_decay if weight.ndim > 1 else 1.0
    step_size, second_bias = learning_rate / (1.0 - beta1**step), 1.0 - beta2**step
    for part, slope, first, second in zip(*map(single_stage.chunks, (weight, gradient, average, square)), strict=True):
        slope = slope * gradient_scale
        exact_first = first.float().lerp_(slope, 1.0 - beta1)
        exact_second = second.float().mul_(beta2).addcmul_(slope, slope, value=1.0 - beta2)
        first.copy_(exact_first)
        second.copy_(exact_second)
        denominator = (exact_second / second_bias).sqrt_().add_(training.epsilon)
        part.mul_(decay).addcdiv_(exact_first, denominator, value=-step_size)
