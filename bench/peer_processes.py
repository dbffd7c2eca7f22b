"""Other gateways as processes: installed into environments of their own, started, measured.

They are no dependencies of Satherd: `venv_of` installs each from PyPI below `.cache/bench-peers` when
it is not there. nginx is taken from the system.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from bench.load import MODEL

CACHE = Path(__file__).parent.parent / ".cache" / "bench-peers"
READY_S = 120.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway that is put in front of the upstream. `command(folder, port, upstream_url)`."""

    name: str
    command: Callable[[Path, int, str], list[str]]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that answers on `port`."""

    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """Processor time of it and its children so far."""
        return sum(_cpu_s(process) for process in self._all())

    def memory_bytes(self) -> int:
        return sum(process.memory_info().rss for process in self._all())

    def _all(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def venv_of(name: str, packages: Sequence[str]) -> Path:
    """The `bin` of an environment with these packages, made when it is not there."""
    folder = CACHE / name
    done = folder / "installed"
    if not done.exists() or done.read_text() != " ".join(packages):
        print(f"installing {' '.join(packages)} …", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run([*pip, *packages], check=True)
        done.write_text(" ".join(packages))
    return folder / "bin"


def nginx() -> Peer | None:
    """nginx with one worker and kept-alive connections; None when the system has none."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        return None

    def command(folder: Path, port: int, upstream_url: str) -> list[str]:
        path = folder / "nginx.conf"
        path.write_text(_NGINX.format(folder=folder, port=port, host=upstream_url[7:]))
        return [binary, "-p", str(folder), "-c", str(path)]

    return Peer("nginx", command)


_NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream model {{ server {host}; keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def vllm_router() -> Peer:
    """vLLM's router, in Rust."""
    python = venv_of("vllm-router", ["vllm-router"]) / "python"

    def command(folder: Path, port: int, upstream_url: str) -> list[str]:
        return [
            *(str(python), "-m", "vllm_router.launch_router"),
            *("--worker-urls", upstream_url, "--host", "127.0.0.1", "--port", str(port)),
            *("--policy", "round_robin", "--log-level", "error"),
            *("--prometheus-port", str(free_port())),
        ]

    return Peer("vllm-router (Rust)", command)


def litellm() -> Peer:
    """LiteLLM's proxy: one worker process, no database, so no money."""
    binary = venv_of("litellm", ["litellm[proxy]"]) / "litellm"

    def command(folder: Path, port: int, upstream_url: str) -> list[str]:
        path = folder / "litellm.yaml"
        path.write_text(_LITELLM.format(model=MODEL, url=upstream_url))
        return [
            *(str(binary), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)),
            *("--num_workers", "1"),
        ]

    # It wants a key of whoever runs it in the open; here nobody else can reach it.
    open_door = (("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true"),)
    quiet = (
        ("LITELLM_LOG", "ERROR"),
        ("LITELLM_TELEMETRY", "False"),
        ("DISABLE_SCHEMA_UPDATE", "1"),
    )
    offline = (("LITELLM_LOCAL_MODEL_COST_MAP", "True"), ("NO_DOCS", "True"))
    return Peer("LiteLLM (Python)", command, (*open_door, *quiet, *offline))


_LITELLM = """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "{url}/v1", api_key: none}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""


@asynccontextmanager
async def upstream(step_s: float) -> AsyncIterator[str]:
    """The instant model server in a process of its own; its URL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.instant_upstream", "--step-s", str(step_s)),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), READY_S)
        yield line.decode().split()[1]
    finally:
        process.terminate()
        await process.wait()


@asynccontextmanager
async def running(
    peer: Peer, folder: Path, upstream_url: str, cores: set[int] | None
) -> AsyncIterator[Running]:
    """Start a gateway on `cores` and wait until it passes an answer on. Raises RuntimeError."""
    port, path = free_port(), folder / "log"
    with path.open("wb") as log:
        process = await _on_cores(
            cores,
            lambda: asyncio.create_subprocess_exec(
                *peer.command(folder, port, upstream_url),
                env=dict(os.environ) | dict(peer.environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ),
        )
    try:
        await _answers(port, process, path)
        yield Running(port, psutil.Process(process.pid))
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _on_cores(cores: set[int] | None, start: Callable) -> asyncio.subprocess.Process:
    if cores is None:
        return await start()
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited, by its threads and children as well
    try:
        return await start()
    finally:
        os.sched_setaffinity(0, mine)


async def _answers(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        async with asyncio.timeout(READY_S):
            while process.returncode is None:
                try:
                    reply = await http.post("/v1/chat/completions", json=body, timeout=5)
                    if reply.status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.5)
    raise RuntimeError(f"it did not start:\n{end_of(log)}")


def end_of(log: Path) -> str:
    return log.read_text()[-2000:]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
