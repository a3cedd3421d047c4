"""What the preparation tests run in processes of their own; imports little, so that those start quickly."""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import parallelism.data.prepare
from parallelism.data.config import DataConfig, TokenizerConfig
from parallelism.data.prepare import prepare


def prepare_and_signal(asked: DataConfig, directory: Path, phase: str, deed: signal.Signals) -> None:
    """Prepare, and send oneself a signal when a phase first reports."""
    reports: list[str] = []

    def at(reached: str, seen: int) -> None:
        reports.append(reached)
        if reached == phase and reports.count(phase) == 1:
            os.kill(os.getpid(), deed)

    prepare(asked, directory, 7, progress=at)


def prepare_and_tell(asked: DataConfig, directory: Path, results: Any) -> None:
    """Prepare, and put the folder of the result on a queue."""
    results.put((os.getpid(), prepare(asked, directory, 7).folder))


def print_peak_memory(path: str, directory: str) -> None:
    """Prepare JSON lines in small batches, the tokenizer seeing little of them; print the peak of resident bytes."""
    parallelism.data.prepare.BATCH_BYTES = 256 << 10
    tokenizer = TokenizerConfig(vocab_size=400, training_bytes=200_000)
    prepare(DataConfig(kind="jsonl", train=[path], tokenizer=tokenizer), Path(directory), 1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    print_peak_memory(*sys.argv[1:])
