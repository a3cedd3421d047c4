"""Engine ``deepspeed``: tensor parallelism by megatron-core × ZeRO 1, 2 or 3 by DeepSpeed, with offload.

Only this file and its neighbours :mod:`~parallelism.engines.nvme` and :mod:`~parallelism.engines.ready_deepspeed` know
DeepSpeed. They reach into its optimizers' partitions, because the checkpoint is our own: what a rank holds of a
parameter is written from there and loaded into it, without gathering.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor
from torch.nn import Module, Parameter

from parallelism import device
from parallelism.engines import limits, nvme, ready_deepspeed, single_stage, state
from parallelism.engines.base import StepResult
from parallelism.layout import Layout
from parallelism.models.base import Batch, ModelConfig, ShardedFamily
from parallelism.registry import FAMILIES, load
from parallelism.training import TrainingConfig, TrainTask

BUCKET_ELEMENTS = 1 << 25
"""Gradients and weights are sent in buckets of at most so many elements (a larger parameter alone in its own)."""


@dataclass(frozen=True)
class _Part:
    """What this rank's optimizer holds of a parameter: its flattened elements from ``start`` on.

    ``weights`` are the same elements of the weights that the model computes with; ``main`` is what AdamW updates
    (float32, flat), and ``average`` and ``square`` are its moments. All are views of DeepSpeed's memory.
    """

    parameter: Parameter
    start: int
    weights: Tensor
    main: Tensor
    average: Tensor
    square: Tensor


class DeepSpeedEngine:
    """Trains one model at ``task.layout`` (no pipeline); protocol :class:`parallelism.engines.base.Engine`.

    Raises ``ValueError`` where ``task`` asks for what :mod:`parallelism.engines.limits` refuses.
    """

    def __init__(self, task: TrainTask) -> None:
        limits.check(task.layout, task.training)
        self.layout = task.layout
        self.config: ModelConfig = task.model
        self.seed = task.seed
        self.training = task.training
        self._family: ShardedFamily = load(FAMILIES[task.model.family].sharded)
        self._module = single_stage.build_module(self._family, task)
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        stored = state.stored_parameters([self._module])
        self._stored = {entry.parameter: _without_data(entry) for entry in stored}
        del stored  # with it goes the memory of the weights that ZeRO replaces
        for parameter in self._module.parameters():
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(_sum_over_tensor_ranks)
        deepspeed = ready_deepspeed.load()
        self._directory = _swap_directory(self._module, task.layout) if task.layout.offload == "nvme" else None
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._module,
            optimizer=_adamw(self._module, task.training),
            mpu=_TensorParallelUnit,
            config=_deepspeed_config(task, self._directory),
        )
        self._swapped: nvme.SwappedState | None = None
        if self._directory is not None:
            path = self._directory.path
            self._swapped = nvme.on_all_ranks(lambda: nvme.SwappedState(self._optimizer, path, _moments))

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this data rank's micro-batches; see :class:`parallelism.engines.base.Engine`."""
        count = self._engine.gradient_accumulation_steps()
        assert len(micro_batches) == count, f"{len(micro_batches)} micro-batches, but {count} make a global batch"
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        parts, norm = [], 0.0
        for index, batch in enumerate(micro_batches):
            losses = self._family.losses(self._engine, single_stage.to_device(batch))
            self._engine.backward(losses.mean())
            if self.layout.zero_stage == 0 and index + 1 == count:
                norm = self._clip_unpartitioned()
            self._engine.step()
            parts.append(losses.detach())
        if self.layout.zero_stage:
            norm = float(self._engine.get_global_grad_norm())
        return StepResult(single_stage.mean_over_data(parts), norm if norm >= 0.0 else math.nan)

    def _clip_unpartitioned(self) -> float:
        """Clip the reduced gradients where ZeRO does not; returns their norm before."""
        parameters = list(self._module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters)
        total = torch.zeros(1, dtype=torch.float64, device=device.device())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if param_is_not_tensor_parallel_duplicate(parameter):
                total += single_stage.square_sum(gradient)
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        norm = math.sqrt(float(total))
        if 0.0 < self.training.gradient_clip < norm:
            for gradient in gradients:
                gradient.mul_(self.training.gradient_clip / (norm + 1e-6))
        return norm

    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Mean loss per token over all data ranks; see :class:`parallelism.engines.base.Engine`."""
        return single_stage.evaluate(self._family, self._engine, micro_batches)

    def sharded_state(self) -> list[ShardedTensor]:
        """Pieces that alias this rank's weights and optimizer; see :class:`parallelism.engines.base.Engine`."""
        stage = self.layout.zero_stage
        if self._swapped is not None:
            self._swapped.refresh()
        pieces = [] if stage == 3 else state.model_pieces(state.stored_parameters([self._module]))
        if stage == 0:
            pieces += [piece for part in self._parts() for piece in self._pieces_of(part, sharded=False)]
            return state.spread_over_data(pieces, self.data_rank, self.layout.data)
        pieces = state.spread_over_data(pieces, self.data_rank, self.layout.data)
        for part in self._parts():
            pieces += self._pieces_of(part, sharded=True)
            if stage == 3:
                pieces += state.sharded_model_pieces(self._stored[part.parameter], part.weights, start=part.start)
        return pieces

    def _pieces_of(self, part: _Part, *, sharded: bool) -> Iterator[ShardedTensor]:
        tensors = {"exp_avg": part.average, "exp_avg_sq": part.square}
        if self.training.precision == "bf16":
            tensors["fp32_param"] = part.main
        stored = self._stored[part.parameter]
        for name, values in tensors.items():
            yield from state.optimizer_pieces(stored, name, values, start=part.start, sharded=sharded)

    @torch.no_grad()
    def restored(self, step: int) -> None:
        """The pieces have been filled at optimizer step ``step``; see :class:`parallelism.engines.base.Engine`."""
        for part in self._parts():
            if self.training.precision == "fp32":
                part.main.copy_(part.weights)
        if self._swapped is not None:
            self._swapped.write_back()
        for adam in _inner(self._optimizer).state.values():
            adam["step"].fill_(step)
        self._engine.global_steps = step
        self._engine.global_samples = step * self._engine.train_batch_size()
        self._engine.micro_steps = step * self._engine.gradient_accumulation_steps()
        persistent = getattr(self._optimizer, "persistent_parameters", [])
        if persistent:  # ZeRO-3 keeps small parameters whole beside their partitions
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _parts(self) -> Iterator[_Part]:
        if self.layout.zero_stage == 0:
            return _parts_of_whole(self._module, self._optimizer)
        if self.layout.zero_stage == 3:
            return _parts_of_zero3(self._optimizer, self.data_rank, self._swapped.copy if self._swapped else {})
        return _parts_of_flat_groups(self._optimizer, self.data_rank)


