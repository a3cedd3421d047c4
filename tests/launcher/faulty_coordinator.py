"""The real coordinator under the faults of the job's plan: ``python -m tests.launcher.faulty_coordinator``."""

import sys

from launcher.coordinator import coordinate, parse
from launcher.stages.line import STAGES
from tests.launcher.faults import FaultPlan, coordinate_with

RANK_FUNCTION = "tests.launcher.faults:run_task"


def main() -> int:
    """Entry point of the coordinator's process."""
    options = parse()
    return coordinate_with(FaultPlan.read(options.journal), lambda: coordinate(options, STAGES, RANK_FUNCTION))


if __name__ == "__main__":
    sys.exit(main())
