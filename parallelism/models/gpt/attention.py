"""Core attention for megatron-core's local layers on torch's scaled dot product (flash kernels on GPUs and CPUs)."""

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parallelism.models.gpt.functions import rotate


class CausalAttention(torch.nn.Module):
    """softmax(QKᵀ/√d)V over the past, without materialising the S×S scores.

    Stands where megatron-core's ``DotProductAttention`` stands; it holds no parameters. With ``rotary_base`` it turns
    queries and keys by their positions itself.
    """

    def __init__(self, config: TransformerConfig, *, rotary_base: float | None = None, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.rotary_base = rotary_base

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Query [S, B, heads, d], key and value [S, B, groups, d] → [S, B, heads·d]."""
        length, batch, heads, channels = query.shape
        if self.rotary_base is not None:
            query, key = rotate(query, self.rotary_base), rotate(key, self.rotary_base)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = key.shape[1] != heads
        if self.training and self.dropout > 0.0:
            # Each tensor-parallel rank holds other heads and so needs other random numbers.
            with get_cuda_rng_tracker().fork():
                context = _attend(query, key, value, self.dropout, grouped)
        else:
            context = _attend(query, key, value, 0.0, grouped)
        return context.permute(2, 0, 1, 3).reshape(length, batch, heads * channels)


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout: float, grouped: bool) -> Tensor:
    if grouped and query.is_cuda and query.dtype == torch.float32:
        # CUDA's one kernel for float32 that does not materialise the scores wants a key and a value for every head.
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        grouped = False
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped
    )
