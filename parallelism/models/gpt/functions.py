"""The elementwise parts of Llama-style layers with backward passes by hand.

Autograd's own chains of products, halves and concatenations read and write the activations two to three times as often.
Everything is computed in the dtype of the input, norms in float32. On GPUs each pass is one kernel: torch's own for
norms, compiled for the rest (:func:`parallelism.device.fused`).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parallelism.device import fused


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / √(mean(x²) + ε) · w over the last axis (Zhang & Sennrich 2019, equation 4); hidden [..., n], weight [n]."""
    if hidden.is_cuda:
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, epsilon)
    output: Tensor = _RMSNorm.apply(hidden, weight, epsilon)
    return output


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020) of the two halves of the last axis: [..., 2n] → [..., n]."""
    output: Tensor = (_FusedSwiGLU if gate_and_up.is_cuda else _SwiGLU).apply(gate_and_up)
    return output


def rotate(heads: Tensor, base: float) -> Tensor:
    """Rotary positions 0, 1, … along the first axis (Su et al. 2021, equation 34); heads [S, B, heads, d].

    Channel i is paired with channel i + d/2, as Llama's checkpoints have it.
    """
    cosine, sine = _angles(heads.shape[0], heads.shape[-1], base, heads.dtype, heads.device)
    output: Tensor = _Rotation.apply(heads, cosine, sine)
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = hidden.float()
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (exact * inverse).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # With r = 1/√(mean(x²) + ε): dw = Σ g·x·r and dx = r·(g·w - x·r²·mean(g·w·x)).
        hidden, weight, inverse = ctx.saved_tensors
        width = hidden.shape[-1]
        exact, slope = hidden.float().view(-1, width), gradient.float().reshape(-1, width)
        inverse, scale = inverse.view(-1, 1), weight.float()
        product = slope * exact
        weight_gradient = product.t() @ inverse.view(-1)
        projection = (product @ scale).view(-1, 1).mul_(inverse.pow(3)).div_(-width)
        hidden_gradient = (slope * scale).mul_(inverse).addcmul_(exact, projection)
        return hidden_gradient.view_as(hidden).to(hidden.dtype), weight_gradient.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_and_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_and_up, activated = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result


class _FusedSwiGLU(torch.autograd.Function):
    """Nothing but the input waits for the backward pass: within one kernel silu costs nothing a second time."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _swiglu_forward(gate_and_up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        return _swiglu_backward(gate_and_up, gradient)


@fused
def _swiglu_forward(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_and_up.dtype)


@fused
def _swiglu_backward(gate_and_up: Tensor, gradient: Tensor) -> Tensor:
    # With s = sigmoid(g): d silu(g)/dg = s·(1 + g·(1 - s)).
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    slope, sigmoid = gradient.float(), torch.sigmoid(gate)
    gate_gradient = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return torch.cat((gate_gradient, slope * gate * sigmoid), dim=-1).to(gate_and_up.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return (_rotated_at_once if heads.is_cuda else _rotated)(heads, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return (_rotated_at_once if gradient.is_cuda else _rotated)(gradient, cosine, sine, -1), None, None


@fused
def _rotated_at_once(heads: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    """What :func:`_rotated` computes, with float32 intermediates."""
    left, right = heads.float().chunk(2, dim=-1)
    cosine, sine = cosine.float(), direction * sine.float()
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1).to(heads.dtype)


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor, direction: int) -> Tensor:
    """Both halves of the channels turned by the angle, forwards (1) or backwards (-1)."""
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    left, right = heads.chunk(2, dim=-1)
    new_left, new_right = result.chunk(2, dim=-1)
    torch.mul(left, cosine, out=new_left)
    new_left.addcmul_(right, sine, value=-direction)
    torch.mul(right, cosine, out=new_right)
    new_right.addcmul_(left, sine, value=direction)
    return result


@lru_cache(maxsize=8)
def _angles(length: int, channels: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(-2i/d), each [S, 1, 1, d/2]."""
    with torch.no_grad():
        frequencies = base ** -(torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return angles.cos().to(dtype)[:, None, None, :], angles.sin().to(dtype)[:, None, None, :]
