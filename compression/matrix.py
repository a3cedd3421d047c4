"""A weight matrix after a recipe: what it is, how it is stored, and what it is worth when read back.

Everything that evaluation, export and verification use goes through :func:`decode`, so that what is measured is what
the file holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.config import Number
from compression.levels import FP8_DTYPE
from compression.packing import pack, packed_bytes, unpack
from parallelism.options import Options

STORED_DTYPE = torch.bfloat16
"""What is not quantised is stored in this type: norms, biases, and the weights of recipes without quantisation."""


@dataclass(frozen=True)
class Quantized:
    """Codes of one matrix [out, in], its columns in groups of equal size: weight = (code - zero) · scale.

    ``codes`` [out, in] uint8 below 2^bits; ``scales`` [out, groups] of type :data:`compression.levels.SCALE_DTYPE`;
    ``zeros`` [out, groups] uint8 below 2^bits, or None for symmetric codes, whose zero is 2^(bits-1) everywhere. With
    ``number`` fp8 the codes are bytes of FP8 e4m3 and stand for weight = number · scale.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    number: Number = "int"

    def dense(self) -> Tensor:
        """The weights [out, in] float32 that the codes stand for."""
        grouped = self.codes.view(*self.scales.shape, -1)
        if self.number == "fp8":
            levels = grouped.view(FP8_DTYPE).float()
        else:
            zeros = 2 ** (self.bits - 1) if self.zeros is None else self.zeros[..., None].float()
            levels = grouped.float() - zeros
        return (levels * self.scales[..., None].float()).view(self.codes.shape)


@dataclass(frozen=True)
class CompressedMatrix:
    """One matrix [out, in] of a variant: quantised, or ``weight`` in :data:`STORED_DTYPE`.

    ``mask`` [out, in] bool is True where a weight was kept; None where nothing was pruned. Pruned weights are exactly
    zero in :meth:`dense`.
    """

    mask: Tensor | None
    weight: Tensor | None = None
    quantized: Quantized | None = None

    def dense(self) -> Tensor:
        """The weights [out, in] float32 that are evaluated."""
        if self.quantized is not None:
            return self.quantized.dense()
        assert self.weight is not None
        return self.weight.float()


class Encoding(Options):
    """How one matrix lies in a compact file; the tensors are named ``NAME:values``, ``NAME:scales``, …

    ``values`` are codes of ``bits`` bits packed without gaps (bytes of FP8 e4m3 where ``number`` says so), or numbers
    of :data:`STORED_DTYPE` where ``bits`` is 16.
    ``sparse``: values of kept weights only, in row-major order, and a ``mask`` of one bit per weight.
    """

    shape: tuple[int, int]
    bits: int
    groups: int = 0
    symmetric: bool = True
    number: Number = "int"
    sparse: bool = False


def encode(matrix: CompressedMatrix) -> tuple[Encoding, dict[str, Tensor]]:
    """How the matrix is stored: its encoding, and suffix → tensor. Sparse storage is used where it is smaller."""
    quantized, mask = matrix.quantized, matrix.mask
    values = matrix.weight if quantized is None else quantized.codes
    assert values is not None
    rows, columns = values.shape
    bits = 16 if quantized is None else quantized.bits
    if mask is not None and not _smaller_sparse(mask, bits):
        mask = None
    kept = values.reshape(-1) if mask is None else values[mask]
    tensors = {"values": kept if quantized is None else pack(kept, bits)}
    if mask is not None:
        tensors["mask"] = pack(mask, 1)
    if quantized is not None:
        tensors["scales"] = quantized.scales
        if quantized.zeros is not None:
            tensors["zeros"] = pack(quantized.zeros, bits)
    encoding = Encoding(
        shape=(rows, columns),
        bits=bits,
        groups=0 if quantized is None else quantized.scales.shape[1],
        symmetric=quantized is None or quantized.zeros is None,
        number="int" if quantized is None else quantized.number,
        sparse=mask is not None,
    )
    return encoding, tensors


def decode(encoding: Encoding, read: Callable[[str], Tensor]) -> CompressedMatrix:
    """The inverse of :func:`encode`; ``read`` gives the tensor of a suffix. Without stored mask, the mask is None."""
    rows, columns = encoding.shape
    mask = unpack(read("mask"), 1, rows * columns).bool().view(rows, columns) if encoding.sparse else None
    kept = rows * columns if mask is None else int(mask.sum())
    if encoding.bits == 16:
        return CompressedMatrix(mask, weight=_spread(read("values"), mask, encoding.shape))
    codes = unpack(read("values"), encoding.bits, kept)
    scales, zeros = read("scales"), None
    if not encoding.symmetric:
        zeros = unpack(read("zeros"), encoding.bits, scales.numel()).view(scales.shape)
    if mask is None:
        filled = codes.view(rows, columns)
    else:
        # A pruned weight's code is its group's zero, so that it is exactly zero.
        filled = _zero_codes(encoding, zeros, codes.device)
        filled[mask] = codes
    return CompressedMatrix(mask, quantized=Quantized(filled, scales, zeros, encoding.bits, encoding.number))


def _smaller_sparse(mask: Tensor, bits: int) -> bool:
    kept = int(mask.sum())
    return packed_bytes(mask.numel(), 1) + packed_bytes(kept, bits) < packed_bytes(mask.numel(), bits)


def _spread(values: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if mask is None:
        return values.view(shape)
    full = torch.zeros(shape, dtype=values.dtype, device=values.device)
    full[mask] = values
    return full


def _zero_codes(encoding: Encoding, zeros: Tensor | None, device: torch.device) -> Tensor:
    rows, columns = encoding.shape
    if zeros is None:
        zero = 0 if encoding.number == "fp8" else 2 ** (encoding.bits - 1)
        return torch.full((rows, columns), zero, dtype=torch.uint8, device=device)
    return zeros.repeat_interleave(columns // encoding.groups, dim=1)