class _TensorParallelUnit:
    """What DeepSpeed calls ``mpu``: megatron-core's groups. Model parallelism is tensor parallelism here."""

    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


def _swap_directory(module: Module, layout: Layout) -> nvme.SwapDirectory:
    """Where this rank's optimizer state goes; see :func:`parallelism.engines.nvme.prepare`. Collective."""
    assert layout.offload_dir
    sizes = [math.ceil(parameter.numel() / layout.data) for parameter in module.parameters()]
    swapped = [size for size in sizes if size >= nvme.SMALLEST_ELEMENTS]
    return nvme.prepare(layout.offload_dir, sum(swapped), max(sizes))


def _adamw(module: Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices only, as the other engines have it."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=training.epsilon, fused=True)


def _deepspeed_config(task: TrainTask, swap: nvme.SwapDirectory | None) -> dict[str, Any]:
    layout, training = task.layout, task.training
    assert isinstance(training.micro_batch, int)
    assert isinstance(training.global_batch, int)
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.global_batch // (training.micro_batch * layout.data),
        "gradient_clipping": training.gradient_clip if layout.zero_stage else 0.0,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero_config(layout, swap),
        **({"aio": nvme.OPERATOR} if swap is not None else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast on the host, and needs no compiler
        "steps_per_print": None,
    }


def _zero_config(layout: Layout, swap: nvme.SwapDirectory | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": layout.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": device.has_cuda(),
    }
    if layout.offload != "none":
        on_host = {"device": "cpu", "pin_memory": device.has_cuda()}
        config["offload_optimizer"] = nvme.settings(swap.path) if swap is not None else on_host
        if layout.zero_stage == 3:
            config["offload_param"] = on_host
            # A disk needs it; without one it makes the same sums in the same order, so that the bits are the same.
            config["sub_group_size"] = nvme.SUB_GROUP_ELEMENTS
    return config


def _sum_over_tensor_ranks(gradient: Tensor) -> Tensor:
    """With sequence parallelism each rank has seen a part of the sequence only."""
    total = gradient.clone()
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


def _without_data(stored: state.StoredParameter) -> state.StoredParameter:
    """The place in the stored tensor alone: ZeRO moves the weights elsewhere and would not free these."""
    return replace(stored, blocks=tuple(replace(block, data=None) for block in stored.blocks))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The AdamW inside one of DeepSpeed's optimizers, or the optimizer itself where there is none around it."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _moments(adam: torch.optim.Optimizer, main: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of what AdamW updates as one tensor; they are made where no step has made them."""
    inner = adam.state[main]
    if not inner:
        inner["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
        inner["exp_avg"], inner["exp_avg_sq"] = (torch.zeros_like(main, requires_grad=False) for _ in range(2))
    return inner["exp_avg"], inner["exp_avg_sq"]


def _parts_of_whole(module: Module, adam: torch.optim.Optimizer) -> Iterator[_Part]:
    """Without ZeRO, AdamW updates the parameters themselves."""
    for parameter in module.parameters():
        average, square = (moment.view(-1) for moment in _moments(adam, parameter))
        flat = parameter.detach().view(-1)
        yield _Part(parameter, 0, flat, flat, average, square)


def _parts_of_flat_groups(optimizer: Any, data_rank: int) -> Iterator[_Part]:
    """ZeRO-1 and 2 concatenate the parameters of a group and give each data rank an equal part of the whole."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups, mains = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    else:  # the optimizer that DeepSpeed takes for ZeRO-1 with bfloat16 weights
        groups, mains = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    for parameters, main in zip(groups, mains, strict=True):
        average, square = _moments(optimizer.optimizer, main)
        begin = -data_rank * main.numel()  # of the parameter, counted from the beginning of this rank's part
        for parameter in parameters:
            low, high = max(begin, 0), min(begin + parameter.numel(), main.numel())
            if low < high:
                weights = parameter.detach().view(-1)[low - begin : high - begin]
                held = (tensor.detach()[low:high] for tensor in (main, average, square))
                yield _Part(parameter, low - begin, weights, *held)
            begin += parameter.numel()


def _parts_of_zero3(optimizer: Any, data_rank: int, swapped: Mapping[int, tuple[Tensor, ...]]) -> Iterator[_Part]:
    """ZeRO-3 gives each data rank an equal part of every parameter, the last of them padded.

    ``swapped`` holds copies of the main weights and moments of the sub-groups that lie on a disk.
    """
    for index, parameters in enumerate(optimizer.fp16_groups):
        main = optimizer.fp32_partitioned_groups_flat[index]
        held = swapped.get(index) or (main.detach(), *_moments(optimizer.optimizer, main))
        low = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = data_rank * size
            real = max(0, min(size, parameter.ds_numel - start))
            if real:
                part = (tensor[low : low + real] for tensor in held)
                yield _Part(parameter, start, parameter.ds_tensor.detach()[:real], *part)
            low += size
