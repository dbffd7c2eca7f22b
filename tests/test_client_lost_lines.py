"""The client on bad lines to a real router, and with workers that vanish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest

from client.errors import JobNotDone
from client.events import Reconnecting, Text
from tests.paying_clients import PROMPT, paying, serving
from tests.reading import until
from tests.router_rig import Rig


class CuttingTransport(httpx.AsyncBaseTransport):
    """Breaks the event streams after so many bytes each, as a bad line would."""

    def __init__(self, cuts: list[int]) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._cuts = cuts

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if request.url.path.endswith("/events") and self._cuts:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _Cut(response.stream, self._cuts.pop(0))
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Cut(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, left: int) -> None:
        self._stream = stream
        self._left = left

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for data in self._stream:
            yield data[: self._left]
            self._left -= len(data)
            if self._left <= 0:
                raise httpx.ReadError("the line was cut")

    async def aclose(self) -> None:
        await self._stream.aclose()


async def test_a_line_that_breaks_again_and_again_loses_and_repeats_nothing(router: Rig):
    words = [f"w{number} " for number in range(40)]
    transport = CuttingTransport([400, 700, 900, 1100])
    events: list[Any] = []

    async def heard(text: str) -> bool:
        return "".join(event.text for event in events if isinstance(event, Text)) == text

    async with router.worker() as worker, paying(router, transport=transport) as client:
        stream = client.stream(PROMPT, max_tokens=100)

        async def serve() -> None:
            job = await worker.job()
            for seq, word in enumerate(words):
                await worker.say(job, word, seq=seq)
                # Each is an event of its own, so that there are bytes enough for all the cuts.
                await until(partial(heard, "".join(words[: seq + 1])))
            await worker.finish(job, tokens=40)

        task = asyncio.create_task(serve())
        async for event in stream:
            events.append(event)
        await task
    assert sum(isinstance(event, Reconnecting) for event in events) == 4
    assert "".join(event.text for event in events if isinstance(event, Text)) == "".join(words)
    assert stream.completion.text == "".join(words)
    assert len(await router.query("select 1 from jobs")) == 1


async def test_a_worker_lost_before_its_first_word_costs_the_reader_nothing(router: Rig):
    async with paying(router) as client:
        async with router.worker() as lost:
            task = asyncio.create_task(client.run(PROMPT, max_tokens=8))
            await lost.job()
        async with router.worker() as worker, serving(worker, "Here."):
            completion = await asyncio.wait_for(task, 20)
    assert completion.text == "Here."


async def test_two_jobs_on_one_bad_line_are_each_resumed_at_their_place(router: Rig):
    transport = CuttingTransport([600, 900, 1200])
    words = [f"w{number} " for number in range(20)]
    async with router.worker(slots=2) as worker, paying(router, transport=transport) as client:

        async def serve(job: dict[str, Any], name: str) -> None:
            for seq, word in enumerate(words):
                await worker.say(job, name + word, seq=seq)
                await asyncio.sleep(0.01)
            await worker.finish(job, tokens=20)

        task = asyncio.create_task(client.run(PROMPT, max_tokens=100, n=2))
        jobs = [await worker.job(), await worker.job()]
        await asyncio.gather(*map(serve, jobs, ("a", "b")))
        completion = await asyncio.wait_for(task, 20)
    expected = {"".join(name + word for word in words) for name in ("a", "b")}
    assert set(completion.texts) == expected
    assert set(completion.partial_texts.values()) == expected


async def test_an_answer_that_was_cut_off_is_an_error_that_says_what_was_charged(router: Rig):
    """It was shown, so it is not begun anew: what was delivered is charged, the rest refunded."""
    async with paying(router) as client:
        async with router.worker() as lost:
            stream = client.stream(PROMPT, max_tokens=50)
            heard = asyncio.Event()

            async def read() -> str:
                text = ""
                async for event in stream:
                    if isinstance(event, Text):
                        text += event.text
                        heard.set()
                return text

            task = asyncio.create_task(read())
            job = await lost.job()
            await lost.say(job, "Half an answ", tokens=4)
            await asyncio.wait_for(heard.wait(), 10)
        with pytest.raises(JobNotDone) as raised:
            await asyncio.wait_for(task, 20)
    failed = raised.value.facts["job"]
    assert failed["state"] == "failed"
    assert 0 < failed["charged_msat"] < failed["held_msat"]
    assert failed["charged_msat"] + failed["refunded_msat"] == failed["held_msat"]
    assert raised.value.credential is not None
    assert (await router.books()).in_order
