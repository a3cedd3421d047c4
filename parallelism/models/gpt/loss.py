"""Cross-entropy over a vocabulary that is divided over tensor-parallel ranks, for GPUs.

megatron-core's own makes a float32 copy of the logits and goes over it nine times. Here the logits stay as the output
layer wrote them, are read once for the loss, and become their own gradient in the backward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from parallelism.device import fused


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], float32 [...], computed in float32.

    ``logits`` [..., vocabulary / tensor] are this rank's part and are **overwritten** by the backward pass, so that
    nothing else may need them; ``labels`` [...] are ids in the whole vocabulary.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        local = labels - dist.get_rank(group) * logits.shape[-1]
        total, predicted = _log_sum_exp(logits), _predicted(logits, local)
        if dist.get_world_size(group) > 1:
            highest = total.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            parts = torch.stack(((total - highest).exp(), predicted))
            dist.all_reduce(parts, group=group)
            total, predicted = parts[0].log() + highest, parts[1]
        ctx.save_for_backward(logits, local, total)
        return total - predicted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, local, total = ctx.saved_tensors
        return _to_gradient(logits, local, total, gradient.contiguous()), None


@fused
def _log_sum_exp(logits: Tensor) -> Tensor:
    """log Σ exp of the last axis, float32."""
    return torch.logsumexp(logits.float(), dim=-1)


def _predicted(logits: Tensor, local: Tensor) -> Tensor:
    """The label's logit, float32; 0 where it lies on another rank."""
    here = (local >= 0) & (local < logits.shape[-1])
    found = logits.gather(-1, local.where(here, 0).unsqueeze(-1)).squeeze(-1).float()
    return found.where(here, 0.0)


@fused
def _to_gradient(logits: Tensor, local: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    """(softmax - one-hot) · gradient, written over the logits."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    probability = (logits.float() - total.unsqueeze(-1)).exp()
    slope = probability - (columns == local.unsqueeze(-1)).float()
    return logits.copy_(slope * gradient.unsqueeze(-1))
