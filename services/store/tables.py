"""The tables of the job store. What the migrations make and what stands here is the same: a test compares them."""

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Counter = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only what it calls INTEGER

Document = dict[str, Any]


class Base(DeclarativeBase):
    """All tables."""


class JobRow(Base):
    """One job: what its owner wants, a cache of what its journal says, the dispatcher's notes. Times: since 1970."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        Index("jobs_by_owner", "owner", "sequence"),
        Index("jobs_by_name", "name", "sequence"),
        Index("jobs_by_state", "state", "sequence"),
        Index("jobs_by_owner_and_state", "owner", "state", "sequence"),
        Index("jobs_by_owner_and_name", "owner", "name", "sequence"),
    )

    sequence: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(100), unique=True)

    # Intent
    owner: Mapped[str] = mapped_column(String(200))
    key_id: Mapped[str | None] = mapped_column(String(32), index=True)
    name: Mapped[str] = mapped_column(String(63))
    spec: Mapped[Document] = mapped_column(JSON, deferred=True)
    plan: Mapped[Document] = mapped_column(JSON, deferred=True)
    request_hash: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(200))
    priority: Mapped[int] = mapped_column(Integer, default=0)
    created: Mapped[float] = mapped_column(Float)
    desired: Mapped[str] = mapped_column(String(10), default="run")
    desired_at: Mapped[float] = mapped_column(Float)
    resumed_epoch: Mapped[int] = mapped_column(Integer, default=-1)
    """The epoch at whose rest the owner asked to go on."""
    layouts: Mapped[Document | None] = mapped_column(JSON(none_as_null=True))
    """Candidate → layout, where the owner changed it after the job was submitted."""

    # What the journal said last
    state: Mapped[str] = mapped_column(String(20), default="submitted")
    changed: Mapped[float] = mapped_column(Float)
    epoch: Mapped[int] = mapped_column(Integer, default=0)
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    error: Mapped[str | None] = mapped_column(Text)
    waiting: Mapped[str | None] = mapped_column(Text)
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    observed: Mapped[Document] = mapped_column(JSON, default=dict)
    device_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    version: Mapped[int] = mapped_column(Integer, default=1)
    """Grows with every change that a reader can see."""

    # The dispatcher's
    devices: Mapped[int] = mapped_column(Integer, default=1)
    handle: Mapped[Document | None] = mapped_column(JSON(none_as_null=True))
    """The submission at the back-end; ``{}`` from the decision to submit until the back-end has answered."""
    handle_epoch: Mapped[int] = mapped_column(Integer, default=0)
    handle_milestones: Mapped[int] = mapped_column(Integer, default=0)
    """What the journal said before the submission."""
    fruitless: Mapped[int] = mapped_column(Integer, default=0)
    not_before: Mapped[float] = mapped_column(Float, default=0.0)
    dispatched: Mapped[float] = mapped_column(Float, default=0.0)
    fed: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether MLflow has everything of a job at rest."""


class KeyRow(Base):
    """An API key. Its secret is not here: only what tells whether one that is shown is the right one."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    owner: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(20))
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float | None] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)
    running_jobs: Mapped[int | None] = mapped_column(Integer)
    queued_jobs: Mapped[int | None] = mapped_column(Integer)
    device_hours_per_month: Mapped[float | None] = mapped_column(Float)
    highest_priority: Mapped[int] = mapped_column(Integer, default=0)


class UsageRow(Base):
    """Device-seconds burnt by an account (a key, or an owner without one) in a month such as ``2026-11`` (UTC)."""

    __tablename__ = "usage"

    account: Mapped[str] = mapped_column(String(240), primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    device_seconds: Mapped[float] = mapped_column(Float, default=0.0)


class LeaseRow(Base):
    """Who leads; ``token`` grows with every change of hands and fences out those who led before."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    token: Mapped[int] = mapped_column(Integer)
    expires: Mapped[float] = mapped_column(Float)


class WebhookRow(Base):
    """Where to tell an owner's changes of state; the secret signs what is sent."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(String(100))
    created: Mapped[float] = mapped_column(Float)


class DeliveryRow(Base):
    """One message to one webhook, written in the transaction of the change that it tells."""

    __tablename__ = "deliveries"

    sequence: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    body: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    due: Mapped[float | None] = mapped_column(Float, index=True)
    """None: delivered, or given up."""
    error: Mapped[str | None] = mapped_column(Text)
