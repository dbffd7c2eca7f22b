# pyright: reportAssignmentType=false
# (SQLModel declares __tablename__ as a property; its own documentation assigns a text.)
"""The tables of work, as SQLModel classes: the schema that migrations are checked against.

    quotes     what was asked and at which price; the unit of payment
    jobs       one answer each; the unit of work (states: router.job_states)
    queue      a row for each lane in which a job waits, and only while it waits
    queue_changes  what came to the queue and left it in the last minute; written by triggers
    attempts   one try at a job by one worker
    job_chunks what a running job has said so far, for readers that come late
    workers    who serves, with its record
    worker_events  what was noted about a worker
    check_prompts, checks  what workers are checked with, and what came of it
    webhooks   who is to be told that a job has ended, until he has been told
    receipt_keys  the public keys of all routers that ever signed receipts here
    door_ids   what opens a job at a door where clients ask again and again
    routers    which routers share this database, and what their workers can take

Texts of strangers (requests, answers) live in `quotes.request`, `jobs.spec`, `jobs.result` and
`job_chunks` only: these are what gets wiped.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Sequence,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlmodel import Field, SQLModel

QUEUE_SEQ = Sequence("queue_seq", metadata=SQLModel.metadata)


def _now() -> Column:
    return Column(DateTime(timezone=True), nullable=False, server_default=func.now())


def _time() -> Column:
    return Column(DateTime(timezone=True), nullable=True)


class QuoteRow(SQLModel, table=True):
    """State: open, paid (its jobs run or ran), late (paid too late, credited), expired."""

    __tablename__ = "quotes"
    __table_args__ = (
        CheckConstraint("offer_msat >= base_fee_msat", name="quotes_offer"),
        Index("quotes_open", "expires_at", postgresql_where=text("state = 'open'")),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    account_id: str | None = Field(default=None, sa_column=Column(Text))
    state: str = Field(sa_column=Column(Text, nullable=False))
    request: str | None = Field(default=None, sa_column=Column(Text))
    request_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    base_fee_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    offer_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    payment_hash: str | None = Field(default=None, sa_column=Column(Text, unique=True))
    max_wait_s: int = Field(sa_column=Column(Integer, nullable=False))
    created_at: datetime = Field(sa_column=_now())
    expires_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))


class JobRow(SQLModel, table=True):
    """`spec` and `result` are JSON texts, null once wiped. `rates` are those of the quote.

    `choices`: for a job that any of several models may serve, the rates of each as JSON
    (`router.choices`); `model` and `rates` are then those of the model that serves it, or served it
    last, and of the dearest before.
    `attached_to`: the router that holds the connection of a client who takes the job along when it
    goes; when that router dies, so does the connection. `cancel_reason`: it is to be cancelled by the
    router that runs it, for this reason.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("held_msat >= 0", name="jobs_held"),
        CheckConstraint("charged_msat is null or charged_msat <= held_msat", name="jobs_charged"),
        Index("jobs_quote", "quote_id", "index"),
        Index("jobs_running", "lease_ends_at", postgresql_where=text("state = 'running'")),
        Index(
            "jobs_waiting_until",
            "wait_ends_at",
            postgresql_where=text("state in ('queued', 'awaiting_payment')"),
        ),
        Index("jobs_wipe", "wipe_at", postgresql_where=text("wipe_at is not null")),
        Index("jobs_created", "created_at"),
        Index(
            "jobs_to_cancel",
            "router_id",
            postgresql_where=text("cancel_reason is not null and state in ('queued', 'running')"),
        ),
        Index(
            "jobs_alive_of_account",
            "account_id",
            postgresql_where=text("state in ('queued', 'running')"),
        ),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    quote_id: str = Field(sa_column=Column(Text, nullable=False))
    index: int = Field(sa_column=Column(Integer, nullable=False))
    account_id: str = Field(sa_column=Column(Text, nullable=False))
    key_id: str | None = Field(default=None, sa_column=Column(Text))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    attempt: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    spec: str | None = Field(default=None, sa_column=Column(Text))
    rates: str = Field(sa_column=Column(Text, nullable=False))
    choices: str | None = Field(default=None, sa_column=Column(Text))
    prompt_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    max_tokens: int = Field(sa_column=Column(BigInteger, nullable=False))
    base_fee_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    held_msat: int = Field(sa_column=Column(BigInteger, nullable=False))
    multiplier_milli: int = Field(sa_column=Column(BigInteger, nullable=False))
    seq: int | None = Field(default=None, sa_column=Column(BigInteger))
    max_wait_s: int = Field(sa_column=Column(Integer, nullable=False))
    charged_msat: int | None = Field(default=None, sa_column=Column(BigInteger))
    commission_ppm: int | None = Field(default=None, sa_column=Column(Integer))
    worker_id: str | None = Field(default=None, sa_column=Column(Text))
    router_id: str | None = Field(default=None, sa_column=Column(Text))
    attached_to: str | None = Field(default=None, sa_column=Column(Text))
    webhook: str | None = Field(default=None, sa_column=Column(Text))
    run_limit_s: int | None = Field(default=None, sa_column=Column(Integer))
    cancel_reason: str | None = Field(default=None, sa_column=Column(Text))
    prefix: int | None = Field(default=None, sa_column=Column(BigInteger))
    lease_ends_at: datetime | None = Field(default=None, sa_column=_time())
    wait_ends_at: datetime | None = Field(default=None, sa_column=_time())
    created_at: datetime = Field(sa_column=_now())
    queued_at: datetime | None = Field(default=None, sa_column=_time())
    started_at: datetime | None = Field(default=None, sa_column=_time())
    first_token_at: datetime | None = Field(default=None, sa_column=_time())
    ended_at: datetime | None = Field(default=None, sa_column=_time())
    end_reason: str | None = Field(default=None, sa_column=Column(Text))
    shown: bool = Field(default=False, nullable=False, sa_column_kwargs={"server_default": "false"})
    usage: str | None = Field(default=None, sa_column=Column(Text))
    result: str | None = Field(default=None, sa_column=Column(Text))
    answer_hash: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    wipe_at: datetime | None = Field(default=None, sa_column=_time())
    wiped: bool = Field(default=False, nullable=False, sa_column_kwargs={"server_default": "false"})


