"""Tasks of lm-evaluation-harness on exported models, in a process of its own that reaches no hub.

The harness (Gao et al., "A framework for few-shot language model evaluation") is an optional dependency. Tasks are
those in a folder of task files, or its own ones where their data lies in the local cache; nothing is downloaded.
Torch-free, but for that process::

    python -m compression.harness REQUEST    the answer is the last line of stdout
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from parallelism import places
from parallelism.options import Options

PACKAGE = "lm_eval"
PREFIX = "harness"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TIMEOUT_SECONDS = 24 * 3600.0


class HarnessError(ValueError):
    """The harness does not know a task or has no data for it here, or could not score a model; its own last word."""


class HarnessConfig(Options):
    """What lm-evaluation-harness measures on exported variants."""

    tasks: list[str] = Field(min_length=1, description="names of tasks or groups")
    include: str | None = Field(default=None, description="a folder of task files, beside the harness's own tasks")
    fewshot: NonNegativeInt | None = Field(
        default=None, description="examples in the prompt; default: as the task says"
    )
    limit: PositiveInt | None = Field(default=None, description="documents of each task at most")
    batch: PositiveInt = 8


def installed() -> bool:
    """Whether the harness can be imported."""
    return find_spec(PACKAGE) is not None


def check_tasks(config: HarnessConfig) -> list[str]:
    """Names of the single tasks that are meant, their data read. Raises :class:`HarnessError`."""
    found: list[str] = _ask(config, {}, "cpu")
    return found


def score(directories: Mapping[str, str], config: HarnessConfig, *, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Name → ``harness/TASK/METRIC`` → value for exports by their names, each loaded in float32 by Transformers.

    Raises :class:`HarnessError`.
    """
    for directory in directories.values():
        places.need(directory)
    found: dict[str, dict[str, float]] = _ask(config, directories, device)
    return found


def _ask(config: HarnessConfig, directories: Mapping[str, str], device: str) -> Any:
    """What the fresh process answers."""
    document = {"directories": directories, "config": config.model_dump(mode="json"), "device": device}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "compression.harness", json.dumps(document)],
        env=os.environ | OFFLINE | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise HarnessError(f"evaluation.harness.tasks {', '.join(config.tasks)}: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's own results by task, flat; a metric's filter is named where it is not the plain one."""
    found = {}
    for task, row in results.items():
        for key, value in row.items():
            name, _, chain = key.partition(",")
            if isinstance(value, int | float) and chain:
                suffix = "" if chain == "none" else f"/{chain}"
                found[f"{PREFIX}/{task}/{name}{suffix}"] = float(value)
    return found


def _answer(document: Mapping[str, Any]) -> Any:
    """The work of the fresh process: scores, or the tasks' names where no model is given."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager, get_task_dict

    config = HarnessConfig.model_validate(document["config"])
    manager = TaskManager(include_path=config.include)
    if not document["directories"]:
        return sorted(map(str, get_task_dict(config.tasks, manager)))
    scores = {}
    for name, directory in document["directories"].items():
        model = HFLM(pretrained=directory, dtype="float32", device=document["device"], batch_size=config.batch)
        found = simple_evaluate(
            model,
            tasks=config.tasks,
            num_fewshot=config.fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
        scores[name] = metrics(found["results"])
    return scores


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
