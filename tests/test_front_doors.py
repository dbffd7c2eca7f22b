"""One queue behind every door: a prompt bought at each of them, at different multipliers, is served in
the order of the multipliers by workers of every kind; each door shows the place, and each job can be
watched and cancelled at `/jobs/{id}`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from billing.fees import Rates
from tests.door_tools import CHAT, JOB, busy_worker, event_stream, set_rates, until_state
from tests.poll_tools import HORDE_PROMPT, KOBOLD_PROMPT, horde_status, kobold_status
from tests.pull_stand_ins import KoboldCpp
from tests.router_rig import PATIENCE_S, Rig
from tests.test_gridrepublic_door import bought as grid_bought
from tests.test_gridrepublic_door import shown as grid_shown
from tests.test_http_workers import Model, delta, described, model_server, said

PROMPT = "Once upon a time"
RATES = Rates(prompt_fee_msat=1000, input_msat_per_mtok=0, output_msat_per_mtok=0)


@dataclass
class Bought:
    """A job as its door has it: the id that the door gave, what opens it, and where the door says that
    it stands."""

    door: str
    id: str
    opens: dict[str, str]
    position: Callable[[], Awaitable[int | None]]
    close: Callable[[], Awaitable[None]] | None = None

    @property
    def path(self) -> str:
        return f"/jobs/{self.id}"


class Buyer:
    """A client with a prepaid key who knows every dialect."""

    def __init__(self, router: Rig, key: str) -> None:
        self.router = router
        self.bearer = {"Authorization": f"Bearer {key}"}
        self.apikey = {"apikey": key.removeprefix("sk-")}

    async def ours(self, multiplier: str) -> Bought:
        made = await self.router.http.post(
            "/jobs", json=JOB | {"fee_multiplier": multiplier}, headers=self.bearer
        )
        assert made.status_code == 202, made.text
        (links,) = made.json()["jobs"]
        opens = {"Authorization": f"Bearer {links['token']}"}

        async def position() -> int | None:
            view = await self.router.http.get(links["status_url"], headers=opens)
            return view.json().get("position")

        return Bought("ours", links["id"], opens, position)

    async def openai(self, multiplier: str) -> Bought:
        return await self._stream("openai", multiplier, {})

    async def decentralgpt(self, multiplier: str) -> Bought:
        """DG-1: on the same path; its bodies name a project, which OpenAI's do not."""
        return await self._stream("decentralgpt", multiplier, {"project": "DecentralGPT"})

    async def _stream(self, door: str, multiplier: str, more: dict[str, Any]) -> Bought:
        headers = self.bearer | {"X-Fee-Multiplier": multiplier, "Idempotency-Key": door}
        stack = AsyncExitStack()
        reply = await stack.enter_async_context(
            self.router.http.stream(
                "POST",
                "/v1/chat/completions",
                json=CHAT | {"stream": True, **more},
                headers=headers,
            )
        )
        assert reply.status_code == 200, await reply.aread()
        lines = reply.aiter_lines()

        async def position() -> int | None:
            # The place is in the comments that keep the line of a waiting stream open.
            async for line in lines:
                if line.startswith(": position "):
                    return int(line.rsplit(" ", 1)[1])
            return None

        return Bought(door, reply.headers["x-satherd-job"], self.bearer, position, stack.aclose)

    async def kobold(self, multiplier: str) -> Bought:
        made = await self.router.http.post(
            "/generate/prompt",
            json=KOBOLD_PROMPT | {"fee_multiplier": multiplier},
            headers=self.apikey,
        )
        assert made.status_code == 200, made.text
        door_id = made.json()["id"]

        async def position() -> int | None:
            return (await kobold_status(self.router, door_id))["queue_position"]

        return Bought("kobold", door_id, {}, position)

    async def horde(self, multiplier: str) -> Bought:
        made = await self.router.http.post(
            "/api/v2/generate/text/async",
            json=HORDE_PROMPT | {"fee_multiplier": multiplier},
            headers=self.apikey,
        )
        assert made.status_code == 202, made.text
        door_id = made.json()["id"]

        async def position() -> int | None:
            return (await horde_status(self.router, door_id))["queue_position"]

        return Bought("horde", door_id, {}, position)

    async def gridrepublic(self, multiplier: str) -> Bought:
        (door_id,) = await grid_bought(self.router, self.bearer, fee_multiplier=multiplier)

        async def position() -> int | None:
            job = (await grid_shown(self.router, door_id))[door_id]
            return job["states"]["default"].get("position")

        return Bought("gridrepublic", door_id, {}, position)

    async def herder(self, multiplier: str) -> Bought:
        """LH-6: `Quantity` is the whole offer; the base fee is one satoshi here."""
        message = {
            "Action": "Transfer",
            "Quantity": multiplier,
            "X-Prompt": PROMPT,
            "X-Tokens": "64",
        }
        made = await self.router.http.post(
            "/herder", json=message, headers=self.bearer | {"Prefer": "respond-async"}
        )
        assert made.status_code == 202, made.text
        told = made.json()
        opens = {"Authorization": f"Bearer {told['Token']}"}

        async def position() -> int | None:
            view = await self.router.http.get(told["Status-Url"], headers=opens)
            return view.json().get("position")

        assert int(told["Position"]) >= 1
        return Bought("herder", told["Job"], opens, position)


