"""The one checkpoint form of model and optimizer, whichever engine holds them and however they are sharded.

Names: a model parameter has megatron-core's key with the layer in it (``decoder.layers.3.mlp.linear_fc1.weight``); its
optimizer tensors are ``optimizer.state.{fp32_param|exp_avg|exp_avg_sq}.<model key>`` in float32 and the parameter's
full shape (``fp32_param`` only where the model itself is not float32). Every tensor of an engine is described by
:class:`ShardedTensor` pieces that *alias* the engine's own memory: they are written from there and loaded into it.

How an engine uses this module::

    parameters = stored_parameters(chunks)
    pieces = model_pieces(parameters)
    for stored in parameters:
        pieces += optimizer_pieces(stored, "exp_avg", average_of(stored.parameter))
    pieces = spread_over_data(pieces, data_rank, data_size)

That is for an optimizer that all data ranks hold alike. One that is sharded over data ranks passes its part of the
flattened parameter with ``start`` and ``sharded=True``, after the spreading: each rank writes what it holds, and
nothing is gathered.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor
from torch.nn import Module, Parameter

from parallelism.device import has_cuda
from parallelism.initialize import PER_LAYER_KEYS

OPTIMIZER_TENSORS = ("fp32_param", "exp_avg", "exp_avg_sq")
OPTIMIZER_PREFIX = "optimizer.state."
ENGINE_PREFIX = "engine."
"""Begins the names of what only the engine that wrote it understands; a checkpoint of another engine lacks it."""


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of this rank and the blocks, consecutive in its flattened form, that it has in the stored tensor.

    There is one block, except for the first matrix of a gated feed-forward: its gate rows and its up rows lie apart.
    """

    parameter: Parameter
    blocks: tuple[ShardedTensor, ...]

    @property
    def key(self) -> str:
        """The parameter's name in the checkpoint."""
        key: str = self.blocks[0].key
        return key


def stored_parameters(chunks: Sequence[Module]) -> list[StoredParameter]:
    """Every parameter of this rank's (unwrapped) pipeline chunks, in an order that is the same on all data ranks."""
    return [stored for chunk in chunks for stored in _stored_in_chunk(chunk)]


def _stored_in_chunk(chunk: Module) -> Iterator[StoredParameter]:
    parameters = {id(parameter): parameter for parameter in chunk.parameters()}
    entries: dict[str, Any] = chunk.sharded_state_dict(metadata=PER_LAYER_KEYS)  # type: ignore[operator]
    for name, entry in entries.items():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # what Transformer Engine's layers keep beside their weights
        parameter = parameters[id(entry.data)]
        built = {name: entry}
        apply_factories(built)
        blocks = sorted(nested_values(built), key=lambda block: block.data.storage_offset())
        begin = parameter.storage_offset()
        for block in blocks:
            assert block.data.is_contiguous()
            assert block.data.storage_offset() == begin, f"{block.key}: not in the order of the parameter"
            begin += block.data.numel()
        yield StoredParameter(parameter, tuple(replace(block, data=block.data.detach()) for block in blocks))


def model_pieces(parameters: Sequence[StoredParameter]) -> list[ShardedTensor]:
    """The weights."""
    return [block for stored in parameters for block in stored.blocks]


def optimizer_pieces(
    stored: StoredParameter, name: str, values: Tensor, *, start: int = 0, sharded: bool = False
) -> list[ShardedTensor]:
    """Pieces of the optimizer tensor ``name`` of a parameter; they are views of ``values``.

    ``values`` holds the elements from ``start`` on of the flattened parameter, contiguous, in any shape: the whole
    parameter, or the part of this data rank (``sharded``: the other data ranks hold the other parts).
    """
    assert name in OPTIMIZER_TENSORS
    return _pieces(stored, f"{OPTIMIZER_PREFIX}{name}.", values, start, sharded)


def sharded_model_pieces(stored: StoredParameter, values: Tensor, *, start: int) -> list[ShardedTensor]:
    """The weights where each data rank holds only its part of them (ZeRO-3); see :func:`optimizer_pieces`."""
    return _pieces(stored, "", values, start, sharded=True)