class QueueRow(SQLModel, table=True):
    """A job that waits in a lane. Narrow on purpose: claims read nothing else."""

    __tablename__ = "queue"
    __table_args__ = (Index("queue_order", "lane", text("multiplier_milli desc"), "seq"),)
    job_id: str = Field(sa_column=Column(Text, primary_key=True))
    lane: str = Field(sa_column=Column(Text, primary_key=True))
    multiplier_milli: int = Field(sa_column=Column(BigInteger, nullable=False))
    seq: int = Field(sa_column=Column(BigInteger, nullable=False))


class QueueChange(SQLModel, table=True):
    """Jobs that came to wait, or left, in one statement: the lanes of each, their multiplier.

    Only added to, so that no two commits wait for each other. `xact` is the transaction's number.
    """

    __tablename__ = "queue_changes"
    xact: int = Field(
        sa_column=Column(
            BigInteger, primary_key=True, server_default=text("pg_current_xact_id()::text::bigint")
        )
    )
    id: int = Field(sa_column=Column(BigInteger, Identity(), primary_key=True))
    lanes: list = Field(sa_column=Column(ARRAY(Text), nullable=False))
    multiplier_milli: int = Field(sa_column=Column(BigInteger, nullable=False))
    seqs: list = Field(sa_column=Column(ARRAY(BigInteger), nullable=False))
    added: bool = Field(nullable=False)
    at: datetime = Field(
        sa_column=Column(
            DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()
        )
    )


class ProjectRow(SQLModel, table=True):
    """A project of the DecentralGPT door at one router. `owner`: the hash of a worker key; null for
    programs on the router's machine. `models`: as `router.project_requests` writes them."""

    __tablename__ = "projects"
    router_id: str = Field(sa_column=Column(Text, primary_key=True))
    name: str = Field(sa_column=Column(Text, primary_key=True))
    owner: bytes | None = Field(default=None, sa_column=Column(LargeBinary))
    has_key_identity: bool = Field(nullable=False)
    ln_url: str | None = Field(default=None, sa_column=Column(Text))
    slots: int = Field(sa_column=Column(Integer, nullable=False))
    models: list = Field(sa_column=Column(JSONB, nullable=False))
    created_at: datetime = Field(sa_column=_now())


class LaneEdge(SQLModel, table=True):
    """A limit that some worker registered, so that rounding never strands a job that fits it."""

    __tablename__ = "lane_edges"
    dimension: str = Field(sa_column=Column(Text, primary_key=True))
    edge: int = Field(sa_column=Column(BigInteger, primary_key=True))


class AttemptRow(SQLModel, table=True):
    """One try. `outcome` null while it runs; `error` is for the operator, never the client."""

    __tablename__ = "attempts"
    __table_args__ = (Index("attempts_worker", "worker_id", "started_at"),)
    job_id: str = Field(sa_column=Column(Text, primary_key=True))
    n: int = Field(sa_column=Column(Integer, primary_key=True))
    worker_id: str = Field(sa_column=Column(Text, nullable=False))
    router_id: str = Field(sa_column=Column(Text, nullable=False))
    started_at: datetime = Field(sa_column=_now())
    ended_at: datetime | None = Field(default=None, sa_column=_time())
    outcome: str | None = Field(default=None, sa_column=Column(Text))
    blame: str | None = Field(default=None, sa_column=Column(Text))
    error: str | None = Field(default=None, sa_column=Column(Text))
    tokens: int | None = Field(default=None, sa_column=Column(BigInteger))


