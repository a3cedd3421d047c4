"""Handing a candidate's newest checkpoint from one process group to the next. Torch-free.

Every process group writes its checkpoints under a root of its own. The next group takes over the newest complete one by
hard links, which costs no bytes and no time (an object store copies inside itself), and from then on whatever the old
group still writes or deletes, should it live on somewhere, is out of sight.
"""

from pathlib import Path

from parallelism import places
from parallelism.checkpoint_store import MANIFEST, CheckpointInfo, CheckpointStore, read_info


def adopt_newest(source: Path | None, target: Path) -> CheckpointInfo | None:
    """Link the newest complete checkpoint under ``source`` into the new root ``target``; None where there is none.

    A checkpoint that its writer deletes meanwhile is passed over for a newer one.
    """
    target.mkdir(parents=True, exist_ok=True)
    if source is None:
        return None
    while (newest := CheckpointStore(source).newest()) is not None:
        adopted = target / newest.path.name
        try:
            link_checkpoint(newest.path, adopted)
            return read_info(adopted)
        except (FileNotFoundError, ValueError):
            places.discard(adopted)
    return None


def link_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` a second name of each file of a checkpoint, its manifest last; copies where that cannot be."""
    for name in [name for name in places.sizes(source) if name != MANIFEST] + [MANIFEST]:
        places.copy(source / name, target / name)


def remove_older_roots(checkpoints_dir: Path, current: Path) -> None:
    """Delete the roots of earlier process groups; names sort by epoch and group, so that newer ones are left alone."""
    for root in places.folders(checkpoints_dir):
        if root.name < current.name:
            places.discard(root)
