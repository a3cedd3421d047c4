"""LayerNorm and RMSNorm for megatron-core's local layers, with sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from parallelism.models.gpt.functions import rms_norm


class Norm(torch.nn.Module):
    """The norm that ``config.normalization`` names, over the last axis.

    Stands where megatron-core's ``WrappedTorchNorm`` stands, which refuses sequence parallelism: there every rank
    normalises its own part of the sequence, so that the gradients of these parameters are summed over ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.epsilon = eps
        self.weight = Parameter(torch.ones(hidden_size))
        self.bias = Parameter(torch.zeros(hidden_size)) if config.normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden] → the same shape."""
        if self.bias is None:
            return rms_norm(hidden, self.weight, self.epsilon)
        return torch.nn.functional.layer_norm(hidden, self.shape, self.weight, self.bias, self.epsilon)