DOORS = ("ours", "openai", "decentralgpt", "kobold", "horde", "gridrepublic", "herder")
# In an order that is not that of the doors; Llama-Herder pays whole satoshis.
MULTIPLIERS = {
    "ours": "2.5",
    "openai": "4.75",
    "decentralgpt": "1.25",
    "kobold": "3.5",
    "horde": "6.125",
    "gridrepublic": "5.5",
    "herder": "4",
}


async def buy(buyer: Buyer, door: str, multiplier: str | None = None) -> Bought:
    return await getattr(buyer, door)(multiplier or MULTIPLIERS[door])


@asynccontextmanager
async def bought_everywhere(router: Rig) -> AsyncIterator[dict[str, Bought]]:
    """The same prompt at every door, while nobody is free to answer it."""
    buyer = Buyer(router, await router.key(10_000_000))
    jobs: dict[str, Bought] = {}
    try:
        for door in DOORS:
            jobs[door] = await buy(buyer, door)
        yield jobs
    finally:
        for job in jobs.values():
            if job.close is not None:
                await job.close()


async def view(router: Rig, job: Bought) -> dict[str, Any]:
    shown = await router.http.get(job.path, headers=job.opens)
    assert shown.status_code == 200, f"{job.door}: {shown.text}"
    return shown.json()


async def until_place(job: Bought, place: int) -> None:
    """Wait for a door to say so: a stream has said before what was true then."""
    said_so: list[int | None] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (at := await job.position()) != place:
                said_so.append(at)
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{job.door} said {said_so[-5:]}, not {place}") from None


def ranked() -> list[str]:
    return sorted(DOORS, key=lambda door: float(MULTIPLIERS[door]), reverse=True)


def answer_by_http(model: Model, asked: tuple[str, dict[str, Any]], text: str) -> None:
    """As a server does that has all: a chat, a stream of one, a completion."""
    path, body = asked
    if body.get("stream"):
        model.stream(delta(text), delta("", "stop"), "[DONE]")
    elif path.endswith("/chat/completions"):
        model.answer(said(text))
    else:
        model.answer({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})


async def test_every_door_shows_the_place_and_every_job_can_be_watched_and_cancelled(router: Rig):
    await set_rates(router, RATES)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        async with bought_everywhere(router) as jobs:
            for place, door in enumerate(ranked(), 1):
                job = jobs[door]
                await until_place(job, place)
                shown = await view(router, job)
                assert (shown["state"], shown["position"]) == ("queued", place), door
                assert float(shown["multiplier"]) == float(MULTIPLIERS[door]), door
            # From the last to the first, so that the places of those that are left stay.
            for door in reversed(ranked()):
                job = jobs[door]
                job_id = (await view(router, job))["id"]
                async with event_stream(router, f"{job.path}/events", job.opens) as stream:
                    first = await stream.next()
                    assert first.data["job"] == job_id, door
                    gone = await router.http.delete(job.path, headers=job.opens)
                    assert gone.status_code == 200, f"{door}: {gone.text}"
                    done = (await stream.until("done"))[-1].data["job"]
                assert (done["id"], done["state"]) == (job_id, "cancelled"), door
                assert done["charged_msat"] == 0, door
            await worker.nothing()
    assert (await router.books()).in_order


