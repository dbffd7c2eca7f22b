"""What the tests of the doors share: bodies, waiting for a state, reading event streams, money."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx

from billing import fee_schedule
from billing.fees import Rates
from tests.router_rig import MODEL, PATIENCE_S, Rig, ScriptedWorker

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Say hello to the world, please."}],
    "max_tokens": 64,
}
JOB: dict[str, Any] = {"kind": "chat", **CHAT}
RATES = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=1_000_000)


async def set_rates(router: Rig, rates: Rates = RATES, model: str | None = None) -> None:
    """Change what the router charges, as its admin does."""
    async with router.core.database.transaction() as connection:
        await fee_schedule.change(connection, model=model, rates=rates, changed_by="test")
    router.core.quotes.fees.forget()


async def balance_msat(router: Rig, headers: dict[str, str]) -> int:
    shown = await router.http.get("/balance", headers=headers)
    assert shown.status_code == 200, shown.text
    return shown.json()["balance_msat"]


async def post_job(router: Rig, headers: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Queue one job from a balance: its links."""
    made = await router.http.post("/jobs", json=JOB | changes, headers=headers)
    assert made.status_code == 202, made.text
    return made.json()["jobs"][0]


def token(links: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {links['token']}"}


async def busy_worker(router: Rig, worker: ScriptedWorker) -> dict[str, Any]:
    """Let a worker be busy with a job of somebody else; the job."""
    await post_job(router, await router.bearer())
    return await worker.job()


async def until_state(router: Rig, job_id: str, *states: str) -> Any:
    """Wait for a job to be in one of these states; its row."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            (row,) = await router.query("select * from jobs where id = $1", job_id)
            if row["state"] in states:
                return row
            await asyncio.sleep(0.02)


async def workers_left(router: Rig, count: int) -> None:
    """Wait until so many workers are connected."""
    async with asyncio.timeout(PATIENCE_S):
        while len(router.core.fleet.all()) != count:
            await asyncio.sleep(0.02)


async def info(router: Rig, *, waiting: int = 0) -> dict[str, Any]:
    """What it says once it has seen so many jobs wait: a snapshot that took long is used for long."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await router.http.get("/info")
            assert reply.status_code == 200, reply.text
            if reply.json()["queue_length"] == waiting:
                return reply.json()
            await asyncio.sleep(0.05)


async def let_quotes_expire(router: Rig) -> None:
    """Make the time of all open quotes and invoices be over; the node still takes payments."""
    past = timedelta(seconds=1)
    async with router.core.database.transaction() as connection:
        now = router.core.clock()
        await connection.execute(
            "update quotes set expires_at = $1 where state = 'open'", now - past
        )
        await connection.execute(
            "update invoices set expires_at = $1 where state = 'open'", now - past
        )


def code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


@dataclass(frozen=True)
class Sse:
    """One event of a stream; comments have the name `comment`."""

    name: str
    data: Any
    id: str | None = None


class Stream:
    """An open event stream of which a test reads as much as it wants."""

    def __init__(self, reply: httpx.Response) -> None:
        self.reply = reply
        self._lines = reply.aiter_lines()

    async def next(self) -> Sse:
        """The next event; comments are passed over."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                line = await anext(self._lines)
                if line.startswith(":"):
                    continue
                if not line:
                    if fields:
                        return _event(fields)
                    continue
                name, _, value = line.partition(": ")
                fields[name] = value

    async def until(self, name: str) -> list[Sse]:
        """All events up to the first of this name."""
        events = [await self.next()]
        while events[-1].name != name:
            events.append(await self.next())
        return events


def _event(fields: dict[str, str]) -> Sse:
    text = fields["data"]
    data = text if text == "[DONE]" else json.loads(text)
    return Sse(fields.get("event", "message"), data, fields.get("id"))


@asynccontextmanager
async def event_stream(
    router: Rig, path: str, headers: dict[str, str], *, last_event_id: str | None = None
) -> AsyncIterator[Stream]:
    more = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    async with router.http.stream("GET", path, headers=headers | more) as reply:
        assert reply.status_code == 200, await reply.aread()
        yield Stream(reply)


def said(events: list[Sse]) -> str:
    """The text of all chunks."""
    return "".join(event.data.get("text", "") for event in events if event.name == "chunk")
