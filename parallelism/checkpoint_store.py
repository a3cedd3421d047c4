"""The checkpoints of one candidate: names, manifests, retention. Torch-free.

A checkpoint is a directory ``e{epoch:04d}-s{step:08d}``, on a file system or in an object store
(:mod:`parallelism.places`). It is complete when its ``manifest.json`` exists, which is written last and appears whole,
and when every file has the size the manifest states.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from parallelism import places
from parallelism.budget import Burnt, Progress
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.registry import FAMILIES, load
from parallelism.training import TrainingConfig, TrainTask

MANIFEST = "manifest.json"
_NAME = re.compile(r"e(\d{4,})-s(\d{8,})")


class Metrics(Options):
    """What a resumed run has to know that is neither progress nor part of the model."""

    train_loss: float | None = Field(default=None, description="of the last step before the checkpoint")
    validation_loss: float | None = Field(default=None, description="of the last evaluation before the checkpoint")
    evaluations: int = Field(default=0, description="periodic evaluations already done")
    burnt: Burnt = Field(default=Burnt(), description="by all attempts until the checkpoint was begun")


class CheckpointInfo(Options):
    """One complete checkpoint: its manifest and where it lies."""

    # A manifest that a later version wrote may hold more.
    model_config = ConfigDict(extra="ignore", frozen=True)

    path: Path = Field(exclude=True)
    step: int
    epoch: int
    progress: Progress
    model: SerializeAsAny[ModelConfig]
    layout: Layout
    training: TrainingConfig
    seed: int
    sequence_length: int
    metrics: Metrics = Metrics()
    files: dict[str, int] = Field(description="name → bytes")
    bytes: int
    created: float = Field(description="seconds since 1970")

    @field_validator("model", mode="before")
    @classmethod
    def _of_its_family(cls, model: Any) -> Any:
        return read_model(model) if isinstance(model, dict) else model


def read_model(document: dict[str, Any]) -> ModelConfig:
    """The model config that a JSON document describes, as its family's class.

    Raises ``ValueError`` for an unknown family or fields that the family refuses.
    """
    family = document.get("family")
    if family not in FAMILIES:
        raise ValueError(f"model.family {family!r} is unknown: available are {', '.join(sorted(FAMILIES))}")
    config: ModelConfig = load(FAMILIES[family].options).model_validate(document)
    return config


def read_info(path: str | Path) -> CheckpointInfo:
    """The manifest of one checkpoint.

    Raises ``ValueError`` with a remedy when the directory is not a complete checkpoint.
    """
    path = Path(path)
    remedy = "name a directory e…-s… that holds a manifest.json, or another checkpoint beside it"
    try:
        document = json.loads(places.read_bytes(path / MANIFEST))
        info = CheckpointInfo.model_validate({**document, "path": path})
    except FileNotFoundError:
        raise ValueError(f"{path} is not a complete checkpoint (no {MANIFEST}): {remedy}") from None
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path / MANIFEST} is not a checkpoint's manifest ({error}): {remedy}") from error
    found = _sizes(path)
    wrong = sorted(name for name, size in info.files.items() if found.get(name) != size)
    if wrong:
        raise ValueError(f"{path} is damaged: missing or of another size: {', '.join(wrong[:5])}: {remedy}")
    return info


def declare_complete(directory: Path, *, progress: Progress, **facts: Any) -> CheckpointInfo:
    """Write the manifest of a checkpoint whose other files are all there; ``facts`` are the manifest's other fields.

    Raises ``OSError``.
    """
    files = _sizes(directory)
    size = sum(files.values())
    info = CheckpointInfo(
        path=directory, step=progress.step, progress=progress, files=files, bytes=size, created=time.time(), **facts
    )
    places.write_text(directory / MANIFEST, info.model_dump_json(indent=1))
    return info


class CheckpointStore:
    """The checkpoints under one root. Only rank 0 of the newest epoch writes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def directory(self, epoch: int, step: int) -> Path:
        """Where the checkpoint of this step belongs."""
        return self.root / f"e{epoch:04d}-s{step:08d}"

    def complete(self) -> list[CheckpointInfo]:
        """Every complete checkpoint, oldest first: by epoch, then by step.

        A stale epoch may still write a higher step than its successor; the successor's lineage counts as newer.
        """
        found = []
        for _, _, path in self._directories():
            try:
                found.append(read_info(path))
            except ValueError:
                continue
        return found

    def newest(self) -> CheckpointInfo | None:
        """The last of :meth:`complete`."""
        return next(reversed(self.complete()), None)

    def prepare(self, directory: Path) -> None:
        """Make the directory new and empty; what an earlier try left there is removed. Raises ``OSError``."""
        _remove(directory)
        directory.mkdir(parents=True)

    def commit(self, directory: Path, task: TrainTask, progress: Progress, metrics: Metrics) -> CheckpointInfo:
        """Declare the directory complete. All ranks' files must be there. Raises ``OSError``."""
        return declare_complete(
            directory,
            progress=progress,
            epoch=task.epoch,
            model=task.model,
            layout=task.layout,
            training=task.training,
            seed=task.seed,
            sequence_length=task.sequence_length,
            metrics=metrics,
        )

    def discard(self, directory: Path) -> None:
        """Delete as much as possible of a checkpoint that could not be completed."""
        places.discard(directory / MANIFEST)
        places.discard(directory)

    def keep_newest(self, count: int) -> None:
        """Delete all complete checkpoints but the newest ``count``. Raises ``OSError``."""
        for info in self.complete()[:-count]:
            _remove(info.path)

    def remove_incomplete(self, epoch: int) -> None:
        """Delete what attempts up to ``epoch`` left unfinished."""
        for found_epoch, _, path in self._directories():
            if found_epoch <= epoch and not places.exists(path / MANIFEST):
                self.discard(path)

    def _directories(self) -> list[tuple[int, int, Path]]:
        """(epoch, step, path) of everything under the root that is named like a checkpoint, in order."""
        matches = [(_NAME.fullmatch(path.name), path) for path in places.folders(self.root)]
        return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below the directory but the manifest, by relative name."""
    return {name: size for name, size in places.sizes(directory).items() if MANIFEST not in name}


def _remove(directory: Path) -> None:
    """Delete a checkpoint; without its manifest first, so that a half-deleted one is never taken for complete."""
    places.remove(directory / MANIFEST)
    places.remove(directory)
