"""The formats of compressed-tensors: how quantised matrices lie in their files, and the config that says so.

``pack-quantized``: codes of 1 to 8 bits, those of one row packed into 32-bit words without gaps; ``int-quantized``: one
byte per weight, for engines that compute with eight-bit activations; ``float-quantized``: FP8 e4m3. In all of them
weight = (code - zero) · scale, with the scales and zeros of our compact file, so that nothing is rounded again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compression.container import TensorSpec
from compression.matrix import Encoding, Quantized
from compression.packing import pack
from compression.recipe import Quantization

PACKED, INTEGERS, FLOATS, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
WORD_BITS = 32
FP8_DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.float16
"""Of the scales, as they are in the compact file."""
OUTPUT_LAYER = "lm_head"


def stored_format(encoding: Encoding, activation_bits: int, mixed: bool) -> str:
    """The format of one quantised matrix; ``mixed``: the model's matrices are not all of one kind."""
    if encoding.number == "fp8":
        return FLOATS
    if encoding.bits == activation_bits == 8:
        return INTEGERS
    # Transformers reads packed zeros only with :func:`quantization_config`'s ``dequantize``, which knows one kind of
    # matrix and no activations.
    return INTEGERS if not encoding.symmetric and (mixed or activation_bits == 8) else PACKED


def stored_specs(encoding: Encoding, layout: str) -> dict[str, TensorSpec]:
    """Suffix of the module's name → what :func:`stored_tensors` gives."""
    rows, columns = encoding.shape
    scales = (rows, encoding.groups)
    packs = layout == PACKED
    specs = {"weight_scale": TensorSpec(_scale_dtype(encoding.symmetric, layout), scales)}
    if packs:
        specs["weight_packed"] = TensorSpec(torch.int32, (rows, _words(columns, encoding.bits)))
        specs["weight_shape"] = TensorSpec(torch.int64, (2,))
    else:
        specs["weight"] = TensorSpec(FP8_DTYPE if layout == FLOATS else torch.int8, (rows, columns))
    if not encoding.symmetric:
        packed = (_words(rows, encoding.bits), encoding.groups)
        specs["weight_zero_point"] = TensorSpec(torch.int32 if packs else torch.int8, packed if packs else scales)
    return specs


def stored_tensors(matrix: Quantized, layout: str) -> dict[str, Tensor]:
    """Suffix of the module's name → tensor, of a matrix [out, in].

    Codes are stored as distances from 2^(bits-1), which in ``pack-quantized`` is added again before they are packed.
    Zeros are packed along the rows.
    """
    symmetric = matrix.zeros is None
    tensors = {"weight_scale": matrix.scales.to(_scale_dtype(symmetric, layout))}
    if layout == PACKED:
        tensors["weight_packed"] = pack_words(matrix.codes, matrix.bits)
        tensors["weight_shape"] = torch.tensor(matrix.codes.shape)
        if matrix.zeros is not None:
            tensors["weight_zero_point"] = _transposed(pack_words(_transposed(matrix.zeros), matrix.bits))
        return tensors
    if layout == FLOATS:
        return tensors | {"weight": matrix.codes.view(FP8_DTYPE)}
    tensors["weight"] = _signed(matrix.codes, matrix.bits)
    if matrix.zeros is not None:
        tensors["weight_zero_point"] = _signed(matrix.zeros, matrix.bits)
    return tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] uint8 below 2^bits → int32 [rows, ⌈columns · bits / 32⌉], each row a bit string of its own.

    Code *i* of a row occupies bits ``i·bits`` to ``(i+1)·bits - 1`` of its little-endian words.
    """
    rows, columns = codes.shape
    whole = pad(codes, (0, -columns % WORD_BITS))  # 32 codes end on a word, whatever their width
    words = pack(whole, bits).view(rows, -1).view(torch.int32)
    return words[:, : _words(columns, bits)].contiguous()


def quantization_config(
    encodings: Mapping[str, Encoding], layouts: Mapping[str, str], ignored: list[str], recipe: Quantization
) -> dict[str, Any]:
    """``quantization_config`` of a model whose modules (by name) are quantised so; ``ignored`` linear modules are not.

    One group of modules for each kind of encoding. Where there is one kind, it is said of all linear layers. Packed
    zeros come with ``dequantize``: Transformers 5 cannot load them otherwise. Other engines do not know that field.
    """
    groups: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for module, encoding in encodings.items():
        scheme = _scheme(encoding, layouts[module], recipe)
        groups.setdefault(str(scheme), scheme)
        members.setdefault(str(scheme), []).append(module)
    uniform = len(groups) == 1
    used = set(layouts.values())
    dequantize = any(layouts[module] == PACKED and not one.symmetric for module, one in encodings.items())
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": used.pop() if len(used) == 1 else MIXED,
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if uniform else members[key], **scheme}
            for number, (key, scheme) in enumerate(groups.items())
        },
        "ignore": [OUTPUT_LAYER, *ignored],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **({"dequantize": True} if dequantize else {}),
    }


def _scheme(encoding: Encoding, layout: str, recipe: Quantization) -> dict[str, Any]:
    kind = "float" if encoding.number == "fp8" else "int"
    weights = {
        "num_bits": encoding.bits,
        "type": kind,
        "symmetric": encoding.symmetric,
        "strategy": "group" if recipe.group_size else "channel",
        "group_size": recipe.group_size,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "weights": weights,
        "input_activations": activations if recipe.activation_bits == 8 else None,
        "output_activations": None,
        "format": layout,
    }


def _scale_dtype(symmetric: bool, layout: str) -> torch.dtype:
    """As in the compact file; but where the whole model is dequantised on loading, that is done in the scales' type."""
    return torch.float32 if layout == PACKED and not symmetric else SCALE_DTYPE


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


def _transposed(tensor: Tensor) -> Tensor:
    # A clone, since a transposed row of one element counts as contiguous with strides that no view of bytes allows.
    return tensor.t().clone(memory_format=torch.contiguous_format)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
