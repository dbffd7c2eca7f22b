"""Everything a worker can be told: `SATHERD_...` in the environment or `.env`, or flags."""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.errors import EngineStartError
from worker.kobold_prompt import ChatTemplate

KEY_FILE = "worker.key"
SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


class EngineName(StrEnum):
    LLAMA_CPP = "llama_cpp"
    OPENAI = "openai"
    KOBOLDCPP = "koboldcpp"
    ECHO = "echo"


class EchoFault(StrEnum):
    """What the echo engine does wrong on purpose."""

    NONE = "none"
    FAIL_BEFORE = "fail_before"
    FAIL_MIDWAY = "fail_midway"
    STALL = "stall"


class WorkerSettings(BaseSettings):
    """Settings of a worker. Without a default, the engine's own counts."""

    model_config = SettingsConfigDict(
        env_prefix="SATHERD_", env_file=".env", extra="ignore", env_ignore_empty=True
    )

    router_url: str = Field(
        default="http://127.0.0.1:8000",
        description="The router: http(s)://host or ws(s)://host; `/worker` is added. Several routers of"
        " one market, comma separated, are tried in turn.",
    )
    ln_url: str | None = Field(
        default=None,
        description="The Lightning address that is paid; without it the worker serves unpaid.",
    )
    engine: EngineName = Field(
        default=EngineName.LLAMA_CPP,
        description="What runs the model: llama.cpp here, a server elsewhere; echo is for tests.",
    )
    model: str | None = Field(
        default=None,
        description="llama_cpp: a GGUF file; else the server's names, comma separated.",
    )
    model_name: str | None = Field(default=None, description="The name that clients see.")
    slots: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Jobs at once; default: measured at the start (llama_cpp, openai); koboldcpp: 1.",
    )
    context: int | None = Field(
        default=None, ge=16, le=100_000_000, description="Tokens of context for each job."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="The longest answer in tokens; default: the context.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads; default: measured at the start, and again while it works.",
    )
    gpu_layers: int = Field(
        default=-1,
        description="Layers on the GPU, -1 for all; without a GPU build it does nothing.",
    )

    engine_url: str | None = Field(
        default=None, description="Where the openai or koboldcpp server listens."
    )
    engine_api_key: SecretStr | None = Field(default=None, description="Its key, if it wants one.")
    image_models: str | None = Field(
        default=None,
        description="openai only: which of its models make pictures, comma separated.",
    )
    image_edit_models: str | None = Field(
        default=None,
        description="openai only: which of its models change pictures, comma separated.",
    )
    engine_timeout_s: float = Field(
        default=300, gt=0, description="The longest silence of that server."
    )
    chat_template: ChatTemplate = Field(
        default=ChatTemplate.ALPACA, description="koboldcpp only: how messages become one prompt."
    )

    worker_key: SecretStr | None = Field(
        default=None,
        description="The secret that earnings belong to; default: a file in the data directory.",
    )
    data_dir: Path = Field(
        default_factory=lambda: Path.home() / ".satherd", description="Where that file lies."
    )
    worker_name: str | None = Field(default=None, max_length=100, description="A name for people.")
    min_fees: dict[str, dict[str, int]] | None = Field(
        default=None,
        description='What it asks at least, after the commission: {"m": {"output_msat_per_mtok": 5}}.',
    )
    grace_s: float = Field(default=30, ge=0, description="How long SIGTERM waits for running jobs.")
    reconnect_max_s: float = Field(
        default=30, gt=0, description="The longest pause between two tries to connect."
    )

    echo_token_s: float = Field(
        default=0, ge=0, description="The echo engine: seconds for each token."
    )
    echo_fault: EchoFault = Field(
        default=EchoFault.NONE, description="The echo engine: what it does wrong on purpose."
    )
    echo_fault_every: int = Field(
        default=1, ge=1, description="The echo engine: every how many jobs."
    )

    @field_validator("worker_key")
    @classmethod
    def _key_is_long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not 32 <= len(key.get_secret_value()) <= 128:
            raise ValueError("a worker key has 32 to 128 characters; 64 hex digits are usual")
        return key

    @field_validator("router_url")
    @classmethod
    def _router_is_a_url(cls, url: str) -> str:
        socket_urls(url)
        return url


def socket_url(router_url: str) -> str:
    """The WebSocket URL of a router's worker door. Raises ValueError for what is no such URL."""
    parts = urlsplit(router_url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError("the router's URL must look like https://router.example or ws://host:8000")
    path = parts.path.rstrip("/")
    if not path.endswith("/worker"):
        path += "/worker"
    return urlunsplit((SCHEMES[parts.scheme], parts.netloc, path, parts.query, ""))


def socket_urls(router_urls: str) -> list[str]:
    """The same for several, comma separated. Raises ValueError."""
    return [socket_url(url.strip()) for url in router_urls.split(",")]


def worker_key(settings: WorkerSettings) -> str:
    """The secret that this worker's earnings belong to: as set, or from the key file.

    The file is made on the first run, readable by its owner only. Losing it loses the name that
    what is not yet paid out belongs to. Raises EngineStartError when it can be neither read nor
    made, or holds something else.
    """
    if settings.worker_key is not None:
        return settings.worker_key.get_secret_value()
    path = settings.data_dir / KEY_FILE
    try:
        return _read_key(path)
    except FileNotFoundError:
        return _make_key(path)
    except OSError as error:
        raise EngineStartError(f"the worker key {path} cannot be read: {error.strerror}") from error


def _read_key(path: Path) -> str:
    key = path.read_text("utf-8", errors="replace").strip()
    if not 32 <= len(key) <= 128:
        raise EngineStartError(f"{path} does not hold a worker key; move it away to make a new one")
    return key


def _make_key(path: Path) -> str:
    key = secrets.token_hex(32)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A link, not a rename: of two workers that start together the first one's key is kept.
        try:
            os.link(draft, path)
        except FileExistsError:
            return _read_key(path)
        finally:
            draft.unlink()
    except OSError as error:
        raise EngineStartError(f"the worker key {path} cannot be made: {error.strerror}") from error
    return key
