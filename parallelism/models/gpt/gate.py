"""The gate of Llama-style feed-forward blocks for megatron-core's local layers."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from parallelism.models.gpt.functions import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) · up; stands where Transformer Engine's activation modules stand, and holds no parameters."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2n], the gate first → [..., n]."""
        return swiglu(gate_and_up)
