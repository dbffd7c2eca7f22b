"""What leaves together, and in which order."""

from __future__ import annotations

import asyncio

from worker.outbox import Outbox
from worker.protocol import WORKER_FRAME, Chunks, Finished, FinishReason


def finished(job_id: str) -> Finished:
    return Finished(job_id=job_id, attempt=1, finish_reason=FinishReason.STOP)


async def taken(outbox: Outbox) -> list[object]:
    frames = await asyncio.wait_for(outbox.take(), 10)
    return [WORKER_FRAME.validate_json(frame) for frame in frames]


async def test_pieces_of_many_jobs_leave_in_one_frame():
    outbox = Outbox()
    for number in range(3):
        assert outbox.add_text(f"job{number}", 1, 0, "a", 1)
    assert await taken(outbox) == [
        Chunks(items=[("job0", 1, 0, "a", 1), ("job1", 1, 0, "a", 1), ("job2", 1, 0, "a", 1)])
    ]


async def test_pieces_of_one_job_that_wait_are_joined_and_use_one_number():
    outbox = Outbox()
    assert outbox.add_text("job", 1, 0, "one ", 1)
    assert not outbox.add_text("job", 1, 1, "two ", 2)
    assert await taken(outbox) == [Chunks(items=[("job", 1, 0, "one two ", 3)])]
    assert outbox.add_text("job", 1, 1, "three", 1)
    assert await taken(outbox) == [Chunks(items=[("job", 1, 1, "three", 1)])]


async def test_a_count_that_is_unknown_makes_the_sum_unknown():
    outbox = Outbox()
    outbox.add_text("job", 1, 0, "one ", 1)
    outbox.add_text("job", 1, 1, "two", None)
    assert await taken(outbox) == [Chunks(items=[("job", 1, 0, "one two", None)])]


async def test_attempts_at_one_job_are_kept_apart():
    outbox = Outbox()
    outbox.add_text("job", 1, 0, "a", 1)
    outbox.add_text("job", 2, 0, "b", 1)
    assert await taken(outbox) == [Chunks(items=[("job", 1, 0, "a", 1), ("job", 2, 0, "b", 1)])]


async def test_the_end_of_a_job_comes_after_its_text_and_never_before():
    outbox = Outbox()
    outbox.add_text("job", 1, 0, "a", 1)
    outbox.add_frame(finished("job"))
    outbox.add_text("other", 1, 0, "b", 1)
    kinds = [getattr(frame, "type", None) for frame in await taken(outbox)]
    assert kinds == ["chunks", "finished", "chunks"]


async def test_only_the_last_ready_is_sent_and_it_comes_last():
    outbox = Outbox()
    outbox.set_ready(1)
    outbox.set_ready(2)
    outbox.add_frame(finished("job"))
    frames = await taken(outbox)
    assert [getattr(frame, "type", None) for frame in frames] == ["finished", "ready"]
    assert getattr(frames[-1], "slots_free", None) == 2


async def test_all_is_sent_when_the_taker_comes_back_and_not_before():
    outbox = Outbox()
    outbox.add_frame(finished("job"))
    waiting = asyncio.ensure_future(outbox.all_sent())
    await taken(outbox)
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.add_frame(finished("later"))
    await taken(outbox)
    await asyncio.sleep(0)
    assert not waiting.done()
    coming_back = asyncio.ensure_future(outbox.take())
    await asyncio.wait_for(waiting, 10)
    coming_back.cancel()
