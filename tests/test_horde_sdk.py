"""AI Horde's own package from PyPI as client and as worker of a router (RC-1).

It is installed into an environment of its own (115 MB, AGPL), once, when `SATHERD_TEST_HORDE_SDK=1`
asks for it, as `make test` does: `SATHERD_TEST_HORDE_SDK_VENV`, or
`~/.cache/satherd/horde-sdk-0.18.0`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.door_tools import balance_msat, set_rates
from tests.poll_tools import apikey, horde_prompt, known_model
from tests.pull_stand_ins import KoboldCpp
from tests.router_rig import MODEL, Rig

VERSION = "0.18.0"
SCRIPT = Path(__file__).parent / "horde_sdk_script.py"
PATIENCE_S = 90.0

# One process installs it, and no other one at the same time.
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("horde_sdk")]


def environment() -> Path:
    named = os.environ.get("SATHERD_TEST_HORDE_SDK_VENV")
    return Path(named) if named else Path.home() / ".cache" / "satherd" / f"horde-sdk-{VERSION}"


async def _run(*command: str) -> int:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    return await process.wait()


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that has the package."""
    found = environment() / "bin" / "python"
    ready = environment() / "installed"
    if ready.exists():
        return str(found)
    if os.environ.get("SATHERD_TEST_HORDE_SDK") != "1":
        pytest.skip("set SATHERD_TEST_HORDE_SDK=1 to install horde_sdk (115 MB)")

    async def install() -> bool:
        made = await _run(sys.executable, "-m", "venv", str(environment()))
        packages = await _run(str(found), "-m", "pip", "install", "-q", f"horde_sdk=={VERSION}")
        return made == packages == 0

    if not asyncio.run(install()):
        pytest.skip("horde_sdk cannot be installed here")
    ready.touch()
    return str(found)


async def run(python: str, router: Rig, what: str, key: str) -> dict[str, Any]:
    """Run the script; the key goes in by its standard input, where nobody sees it."""
    process = await asyncio.create_subprocess_exec(
        python,
        str(SCRIPT),
        what,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"AI_HORDE_URL": f"{router.url}/api/", "PYTHONPATH": ""},
        cwd=environment(),
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate(f"{key} {MODEL}".encode())
    assert process.returncode == 0, err.decode()[-3000:]
    return json.loads(out.decode().splitlines()[-1])


async def test_the_package_prices_buys_and_reads_an_answer(python: str, router: Rig):
    """AH-1, AH-5, AH-13, AH-15, KL-10: all its pydantic types accept what we say."""
    await set_rates(router)
    key = await apikey(router)
    worker = KoboldCpp(router, "w" * 22, name="kcpp")
    await worker.pop()
    asked = asyncio.create_task(run(python, router, "client", key["apikey"]))
    while not (await worker.once() or asked.done()):
        await asyncio.sleep(0.1)
    facts = await asked
    assert facts == {
        "dry_kudos": 1.064,
        "texts": [", a rabbit lived in the wood."],
        "kudos": 1.008,
        "possible": True,
        "user_kudos": 1000.0 - 1.008,
        "workers": ["kcpp"],
    }
    assert (await router.books()).in_order


async def test_the_package_takes_a_request_back(python: str, router: Rig):
    """AH-6."""
    await known_model(router)
    key = await apikey(router)
    assert await run(python, router, "cancel", key["apikey"]) == {"waiting": 1, "done": False}
    bearer = {"Authorization": f"Bearer sk-{key['apikey']}"}
    assert await balance_msat(router, bearer) == 1_000_000


async def test_the_package_pops_and_submits_as_a_worker(python: str, router: Rig):
    """AH-7, AH-10."""
    await set_rates(router)
    await known_model(router)
    await horde_prompt(router, await apikey(router))
    facts = await run(python, router, "worker", "w" * 22)
    assert facts == {"prompt": "Once upon a time", "max_length": 64, "reward": 0.953}
    assert (await router.books()).in_order
