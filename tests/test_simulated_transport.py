"""What only a connection can do to a back end: be refused, break, be slow, talk nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from billing.lightning import BackendRejected, BackendUnavailable, OutcomeUnknown
from billing.lightning.simulated import transport
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import SimulatedRig, ask


@pytest.fixture
async def http_rig(tmp_path: Path) -> AsyncIterator[SimulatedRig]:
    rig = SimulatedRig(tmp_path, over_http=True)
    await rig.start()
    yield rig
    await rig.stop()


async def test_a_node_that_cannot_be_reached_certainly_did_nothing() -> None:
    backend = SimulatedBackend.over_http("http://127.0.0.1:1")
    with pytest.raises(BackendUnavailable):
        await backend.node_info()
    with pytest.raises(BackendUnavailable):
        await backend.pay_invoice("lnbcrt1x", max_fee_msat=1, timeout_s=1.0, max_cltv_blocks=None)
    with pytest.raises(BackendUnavailable):
        await anext(aiter(backend.settlements(None)))
    await backend.aclose()


async def test_an_answer_that_does_not_come_in_time_is_unknown(
    http_rig: SimulatedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_READ_TIMEOUT_S", 0.1)
    await http_rig.go_wrong(FaultKind.DELAY, "create_invoice", delay_s=1.0)
    with pytest.raises(OutcomeUnknown):
        await ask(http_rig)


async def test_a_node_that_refuses_says_so(http_rig: SimulatedRig) -> None:
    await http_rig.go_wrong(FaultKind.FAIL, "create_invoice")
    with pytest.raises(BackendRejected):
        await ask(http_rig)
    assert (await ask(http_rig)).payment_hash


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nnot JSON!",
        b"HTTP/1.1 409 No\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{",
        b"gibberish\r\n\r\n",
        b"",
    ],
)
async def test_an_answer_that_means_nothing_is_unknown(answer: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    backend = SimulatedBackend.over_http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(OutcomeUnknown):
        await backend.pay_invoice("lnbcrt1x", max_fee_msat=1, timeout_s=1.0, max_cltv_blocks=None)
    await backend.aclose()
    server.close()
    await server.wait_closed()