def _pieces(stored: StoredParameter, prefix: str, values: Tensor, start: int, sharded: bool) -> list[ShardedTensor]:
    flat = values.detach().view(-1)
    pieces: list[ShardedTensor] = []
    begin = 0
    for block in stored.blocks:
        size = math.prod(block.local_shape)
        low, high = max(start, begin), min(start + flat.numel(), begin + size)
        if low < high:
            pieces += _rectangular_pieces(block, prefix, flat[low - start : high - start], low - begin, sharded)
        begin += size
    return pieces


def _rectangular_pieces(
    block: ShardedTensor, prefix: str, flat: Tensor, start: int, sharded: bool
) -> Iterator[ShardedTensor]:
    position = 0
    for offset, shape in rectangles(tuple(block.local_shape), start, start + flat.numel()):
        size = math.prod(shape)
        yield ShardedTensor(
            key=f"{prefix}{block.key}",
            data=flat[position : position + size].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_shape=block.global_shape,
            global_offset=tuple(outer + inner for outer, inner in zip(block.global_offset, offset, strict=True)),
            axis_fragmentations=None,
            replica_id=(*block.replica_id[:-1], 0) if sharded else block.replica_id,
        )
        position += size


def rectangles(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements ``start`` to ``end`` of a row-major tensor as (offset, extent) of boxes, in their order.

    A range of a matrix is at most three boxes: the rest of a row, whole rows, and the beginning of a row.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    if start % row or end - start < row:
        index = start // row
        stop = min(end, (index + 1) * row)
        for offset, extent in rectangles(shape[1:], start - index * row, stop - index * row):
            yield (index, *offset), (1, *extent)
        start = stop
    whole = (end - start) // row
    if whole:
        yield (start // row, *[0] * (len(shape) - 1)), (whole, *shape[1:])
    yield from rectangles(shape, start + whole * row, end)


def spread_over_data(pieces: Sequence[ShardedTensor], data_rank: int, data_size: int) -> list[ShardedTensor]:
    """Share the writing of what all data ranks hold alike among them, evenly by bytes.

    All data ranks pass the same pieces in the same order: no ``sharded`` ones, which each rank writes by itself.
    """
    load = [0] * data_size
    spread = []
    for piece in pieces:
        writer = load.index(min(load))
        load[writer] += math.prod(piece.local_shape) * piece.dtype.itemsize
        spread.append(replace(piece, replica_id=(*piece.replica_id[:-1], (data_rank - writer) % data_size)))
    return spread


def seed_everything(seed: int, step: int) -> None:
    """Seed Python, numpy, torch and megatron's tensor-parallel generator from (seed, step, pipeline and data rank).

    Tensor-parallel ranks share the plain generators, because they hold copies of the same residual stream.
    """
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank())
    digest = hashlib.sha256(f"{seed}|{step}|{place}".encode()).digest()
    derived = int.from_bytes(digest[:4], "little") >> 1
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)
    model_parallel_cuda_manual_seed(derived, force_reset_rng=True)


def random_state() -> dict[str, Any]:
    """Every random state of this rank, in types that ``torch.load(weights_only=True)`` reads.

    Python's own is left out: training draws nothing from it, but clients of object stores do, when they try again.
    """
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    return {
        "numpy": (algorithm, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tensor_parallel": dict(get_cuda_rng_tracker().get_states()),
    }


def random_state_key(rank: int, world_size: int) -> str:
    """The name under which a rank's random states are stored."""
    key: str = ShardedObject("random_state", None, (world_size,), (rank,)).unique_key
    return key


def restore_random_state(saved: dict[str, Any]) -> None:
    """Go back to what :func:`random_state` returned, on the same rank of the same layout."""
    algorithm, keys, *rest = saved["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if has_cuda():
        torch.cuda.set_rng_state(saved["cuda"])
    get_cuda_rng_tracker().set_states(saved["tensor_parallel"])
