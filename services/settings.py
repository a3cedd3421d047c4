"""What a service is told by whoever runs it: one file in the home, and what the command line adds. Torch-free."""

import os
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, field_validator

from launcher.backends.base import BACKENDS
from launcher.environment import default_devices
from launcher.jobs import Home
from launcher.planning.cluster import GIBI
from launcher.problems import Problem, SpecError, of_validation
from parallelism.data.sources import ALLOWED_PROTOCOLS
from parallelism.options import Options

FILE = "service.yaml"
"""The operator's file, in the home."""
RESOLVED = "service/settings.json"
"""What the parts of a running service read; only its owner may, because a database's address holds a password."""

COORDINATOR = "launcher.coordinator"
STORE_PATIENCE_SECONDS = 5.0
"""How long the service waits for an object store: it has other jobs to look after, and is asked again."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class OidcSettings(Options):
    """Who issues the tokens that are accepted beside keys. The keys are a JWKS file: nothing is fetched."""

    issuer: str
    audience: str
    jwks_file: Path
    owner_claim: str = "sub"
    role_claim: str = Field(default="espalier_role", description="reader, submitter or admin; without it: reader")


class Limits(Options):
    """What one owner may ask for, unless a key says otherwise; None: no limit."""

    running_jobs: PositiveInt | None = None
    queued_jobs: PositiveInt | None = 1000
    device_hours_per_month: PositiveFloat | None = None


class Settings(Options):
    """One service on one home."""

    home: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8700, ge=0, le=65535, description="0: any free one")
    public_url: str | None = Field(default=None, description="the address that links begin with")
    database: str | None = Field(default=None, description="SQLAlchemy's address; default: SQLite in the home")
    allowed_hosts: list[str] = Field(default=[], description="names a browser may call the service by, beside its own")
    roots: list[Path] | None = Field(
        default=None, description="folders that jobs may read from; default: `data` in the home once there are keys"
    )
    journals: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9+]+://[^#?]+$",
        description="where jobs lie instead of in the home: an fsspec URL, such as s3://bucket/jobs",
    )
    protocols: list[str] = Field(default=list(ALLOWED_PROTOCOLS), description="fsspec protocols that jobs may name")
    backends: Annotated[list[str], Field(min_length=1)] | None = Field(
        default=None,
        description="back-ends that jobs may name; the first is for jobs that name none. Default: any, local",
    )
    mlflow: str | None = Field(default=None, description="a server, or 'none'; default: the home's own, served here")
    mlflow_url: str | None = Field(default=None, description="where people see it; known once it runs")
    body_bytes: PositiveInt = 1 << 20
    devices: PositiveInt = Field(default_factory=lambda: default_devices(1), description="ranks of all jobs at once")
    prestart: bool = Field(
        default=False, description="keep a Ray cluster with warm workers ready for the next local job, while idle"
    )
    limits: Limits = Limits()
    oidc: OidcSettings | None = None
    grace_seconds: NonNegativeFloat = Field(default=660.0, description="for the last checkpoint of a stopped job")
    coordinator: str = Field(default=COORDINATOR, description="module that drives a job")
    lease_seconds: PositiveFloat = 15.0
    poll_seconds: PositiveFloat = 0.5
    disk_reserve_bytes: PositiveInt = Field(default=GIBI // 2, description="no job is accepted below this much room")

    @field_validator("backends")
    @classmethod
    def _known(cls, names: list[str] | None) -> list[str] | None:
        unknown = sorted(set(names or []) - BACKENDS.keys())
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: available are {', '.join(sorted(BACKENDS))}")
        return names

    @property
    def database_url(self) -> str:
        """Where the job store is."""
        return self.database or f"sqlite:///{self.home}/service/jobs.db"

    def jobs_home(self, patience_seconds: float = STORE_PATIENCE_SECONDS) -> Home:
        """Where the jobs are. Raises ``ValueError`` where the store's client is not installed."""
        return Home(self.home, self.journals, patience_seconds)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    def write(self) -> Path:
        """Keep the resolved settings for the service's other processes."""
        path = self.home / RESOLVED
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=1))
        draft.replace(path)
        return path

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """What :meth:`write` kept."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def load_settings(home: Path, **given: Any) -> Settings:
    """The operator's file with what the command line adds (None: nothing). Raises ``SpecError`` by field."""
    home = home.expanduser().absolute()
    path = home / FILE
    document: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    if document is not None and not isinstance(document, dict):
        raise SpecError([Problem("", str(path), "not a mapping", "write it as {field: value, ...}")])
    values = {**(document or {}), **{name: value for name, value in given.items() if value is not None}}
    try:
        return Settings.model_validate({**values, "home": home})
    except ValidationError as error:
        raise SpecError(of_validation(error, Settings)) from error
