"""Prepaid keys: looked up once for all who bring one at the same time, and never past a change."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from billing import accounts
from billing.errors import BadCredential
from router import key_ring
from router.database import DatabaseUnavailable
from router.key_ring import KeyRing
from tests.router_rig import Rig


class Looks:
    """Counts how often the database is asked, and holds its answers back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.may_answer = asyncio.Event()
        self.fails = False
        find_keys = accounts.find_keys

        async def find(connection: Any, hashes: Any) -> Any:
            self.count += 1
            found = await find_keys(connection, hashes)
            await self.may_answer.wait()
            if self.fails:
                raise ConnectionResetError
            return found

        monkeypatch.setattr(accounts, "find_keys", find)


# A second in real life, which a busy machine may take from one line of a test to the next.
FRESH_S = 60.0


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setattr(key_ring, "FRESH_S", FRESH_S)
    return Looks(monkeypatch)


async def asking(ring: KeyRing, key: str, looks: Looks, count: int = 5) -> list[asyncio.Task]:
    """So many that bring a key at once, and wait for the database."""
    before = looks.count
    tasks = [asyncio.create_task(ring.find(key)) for _ in range(count)]
    async with asyncio.timeout(20):
        while looks.count == before:
            await asyncio.sleep(0.01)
    return tasks


async def test_all_who_bring_a_key_wait_for_one_look(router: Rig, looks: Looks):
    ring = KeyRing(router.core.database)
    looks.may_answer.set()
    key = await router.key()
    looks.may_answer.clear()
    tasks = await asking(ring, key, looks)
    before = looks.count
    tasks[0].cancel()  # the one whose look it is
    looks.may_answer.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [await ring.find(key)] * 4
    assert looks.count == before and not ring._looking


async def test_a_look_that_fails_fails_for_all_who_wait_for_it_and_for_nobody_after(
    router: Rig, looks: Looks
):
    ring = KeyRing(router.core.database)
    looks.may_answer.set()
    key = await router.key()
    looks.fails = True
    found = await asyncio.gather(*await asking(ring, key, looks), return_exceptions=True)
    assert all(isinstance(one, DatabaseUnavailable) for one in found)
    looks.fails = False
    assert await ring.find(key)


async def test_unknown_keys_are_not_remembered(router: Rig, looks: Looks):
    ring = KeyRing(router.core.database)
    looks.may_answer.set()
    for _ in range(2):
        before = looks.count
        with pytest.raises(BadCredential):
            await ring.find("sk-" + "a" * 22)
        assert looks.count == before + 1
    assert not ring._seen and not ring._looking


async def test_what_was_read_before_a_change_is_not_remembered_after_it(router: Rig, looks: Looks):
    ring = KeyRing(router.core.database)
    looks.may_answer.set()
    key = await router.key()
    looks.may_answer.clear()
    tasks = await asking(ring, key, looks, count=1)
    ring.forget()
    looks.may_answer.set()
    await tasks[0]
    assert not ring._seen
    before = looks.count
    await ring.find(key)
    assert looks.count == before + 1


async def test_a_key_is_looked_up_again_after_a_moment(
    router: Rig, looks: Looks, monkeypatch: pytest.MonkeyPatch
):
    ring = KeyRing(router.core.database)
    looks.may_answer.set()
    key = await router.key()
    await ring.find(key)
    before = looks.count
    await ring.find(key)
    assert looks.count == before
    hashed, (asked_at, found) = next(iter(ring._seen.items()))
    ring._seen[hashed] = (asked_at - FRESH_S, found)
    await ring.find(key)
    assert looks.count == before + 1
