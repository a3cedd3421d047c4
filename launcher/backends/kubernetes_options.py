"""What a job may ask of Kubernetes: ``execution.kubernetes``. Torch-free."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from parallelism.options import Options

OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")


def _object_name(value: str) -> str:
    if not OBJECT_NAME.fullmatch(value):
        raise ValueError("no name that Kubernetes gives; use small letters, digits, '-' and '.', at most 63 of them")
    return value


ObjectName = Annotated[str, AfterValidator(_object_name)]


class KubernetesOptions(Options):
    """One Ray cluster for the job: a pod for each node, the head's among them.

    Images, volumes, accounts and whatever else lets a pod reach something belong to the operator's profile.
    """

    nodes: PositiveInt = Field(default=1, description="pods, each with one node of Ray")
    gpus_per_node: NonNegativeInt = Field(default=0, description="0: ranks run on CPUs")
    cpus_per_node: PositiveInt | None = Field(
        default=None, description="default: threads_per_rank for each GPU, or for one rank"
    )
    memory_gib_per_node: PositiveFloat | None = Field(default=None, description="default: the profile's")
    shared_memory_gib: PositiveFloat = Field(default=2.0, description="/dev/shm of a pod, part of its memory")
    queue: ObjectName | None = Field(default=None, description="of Kueue or Volcano, as the profile has it")
    priority_class: ObjectName | None = Field(default=None, description="one of those that the profile offers")
    deadline_seconds: PositiveInt | None = Field(
        default=None,
        le=2**31 - 1,
        description="the job is ended this long after it was let in, waiting for pods included",
    )
    checkpoint_seconds: PositiveInt = Field(
        default=120, le=3600, description="how long a pod that has to go waits for checkpoints"
    )

    def cpus(self, threads_per_rank: int) -> int:
        """Processors of each pod."""
        return self.cpus_per_node or threads_per_rank * max(1, self.gpus_per_node)

    def devices_per_node(self, threads_per_rank: int) -> int:
        """Ranks that one pod carries; 0 where its processors are too few for one."""
        ranks = self.cpus(threads_per_rank) // threads_per_rank
        return min(ranks, self.gpus_per_node) if self.gpus_per_node else ranks
