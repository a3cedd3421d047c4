"""Calibration: one pass of text through a model, layer by layer, and what its linear layers saw.

A *shard* is a run of sequences. A step takes one shard through one layer: it commits the shard's sums of that layer,
and then the hidden states behind it, from which the next step goes on. So one layer of weights is in memory whatever
the depth, and a killed worker repeats one step at most. Shards are added up when the statistics are read; how many
there are follows from the number of sequences alone, so that the sums do not depend on how many workers there were.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from compression.text import shards
from parallelism import places
from parallelism.layer_reader import plain_family
from parallelism.models.base import ModelConfig, Observer

VERSION = 1
PARTS = ("hessian", "absolute", "absmax")
GRAM_BLOCK = 128
_FACTS = "espalier"


@dataclass(frozen=True)
class CalibrationFiles:
    """Where the statistics of one candidate lie; ``inputs`` is a hash of everything that they depend on::

    DIR/statistics/HASH/00003/shard-001.safetensors   a shard's sums of layer 3
    DIR/statistics/HASH/hidden-001-00003.npy          its hidden states before layer 3: steps 0 to 2 are done
    """

    directory: Path
    inputs: str

    @property
    def folder(self) -> Path:
        """Everything of these inputs."""
        return self.directory / "statistics" / self.inputs[:16]

    def sums(self, layer: int, shard: int) -> Path:
        """A shard's sums of one layer."""
        return self.folder / f"{layer:05d}" / f"shard-{shard:03d}.safetensors"

    def hidden(self, layer: int, shard: int) -> Path:
        """A shard's hidden states [sequences, length, hidden] float32 before ``layer``."""
        return self.folder / f"hidden-{shard:03d}-{layer:05d}.npy"

    def reached(self, shard: int) -> int:
        """Number of steps that are done."""
        prefix = f"hidden-{shard:03d}-"
        found = [name for name in places.sizes(self.folder) if name.startswith(prefix) and name.endswith(".npy")]
        return int(found[-1].removeprefix(prefix).removesuffix(".npy")) if found else 0

    def remove_layer(self, layer: int) -> None:
        """Delete the sums of a layer that nobody needs any more."""
        places.discard(self.folder / f"{layer:05d}")


def calibrate_step(
    model: Weights, rows: Rows, layer: int, shard: int, positions: range, files: CalibrationFiles
) -> None:
    """Take a shard (``positions`` of ``rows``) through ``layer``, unless that is done; earlier steps have to be."""
    if files.reached(shard) > layer:
        return
    before = files.hidden(layer, shard)
    if layer == 0 and not places.exists(before):
        embed(model, rows, positions, before)
    with torch.inference_mode():
        weights = model.layer(layer)
        gathered = Gathered()
        outputs = pass_through(model.config, weights, before, gathered, gathered.compare)
        # The sums first: where the states behind a layer are, its sums are, too.
        write_states(
            files.hidden(layer + 1, shard),
            _shape(before),
            outputs,
            before_it_appears=lambda: gathered.write(files.sums(layer, shard)),
        )
    places.remove(before)


def read_statistics(
    files: CalibrationFiles, layer: int, sequences: int, damping: float, device: torch.device | str = "cpu"
) -> LayerStatistics:
    """All shards' sums of one layer added up. Raises ``ValueError`` where one is missing or damaged."""
    gathered = Gathered()
    for shard in range(len(shards(sequences))):
        path = files.sums(layer, shard)
        if not places.exists(path):
            raise ValueError(f"{path} is missing: layer {layer} has not been calibrated; calibrate the candidate first")
        gathered.add_file(TensorFile(path), device)
    return gathered.statistics(damping)


@dataclass
class _Sums:
    """Over the rows of one input: XᵀX [in, in] (its upper triangle), Σ|x| [in], max |x| [in]; float32."""

    hessian: Tensor
    absolute: Tensor
    absmax: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, device: torch.device | str) -> "_Sums":
        absolute, absmax = torch.zeros(2, width, device=device)
        return cls(torch.zeros(width, width, device=device), absolute, absmax)


