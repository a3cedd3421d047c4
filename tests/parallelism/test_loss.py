"""The loss that GPUs compute, on CPU ranks: against torch's cross-entropy, whole and divided over two ranks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from parallelism.engines.megatron import start_parallel_state
from parallelism.layout import Layout
from parallelism.models.gpt.loss import cross_entropy
from tests.ranks import run_ranks

VOCABULARY = 64


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [5, 3, V], labels [5, 3] and what the losses are weighed by."""
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(5, 3, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (5, 3), generator=generator)
    return logits, labels, torch.rand(5, 3, generator=generator)


def divided(tensor: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """This rank's losses and its part of the gradient, both float32."""
    start_parallel_state(Layout(tensor=tensor), seed=1)
    logits, labels, weights = inputs(dtype)
    part = logits.chunk(tensor, dim=-1)[torch.distributed.get_rank()].clone().requires_grad_()
    losses = cross_entropy(part * 1.0, labels)
    (losses * weights).sum().backward()
    assert part.grad is not None
    assert part.grad.dtype == dtype
    return losses.detach().numpy(), part.grad.float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2])
def test_loss_and_gradient_are_torchs(tensor: int, dtype: torch.dtype) -> None:
    logits, labels, weights = inputs(dtype)
    leaf = logits.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)
    ranks = run_ranks(divided, tensor, tensor, dtype)
    for losses, _ in ranks:
        torch.testing.assert_close(torch.from_numpy(losses), expected.detach(), rtol=1e-6, atol=1e-6)
    found = torch.from_numpy(np.concatenate([part for _, part in ranks], axis=-1))
    torch.testing.assert_close(found.to(dtype), gradient.to(dtype))
