"""Codes of 1 to 8 bits without gaps."""

import pytest
import torch

from compression import packing
from compression.packing import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 24, 1001])
def test_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_a_code_of_three_bits_takes_three_bits() -> None:
    # Codes 1, 2, …, 7, 0 from the lowest bit up: 000 111 110 101 100 011 010 001, cut into bytes from the right.
    packed = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b11_010_001, 0b0_101_100_0, 0b000_111_11]
    assert packed_bytes(1_000_000, 3) == 375_000
    assert packed_bytes(1_000_000, 6) == 750_000


def test_a_mask_takes_one_bit_per_weight() -> None:
    mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    assert pack(mask, 1).tolist() == [0b0011_1001]


@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_long_rows_are_packed_in_pieces_to_the_same_bytes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (203,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_AT_ONCE", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 203), codes)
