"""The real coordinator under the faults of the job's plan: ``python -m tests.launcher.faulty_coordinator``."""

import sys

from launcher.coordinator import coordinate, parse
from launcher.stages.line import STAGES
from parallelism import places
from tests.launcher.faults import FaultPlan, coordinate_with

RANK_FUNCTION = "tests.launcher.faults:run_task"


def main() -> int:
    """Entry point of the coordinator's process."""
    options = parse()
    return coordinate_with(
        FaultPlan.read(places.at(options.journal)), lambda: coordinate(options, STAGES, RANK_FUNCTION)
    )


if __name__ == "__main__":
    sys.exit(main())
