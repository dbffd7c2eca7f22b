"""What every bus has in common: nothing is lost unnoticed."""

from __future__ import annotations

import pytest

from router import bus
from router.bus import Exchange, InProcessBus, Message, Parcels
from tests.reading import until


async def test_a_message_that_cannot_be_sent_takes_no_other_with_it():
    exchange = Exchange()
    sender, receiver = InProcessBus("a", exchange), InProcessBus("b", exchange)
    heard: list[Message] = []
    missed: list[str] = []
    receiver.on_message = lambda sender, message: heard.append(message)
    receiver.on_gap = missed.append
    for member in (sender, receiver):
        member.start()
    for number in (1, 2, object(), 4, 1 << 70, 6):
        sender.send("b", ["said", number])

    async def arrived() -> bool:
        return len(heard) == 4

    await until(arrived)
    sender.tell_all(["said", 7])
    sender.send("b", ["said", 8])

    async def all_arrived() -> bool:
        return len(heard) == 6

    await until(all_arrived)
    assert sorted(number for _, number in heard) == [1, 2, 4, 6, 7, 8]
    assert set(missed) == {"a"}
    for member in (sender, receiver):
        await member.stop()


async def test_what_is_dropped_for_want_of_room_is_missed_by_its_receiver(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(bus, "MOST_UNSENT", 3)
    sender, receiver = Parcels("a"), Parcels("b")
    heard: list[Message] = []
    missed: list[str] = []
    receiver.on_message = lambda sender, message: heard.append(message)
    receiver.on_gap = missed.append

    async def carried(*numbers: int) -> None:
        for number in numbers:
            sender.send("b", ["said", number])
        for _, parcel in await sender.parcels():
            receiver.take(parcel)

    await carried(1, 2, 3)
    await carried(4)
    assert missed == []
    await carried(5, 6, 7, 8)
    await carried(9)
    assert heard == [["said", number] for number in (1, 2, 3, 4, 5, 6, 7, 9)]
    assert missed == ["a"]
