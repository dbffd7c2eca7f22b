"""deploy/nginx.conf before two routers: streams come as they are said, workers connect through it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.crash_rig import dying_with_us, free_port
from tests.pair_rig import running_pair
from tests.reading import PATIENCE_S, Reader, until
from tests.router_rig import Rig, ScriptedWorker

CONFIG = Path(__file__).parent.parent / "deploy" / "nginx.conf"


def nginx_command() -> str:
    """The program. Skips without it, but not in CI."""
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if found is not None:
        return found
    if os.environ.get("CI") == "true":
        pytest.fail("nginx is missing: apt-get install nginx-light")
    pytest.skip("nginx is not installed (apt-get install nginx-light)")


def config_for(folder: Path, port: int, rigs: tuple[Rig, Rig]) -> Path:
    """The file as it is, but for where things are."""
    text = CONFIG.read_text()
    for there, here in (
        ("router:8000", rigs[0].url.removeprefix("http://")),
        ("router-2:8000", rigs[1].url.removeprefix("http://")),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("/tmp/", f"{folder}/"),
    ):
        assert there in text
        text = text.replace(there, here)
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


@asynccontextmanager
async def running_nginx(folder: Path, rigs: tuple[Rig, Rig]) -> AsyncIterator[str]:
    """nginx in the foreground; its URL."""
    port = free_port()
    folder.mkdir()
    config = config_for(folder, port, rigs)
    process = await asyncio.to_thread(
        subprocess.Popen,
        [*dying_with_us(), nginx_command(), "-c", str(config), "-g", "daemon off; user root;"]
        if os.geteuid() == 0
        else [*dying_with_us(), nginx_command(), "-c", str(config), "-g", "daemon off;"],
    )
    url = f"http://127.0.0.1:{port}"

    async def answers() -> bool:
        assert process.poll() is None
        try:
            async with httpx.AsyncClient(trust_env=False) as http:
                return (await http.get(f"{url}/health/live")).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        await until(answers)
        yield url
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 10)


async def test_streams_and_workers_pass_the_load_balancer_unbuffered(
    tmp_path: Path, database_url: str
):
    async with (
        running_pair(tmp_path, database_url, lines=(None, None)) as rigs,
        running_nginx(tmp_path / "nginx", rigs) as url,
        connect(url.replace("http", "ws") + "/worker") as socket,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http,
    ):
        worker = ScriptedWorker(socket, rigs[0].lnurl_host, slots=4)
        await worker.register()

        async def known() -> bool:
            return all(rig.core.models.facts() for rig in rigs)

        await until(known)
        key = await rigs[0].bearer()
        # With one connection each they are spread over both routers.
        readers = [Reader(http, key, user=str(n)) for n in range(4)]
        jobs = [await worker.job() for _ in readers]
        for job in jobs:
            await worker.say(job, "Not held back. ")
        for reader in readers:
            await reader.until_shown("Not held back. ")
        for job in jobs:
            await worker.say(job, "To the end.", seq=1)
            await worker.finish(job, tokens=6)
        for reader in readers:
            await asyncio.wait_for(reader.task, PATIENCE_S)
            assert reader.done and reader.text == "Not held back. To the end."
