"""The examples and the commands run as their reader would run them, against a real router."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.router_rig import MODEL, Rig, ScriptedWorker

ROOT = Path(__file__).parent.parent
SATHERD = "from cli.main import main; raise SystemExit(main())"
MODELS = [
    {"id": MODEL, "kind": "text", "context_length": 2048, "max_tokens": 1024},
    {"id": "vectors", "kind": "embedding", "context_length": 512},
]


@asynccontextmanager
async def served(router: Rig) -> AsyncIterator[list[dict[str, Any]]]:
    """A worker that answers whatever comes; the jobs that it was given."""
    jobs: list[dict[str, Any]] = []

    async def serve(worker: ScriptedWorker) -> None:
        while True:
            frame = json.loads(await worker.socket.recv())
            if frame["type"] != "assign":
                continue
            jobs.append(frame["job"])
            if frame["job"]["kind"] == "embedding":
                vectors = [[1.0, float(len(text))] for text in frame["job"]["input"]]
                await worker.finish(frame, data=vectors, tokens=0)
            else:
                await worker.say(frame, f"Answer {len(jobs)}, ", seq=0, tokens=3)
                await worker.say(frame, "positive.", seq=1, tokens=2)
                await worker.finish(frame, tokens=5)

    async with router.worker(models=MODELS, slots=4) as worker:
        task = asyncio.create_task(serve(worker))
        yield jobs
        task.cancel()
        await asyncio.wait([task])


def _environment(router: Rig) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "SATHERD" not in name}
    return kept | {"SATHERD_ROUTER_URL": router.url, "PYTHONPATH": str(ROOT)}


async def run(
    router: Rig, *command: str, stdin: str = "", fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command with this router's address in the environment."""
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        input=stdin,
        env=_environment(router),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done


