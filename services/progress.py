"""What a running job looks like in a terminal: bars for people, lines for logs; fed with the journal's picture."""

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.states import JobState
from launcher.view import CandidateView, JobView

RATE_SECONDS = 60.0
"""The time left follows from the budget spent over this long."""


@dataclass(frozen=True)
class CandidateRow:
    """One candidate's line."""

    name: str
    status: str
    fraction: float
    step: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float | None
    restarts: int


class Pace:
    """Time left of each candidate, from how fast its budget was spent lately."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, float]]] = {}

    def seconds_left(self, name: str, fraction: float, now: float) -> float | None:
        """Seconds until the budget is spent; None while that cannot be told. ``now`` in seconds of any one clock."""
        samples = self._samples.setdefault(name, deque())
        if samples and fraction < samples[-1][1]:
            samples.clear()  # the group went back to a checkpoint
        if not samples or fraction > samples[-1][1]:
            samples.append((now, fraction))
        while len(samples) > 2 and samples[1][0] < now - RATE_SECONDS:
            samples.popleft()
        (first_time, first), (last_time, last) = samples[0], samples[-1]
        if last <= first or last_time <= first_time:
            return None
        rate = (last - first) / (last_time - first_time)
        return max(0.0, (1.0 - last) / rate - (now - last_time))


def candidate_row(view: CandidateView, pace: Pace, now: float) -> CandidateRow:
    """What is known of a candidate, as one line."""
    latest = view.latest
    fraction = float(latest.get("fraction", 0.0))
    status = _status(view)
    return CandidateRow(
        name=view.name,
        status=status,
        fraction=1.0 if status == "trained" else fraction,
        step=int(latest.get("step", 0)),
        loss=_number(latest.get("loss")),
        validation_loss=view.validation_loss,
        tokens_per_second=_number(latest.get("tokens_per_second")),
        mfu=_number(latest.get("mfu")),
        seconds_left=pace.seconds_left(view.name, fraction, now) if status == "training" else None,
        restarts=len(view.restarts),
    )


def _status(view: CandidateView) -> str:
    if view.failure:
        return "failed"
    if view.result:
        return "trained" if view.result.get("reason") == "budget" else "stopped"
    if view.gang is None:
        return "waiting"
    if view.gang.ended:
        return "restarting"
    return "training" if view.latest else "starting"


def job_line(view: JobView, variants: int) -> str:
    """The job's state in one line; ``variants``: how many the job will have."""
    parts = [view.state.value]
    if view.waiting:
        parts.append(f"waiting: {view.waiting}")
    if view.active_stage:
        parts.append(view.active_stage)
    if view.variants:
        parts.append(f"{len(view.variants)} of {variants} variants measured")
    if view.epoch > 1:
        parts.append(f"attempt {view.epoch}")
    return " · ".join(parts)


def plain_line(row: CandidateRow) -> str:
    """One candidate for a log file."""
    parts = [f"{row.name}: {row.status}", f"{row.fraction:.0%} of the budget", f"step {row.step}"]
    if row.loss is not None:
        parts.append(f"loss {row.loss:.3f}")
    if row.tokens_per_second is not None:
        parts.append(f"{row.tokens_per_second:,.0f} tokens/s")
    if row.mfu is not None:
        parts.append(f"MFU {row.mfu:.0%}")
    if row.seconds_left is not None:
        parts.append(f"{clock(row.seconds_left)} left")
    if row.restarts:
        parts.append(f"{row.restarts} restarts")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """``75`` → ``1:15``, ``4000`` → ``1:06:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display(Protocol):
    """Shows a job while it runs."""

    def update(self, view: JobView) -> None:
        """Show the newest picture."""

    def say(self, message: str) -> None:
        """A line that stays."""

    def __enter__(self) -> "Display": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Bars:
    """Live progress bars, one per candidate."""

    def __init__(self, console: Console, candidates: list[str], variants: int) -> None:
        self._console = console
        self._candidates = candidates
        self._variants = variants
        self._pace = Pace()
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "Bars":
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, view: JobView) -> None:
        """Draw the table of candidates and the line of the job."""
        now = time.monotonic()
        table = Table(box=None, padding=(0, 1), show_edge=False, header_style="dim")
        for title in ("candidate", "", "budget", "loss", "val. loss", "tokens/s", "MFU", "left", ""):
            table.add_column(title, justify="left" if title in ("candidate", "") else "right")
        for name in self._candidates:
            row = candidate_row(view.candidates.get(name) or CandidateView(name), self._pace, now)
            table.add_row(
                row.name,
                ProgressBar(total=1.0, completed=row.fraction, width=24),
                f"{row.fraction:.0%}",
                _cell(row.loss, ".3f"),
                _cell(row.validation_loss, ".3f"),
                _cell(row.tokens_per_second, ",.0f"),
                _cell(row.mfu, ".0%"),
                "" if row.seconds_left is None else clock(row.seconds_left),
                row.status + (f", {row.restarts} restarts" if row.restarts else ""),
            )
        self._live.update(Group(table, Text(job_line(view, self._variants), style="dim")))

    def say(self, message: str) -> None:
        """A line above the bars."""
        self._console.print(message)


class Lines:
    """Plain lines: at once when a status changes, otherwise every ``every_seconds``."""

    def __init__(self, console: Console, candidates: list[str], variants: int, every_seconds: float = 15.0) -> None:
        self._console = console
        self._candidates = candidates
        self._variants = variants
        self._every_seconds = every_seconds
        self._pace = Pace()
        self._shown: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, view: JobView) -> None:
        """Write what is due."""
        now = time.monotonic()
        if view.active_stage or view.state is not JobState.RUNNING:  # between two stages there is nothing to tell
            line = job_line(view, self._variants)
            self._show("", line, line, now)
        for name in self._candidates:
            row = candidate_row(view.candidates.get(name) or CandidateView(name), self._pace, now)
            lasting = row.status not in ("training", "starting")
            self._show(name, row.status, plain_line(row), now, repeat=not lasting)

    def say(self, message: str) -> None:
        """A line of its own."""
        self._console.print(message, highlight=False, soft_wrap=True)

    def _show(self, key: str, status: str, line: str, now: float, repeat: bool = False) -> None:
        shown = self._shown.get(key)
        due = shown is None or shown[0] != status or (repeat and now - shown[1] >= self._every_seconds)
        if due and status != "waiting":
            self._shown[key] = (status, now)
            self.say(line)


def display_for(console: Console, candidates: list[str], variants: int) -> Display:
    """Bars in a terminal, lines elsewhere."""
    return (Bars if console.is_terminal else Lines)(console, candidates, variants)


def _number(value: object) -> float | None:
    # A diverged loss comes as the text "nan": JSON has no word for it.
    return float(value) if isinstance(value, int | float | str) else None


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
