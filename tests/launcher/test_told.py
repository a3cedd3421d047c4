"""Steps that a rank has made and nobody has written down."""

from pathlib import Path

import pytest

from launcher import told
from launcher.told import ToldSteps, forget_told, told_steps


def _numbers(log: Path, above: int = 0, up_to: int = 10**9) -> list[int]:
    return [row["step"] for row in told_steps(log, above, up_to)]


def test_what_lies_between_the_journal_and_the_checkpoint_is_read(tmp_path: Path) -> None:
    log = tmp_path / "small.e0001-g01.rank0.log"
    assert _numbers(log) == []
    kept = ToldSteps(log)
    for step in range(1, 11):
        kept.add({"step": step, "loss": 1.0 / step, "time": 5.0 * step})
    assert _numbers(log, above=3, up_to=7) == [4, 5, 6, 7]
    assert told_steps(log, 9, 10) == [{"step": 10, "loss": 0.1, "time": 50.0}]
    forget_told(log)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    ToldSteps(log).add({"step": 1})
    with open(tmp_path / "a.steps", "a") as file:
        file.write('{"step": 2, "lo')
    assert _numbers(log) == [1]


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MOST_BYTES", 200)
    log = tmp_path / "a.log"
    kept = ToldSteps(log)
    for step in range(1, 101):
        kept.add({"step": step})
    found = _numbers(log)
    assert found[-1] == 100
    assert found == list(range(found[0], 101))
    assert 10 < len(found) < 40
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3 * 200
