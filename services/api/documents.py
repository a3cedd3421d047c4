"""What the API answers with; the same models are the client's types."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from launcher.states import JobState


class BudgetDocument(BaseModel):
    """What one candidate's training has spent of its budget and has left, in the budget's unit."""

    unit: str
    limit: float
    spent: float
    left: float
    device_seconds: float
    lost_device_seconds: float


class CandidateDocument(BaseModel):
    """One candidate's training."""

    name: str
    status: str
    fraction: float = Field(description="of the budget, 0 to 1")
    step: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    restarts: int
    error: str | None
    budget: BudgetDocument


class VariantCount(BaseModel):
    """How many variants have been measured."""

    measured: int
    expected: int


class Links(BaseModel):
    """Where to go from a job."""

    self: str
    page: str
    events: str
    logs: str
    metrics: str
    result: str
    frontier: str
    variants: str
    mlflow: str = Field(description="leads to the job's run as soon as MLflow knows it")


class JobDocument(BaseModel):
    """A job: what is wanted of it, and what it is doing."""

    id: str
    name: str
    owner: str
    state: JobState
    desired: Literal["run", "pause", "cancel"]
    active: bool = Field(description="something still happens to it without anybody asking")
    priority: int
    created: float = Field(description="seconds since 1970, as all times here")
    changed: float = Field(description="when the state changed last")
    attempt: int = Field(description="lives of the job's coordinator so far")
    stage: str | None
    progress: float = Field(description="of the whole job, 0 to 1")
    seconds_left: float | None = Field(description="of training; null while that cannot be told")
    waiting: str | None = Field(description="what the job waits for")
    error: str | None
    devices: int
    candidates: list[CandidateDocument]
    variants: VariantCount | None
    links: Links


class JobWithSpec(JobDocument):
    """A job with the document that describes it, its plan, and the layouts that were changed since."""

    spec: dict[str, Any]
    plan: dict[str, Any]
    layouts: dict[str, Any]


class JobPage(BaseModel):
    """A part of the list of jobs, the newest first."""

    jobs: list[JobDocument]
    next: str | None = Field(description="the cursor of the next part; null: this was the last")


class EventPage(BaseModel):
    """A part of a job's events, in order."""

    events: list[dict[str, Any]]
    next: int = Field(description="give it as `after` to go on")
    more: bool


class LogFile(BaseModel):
    """One process's output."""

    name: str
    bytes: int
    modified: float
    candidate: str | None
    rank: int | None


class LogList(BaseModel):
    """The logs of a job."""

    logs: list[LogFile]


class FrontierDocument(BaseModel):
    """Every measured variant, the smallest first, each told whether it is on the frontier of these."""

    job: str
    name: str
    complete: bool
    variants: list[dict[str, Any]]


class FileDocument(BaseModel):
    """One file of a variant."""

    path: str
    bytes: int
    sha256: str
    href: str


class VariantDocument(BaseModel):
    """One variant and its files: the compact one, and its export."""

    variant: dict[str, Any]
    files: list[FileDocument]


class MetricNames(BaseModel):
    """What can be drawn."""

    metrics: list[str]


class Series(BaseModel):
    """One candidate's values; after a restart the newer value of a step counts."""

    candidate: str
    steps: list[int]
    values: list[float | None]
    times: list[float]


class MetricDocument(BaseModel):
    """One metric against the step."""

    name: str
    series: list[Series]


class ResumeRequest(BaseModel, extra="forbid"):
    """How a job goes on."""

    layouts: dict[str, dict[str, Any]] = Field(
        default={}, description="candidate → layout, where it is to be another one", examples=[{"large": {"tensor": 2}}]
    )


class PresetDocument(BaseModel):
    """A published model."""

    name: str
    parameters: int
    layers: int
    hidden: int
    heads: int
    source: str


class PresetList(BaseModel):
    """All of them, the smallest first."""

    presets: list[PresetDocument]


class Health(BaseModel):
    """Whether the service works, and what does not."""

    status: Literal["ok", "unavailable"]
    problems: list[str] = []
