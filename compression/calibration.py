"""Calibration: one pass of text through a model, layer by layer, and what its linear layers saw.

A *shard* is a run of sequences; its share of the statistics is committed layer by layer, and the hidden states between
layers lie in a file, so that one layer of weights is in memory whatever the depth, and a killed worker repeats one
layer at most. Shards are added up when the statistics are read. The number of shards follows from the number of
sequences alone, so that the sums do not depend on how many workers there were.
"""

import json
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compression.container import TensorFile, TensorSpec, write
from compression.evaluation import Rows, Weights, step_sequences
from compression.methods.base import InputStatistics, LayerStatistics
from parallelism.layer_reader import plain_family

SHARD_SEQUENCES = 32
VERSION = 1
PARTS = ("hessian", "absolute", "absmax")
_FACTS = "espalier"


def shards(sequences: int) -> list[range]:
    """Positions of every shard."""
    return [range(first, min(first + SHARD_SEQUENCES, sequences)) for first in range(0, sequences, SHARD_SEQUENCES)]


@dataclass(frozen=True)
class CalibrationFiles:
    """Where the statistics of one candidate lie::

    DIR/statistics/00003/shard-001.safetensors   a shard's sums of layer 3
    DIR/statistics/hidden-001-00003.npy          the shard's hidden states before layer 3
    """

    directory: Path

    def sums(self, layer: int, shard: int) -> Path:
        """A shard's sums of one layer."""
        return self.directory / "statistics" / f"{layer:05d}" / f"shard-{shard:03d}.safetensors"

    def hidden(self, layer: int, shard: int) -> Path:
        """A shard's hidden states [sequences, length, hidden] float32 before ``layer``."""
        return self.directory / "statistics" / f"hidden-{shard:03d}-{layer:05d}.npy"


def calibrate_shard(
    model: Weights, rows: Rows, positions: range, shard: int, files: CalibrationFiles, inputs: str
) -> float:
    """Run one shard through all layers and commit its sums; layers that are committed for ``inputs`` are not repeated.

    ``inputs`` is a hash of everything the statistics depend on. Returns the seconds it took.
    """
    started, layers = time.monotonic(), model.config.layers
    first = next((layer for layer in range(layers) if not _committed(files.sums(layer, shard), inputs)), layers)
    if first == layers:
        return 0.0
    if not files.hidden(first, shard).exists():
        first = 0
        _embed(model, rows, positions, files.hidden(0, shard))
    with torch.inference_mode():
        for layer in range(first, layers):
            gathered = _pass_through(model, layer, files.hidden(layer, shard), files.hidden(layer + 1, shard))
            gathered.write(files.sums(layer, shard), inputs)
            files.hidden(layer, shard).unlink(missing_ok=True)
    files.hidden(layers, shard).unlink(missing_ok=True)
    return time.monotonic() - started


def read_statistics(
    files: CalibrationFiles, layer: int, sequences: int, damping: float, device: torch.device | str = "cpu"
) -> LayerStatistics:
    """All shards' sums of one layer added up. Raises ``ValueError`` where one is missing or damaged."""
    gathered = Gathered()
    for shard in range(len(shards(sequences))):
        path = files.sums(layer, shard)
        if not path.exists():
            raise ValueError(f"{path} is missing: layer {layer} has not been calibrated; calibrate the candidate first")
        gathered.add_file(TensorFile(path), device)
    return gathered.statistics(damping)


@dataclass
class _Sums:
    """Over the rows of one input: XᵀX [in, in], Σ|x| [in], max |x| [in]; float32."""

    hessian: Tensor
    absolute: Tensor
    absmax: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str) -> "_Sums":
        absolute, absmax = torch.zeros(2, width, device=device)
        return cls(torch.zeros(width, width, device=device), absolute, absmax)


