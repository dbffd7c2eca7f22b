"""deploy/nginx.conf before routers: streams come as they are said, workers connect through it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.crash_rig import dying_with_us
from tests.pair_rig import running_pair
from tests.ports import free_port
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


def config_for(folder: Path, port: int, urls: Sequence[str]) -> Path:
    """The file as it is, but for where things are; a third router is added as the file says."""
    text = CONFIG.read_text()
    (line,) = [line for line in text.splitlines() if "server router-2:8000" in line]
    more = [line.replace("router-2", f"router-{n}") for n in range(3, len(urls) + 1)]
    text = text.replace(line, "\n".join([line, *more]))
    names = ["router:8000", *(f"router-{n}:8000" for n in range(2, len(urls) + 1))]
    for there, here in (
        *zip(names, (url.removeprefix("http://") for url in urls), strict=True),
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("/tmp/", f"{folder}/"),
    ):
        assert there in text
        text = text.replace(there, here)
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


@asynccontextmanager
async def running_nginx(folder: Path, urls: Sequence[str]) -> AsyncIterator[str]:
    """nginx in the foreground; its URL."""
    port = free_port()
    folder.mkdir()
    config = config_for(folder, port, urls)
    process = await asyncio.to_thread(
        subprocess.Popen,
        [*dying_with_us(), nginx_command(), "-c", str(config), "-g", "daemon off; user root;"]
        if os.geteuid() == 0
        else [*dying_with_us(), nginx_command(), "-c", str(config), "-g", "daemon off;"],
    )

    async def listens() -> bool:
        assert process.poll() is None
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(listens)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 10)


async def test_streams_and_workers_pass_the_load_balancer_unbuffered(
    tmp_path: Path, database_url: str
):
    async with (
        running_pair(tmp_path, database_url, lines=(None, None)) as rigs,
        running_nginx(tmp_path / "nginx", [rig.url for rig in rigs]) as url,
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


async def test_nobody_is_refused_though_two_of_three_routers_are_dead(tmp_path: Path, router: Rig):
    """Each that cannot be connected to is passed over, however many there are."""
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    answered: set[int] = set()
    async with (
        running_nginx(tmp_path / "nginx", [*dead, router.url]) as url,
        httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http,
    ):
        for _ in range(20):
            answered.add((await http.get("/info")).status_code)
    assert answered == {200}
