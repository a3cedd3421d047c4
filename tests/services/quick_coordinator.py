"""A coordinator's process without a cluster: it claims, steps, checkpoints and obeys as the real one does.

``python -m tests.services.quick_coordinator JOURNAL_DIR …``. A job's ``seed`` says how many steps there are, each of
``STEP_SECONDS``; its progress is a file that each step replaces, its checkpoints are events. So what the dispatcher has
to get right (who works on a job, from where, how often) can be watched in seconds.
"""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

from launcher.context import STOPPED, STOPPING
from launcher.control import Control
from launcher.coordinator import EXIT_STALE, parse
from launcher.journal import Journal, StaleEpochError, open_journal
from launcher.states import JobState

STEP_SECONDS = 0.05
CHECKPOINT_EVERY = 5


def main() -> int:
    """Entry point of the process."""
    options = parse()
    journal = open_journal(options.journal)
    control = Control(journal, options.keeper, poll_seconds=0.1)
    control.listen()
    try:
        journal.claim_epoch()
        facts = {"pid": os.getpid(), "node": socket.gethostname()}
        journal.append("process_started", {"role": "coordinator", **facts})
        journal.set_state(JobState.STARTING)
        journal.set_state(JobState.RUNNING)
        state = _work(journal, control)
        journal.append("process_ended", {"role": "coordinator", **facts})
        journal.set_state(state)
    except StaleEpochError:
        return EXIT_STALE
    finally:
        if options.ray_dir is not None:
            shutil.rmtree(options.ray_dir, ignore_errors=True)
    return 0


def _work(journal: Journal, control: Control) -> JobState:
    saved, log = journal.directory / "steps", journal.log_path("coordinator")
    step = int(saved.read_text()) if saved.exists() else 0
    root = {"root": str(journal.directory), "world_size": 1, "resumed_from": None, "resumed_step": step}
    journal.append("gang_started", {"candidate": "small", "gang": 1, **root})
    while step < journal.spec().seed:
        reason = control.reason()
        if reason:
            if reason in STOPPING:
                journal.set_state(STOPPING[reason])
            _save(journal, saved, step)
            return STOPPED[reason]
        step += 1
        time.sleep(STEP_SECONDS)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"step {step} of epoch {journal.epoch}\n")
        row = {"step": step, "tokens": 100 * step, "loss": 1 / step, "fraction": step / journal.spec().seed}
        clock = {"gang_device_seconds": STEP_SECONDS * step, "gang_wall_seconds": STEP_SECONDS * step}
        journal.append("train.step", {"candidate": "small", "steps": [row], **clock})
        if step % CHECKPOINT_EVERY == 0:
            _save(journal, saved, step)
    return JobState.SUCCEEDED


def _save(journal: Journal, saved: Path, step: int) -> None:
    draft = saved.with_suffix(f".{os.getpid()}")
    draft.write_text(str(step))
    draft.replace(saved)
    journal.append("train.checkpoint", {"candidate": "small", "step": step, "path": str(saved)})


if __name__ == "__main__":
    sys.exit(main())