async def test_the_queue_of_all_doors_is_served_by_multiplier_by_workers_of_every_kind(router: Rig):
    """Contract §2: strictly ordered by multiplier, whatever the door and whoever serves."""
    await set_rates(router, RATES)
    served: list[str] = []
    async with router.worker() as pusher, model_server() as model:
        holding = await busy_worker(router, pusher)
        puller = KoboldCpp(router, "A" * 22, name="puller")
        async with bought_everywhere(router) as jobs:
            ids = {(await view(router, job))["id"]: door for door, job in jobs.items()}

            async def next_started() -> str:
                """The job that a worker was given last, of those bought here."""
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        rows = await router.query(
                            "select id from jobs where started_at is not null and id = any($1::text[])",
                            list(ids),
                        )
                        new = [row["id"] for row in rows if ids[row["id"]] not in served]
                        if new:
                            (only,) = new
                            served.append(ids[only])
                            return only
                        await asyncio.sleep(0.02)

            # It pulls: the dearest, though a cheaper one might be there first.
            popped = await puller.pop()
            assert popped["id"], popped
            await next_started()
            # It is called by HTTP.
            session = await router.core.gate.register_http(described(model))
            asked = await model.next()
            await next_started()
            # It is handed its jobs over a socket.
            await pusher.say(holding, "Done.")
            await pusher.finish(holding, tokens=1)
            in_hand = await pusher.job()
            await next_started()
            # And so on, each as it gets free, until the queue is empty.
            answer_by_http(model, asked, "By HTTP.")
            asked = await model.next()
            await next_started()
            sent = await puller.submit(popped["id"], "By pulling.")
            assert sent.status_code == 200, sent.text
            popped = await puller.pop()
            assert popped["id"], popped
            await next_started()
            await pusher.say(in_hand, "By push.")
            await pusher.finish(in_hand, tokens=2)
            in_hand = await pusher.job()
            await next_started()
            answer_by_http(model, asked, "By HTTP again.")
            asked = await model.next()
            await next_started()
            assert served == ranked()

            answer_by_http(model, asked, "By HTTP at last.")
            await puller.submit(popped["id"], "By pulling again.")
            await pusher.say(in_hand, "By push again.")
            await pusher.finish(in_hand, tokens=2)
            texts = {}
            for door, job in jobs.items():
                row = await until_state(router, (await view(router, job))["id"], "succeeded")
                assert row["charged_msat"] == round(1000 * float(MULTIPLIERS[door])), door
                texts[door] = str((await view(router, job))["result"])
            expected = ["By pulling.", "By HTTP.", "By push.", "By HTTP again."]
            expected += ["By pulling again.", "By push again.", "By HTTP at last."]
            for door, text in zip(ranked(), expected, strict=True):
                assert text in texts[door], door
            # Each has its receipt, whichever door it was bought at.
            for job in jobs.values():
                receipt = await router.http.get(f"{job.path}/receipt", headers=job.opens)
                assert receipt.status_code == 200, f"{job.door}: {receipt.text}"
                facts = receipt.json()["facts"]
                if not job.opens:
                    assert job.id not in receipt.text, f"{job.door}: the id opens its job"
                assert facts["multiplier"] == f"{float(MULTIPLIERS[job.door]):.3f}"
        session.cut("the test is over", blame="nobody")
    books = await router.books()
    assert books.in_order and books.sum_msat == 0


@pytest.mark.parametrize("door", ["kobold", "horde", "gridrepublic"])
async def test_a_door_id_opens_its_own_job_and_no_other(router: Rig, door: str):
    """§4: ids of polling doors are capabilities."""
    await set_rates(router, RATES)
    async with router.worker() as worker:
        await busy_worker(router, worker)
        buyer = Buyer(router, await router.key(10_000_000))
        mine, other = await buy(buyer, door, "2"), await buyer.ours("2")
        as_bearer = {"Authorization": f"Bearer {mine.id}"}
        real_id = (await view(router, mine))["id"]
        assert (await router.http.get(f"/jobs/{real_id}", headers=as_bearer)).status_code == 200
        refused: httpx.Response = await router.http.get(other.path, headers=as_bearer)
        assert refused.status_code in (401, 403)
        # The job's own id, which logs and receipts have, opens nothing by itself.
        assert (await router.http.get(f"/jobs/{real_id}")).status_code == 401
