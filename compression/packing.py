"""Codes of any width from 1 to 8 bits packed without gaps.

Code *i* occupies the bits ``i·bits`` to ``(i+1)·bits - 1`` of one long little-endian bit string: a 3-bit code takes
3 bits, and eight codes of *b* bits take *b* bytes. A mask is packed as codes of one bit.
"""

import math

import torch
from torch import Tensor

_AT_ONCE = 8 << 20  # codes per pass: bounds the wider intermediates to some tens of MiB; a multiple of 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, bool or uint8, below 2^bits) in row-major order → uint8 [:func:`packed_bytes`]."""
    assert 1 <= bits <= 8
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8 or not flat.numel():
        return flat.clone()
    return torch.cat([_pack(part, bits) for part in flat.split(_AT_ONCE)])


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [count]."""
    assert 1 <= bits <= 8
    assert packed.numel() == packed_bytes(count, bits), f"{packed.numel()} bytes for {count} codes of {bits} bits"
    if bits == 8 or not count:
        return packed.clone()
    return torch.cat([_unpack(part, bits) for part in packed.split(_AT_ONCE // 8 * bits)])[:count]


def _pack(flat: Tensor, bits: int) -> Tensor:
    codes, octets, dtype = _word(bits)
    whole = torch.nn.functional.pad(flat, (0, -flat.numel() % codes)).view(-1, codes).to(dtype)
    words = (whole << _shifts(codes, bits, whole)).sum(1, keepdim=True, dtype=dtype)
    # Bytes by arithmetic, not by a view: the same on machines of either byte order.
    split = (words >> _shifts(octets, 8, words)) & 255
    return split.to(torch.uint8).view(-1)[: packed_bytes(flat.numel(), bits)]


def _unpack(packed: Tensor, bits: int) -> Tensor:
    codes, octets, dtype = _word(bits)
    whole = torch.nn.functional.pad(packed, (0, -packed.numel() % octets)).view(-1, octets).to(dtype)
    words = (whole << _shifts(octets, 8, whole)).sum(1, keepdim=True, dtype=dtype)
    return ((words >> _shifts(codes, bits, words)) & (2**bits - 1)).to(torch.uint8).view(-1)


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest run that ends on a byte: codes in it, bytes in it, and an integer type that holds it."""
    width = math.lcm(bits, 8)
    dtype = torch.uint8 if width == 8 else torch.int32 if width < 32 else torch.int64
    return width // bits, width // 8, dtype


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device) * step
