"""Start weights that do not depend on the layout.

Every full tensor is drawn from (seed, its name in the checkpoint); each rank keeps the slice that it holds. Standard
deviations follow GPT-2: residual outputs (``linear_proj``, ``linear_fc2``) are scaled by 1/√(2·layers).
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
PER_LAYER_KEYS = {"non_homogeneous_layers": True}
"""``metadata`` for ``sharded_state_dict``: one key per layer instead of one stacked tensor."""


@torch.no_grad()
def initialize(chunks: Sequence[torch.nn.Module], seed: int, std: float, layers: int) -> None:
    """Fill the parameters of this rank's pipeline chunks in place."""
    for chunk in chunks:
        for shard in _sharded_tensors(chunk):
            full = _full_tensor(shard.key, tuple(shard.global_shape[shard.prepend_axis_num :]), seed, std, layers)
            offsets = shard.global_offset[shard.prepend_axis_num :]
            assert shard.data is not None
            local = tuple(slice(start, start + size) for start, size in zip(offsets, shard.local_shape, strict=True))
            shard.data.copy_(full[local])


def _sharded_tensors(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    state: dict[str, Any] = chunk.sharded_state_dict(metadata=PER_LAYER_KEYS)  # type: ignore[operator]
    state = {key: value for key, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _full_tensor(key: str, shape: tuple[int, ...], seed: int, std: float, layers: int) -> torch.Tensor:
    name = key.rpartition(".")[2]
    if "norm" in key and name.endswith("weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    scale = std / math.sqrt(2 * layers) if key.endswith(RESIDUAL_OUTPUTS) else std
    return torch.empty(shape).normal_(0.0, scale, generator=generator)
