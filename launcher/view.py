"""What the events of a job say, folded into one picture: state, stages, candidates, burnt work. Pure and torch-free."""

from dataclasses import dataclass, field
from typing import Any

from launcher.events import ATTEMPT_STARTED, Event
from launcher.states import RESTING, JobState

MILESTONES = frozenset({"stage_done", "train.checkpoint", "candidate_done", "variant"})


@dataclass
class GangView:
    """One life of a candidate's process group."""

    epoch: int
    number: int
    root: str
    world_size: int
    resumed_from: str | None
    resumed_step: int
    step: int
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    told: float = 0.0
    """When its clock was last told, in seconds since 1970."""
    checkpoint_step: int = 0
    ended: str | None = None
    replaced: bool = False
    """Its death is written down, and what it lost."""


@dataclass
class CandidateView:
    """What is known of one candidate."""

    name: str
    gangs: list[GangView] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    validation_loss: float | None = None
    restarts: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    failure: str | None = None

    @property
    def gang(self) -> GangView | None:
        """The newest process group."""
        return self.gangs[-1] if self.gangs else None

    @property
    def device_seconds(self) -> float:
        """Burnt by all process groups so far."""
        return sum(gang.device_seconds for gang in self.gangs)

    @property
    def wall_seconds(self) -> float:
        """Wall-clock seconds of all process groups so far; queues do not count."""
        return sum(gang.wall_seconds for gang in self.gangs)

    @property
    def lost_device_seconds(self) -> float:
        """Part of :attr:`device_seconds` that bought no progress."""
        return sum(restart["lost_device_seconds"] for restart in self.restarts)


@dataclass
class JobView:
    """One job as its journal tells it."""

    state: JobState = JobState.SUBMITTED
    epoch: int = 0
    attempt: dict[str, Any] | None = None
    released: bool = True
    error: str | None = None
    waiting: str | None = None
    stages: dict[str, Event] = field(default_factory=dict)
    active_stage: str | None = None
    candidates: dict[str, CandidateView] = field(default_factory=dict)
    variants: dict[tuple[str, str], Event] = field(default_factory=dict)
    processes: dict[tuple[str, int], Event] = field(default_factory=dict)
    milestones: int = 0
    """Grows with everything that a later attempt need not do again."""
    last_event: int = 0
    last_time: float = 0.0

    def candidate(self, name: str) -> CandidateView:
        """The candidate's part, made when it is first spoken of."""
        return self.candidates.setdefault(name, CandidateView(name))

    def apply(self, event: Event) -> None:
        """Take in the next event. Kinds that this version does not know are passed over."""
        self.last_event, self.last_time = event["number"], event["time"]
        self.milestones += event["kind"] in MILESTONES
        handler = _HANDLERS.get(event["kind"])
        if handler:
            handler(self, event)


def _attempt_started(view: JobView, event: Event) -> None:
    view.epoch, view.attempt, view.released = event["epoch"], event, False
    view.error = view.waiting = view.active_stage = None
    view.processes.clear()
    for candidate in view.candidates.values():
        candidate.failure = None


def _state(view: JobView, event: Event) -> None:
    view.state = JobState(event["state"])
    if view.state in RESTING:
        view.released, view.active_stage = True, None
    if view.state is not JobState.STARTING:
        view.waiting = None
    view.error = event.get("error") or (None if view.state is JobState.SUCCEEDED else view.error)


def _waiting(view: JobView, event: Event) -> None:
    view.waiting = event["reason"]


def _stage_started(view: JobView, event: Event) -> None:
    view.active_stage = event["stage"]


def _stage_done(view: JobView, event: Event) -> None:
    view.stages[event["stage"]] = event
    view.waiting = None
    if view.active_stage == event["stage"]:
        view.active_stage = None


def _process_started(view: JobView, event: Event) -> None:
    if event["role"] == "worker":
        view.waiting = None  # it has the device that was waited for
    view.processes[event["node"], event["pid"]] = event


def _process_ended(view: JobView, event: Event) -> None:
    view.processes.pop((event["node"], event["pid"]), None)


def _gang_started(view: JobView, event: Event) -> None:
    candidate = view.candidate(event["candidate"])
    candidate.result = candidate.failure = view.waiting = None
    candidate.gangs.append(
        GangView(
            epoch=event["epoch"],
            number=event["gang"],
            root=event["root"],
            world_size=event["world_size"],
            resumed_from=event["resumed_from"],
            resumed_step=event["resumed_step"],
            step=event["resumed_step"],
            told=event["time"],
            checkpoint_step=event["resumed_step"],
        )
    )
    _clock(candidate.gangs[-1], event)


def _clock(gang: GangView, event: Event) -> None:
    """Clocks of a gang only run forward, whichever event tells them."""
    gang.step = max(gang.step, event.get("step", 0))
    if "gang_wall_seconds" in event:
        gang.device_seconds = max(gang.device_seconds, event["gang_device_seconds"])
        gang.wall_seconds = max(gang.wall_seconds, event["gang_wall_seconds"])
        gang.told = max(gang.told, event["time"])


def _gang_event(view: JobView, event: Event) -> CandidateView | None:
    """The candidate an event of training speaks of, its gang's clocks set."""
    if event.get("candidate") is None:
        return None
    candidate = view.candidate(event["candidate"])
    if candidate.gang:
        _clock(candidate.gang, event)
    return candidate


def _train_start(view: JobView, event: Event) -> None:
    candidate = _gang_event(view, event)
    if candidate:
        candidate.start = event


def _train_step(view: JobView, event: Event) -> None:
    candidate = _gang_event(view, event)
    if candidate:
        candidate.latest = event["steps"][-1]
        if candidate.gang:
            candidate.gang.step = max(candidate.gang.step, candidate.latest["step"])


def _train_evaluation(view: JobView, event: Event) -> None:
    candidate = _gang_event(view, event)
    if candidate:
        candidate.validation_loss = event["validation_loss"]


def _train_checkpoint(view: JobView, event: Event) -> None:
    candidate = _gang_event(view, event)
    if candidate and candidate.gang:
        candidate.gang.checkpoint_step = max(candidate.gang.checkpoint_step, event["step"])


def _gang_ended(view: JobView, event: Event) -> None:
    candidate = _gang_event(view, event)
    if candidate and candidate.gang:
        candidate.gang.ended = event["outcome"]


def _restart(view: JobView, event: Event) -> None:
    candidate = view.candidate(event["candidate"])
    candidate.restarts.append(event)
    if candidate.gang:
        _clock(candidate.gang, event)
        candidate.gang.replaced = True


def _candidate_done(view: JobView, event: Event) -> None:
    view.candidate(event["candidate"]).result = event["result"]


def _candidate_failed(view: JobView, event: Event) -> None:
    view.candidate(event["candidate"]).failure = event["error"]


def _variant(view: JobView, event: Event) -> None:
    view.variants[event["candidate"], event["name"]] = event


_HANDLERS = {
    ATTEMPT_STARTED: _attempt_started,
    "state": _state,
    "waiting": _waiting,
    "stage_started": _stage_started,
    "stage_done": _stage_done,
    "process_started": _process_started,
    "process_ended": _process_ended,
    "gang_started": _gang_started,
    "gang_ended": _gang_ended,
    "heartbeat": _gang_event,
    "train.start": _train_start,
    "train.step": _train_step,
    "train.evaluation": _train_evaluation,
    "train.checkpoint": _train_checkpoint,
    "restart": _restart,
    "candidate_done": _candidate_done,
    "candidate_failed": _candidate_failed,
    "variant": _variant,
}
