"""The vocabulary as tensor-parallel ranks divide it, padding included."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def hide_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """``logits`` [..., padded vocabulary / tensor], in place, lowest where the entry only pads the vocabulary.

    Its probability, and so its gradient, is exactly zero then: the loss is that of the real vocabulary, as evaluation
    and exported models have it. Weights that come from elsewhere know nothing of padding: the logits of its zero rows
    would be 0, often far above those of real tokens.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    width = logits.shape[-1]
    real = min(max(vocab_size - dist.get_rank(group) * width, 0), width)
    logits.detach()[..., real:].fill_(torch.finfo(logits.dtype).min)
    return logits
