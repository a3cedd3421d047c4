"""The compact file: a variant's weights in as few bytes as its recipe allows, in a safetensors container.

Matrices lie as :mod:`compression.matrix` encodes them, everything else in bfloat16 under its own name. The header's
metadata holds one JSON document ``espalier``: format version, encodings, and (in a whole variant) model, recipe, facts.
A layer's file and a whole variant's file are of the same format; tensor names are the model's canonical ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.container import TensorFile, TensorSpec, write
from compression.matrix import STORED_DTYPE, CompressedMatrix, Encoding, decode, encode
from compression.recipe import Recipe
from parallelism import places
from parallelism.checkpoint_store import read_model
from parallelism.models.base import ModelConfig

VERSION = 1
_KEY = "espalier"


class CompactPart:
    """Weights gathered in memory for one file: a layer, or what stands outside the layers."""

    def __init__(self) -> None:
        self._encodings: dict[str, Encoding] = {}
        self._tensors: dict[str, Tensor] = {}

    def add_matrix(self, name: str, matrix: CompressedMatrix) -> None:
        """A matrix, encoded at once, so that only its compact form is held."""
        encoding, tensors = encode(matrix)
        self._encodings[name] = encoding
        self._tensors |= {_stored(name, suffix): tensor.cpu() for suffix, tensor in tensors.items()}

    def add_vector(self, name: str, tensor: Tensor) -> None:
        """A norm's or a bias's parameters."""
        self._tensors[name] = tensor.to(STORED_DTYPE).cpu()

    def write(self, path: Path) -> int:
        """Write the file under a unique name, then rename it; returns its bytes."""
        specs = {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items()}
        size = write(path, specs, self._tensors.__getitem__, _metadata(self._encodings, {}))
        places.share(path)
        return size


class CompactFile:
    """Reads a compact file: :class:`compression.evaluation.Weights` of a variant, one layer at a time.

    Raises ``ValueError`` for a truncated file or one of another kind.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.file = TensorFile(path)
        self.device = torch.device(device)
        text = self.file.metadata.get(_KEY)
        self.facts: dict[str, Any] = json.loads(text) if text else {}
        if self.facts.get("format") != VERSION:
            found = self.facts.get("format", "none")
            raise ValueError(f"{path} is no compact file of format {VERSION} (found {found}): compress the model again")
        self.encodings = {name: Encoding.model_validate(row) for name, row in self.facts.pop("encodings").items()}

    @property
    def config(self) -> ModelConfig:
        """The variant's model."""
        return read_model(self.facts["model"])

    @property
    def recipe(self) -> Recipe:
        """How the variant was made."""
        return Recipe.model_validate(self.facts["recipe"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of everything in the file."""
        vectors = {name: spec.shape for name, spec in self.file.specs.items() if ":" not in name}
        return {name: encoding.shape for name, encoding in self.encodings.items()} | vectors

    @property
    def parameters(self) -> int:
        """Parameters of the model, pruned ones included."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def layer(self, index: int) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of one layer, its prefix left off."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): self.tensor(name) for name in self.shapes if name.startswith(prefix)}

    def outer(self) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of everything outside the layers."""
        return {name: self.tensor(name) for name in self.shapes if not name.startswith("layers.")}

    def tensor(self, name: str) -> Tensor:
        """One parameter in float32, exactly as the variant is evaluated."""
        return self.matrix(name).dense() if name in self.encodings else self._read(name).float()

    def matrix(self, name: str) -> CompressedMatrix:
        """One matrix with its codes, scales and mask."""
        return decode(self.encodings[name], lambda suffix: self._read(_stored(name, suffix)))

    def _read(self, stored: str) -> Tensor:
        return self.file.read(stored).to(self.device)


def assemble(
    parts: Sequence[Path], facts: Mapping[str, Any], path: Path, numbers: Mapping[int, int] | None = None
) -> int:
    """Put the parts' tensors into one file with ``facts`` in its header; returns its bytes.

    ``numbers``: a layer's number in its part → in the file, where layers are left out. One tensor is held at a time, so
    memory does not grow with the model.
    """
    files = [CompactFile(part) for part in parts]
    owner = {_renumbered(name, numbers): (file.file, name) for file in files for name in file.file.specs}
    specs = {name: file.specs[theirs] for name, (file, theirs) in owner.items()}
    encodings = {_renumbered(name, numbers): row for file in files for name, row in file.encodings.items()}

    def read(name: str) -> Tensor:
        file, theirs = owner[name]
        return file.read(theirs)

    size = write(path, specs, read, _metadata(encodings, facts))
    places.share(path)
    return size


def _renumbered(name: str, numbers: Mapping[int, int] | None) -> str:
    """``layers.5.mlp.up.weight`` → ``layers.4.mlp.up.weight`` and the like."""
    if numbers is None or not name.startswith("layers."):
        return name
    prefix, number, rest = name.split(".", 2)
    return f"{prefix}.{numbers[int(number)]}.{rest}"


def _stored(name: str, suffix: str) -> str:
    return f"{name}:{suffix}"


def _metadata(encodings: Mapping[str, Encoding], facts: Mapping[str, Any]) -> dict[str, str]:
    rows = {name: encoding.model_dump(exclude_defaults=True) for name, encoding in sorted(encodings.items())}
    return {_KEY: json.dumps({"format": VERSION, **facts, "encodings": rows}, separators=(",", ":"))}
