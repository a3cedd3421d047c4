"""What a job may ask of Slurm: ``execution.slurm``. Torch-free."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from parallelism.options import Options

NAMES = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,127}")
CONSTRAINT = re.compile(r"[A-Za-z0-9_.,:&|*()\[\]+-]{1,256}")
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d{1,2}(:\d\d){0,2}")


def _name(value: str) -> str:
    if not NAMES.fullmatch(value):
        raise ValueError("no name that Slurm gives; use letters, digits, '_', '.', '-', and ',' between several")
    return value


def _constraint(value: str) -> str:
    if not CONSTRAINT.fullmatch(value):
        raise ValueError("no constraint that Slurm reads; write features and operators without blanks: 'a100&ib'")
    return value


def _not_a_number(value: object) -> object:
    """YAML reads 4:00:00 as a number of seconds."""
    if isinstance(value, int):
        raise ValueError("a number is ambiguous; write the time in quotes: '4:00:00', '2-12', or '90' for minutes")
    return value


def _time(value: str) -> str:
    if not TIME.fullmatch(value):
        raise ValueError("no time that Slurm reads; write minutes, MM:SS, HH:MM:SS, or DAYS-HH[:MM[:SS]]")
    return value


Name = Annotated[str, AfterValidator(_name)]


class SlurmOptions(Options):
    """One allocation for the whole job, with one Ray node on each of its nodes.

    What else a batch script may hold (containers, modules, further lines) belongs to the operator's profile.
    """

    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = Field(default=0, description="0: ranks run on CPUs")
    cpus_per_node: PositiveInt | None = Field(
        default=None, description="default: threads_per_rank for each GPU, or for one rank"
    )
    memory_gib_per_node: PositiveFloat | None = Field(default=None, description="default: the partition's")
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    time: Annotated[str, AfterValidator(_time), BeforeValidator(_not_a_number)] | None = Field(
        default=None, description="limit of one allocation; the job goes on in the next"
    )
    constraint: Annotated[str, AfterValidator(_constraint)] | None = None
    checkpoint_seconds: PositiveInt = Field(
        default=120, le=65535, description="how long before the time limit checkpoints are written"
    )

    def cpus(self, threads_per_rank: int) -> int:
        """Processors of each node that the job holds."""
        return self.cpus_per_node or threads_per_rank * max(1, self.gpus_per_node)

    def devices_per_node(self, threads_per_rank: int) -> int:
        """Ranks that one node carries; 0 where its processors are too few for one."""
        ranks = self.cpus(threads_per_rank) // threads_per_rank
        return min(ranks, self.gpus_per_node) if self.gpus_per_node else ranks
