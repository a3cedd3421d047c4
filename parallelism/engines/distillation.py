"""Learning from a teacher: the loss over a vocabulary that tensor-parallel ranks divide, the teacher's forward pass.

Nobody gathers logits: ranks agree on maxima and sums, a few numbers per token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from parallelism.models.base import Batch, ShardedFamily
from parallelism.vocabulary import hide_padding


def token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, weight: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """(1 - w)·CE + w·T²·KL(teacher ‖ student) of every token [B, S] float32 (Hinton, Vinyals & Dean 2015, section 2).

    With p = softmax(teacher / T), q = softmax(logits / T), KL = Σ p·(log p - log q); T² keeps its gradient of the size
    of CE's. ``logits`` and ``teacher`` [B, S, vocabulary / tensor] are this rank's part, ``logits`` are **overwritten**
    by the backward pass; ``labels`` [B, S] are ids in the whole vocabulary. Without a teacher w is 0.
    """
    losses: Tensor = _TokenLosses.apply(logits, labels, teacher, weight if teacher is not None else 0.0, temperature)
    return losses


class _TokenLosses(torch.autograd.Function):
    """In float32, one row of the batch after the other, so that no float32 copy of all logits is made."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | None, weight: float, temperature: float
    ) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        local = labels - dist.get_rank(group) * logits.shape[-1]
        highest = torch.stack([part.amax(-1).float() for part in (logits, teacher) if part is not None])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([_hard_sums(*row) for row in zip(logits, highest[0], local, strict=True)], dim=1)
        if teacher is not None:
            rows = zip(logits, highest[0], teacher, highest[1], strict=True)
            sums = torch.cat((sums, torch.stack([_soft_sums(*row, temperature) for row in rows], dim=1)))
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(logits, local, teacher, highest, sums)
        ctx.weight, ctx.temperature = weight, temperature
        losses = (1.0 - weight) * (sums[0].log() - sums[1])
        if teacher is None:
            return losses
        total, teacher_total, cross = sums[2:]
        divergence = cross / (temperature * teacher_total) - teacher_total.log() + total.log()
        return losses + weight * temperature**2 * divergence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(1 - w)·(softmax - one-hot) + w·T·(q - p), times the token's gradient, written over the logits."""
        logits, local, teacher, highest, sums = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        columns = torch.arange(logits.shape[-1], device=logits.device)
        for index in range(len(logits)):
            shifted = logits[index].float() - highest[0, index, :, None]
            slope = shifted.exp() / sums[0, index, :, None] - (columns == local[index, :, None]).float()
            slope *= 1.0 - weight
            if teacher is not None:
                aim = teacher[index].float() - highest[1, index, :, None]
                distance = _softened(shifted, temperature) / sums[2, index, :, None]
                distance -= _softened(aim, temperature) / sums[3, index, :, None]
                slope += weight * temperature * distance
            logits[index].copy_(slope * gradient[index, :, None])
        return logits, None, None, None, None


def _hard_sums(logits: Tensor, highest: Tensor, local: Tensor) -> Tensor:
    """[2, S]: Σ exp(z - max) and the label's z - max (0 where it lies on another rank) of one row [S, V]."""
    shifted = logits.float() - highest[:, None]
    here = (local >= 0) & (local < logits.shape[-1])
    label = shifted.gather(-1, local.where(here, 0)[:, None]).squeeze(-1)
    return torch.stack((shifted.exp().sum(-1), label.where(here, 0.0)))


def _soft_sums(logits: Tensor, highest: Tensor, teacher: Tensor, teacher_highest: Tensor, temperature: float) -> Tensor:
    """[3, S] of one row, with z and t less their maxima: Σ exp(z/T), Σ exp(t/T), Σ exp(t/T)·(t - z)."""
    shifted, aim = logits.float() - highest[:, None], teacher.float() - teacher_highest[:, None]
    weights = _softened(aim, temperature)
    totals = (_softened(shifted, temperature).sum(-1), weights.sum(-1), (weights * (aim - shifted)).sum(-1))
    return torch.stack(totals)


def _softened(shifted: Tensor, temperature: float) -> Tensor:
    return (shifted / temperature).exp()


class Teacher:
    """A model that is only asked: this rank's pipeline chunks of it, in evaluation mode and without gradients.

    Without pipeline stages a micro-batch's logits are computed when they are asked for. With stages the whole schedule
    runs beforehand, forward only, and the last stage keeps the logits of all micro-batches of the step.
    """

    def __init__(self, family: ShardedFamily, chunks: Sequence[Module], pipeline: int) -> None:
        self._family = family
        self._chunks = list(chunks)
        self._pipeline = pipeline
        self._kept: list[Tensor] = []
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch]) -> None:
        """Run the stages' schedule over a step's micro-batches (on the device), where there are stages. Collective."""
        if self._pipeline == 1:
            return
        self._kept.clear()
        rows, length = batches[0]["tokens"].shape
        iterators = [iter(batches) for _ in self._chunks]
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=True,
        )

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, S, vocabulary / tensor] of a micro-batch, on the last stage; those that were kept in their order."""
        if self._pipeline > 1:
            return self._kept.pop(0)
        return self._family.logits(self._chunks[0], batch)

    def _forward(self, batches: Iterator[Batch], chunk: Module) -> tuple[Tensor, Any]:
        return self._family.logits(chunk, next(batches)), self._keep

    def _keep(self, logits: Tensor) -> tuple[Tensor, None]:
        """Where megatron-core expects a loss."""
        self._kept.append(logits)
        return logits.new_zeros(()), None


class Objective:
    """The loss of a training that began with given weights: over the real vocabulary, with a teacher or without.

    :meth:`losses` stands where a family's does, for engines without pipeline stages.
    """

    def __init__(
        self, family: ShardedFamily, vocab_size: int, teacher: Teacher | None, weight: float, temperature: float
    ) -> None:
        self._family = family
        self._vocab_size = vocab_size
        self._teacher = teacher
        self._weight = weight
        self._temperature = temperature

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Before a training step over these micro-batches (on the device). Collective."""
        if self._teacher is not None:
            self._teacher.prepare(batches)

    def losses(self, module: Module, batch: Batch) -> Tensor:
        """Per-token losses [B, S] float32 of a micro-batch; in evaluation mode the cross-entropy alone."""
        return self.of_logits(self._family.logits(module, batch), batch, training=module.training)

    def of_logits(self, logits: Tensor, batch: Batch, *, training: bool) -> Tensor:
        """The same from the logits [B, S, vocabulary / tensor] of the last stage."""
        hide_padding(logits, self._vocab_size)
        if self._teacher is None or not training:
            return token_losses(logits, batch["labels"])
        aim = hide_padding(self._teacher.logits(batch), self._vocab_size)
        return token_losses(logits, batch["labels"], aim, self._weight, self._temperature)