async def cli(router: Rig, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return await run(router, sys.executable, "-c", SATHERD, *arguments, **options)


async def test_the_curl_walk_pays_once_and_gets_the_same_job_twice(router: Rig):
    async with served(router) as jobs:
        done = await run(router, "bash", "examples/curl.sh", router.url, "How much is 1 + 1?")
    assert "Answer 1, positive." in done.stdout
    assert "same job" in done.stdout
    assert "(simulated money)" in done.stdout
    assert len(jobs) == 1
    assert jobs[0]["messages"] == [{"role": "user", "content": "How much is 1 + 1?"}]
    assert len(await router.query("select 1 from ledger_transfers where code = 'hold'")) == 1
    assert (await router.books()).in_order


async def test_the_openai_package_chats_streams_and_embeds_with_a_key_that_it_bought(router: Rig):
    async with served(router) as jobs:
        done = await run(router, sys.executable, "examples/openai_sdk.py")
    assert f"models: {MODEL}, vectors" in done.stdout
    assert "chat: Answer 1, positive." in done.stdout
    assert "stream: Answer 2, positive." in done.stdout
    assert "embeddings: 2 numbers each" in done.stdout
    charges = await router.query("select charged_msat from jobs where kind = 'chat' order by seq")
    for row in charges:
        assert f"charged {row['charged_msat']} msat" in done.stdout
    assert "msat (simulated)" in done.stdout
    assert [job["kind"] for job in jobs] == ["chat", "chat", "embedding"]
    assert (await router.books()).in_order


async def test_the_openai_example_shows_the_routers_refusal(router: Rig):
    done = await run(
        router, sys.executable, "examples/openai_sdk.py", "--key", "sk-" + "x" * 22, fails=True
    )
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr


async def test_the_chatbot_talks_over_lightning(router: Rig):
    async with served(router) as jobs:
        done = await run(
            router, sys.executable, "examples/chatbot.py", stdin="anna> hello\nben> hi\n"
        )
    assert done.stdout == "satherd> Answer 1, positive.\nsatherd> Answer 2, positive.\n"
    assert [message["role"] for message in jobs[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert "msat (simulated)" in done.stderr


async def test_the_sentiment_agent_buys_an_opinion_and_trades(router: Rig):
    async with served(router):
        done = await run(router, sys.executable, "examples/sentiment_agent.py", "--once")
    outcome = json.loads(done.stdout)
    assert (outcome["decision"], outcome["traded"], outcome["tokens"]) == ("buy", True, 1)
    assert outcome["charged_msat"] > 0


async def test_the_notebook_runs_from_top_to_bottom(router: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SATHERD_ROUTER_URL", router.url)
    monkeypatch.delenv("SATHERD_KEY", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    async with served(router) as jobs:
        # A kernel sends what is printed in pieces as its clock has it; put together, as a reader sees
        # it.
        await NotebookClient(
            notebook, timeout=60, kernel_name="python3", coalesce_streams=True
        ).async_execute()
    shown = json.dumps(notebook)
    assert len(jobs) == 4
    assert "3 jobs" in shown
    assert shown.count("positive.</td>") == 3
    assert "simulated money" in shown


async def test_a_prompt_and_a_balance_at_the_command_line(router: Rig, tmp_path: Path):
    kept = tmp_path / "credential"
    async with served(router):
        done = await cli(
            router, "prompt", "Hello?", "--max-tokens", "8", "--save-credential", str(kept)
        )
    assert done.stdout == "Answer 1, positive.\n"
    assert "(simulated)" in done.stderr
    change = json.loads((await cli(router, "balance", "show", "--key", f"@{kept}")).stdout)
    assert change["balance_msat"] > 0
    assert change["simulated"] is True


async def test_ctrl_c_cancels_the_running_job_and_says_what_it_cost(router: Rig):
    async with router.worker() as worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", SATHERD, "prompt", "Count to a million.", "--max-tokens", "500"),
            env=_environment(router),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        job = await worker.job()
        await worker.say(job, "One ", tokens=1)
        assert await asyncio.wait_for(process.stdout.readexactly(4), 10) == b"One "
        process.send_signal(signal.SIGINT)
        frame = await worker.receive()
        assert (frame["type"], frame["job_id"]) == ("cancel", job["job_id"])
        await worker.finish(job, "cancelled", tokens=1)
        _, stderr = await asyncio.wait_for(process.communicate(), 20)
    [row] = await router.query("select state, charged_msat, held_msat from jobs")
    assert process.returncode == 130
    assert row["state"] == "cancelled"
    assert 0 < row["charged_msat"] < row["held_msat"]
    assert f"Cancelled; charged {row['charged_msat']} msat." in stderr.decode()
    assert (await router.books()).in_order


async def test_a_quote_and_an_invoice_paid_by_hand(router: Rig):
    async with served(router):
        quoted = json.loads((await cli(router, "quote", "Hello?", "--json")).stdout)
    made = await router.http.post(f"/quotes/{quoted['quote_id']}/invoice", json={})
    paid = json.loads((await cli(router, "pay", made.json()["invoice"])).stdout)
    assert (paid["amount_msat"], paid["simulated"]) == (made.json()["amount_msat"], True)
    credential = {"Authorization": f"L402 {made.json()['l402_token']}:{paid['preimage']}"}
    async with asyncio.timeout(10):
        while True:
            shown = await router.http.get(f"/quotes/{quoted['quote_id']}", headers=credential)
            if shown.json()["state"] == "paid":
                break
            await asyncio.sleep(0.05)
    assert len(shown.json()["jobs"]) == 1


async def test_money_goes_in_and_out_at_the_command_line(router: Rig):
    top_up = json.loads((await cli(router, "balance", "topup", "60000")).stdout)
    assert top_up["balance_msat"] == 60_000
    done = await cli(
        router,
        *("balance", "withdraw", "--key", top_up["credential"]),
        *("--address", f"alice@{router.lnurl_host}", "--amount-msat", "20000"),
    )
    assert json.loads(done.stdout)["state"] == "paid"
    refused = await cli(
        router,
        *("balance", "withdraw", "--key", top_up["key"]),
        *("--address", f"alice@{router.lnurl_host}"),
        fails=True,
    )
    assert "[forbidden]" in refused.stderr
    assert top_up["key"] not in refused.stderr


async def test_without_a_worker_the_command_says_so_and_charges_nothing(router: Rig):
    async with served(router):
        pass
    done = await cli(router, "prompt", "Hello?", "--model", MODEL, fails=True)
    assert "[no_worker]" in done.stderr
    assert await router.query("select 1 from invoices") == []
