"""Everything a worker can be told, from `SATHERD_...` in the environment or a `.env` file.

setting                    meaning
SATHERD_ROUTER_URL         the router: http(s)://host or ws(s)://host; `/worker` is added
SATHERD_LN_URL             Lightning address that is paid; without it the worker serves unpaid
SATHERD_ENGINE             llama_cpp, openai, koboldcpp, echo
SATHERD_MODEL              llama_cpp: a GGUF file; others: the server's names, comma separated
SATHERD_MODEL_NAME         the name that clients see
SATHERD_SLOTS              jobs at once
SATHERD_CONTEXT            tokens of context for each job
SATHERD_MAX_TOKENS         the longest answer in tokens; default: the context
SATHERD_THREADS            CPU threads; default: physical cores less one, at least one
SATHERD_GPU_LAYERS         layers on the GPU, -1 for all; without a GPU build it does nothing
SATHERD_ENGINE_URL         where the openai or koboldcpp server listens
SATHERD_ENGINE_API_KEY     its key, if it wants one
SATHERD_ENGINE_TIMEOUT_S   the longest silence of that server
SATHERD_CHAT_TEMPLATE      koboldcpp only: chatml, alpaca or plain
SATHERD_WORKER_KEY         the secret that earnings belong to; default: a file in the data dir
SATHERD_DATA_DIR           where that file lies
SATHERD_WORKER_NAME        a name for people
SATHERD_MIN_FEES           JSON, model to least rates: {"m": {"output_msat_per_mtok": 5}}
SATHERD_GRACE_S            how long SIGTERM waits for running jobs
SATHERD_RECONNECT_MAX_S    the longest pause between two tries to connect
SATHERD_ECHO_*             see `worker.engines.echo`
"""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.errors import EngineStartError
from worker.hardware import physical_cores

KEY_FILE = "worker.key"
SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


class EngineName(StrEnum):
    LLAMA_CPP = "llama_cpp"
    OPENAI = "openai"
    KOBOLDCPP = "koboldcpp"
    ECHO = "echo"


class ChatTemplate(StrEnum):
    """How messages become one prompt, for servers that take nothing but a prompt."""

    CHATML = "chatml"
    ALPACA = "alpaca"
    PLAIN = "plain"


class EchoFault(StrEnum):
    """What the echo engine does wrong on purpose."""

    NONE = "none"
    FAIL_BEFORE = "fail_before"
    FAIL_MIDWAY = "fail_midway"
    STALL = "stall"


class WorkerSettings(BaseSettings):
    """See the table at the top of this file. `None` means the engine's own default."""

    model_config = SettingsConfigDict(
        env_prefix="SATHERD_", env_file=".env", extra="ignore", env_ignore_empty=True
    )

    router_url: str = "http://127.0.0.1:8000"
    ln_url: str | None = None
    engine: EngineName = EngineName.LLAMA_CPP
    model: str | None = None
    model_name: str | None = None
    slots: int | None = Field(default=None, ge=1, le=1024)
    context: int | None = Field(default=None, ge=16, le=100_000_000)
    max_tokens: int | None = Field(default=None, ge=1, le=100_000_000)
    threads: int = Field(default_factory=lambda: max(1, physical_cores() - 1), ge=1, le=1024)
    gpu_layers: int = -1

    engine_url: str | None = None
    engine_api_key: SecretStr | None = None
    engine_timeout_s: float = Field(default=300, gt=0)
    chat_template: ChatTemplate = ChatTemplate.ALPACA

    worker_key: SecretStr | None = None
    data_dir: Path = Field(default_factory=lambda: Path.home() / ".satherd")
    worker_name: str | None = Field(default=None, max_length=100)
    min_fees: dict[str, dict[str, int]] | None = None
    grace_s: float = Field(default=30, ge=0)
    reconnect_max_s: float = Field(default=30, gt=0)

    echo_token_s: float = Field(default=0, ge=0)
    echo_fault: EchoFault = EchoFault.NONE
    echo_fault_every: int = Field(default=1, ge=1)

    @field_validator("worker_key")
    @classmethod
    def _key_is_long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not 32 <= len(key.get_secret_value()) <= 128:
            raise ValueError("a worker key has 32 to 128 characters; 64 hex digits are usual")
        return key

    @field_validator("router_url")
    @classmethod
    def _router_is_a_url(cls, url: str) -> str:
        socket_url(url)
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