def add_gram(upper: Tensor, rows: Tensor) -> None:
    """Add XᵀX of ``rows`` X [rows, in] to ``upper`` [in, in], of which only the upper triangle counts.

    Below the blocks on the diagonal would be the same numbers again; without them it takes two thirds of the time.
    """
    for start in range(0, rows.shape[1], GRAM_BLOCK):
        end = start + GRAM_BLOCK
        upper[start:end, start:].addmm_(rows[:, start:end].t(), rows[:, start:])


def mirror(upper: Tensor) -> Tensor:
    """Make a matrix [in, in] of which the upper triangle counts the whole symmetric one, in place; it may be one."""
    above = upper.triu(1).t()
    return upper.triu_().add_(above)


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
        add_gram(sums.hessian, flat)
        sizes = flat.abs()
        sums.absolute += sizes.sum(0)
        sums.absmax = torch.maximum(sums.absmax, sizes.amax(0))
        sums.rows += flat.shape[0]

    def compare(self, before: Tensor, after: Tensor) -> None:
        """Add how alike the hidden states [..., hidden] before and after the layer are."""
        self.similarity += float(cosine_similarity(before, after, dim=-1).double().sum())
        self.tokens += before[..., 0].numel()

    def write(self, path: Path) -> None:
        """Commit: the file appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            mirror(sums.hessian)
            tensors |= {f"{name}:{part}": getattr(sums, part) for part in PARTS}
        facts = {
            "version": VERSION,
            "shared": self.shared,
            "rows": {name: sums.rows for name, sums in self.sums.items()},
            "similarity": self.similarity,
            "tokens": self.tokens,
        }
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        write(path, specs, tensors.__getitem__, {_FACTS: json.dumps(facts)})
        places.share(path, keep=False)

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
            name: InputStatistics(mirror(sums.hessian), sums.rows, sums.absmax, sums.absolute / sums.rows, damping)
            for name, sums in self.sums.items()
        }
        inputs = {name: by_input[owner] for name, owner in self.shared.items()}
        return LayerStatistics(inputs, influence=1.0 - self.similarity / max(1, self.tokens))


def embed(model: Weights, rows: Rows, positions: range, path: Path) -> None:
    """Write the hidden states [sequences, length, hidden] of ``positions`` before the first layer."""
    family, outer = plain_family(model.config), model.outer()
    device = next(iter(outer.values())).device
    shape = (len(positions), rows([positions.start]).shape[1] - 1, model.config.hidden)
    tokens = (torch.from_numpy(rows([position]))[:, :-1].to(device) for position in positions)
    with torch.inference_mode():
        write_states(path, shape, (family.embed(model.config, outer, each) for each in tokens))


def _shape(states: Path) -> tuple[int, ...]:
    return tuple(np.load(places.need(states), mmap_mode="r").shape)


def pass_through(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    states: Path,
    observer: Observer | None,
    compare: Callable[[Tensor, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Hidden states in a file, taken through one layer a few sequences at a time.

    ``observer`` sees the input of every linear layer, ``compare`` the states before and behind the layer.
    """
    family, device = plain_family(config), next(iter(weights.values())).device
    before = np.load(places.need(states), mmap_mode="r")
    step = step_sequences(weights, config.hidden, before.shape[1])
    for start in range(0, len(before), step):
        part = torch.from_numpy(np.array(before[start : start + step])).to(device)
        output = family.layer(config, weights, part, observer)
        if compare is not None:
            compare(part, output)
        yield output


def write_states(
    path: Path, shape: tuple[int, ...], parts: Iterable[Tensor], before_it_appears: Callable[[], None] = lambda: None
) -> None:
    """Write hidden states of ``shape`` [sequences, length, hidden], part by part; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.float().cpu().contiguous().numpy().data)
        before_it_appears()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    places.share(path, keep=False)


def statistics_hash(source: str, *facts: object) -> str:
    """Hash of everything that the statistics depend on: the model's fingerprint, the text, its length and number."""
    return sha256(json.dumps([VERSION, source, *facts], default=str).encode()).hexdigest()