class JobChunk(SQLModel, table=True):
    """Output of a running job from character `start` of attempt `n`."""

    __tablename__ = "job_chunks"
    job_id: str = Field(sa_column=Column(Text, primary_key=True))
    n: int = Field(sa_column=Column(Integer, primary_key=True))
    start: int = Field(sa_column=Column(BigInteger, primary_key=True))
    text: str = Field(sa_column=Column(Text, nullable=False))
    tokens: int = Field(sa_column=Column(BigInteger, nullable=False))


class WorkerRow(SQLModel, table=True):
    """A worker, known by the hash of its key. Where it is paid stands in `payees`.

    `router_id`: the router that it is connected to, as that router last said.
    """

    __tablename__ = "workers"
    __table_args__ = (
        Index("workers_connected", "router_id", postgresql_where=text("router_id is not null")),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    key_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False, unique=True))
    router_id: str | None = Field(default=None, sa_column=Column(Text))
    name: str | None = Field(default=None, sa_column=Column(Text))
    models: list = Field(sa_column=Column(JSONB, nullable=False))
    hardware: dict = Field(sa_column=Column(JSONB, nullable=False))
    slots: int = Field(sa_column=Column(Integer, nullable=False))
    created_at: datetime = Field(sa_column=_now())
    last_seen_at: datetime = Field(sa_column=_now())
    banned_at: datetime | None = Field(default=None, sa_column=_time())
    ban_reason: str | None = Field(default=None, sa_column=Column(Text))
    draining: bool = Field(
        default=False, nullable=False, sa_column_kwargs={"server_default": "false"}
    )
    jobs_done: int = Field(
        default=0, sa_column=Column(BigInteger, nullable=False, server_default="0")
    )
    jobs_failed: int = Field(
        default=0, sa_column=Column(BigInteger, nullable=False, server_default="0")
    )
    tokens: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    reliability: float = Field(
        default=1.0, sa_column=Column(Float, nullable=False, server_default="1")
    )
    quality: float = Field(default=1.0, sa_column=Column(Float, nullable=False, server_default="1"))
    speeds: dict = Field(sa_column=Column(JSONB, nullable=False, server_default="{}"))


class RouterRow(SQLModel, table=True):
    """A router that lives, or lived not long ago: `seen_at` moves while it does.

    `workers` is what the workers connected to it can take, summed up (`router.presence`), and
    `minute_tokens` what was written there in the minute before `seen_at`. `place` is where its data folder
    lies (`router.data_folder`): one id at two places is a router and its copy.
    """

    __tablename__ = "routers"
    id: str = Field(sa_column=Column(Text, primary_key=True))
    started_at: datetime = Field(sa_column=_now())
    seen_at: datetime = Field(sa_column=_now())
    workers: list = Field(sa_column=Column(JSONB, nullable=False, server_default="[]"))
    minute_tokens: int = Field(sa_column=Column(BigInteger, nullable=False, server_default="0"))
    place: str | None = Field(default=None, sa_column=Column(Text))


class WorkerEventRow(SQLModel, table=True):
    """Something noted about a worker that is no failed attempt; those are in `attempts`."""

    __tablename__ = "worker_events"
    __table_args__ = (
        Index("worker_events_worker", "worker_id", "at"),
        Index("worker_events_at", "at"),
    )
    id: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    worker_id: str = Field(sa_column=Column(Text, nullable=False))
    at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    code: str = Field(sa_column=Column(Text, nullable=False))
    job_id: str | None = Field(default=None, sa_column=Column(Text))
    facts: dict = Field(sa_column=Column(JSONB, nullable=False))


class CheckPrompt(SQLModel, table=True):
    """A prompt of the operator's to check workers with. `expected` is a JSON list of texts, or null:
    then answers are held against one another. `model` null: any."""

    __tablename__ = "check_prompts"
    id: str = Field(sa_column=Column(Text, primary_key=True))
    prompt: str = Field(sa_column=Column(Text, nullable=False))
    expected: str | None = Field(default=None, sa_column=Column(Text))
    model: str | None = Field(default=None, sa_column=Column(Text))
    max_tokens: int = Field(sa_column=Column(Integer, nullable=False))
    created_at: datetime = Field(sa_column=_now())


