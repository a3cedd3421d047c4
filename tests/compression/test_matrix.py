"""How a matrix lies in a compact file, and that it comes back bit for bit."""

from pathlib import Path

import pytest
import torch

from compression.compact import CompactFile, CompactPart
from compression.levels import SCALE_DTYPE, Levels
from compression.matrix import CompressedMatrix, Encoding, Quantized, decode, encode
from compression.methods.magnitude import prune
from compression.methods.rtn import round_to_levels, round_to_nearest
from compression.recipe import Pruning

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.1


def _mask(sparsity: float | None) -> torch.Tensor | None:
    return None if sparsity is None else prune(WEIGHT, [Pruning(method="magnitude", sparsity=sparsity)])[0].mask


@pytest.mark.parametrize("sparsity", [None, 0.3, 0.7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_quantised_matrices_come_back(bits: int, group: int | None, symmetric: bool, sparsity: float | None) -> None:
    mask = _mask(sparsity)
    weight = WEIGHT if mask is None else torch.where(mask, WEIGHT, 0.0)
    matrix = CompressedMatrix(mask, quantized=round_to_nearest(weight, bits, group, symmetric))
    encoding, tensors = encode(matrix)
    back = decode(encoding, tensors.__getitem__)
    assert torch.equal(back.dense(), matrix.dense())
    assert back.quantized is not None
    assert matrix.quantized is not None
    assert torch.equal(back.quantized.codes, matrix.quantized.codes)
    if encoding.sparse:
        assert mask is not None
        assert back.mask is not None
        assert torch.equal(back.mask, mask)
    if mask is not None:
        assert (back.dense()[~mask] == 0.0).all()


@pytest.mark.parametrize("sparsity", [None, 0.05, 0.5])
@pytest.mark.parametrize("group", [None, 8])
def test_fp8_matrices_come_back(group: int | None, sparsity: float | None, tmp_path: Path) -> None:
    mask = _mask(sparsity)
    weight = WEIGHT if mask is None else torch.where(mask, WEIGHT, 0.0)
    matrix = CompressedMatrix(mask, quantized=round_to_levels(weight, Levels(8, number="fp8"), group))
    encoding, tensors = encode(matrix)
    assert encoding.number == "fp8"
    assert encoding.sparse == (sparsity == 0.5)
    back = decode(Encoding.model_validate_json(encoding.model_dump_json(exclude_defaults=True)), tensors.__getitem__)
    assert torch.equal(back.dense(), matrix.dense())
    assert back.quantized is not None
    assert matrix.quantized is not None
    assert torch.equal(back.quantized.codes, matrix.quantized.codes)
    part = CompactPart()
    part.add_matrix("mlp.up.weight", matrix)
    part.write(tmp_path / "part.safetensors")
    assert torch.equal(CompactFile(tmp_path / "part.safetensors").tensor("mlp.up.weight"), matrix.dense())


@pytest.mark.parametrize("sparsity", [None, 0.03, 0.5])
def test_unquantised_matrices_come_back_in_bfloat16(sparsity: float | None) -> None:
    mask = _mask(sparsity)
    weight = WEIGHT if mask is None else torch.where(mask, WEIGHT, 0.0)
    matrix = CompressedMatrix(mask, weight=weight.bfloat16())
    encoding, tensors = encode(matrix)
    assert torch.equal(decode(encoding, tensors.__getitem__).dense(), weight.bfloat16().float())


@pytest.mark.parametrize(
    ("bits", "sparsity", "sparse"),
    # Sparse storage costs one bit per weight and saves its share of zeros: it pays above a sparsity of 1 / bits.
    [
        (16, 0.03, False),
        (16, 0.3, True),
        (8, 0.3, True),
        (4, 0.2, False),
        (4, 0.3, True),
        (3, 0.3, False),
        (3, 0.4, True),
    ],
)
def test_the_smaller_of_two_ways_to_store_is_taken(bits: int, sparsity: float, sparse: bool) -> None:
    mask = _mask(sparsity)
    assert mask is not None
    weight = torch.where(mask, WEIGHT, 0.0)
    matrix = (
        CompressedMatrix(mask, weight=weight.bfloat16())
        if bits == 16
        else CompressedMatrix(mask, quantized=round_to_nearest(weight, bits))
    )
    encoding, tensors = encode(matrix)
    assert encoding.sparse == sparse
    kept = int(mask.sum()) if sparse else 960
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    scales = 0 if bits == 16 else 24 * SCALE_DTYPE.itemsize
    assert stored == -(-kept * bits // 8) + (960 // 8 if sparse else 0) + scales


def test_dense_weights_are_code_minus_zero_times_scale() -> None:
    codes = torch.tensor([[0, 7, 3, 4]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=SCALE_DTYPE)
    symmetric = Quantized(codes, scales, None, bits=3)
    assert symmetric.dense().tolist() == [[-2.0, 1.5, -2.0, 0.0]]
    asymmetric = Quantized(codes, scales, torch.tensor([[1, 3]], dtype=torch.uint8), bits=3)
    assert asymmetric.dense().tolist() == [[-0.5, 3.0, 0.0, 2.0]]
