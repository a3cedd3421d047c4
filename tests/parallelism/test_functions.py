"""Norm, gate and rotation with their backward passes by hand, against autograd's of the textbook formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallelism.models.gpt.functions import (
    _angles,
    _FusedSwiGLU,
    _rotated,
    _rotated_at_once,
    rms_norm,
    rotate,
    swiglu,
)

EPSILON, BASE = 1e-5, 10000.0


def textbook_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight


def textbook_gate(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def textbook_rotation(heads: Tensor) -> Tensor:
    """Every pair (i, i + d/2) as a complex number, multiplied by e^(i·position·base^(-2i/d))."""
    length, *_, channels = heads.shape
    frequencies = BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.arange(length, dtype=torch.float64)[:, None, None, None] * frequencies
    left, right = heads.chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def values_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), leaves)]


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "norm": (lambda hidden, weight: rms_norm(hidden, weight, EPSILON), textbook_norm, [(7, 3, 24), (24,)]),
    "gate": (swiglu, textbook_gate, [(7, 3, 50)]),
    "gate as on GPUs": (_FusedSwiGLU.apply, textbook_gate, [(7, 3, 50)]),
    "rotation": (lambda heads: rotate(heads, BASE), textbook_rotation, [(9, 2, 3, 8)]),
}


@pytest.mark.parametrize("name", CASES)
def test_against_autograd_in_float64(name: str) -> None:
    function, textbook, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = values_and_gradients(textbook, [tensor.double() for tensor in inputs])
    for actual, exact in zip(values_and_gradients(function, inputs), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=2e-5)


def test_half_precision_is_rounded_once() -> None:
    """In bfloat16 the norm is computed in float32: half a unit in the last place, 2⁻⁸ of the value at most."""
    hidden, weight = torch.randn(64, 48).bfloat16(), torch.rand(48).bfloat16()
    exact = textbook_norm(hidden.double(), weight.double())
    actual = rms_norm(hidden, weight, EPSILON)
    assert actual.dtype == torch.bfloat16
    assert ((actual.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001).all()


def test_rotation_depends_on_distance_only() -> None:
    """The product of a query and a key at a fixed distance is the same everywhere (Su et al. 2021, equation 16)."""
    query, key = (torch.randn(1, 1, 1, 16).expand(12, 1, 1, 16) for _ in range(2))
    scores = rotate(query, BASE).view(12, 16) @ rotate(key, BASE).view(12, 16).T
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)


@pytest.mark.parametrize("direction", [1, -1])
def test_rotation_in_one_kernel_is_the_rotation(direction: int) -> None:
    heads = torch.randn(9, 2, 3, 8)
    angles = _angles(9, 8, BASE, heads.dtype, heads.device)
    torch.testing.assert_close(_rotated_at_once(heads, *angles, direction), _rotated(heads, *angles, direction))
