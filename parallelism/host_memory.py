"""How much memory of this machine new processes may use. Torch-free."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Names of the limit, of what is used, and in ``memory.stat`` of what the kernel takes back from it when it must."""


def available_memory() -> int:
    """Bytes that new processes may use: what is free, within the limits of the control groups that we are in."""
    membership = MEMBERSHIP.read_text("utf-8") if MEMBERSHIP.exists() else ""
    return min([psutil.virtual_memory().available, *group_headroom(MOUNT, membership)])


def group_headroom(mount: Path, membership: str) -> Iterator[int]:
    """What is left of every memory limit that a container, a Slurm job or a service set for this process, in bytes.

    ``membership`` is the content of ``/proc/self/cgroup``, ``mount`` where control groups of version 2, or the
    controllers of version 1, are mounted. A limit of a group holds for the groups in it, so all above ours count.
    """
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _headroom(mount, group, *_VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _headroom(mount / "memory", group, *_VERSION_1)


def _headroom(root: Path, group: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    path = PurePosixPath(group.lstrip("/"))
    for folder in (path, *path.parents):
        # A container may see only its own part of the tree, under the mount's root, and still be told its whole path.
        inside = root / folder
        if not (inside / limit).is_file():
            continue
        most, used, facts = ((inside / name).read_text("ascii").split() for name in (limit, usage, "memory.stat"))
        # Without a limit version 2 says "max", and version 1 a number near 2^63.
        if most[0].isdigit() and int(most[0]) < psutil.virtual_memory().total:
            reclaimable = int(facts[facts.index(cache) + 1]) if cache in facts else 0
            yield max(0, int(most[0]) - int(used[0]) + reclaimable)
