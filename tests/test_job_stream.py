"""A job's output in memory: told at the end of the loop's turn, through a tap or by waking."""

from __future__ import annotations

import asyncio

from router.job_states import State
from router.job_stream import JobStream, StreamHub
from tests.router_rig import PATIENCE_S


def _stream(name: str = "job_a", hub: StreamHub | None = None) -> JobStream:
    return (hub or StreamHub()).open(name, State.RUNNING, 1)


async def _turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_what_is_said_in_one_turn_is_told_at_once():
    stream, told = _stream(), []

    def tap() -> bool:
        told.append(stream.text())
        return True

    waiting = asyncio.create_task(stream.changed(tap))
    await _turn()
    stream.push("two ")
    stream.push("words")
    await _turn()
    assert told == ["two words"]
    assert not waiting.done()
    stream.push(", and more")
    await _turn()
    assert told == ["two words", "two words, and more"]
    waiting.cancel()


async def test_a_tap_that_does_not_take_output_is_woken_for_it():
    stream = _stream()
    waiting = asyncio.create_task(stream.changed(lambda: False))
    await _turn()
    stream.push("said")
    await asyncio.wait_for(waiting, PATIENCE_S)


async def test_a_change_of_state_wakes_a_reader_though_it_has_a_tap():
    stream, taps = _stream(), 0

    def tap() -> bool:
        nonlocal taps
        taps += 1
        return True

    waiting = asyncio.create_task(stream.changed(tap))
    await _turn()
    stream.restart(State.QUEUED, 1)
    await asyncio.wait_for(waiting, PATIENCE_S)
    stream.push("too late for it")
    await _turn()
    assert taps == 0


async def test_a_tap_that_breaks_wakes_its_reader_and_hurts_no_other_stream():
    hub = StreamHub()
    broken, sound = _stream("job_broken", hub), _stream("job_sound", hub)

    def breaks() -> bool:
        raise RuntimeError("the connection is in an odd state")

    first = asyncio.create_task(broken.changed(breaks))
    second = asyncio.create_task(sound.changed())
    await _turn()
    broken.push("a")
    sound.push("b")
    await asyncio.wait_for(asyncio.gather(first, second), PATIENCE_S)


async def test_a_tick_leaves_readers_of_streams_alone_that_have_just_spoken(monkeypatch):
    """A comment that keeps the line open is for lines on which nothing comes."""
    monkeypatch.setattr(StreamHub, "TICK_S", 0.02)
    hub = StreamHub()
    talking, silent = _stream("job_talking", hub), _stream("job_silent", hub)
    first = asyncio.create_task(talking.changed(lambda: True))
    second = asyncio.create_task(silent.changed(lambda: True))
    await _turn()
    talking.push("a word")
    hub.start()
    await asyncio.wait_for(second, PATIENCE_S)
    woken_too = first.done()
    await asyncio.wait_for(first, PATIENCE_S)  # by the tick after
    await hub.stop()
    assert not woken_too
