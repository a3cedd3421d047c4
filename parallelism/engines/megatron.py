"""Engine ``megatron``: tensor × pipeline × data parallelism by megatron-core.

This file and :mod:`parallelism.device` are the only ones that touch megatron-core's process-wide state.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from parallelism import device
from parallelism.engines import state
from parallelism.engines.base import StepResult
from parallelism.engines.recovery import Recovery, make_objective, zero
from parallelism.initialize import initialize
from parallelism.layout import Layout
from parallelism.models.base import Batch, ModelConfig, ShardedFamily
from parallelism.registry import FAMILIES, load
from parallelism.training import TrainingConfig, TrainTask


class MegatronEngine:
    """Trains one model at ``task.layout``; protocol :class:`parallelism.engines.base.Engine`.

    ``task`` holds no ``auto``. Every rank of the process group makes one, after :func:`parallelism.device.connect`.
    """

    def __init__(self, task: TrainTask) -> None:
        self.layout = task.layout
        self.config: ModelConfig = task.model
        self.seed: int = task.seed
        self._training = task.training
        self._family: ShardedFamily = load(FAMILIES[task.model.family].sharded)
        start_parallel_state(task.layout, task.seed)
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        self._megatron = _megatron_config(self._family, task)
        self.chunks = build_chunks(self._family, task.model, task.layout, self._megatron)
        self._megatron.finalize_model_grads_func = self._finalize_gradients
        initialize(self.chunks, task.seed, self._megatron.init_method_std, task.model.layers)
        self._distributed = task.training.distributed_optimizer and task.layout.data > 1
        self._wrapped = [_wrap(chunk, self._megatron, self._distributed) for chunk in self.chunks]
        self._optimizer = get_megatron_optimizer(_optimizer_config(task.training, self._distributed), self._wrapped)
        self._recovery = Recovery(task, state.stored_parameters(self.chunks))
        self._objective = make_objective(task, task.start, self._family, self._build_other) if task.start else None
        for group in self._adam.param_groups:
            # megatron-core's scheduler, which is not used here, would exempt biases and norms from weight decay.
            group["weight_decay"] = task.training.weight_decay * group["wd_mult"]
            # One fused kernel per parameter on CPUs, for many parameters on GPUs; megatron-core does not ask for it.
            group["fused"] = True

    @property
    def _adam(self) -> torch.optim.Optimizer:
        (optimizer,) = self._optimizer.chained_optimizers
        adam: torch.optim.Optimizer = optimizer.optimizer
        return adam

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this data rank's micro-batches; see :class:`parallelism.engines.base.Engine`."""
        self._check_interleaving(len(micro_batches))
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with self._recovery.rounded():
            loss = self._run(micro_batches, forward_only=False)
        self._recovery.mask_gradients(_main_gradient)
        _, gradient_norm, _ = self._optimizer.step()
        return StepResult(loss, float(gradient_norm))

    @torch.no_grad()
    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Mean loss per token over all data ranks; see :class:`parallelism.engines.base.Engine`."""
        for chunk in self._wrapped:
            chunk.eval()
        try:
            with self._recovery.rounded():
                return self._run(micro_batches, forward_only=True)
        finally:
            for chunk in self._wrapped:
                chunk.train()

    def _run(self, micro_batches: list[Batch], *, forward_only: bool) -> float:
        batches = [{name: tensor.to(device.device()) for name, tensor in batch.items()} for batch in micro_batches]
        rows, length = batches[0]["tokens"].shape
        self._tokens = len(batches) * rows * length * self.layout.data
        if self._objective is not None and not forward_only:
            self._objective.prepare(batches)
        iterators = [iter(batches) for _ in self._wrapped]
        parts: list[Tensor] = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped if len(iterators) > 1 else self._wrapped[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return mean_over_ranks(parts)

    def _finalize_gradients(self, chunks: list[DistributedDataParallel], tokens: Tensor, **groups: Any) -> None:
        """Sum gradients over ranks and divide them by the tokens of the global batch.

        megatron-core would ask the device for that number, and the device would stand still meanwhile.
        """
        finalize_model_grads(chunks, None, **groups)
        for chunk in chunks:
            chunk.scale_gradients(1.0 / self._tokens)

    def _forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch, objective = next(batches), self._objective
        if objective is None:
            return self._family.losses(model, batch), sum_of_losses
        training = model.training
        logits = self._family.logits(model, batch)
        return logits, lambda logits: sum_of_losses(objective.of_logits(logits, batch, training=training))

    def _check_interleaving(self, count: int) -> None:
        if self.layout.virtual_pipeline > 1 and count % self.layout.pipeline:
            raise ValueError(
                f"virtual_pipeline {self.layout.virtual_pipeline} needs a number of micro-batches per step and data "
                f"rank that pipeline {self.layout.pipeline} divides, not {count}: change global_batch or micro_batch"
            )

    def _build_other(self, config: ModelConfig) -> list[torch.nn.Module]:
        """This rank's chunks of another model at the same layout, their weights not set."""
        megatron = self._family.transformer_config(config, self.layout, self._training)
        return build_chunks(self._family, config, self.layout, megatron)

    def prune(self, sparsity: float) -> None:
        """Zero the smallest linear weights for good; see :class:`parallelism.engines.base.Engine`."""
        for stored, pruned in self._recovery.pruned(sparsity):
            zero(stored.parameter, pruned)
            for start, tensors in self._optimizer_parts(stored):
                for values in tensors.values():
                    zero(values, pruned, start)

    def sharded_state(self) -> list[ShardedTensor]:
        """Pieces that alias this rank's weights and optimizer; see :class:`parallelism.engines.base.Engine`."""
        parameters = state.stored_parameters(self.chunks)
        pieces = state.model_pieces(parameters)
        if not self._distributed:
            pieces += [piece for stored in parameters for piece in self._optimizer_pieces(stored, sharded=False)]
        pieces = state.spread_over_data(pieces, self.data_rank, self.layout.data)
        if self._distributed:
            pieces += [piece for stored in parameters for piece in self._optimizer_pieces(stored, sharded=True)]
        return pieces

    def restored(self, step: int) -> None:
        """The pieces have been filled; see :class:`parallelism.engines.base.Engine`."""
        for group in self._adam.param_groups:
            if "step" in group:  # Transformer Engine's Adam counts per group, torch's per parameter
                group["step"] = step
            for parameter in group["params"]:
                if "step" in self._adam.state[parameter]:
                    self._adam.state[parameter]["step"].fill_(step)

    def _optimizer_pieces(self, stored: state.StoredParameter, *, sharded: bool) -> Iterator[ShardedTensor]:
        for start, tensors in self._optimizer_parts(stored):
            for name, values in tensors.items():
                yield from state.optimizer_pieces(stored, name, values, start=start, sharded=sharded)

    def _optimizer_parts(self, stored: state.StoredParameter) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What this rank has of a parameter's optimizer: first element of the flattened parameter, name → tensor."""
        if not self._distributed:
            main = getattr(stored.parameter, "main_param", stored.parameter)
            yield 0, self._optimizer_tensors(stored.parameter, main)
            return
        (optimizer,) = self._optimizer.chained_optimizers
        if stored.parameter not in optimizer.model_param_group_index_map:
            return  # the whole parameter belongs to other data ranks
        group, index = optimizer.model_param_group_index_map[stored.parameter]
        main = self._adam.param_groups[group]["params"][index]
        start = optimizer._get_model_param_range_map(stored.parameter)["param"].start
        yield start, self._optimizer_tensors(stored.parameter, main)

    def _optimizer_tensors(self, parameter: Parameter, main: Tensor) -> dict[str, Tensor]:
        """Name → tensor in the shape of ``main``, which is what the inner optimizer updates for ``parameter``."""
        inner = self._adam.state[main]
        if not inner:  # before the first step
            if not any("step" in group for group in self._adam.param_groups):
                inner["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
            inner["exp_avg"], inner["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
        tensors = {name: inner[name] for name in ("exp_avg", "exp_avg_sq")}
        return tensors if parameter.dtype == torch.float32 else {"fp32_param": main, **tensors}


def start_parallel_state(layout: Layout, seed: int) -> None:
    """Make megatron-core's process groups for ``layout`` (forgetting earlier ones) and seed all random states."""
    world = dist.get_world_size()
    if world != layout.world_size:
        raise ValueError(f"layout {layout} occupies {layout.world_size} ranks, but the process group has {world}")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
    )
    state.seed_everything(seed, step=0)


def build_chunks(
    family: ShardedFamily, config: ModelConfig, layout: Layout, megatron: TransformerConfig
) -> list[torch.nn.Module]:
    """This rank's pipeline chunks, uninitialised, on its device."""
    chunks = []
    for index in range(layout.virtual_pipeline):
        virtual = index if layout.virtual_pipeline > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
        chunk = family.build(config, megatron, first=first, last=last, chunk=virtual)
        chunk.vp_stage = virtual  # type: ignore[assignment]
        _mark_tensor_parallel(chunk)
        chunks.append(chunk)
    return chunks


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Say which parameters are split over tensor-parallel ranks: megatron-core does so only when it initialises them.

    Without the mark, its gradient norm would count the shard of the first tensor-parallel rank alone.
    """
    for stored in state.stored_parameters([chunk]):
        whole = math.prod(stored.blocks[0].global_shape)
        stored.parameter.tensor_model_parallel = stored.parameter.numel() != whole  # type: ignore[attr-defined]


def _megatron_config(family: ShardedFamily, task: TrainTask) -> TransformerConfig:
    megatron = family.transformer_config(task.model, task.layout, task.training)
    # The gradient is of the mean over all tokens of the global batch, whatever micro-batch they are in.
    megatron.calculate_per_token_loss = True
    return megatron


def _wrap(chunk: torch.nn.Module, megatron: TransformerConfig, distributed: bool) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
    )
    return DistributedDataParallel(megatron, config, chunk)


def _optimizer_config(training: TrainingConfig, distributed: bool) -> OptimizerConfig:
    """Adam with decoupled weight decay; megatron-core decays neither biases nor one-dimensional parameters."""
    bf16 = training.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before every step
        min_lr=0.0,
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        adam_eps=training.epsilon,
        clip_grad=training.gradient_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )


def _main_gradient(parameter: Any) -> Tensor:
    """Where megatron-core sums the gradients of a parameter up, in float32."""
    gradient: Tensor = parameter.main_grad
    return gradient


def sum_of_losses(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum to differentiate, number of tokens, [sum, number] to report) of one micro-batch's losses [B, S]."""
    # Filled on the device: a number sent there would wait for everything before it.
    count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return losses.sum(), count, torch.stack((losses.detach().double().sum(), count.double()))


def mean_over_ranks(parts: list[Tensor]) -> float:
    """Mean loss per token from the [sum, number] of the micro-batches on last stages, the same on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=device.device())
    if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
        total = torch.stack(parts).sum(0)
    dist.all_reduce(total)
    return float(total[0] / total[1])
