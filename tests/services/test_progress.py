"""What a running job shows: rows, time left, lines at changes and at intervals."""

import io
from typing import Any

import pytest
from rich.console import Console

from launcher.view import JobView
from services import progress
from services.progress import Bars, Lines, Pace, candidate_row, clock, display_for, job_line, plain_line


class Story:
    """Builds a view from events, as the journal does."""

    def __init__(self) -> None:
        self.view = JobView()
        self._number = 0

    def tell(self, kind: str, **fields: Any) -> JobView:
        self._number += 1
        self.view.apply({"number": self._number, "time": 1000.0 + self._number, "epoch": 1, "kind": kind, **fields})
        return self.view

    def gang(self, candidate: str) -> JobView:
        gang = {"gang": 1, "root": "r", "world_size": 2, "resumed_from": None, "resumed_step": 0}
        return self.tell("gang_started", candidate=candidate, **gang)

    def step(self, candidate: str, step: int, fraction: float, **fields: Any) -> JobView:
        values = {"step": step, "loss": 3.0, "fraction": fraction, "tokens_per_second": 1234.5, "mfu": 0.4, **fields}
        return self.tell("train.step", candidate=candidate, steps=[values])


def test_pace_tells_the_time_left_from_the_rate_of_spending() -> None:
    pace = Pace()
    assert pace.seconds_left("a", 0.1, now=100.0) is None
    assert pace.seconds_left("a", 0.2, now=110.0) == pytest.approx(80.0)
    assert pace.seconds_left("a", 0.2, now=115.0) == pytest.approx(75.0), "no news: the clock goes on"
    assert pace.seconds_left("a", 0.6, now=120.0) == pytest.approx(0.4 / (0.5 / 20))


def test_pace_starts_anew_when_a_group_goes_back_to_a_checkpoint() -> None:
    pace = Pace()
    pace.seconds_left("a", 0.1, now=0.0)
    pace.seconds_left("a", 0.5, now=10.0)
    assert pace.seconds_left("a", 0.3, now=20.0) is None
    assert pace.seconds_left("a", 0.4, now=30.0) == pytest.approx(60.0)


def test_pace_forgets_what_is_older_than_a_minute() -> None:
    pace = Pace()
    for now, fraction in ((0.0, 0.0), (10.0, 0.5), (80.0, 0.51), (150.0, 0.52)):
        left = pace.seconds_left("a", fraction, now)
    assert left == pytest.approx(0.48 / (0.01 / 70))


def test_candidate_row_follows_the_events() -> None:
    story, pace = Story(), Pace()
    view = story.view
    assert candidate_row(view.candidate("a"), pace, 0.0).status == "waiting"
    story.gang("a")
    assert candidate_row(view.candidate("a"), pace, 0.0).status == "starting"
    story.step("a", 7, 0.25)
    row = candidate_row(view.candidate("a"), pace, 0.0)
    assert (row.status, row.step, row.fraction, row.loss, row.mfu) == ("training", 7, 0.25, 3.0, 0.4)
    story.tell("candidate_done", candidate="a", result={"reason": "budget"})
    row = candidate_row(view.candidate("a"), pace, 0.0)
    assert (row.status, row.fraction, row.seconds_left) == ("trained", 1.0, None)


def test_plain_line_says_what_the_bars_say() -> None:
    story = Story()
    story.gang("a")
    row = candidate_row(story.step("a", 7, 0.25).candidate("a"), Pace(), 0.0)
    assert plain_line(row) == "a: training, 25% of the budget, step 7, loss 3.000, 1,234 tokens/s, MFU 40%"


def test_job_line_names_stage_variants_and_attempt() -> None:
    story = Story()
    story.tell("state", state="running")
    story.tell("stage_started", stage="compress")
    story.tell("variant", candidate="a", name="dense")
    assert job_line(story.view, 4) == "running · compress · 1 of 4 variants measured"


def test_lines_come_at_changes_and_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    lines = Lines(Console(file=text, width=200), ["a"], variants=4, every_seconds=15.0)
    story = Story()

    def written(view: JobView) -> list[str]:
        text.seek(0)
        text.truncate()
        lines.update(view)
        return text.getvalue().splitlines()

    assert written(story.view) == ["submitted"]
    assert written(story.view) == []
    assert written(story.gang("a")) == ["a: starting, 0% of the budget, step 0"]
    assert len(written(story.step("a", 1, 0.1))) == 1
    assert written(story.step("a", 2, 0.2)) == []
    now[0] = 20.0
    assert written(story.step("a", 3, 0.3))[0].startswith("a: training, 30% of the budget, step 3")
    assert written(story.tell("state", state="running")) == []
    assert written(story.tell("stage_started", stage="compress")) == ["running · compress"]


def test_a_job_that_waits_says_why_until_it_goes_on() -> None:
    story = Story()
    story.tell("state", state="starting")
    assert job_line(story.tell("waiting", reason="Ray to start"), 0) == "starting · waiting: Ray to start"
    assert job_line(story.tell("state", state="running"), 0) == "running"
    needs = "a needs 8 CPU (2 of 4 free) on one node"
    assert job_line(story.tell("waiting", candidate="a", reason=needs), 0) == f"running · waiting: {needs}"
    assert job_line(story.gang("a"), 0) == "running"


def test_bars_show_every_number_and_lines_serve_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    console = Console(file=text, width=140, force_terminal=True)
    display = display_for(console, ["a", "b"], variants=4)
    assert isinstance(display, Bars)
    story = Story()
    story.gang("a")
    with display:
        display.update(story.step("a", 7, 0.25))
    for part in ("25%", "3.000", "1,234", "40%", "training", "waiting"):
        assert part in text.getvalue()
    assert isinstance(display_for(Console(file=io.StringIO()), ["a"], 4), Lines)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (4000, "1:06:40")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