@dataclass
class Gathered:
    """What the linear layers of one layer saw. As an observer it takes every linear layer's input [..., in]."""

    sums: dict[str, _Sums] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    """Linear layer → the one whose input it shares."""
    similarity: float = 0.0
    tokens: int = 0
    _last: tuple[str, Tensor] | None = None

    def __call__(self, name: str, inputs: Tensor) -> None:
        """Add the input of one linear layer; neighbours that take the same tensor are noticed."""
        if self._last is not None and self._last[1] is inputs:
            self.shared[name] = self._last[0]
            return
        self._last, self.shared[name] = (name, inputs), name
        flat = inputs.flatten(0, -2).float()
        sums = self.sums.setdefault(name, _Sums.zeros(flat.shape[1], flat.device))
        sums.hessian.addmm_(flat.t(), flat)
        sums.absolute += flat.abs().sum(0)
        sums.absmax = torch.maximum(sums.absmax, flat.abs().amax(0))
        sums.rows += flat.shape[0]

    def compare(self, before: Tensor, after: Tensor) -> None:
        """Add how alike the hidden states [..., hidden] before and after the layer are."""
        self.similarity += float(cosine_similarity(before, after, dim=-1).double().sum())
        self.tokens += before[..., 0].numel()

    def write(self, path: Path, inputs: str) -> None:
        """Commit: the file appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            tensors |= {f"{name}:{part}": getattr(sums, part) for part in PARTS}
        facts = {
            "version": VERSION,
            "inputs": inputs,
            "shared": self.shared,
            "rows": {name: sums.rows for name, sums in self.sums.items()},
            "similarity": self.similarity,
            "tokens": self.tokens,
        }
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        write(path, specs, tensors.__getitem__, {_FACTS: json.dumps(facts)})

    def add_file(self, file: TensorFile, device: torch.device | str) -> None:
        """Add what another shard has written."""
        facts = json.loads(file.metadata[_FACTS])
        self.shared |= facts["shared"]
        for name, rows in facts["rows"].items():
            hessian, absolute, absmax = (file.read(f"{name}:{part}").to(device) for part in PARTS)
            sums = self.sums.setdefault(name, _Sums.zeros(hessian.shape[0], device))
            sums.hessian += hessian
            sums.absolute += absolute
            sums.absmax = torch.maximum(sums.absmax, absmax)
            sums.rows += rows
        self.similarity += facts["similarity"]
        self.tokens += facts["tokens"]

    def statistics(self, damping: float) -> LayerStatistics:
        """The sums as methods take them."""
        by_input = {
            name: InputStatistics(sums.hessian, sums.rows, sums.absmax, sums.absolute / sums.rows, damping)
            for name, sums in self.sums.items()
        }
        inputs = {name: by_input[owner] for name, owner in self.shared.items()}
        return LayerStatistics(inputs, influence=1.0 - self.similarity / max(1, self.tokens))


def _embed(model: Weights, rows: Rows, positions: range, path: Path) -> None:
    family, outer = plain_family(model.config), model.outer()
    length = rows([positions.start]).shape[1] - 1
    target = _new_array(path, (len(positions), length, model.config.hidden))
    with torch.inference_mode():
        for place, position in enumerate(positions):
            tokens = torch.from_numpy(rows([position]))[:, :-1].to(_device_of(outer))
            target[place] = family.embed(model.config, outer, tokens)[0].float().cpu().numpy()
    _finish_array(target, path)


def _pass_through(model: Weights, layer: int, source: Path, target: Path) -> Gathered:
    """One layer over a shard, from file to file."""
    weights = model.layer(layer)
    before = np.load(source, mmap_mode="r")
    after = _new_array(target, before.shape)
    step, device = step_sequences(weights, model.config.hidden, before.shape[1]), _device_of(weights)
    gathered, family = Gathered(), plain_family(model.config)
    for start in range(0, len(before), step):
        part = torch.from_numpy(np.array(before[start : start + step])).to(device)
        output = family.layer(model.config, weights, part, gathered)
        gathered.compare(part, output)
        after[start : start + step] = output.cpu().numpy()
    _finish_array(after, target)
    return gathered


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(_draft(path), mode="w+", dtype=np.float32, shape=shape)


def _finish_array(array: np.memmap, path: Path) -> None:
    array.flush()
    _draft(path).replace(path)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _device_of(weights: dict[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


def _committed(path: Path, inputs: str) -> bool:
    try:
        return bool(json.loads(TensorFile(path).metadata[_FACTS])["inputs"] == inputs)
    except (FileNotFoundError, ValueError, KeyError):
        return False


def statistics_hash(source: str, *facts: object) -> str:
    """Hash of everything that the statistics depend on: the model's fingerprint, the text, its length and number."""
    return sha256(json.dumps([VERSION, source, *facts], default=str).encode()).hexdigest()