class CheckRow(SQLModel, table=True):
    """One job that checks a worker. `worker_id` and `answer` once it was answered; `score` null in one
    that says nothing."""

    __tablename__ = "checks"
    __table_args__ = (
        Index("checks_open", "created_at", postgresql_where=text("scored_at is null")),
        Index("checks_prompt", "prompt_id", "created_at"),
        Index("checks_worker", "worker_id", "created_at"),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    prompt_id: str = Field(sa_column=Column(Text, nullable=False))
    job_id: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    worker_id: str | None = Field(default=None, sa_column=Column(Text))
    model: str | None = Field(default=None, sa_column=Column(Text))
    answer: str | None = Field(default=None, sa_column=Column(Text))
    score: float | None = Field(default=None, sa_column=Column(Float))
    scored_at: datetime | None = Field(default=None, sa_column=_time())
    created_at: datetime = Field(sa_column=_now())


class IdempotencyRow(SQLModel, table=True):
    """A submit that is not to be done twice. Scope: an account, or an L402 credential."""

    __tablename__ = "idempotency"
    __table_args__ = (Index("idempotency_created", "created_at"),)
    scope: str = Field(sa_column=Column(Text, primary_key=True))
    key: str = Field(sa_column=Column(Text, primary_key=True))
    request_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    quote_id: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime = Field(sa_column=_now())


class WebhookRow(SQLModel, table=True):
    """State: pending, delivered, given_up. `url` is null once it is not needed any more."""

    __tablename__ = "webhooks"
    __table_args__ = (
        Index(
            "webhooks_due",
            "account_id",
            "next_try_at",
            postgresql_where=text("state = 'pending'"),
        ),
    )
    id: str = Field(sa_column=Column(Text, primary_key=True))
    job_id: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    account_id: str = Field(sa_column=Column(Text, nullable=False))
    url: str | None = Field(default=None, sa_column=Column(Text))
    include_result: bool = Field(nullable=False)
    state: str = Field(sa_column=Column(Text, nullable=False))
    tries: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    next_try_at: datetime = Field(sa_column=_now())
    created_at: datetime = Field(sa_column=_now())
    last_status: int | None = Field(default=None, sa_column=Column(Integer))
    last_error: str | None = Field(default=None, sa_column=Column(Text))


class ReceiptKeyRow(SQLModel, table=True):
    """The public half of a router's key; never deleted, since old receipts are checked with it."""

    __tablename__ = "receipt_keys"
    kid: str = Field(sa_column=Column(Text, primary_key=True))
    public_key: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = Field(sa_column=_now())


class DoorId(SQLModel, table=True):
    """An id that a polling door handed out, by its hash: it opens the jobs of a quote, or one.

    `shown_as`: the name that the client goes by in public, where its dialect has one.
    """

    __tablename__ = "door_ids"
    __table_args__ = (Index("door_ids_created", "created_at"),)
    id_hash: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    door: str = Field(sa_column=Column(Text, nullable=False))
    quote_id: str = Field(sa_column=Column(Text, nullable=False))
    job_index: int | None = Field(default=None, sa_column=Column(Integer))
    shown_as: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_now())


class PullWorker(SQLModel, table=True):
    """A worker that polls, by the name that its owner keeps; its record is in `workers`.

    `owner_hash` is of the secret that goes with the name (`router.pull_records`). `shown_as`: the
    public name of its owner, where its dialect has one.
    """

    __tablename__ = "pull_workers"
    __table_args__ = (Index("pull_workers_owner", "owner_hash"),)
    name: str = Field(sa_column=Column(Text, primary_key=True))
    door: str = Field(sa_column=Column(Text, nullable=False))
    worker_id: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    owner_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    shown_as: str | None = Field(default=None, sa_column=Column(Text))
    info: str | None = Field(default=None, sa_column=Column(Text))
    agent: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=_now())


class NamedUse(SQLModel, table=True):
    """Prompt tokens by the public name of a client, of jobs whose ids are forgotten (KC-10)."""

    __tablename__ = "named_use"
    name: str = Field(sa_column=Column(Text, primary_key=True))
    tokens: int = Field(sa_column=Column(BigInteger, nullable=False))


class SettingRow(SQLModel, table=True):
    """A setting that an admin changed at run time; it outranks the environment."""

    __tablename__ = "settings"
    key: str = Field(sa_column=Column(Text, primary_key=True))
    value: dict = Field(sa_column=Column(JSONB, nullable=False))


class AuditRow(SQLModel, table=True):
    """One change by an admin: who, when, before, after."""

    __tablename__ = "audit"
    id: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    at: datetime = Field(sa_column=_now())
    who: str = Field(sa_column=Column(Text, nullable=False))
    action: str = Field(sa_column=Column(Text, nullable=False))
    subject: str = Field(sa_column=Column(Text, nullable=False))
    before: dict | None = Field(default=None, sa_column=Column(JSONB))
    after: dict | None = Field(default=None, sa_column=Column(JSONB))
