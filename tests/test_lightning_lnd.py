"""What is LND's own, against the stand-in and against answers written out. What every back end must
do is in test_lightning_backends.py."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from billing.lightning import (
    BackendAuthError,
    BackendRejected,
    BackendUnavailable,
    InvoiceState,
    OutcomeUnknown,
    PaymentState,
)
from billing.lightning.lnd import LndBackend, from_settings
from billing.lightning.node_http import NodeHttp
from billing.lightning.simulated.faults import FaultKind
from tests.lightning_rig import ENOUGH_FEE_MSAT, SOON_S, ask, hash_of, pay, take
from tests.loopback_http import Answer, Loopback, Request, http_json
from tests.stand_ins import lnd
from tests.stand_ins.rig import StandInRig

HASH = "ab" * 32
PREIMAGE = "cd" * 32


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[StandInRig]:
    rig = StandInRig(tmp_path, "lnd")
    await rig.start()
    yield rig
    await rig.stop()


def saying(answer: Answer) -> Loopback:
    return Loopback(answer)


def backend_at(server: Loopback) -> LndBackend:
    http = NodeHttp("lnd", server.url("").rstrip("/"), headers={})
    return LndBackend(http, http, preimage_key=b"key")


def payment(status: str, **more: str) -> dict:
    return {
        "result": {
            "payment_hash": HASH,
            "status": status,
            "value_msat": "50000",
            "fee_msat": "12",
            "payment_preimage": PREIMAGE,
            "failure_reason": "FAILURE_REASON_NONE",
            **more,
        }
    }


async def look_up(answer: bytes) -> object:
    async with saying(lambda request: answer) as server:
        backend = backend_at(server)
        try:
            return await backend.lookup_payment(HASH)
        finally:
            await backend.aclose()


async def test_a_payment_asks_for_what_lnd_would_otherwise_refuse(rig: StandInRig) -> None:
    """The default fee limit is 0, and a 64-bit integer is a string."""
    bolt11 = await rig.their_invoice(50_000)
    await rig.backend.pay_invoice(bolt11, max_fee_msat=7_000, timeout_s=1.5, max_cltv_blocks=900)
    [body] = [body for _, path, body in rig.core.requests if path == "/v2/router/send"]
    assert body == {
        "payment_request": bolt11,
        "fee_limit_msat": "7000",
        "timeout_seconds": 2,
        "no_inflight_updates": True,
        "cltv_limit": 900,
    }


async def test_an_amount_beyond_53_bits_survives_its_way() -> None:
    answer = http_json(
        {
            "state": "SETTLED",
            "amt_paid_msat": "9007199254740993",
            "settle_date": "1790000000",
            "settle_index": "9223372036854775807",
        }
    )
    async with saying(lambda request: answer) as server:
        backend = backend_at(server)
        status = await backend.lookup_invoice(HASH)
        await backend.aclose()
    assert status.amount_received_msat == 9_007_199_254_740_993
    assert status.cursor == "9223372036854775807"


async def test_a_hash_is_urlsafe_base64_in_a_path_and_standard_in_a_body() -> None:
    awkward = "fb" * 32  # its base64 is full of "+" and "/"

    def answer(request: Request) -> bytes:
        return http_json({"code": 5, "message": "unknown", "details": []}, 404)

    async with saying(answer) as server:
        backend = backend_at(server)
        assert (await backend.lookup_payment(awkward)).state is PaymentState.NOT_FOUND
        assert not await backend.cancel_invoice(awkward)
        await backend.aclose()
    tracked, cancelled = server.requests[0], server.requests[1]
    assert tracked.path.rpartition("/")[2] == base64.urlsafe_b64encode(b"\xfb" * 32).decode()
    assert base64.b64encode(b"\xfb" * 32) in cancelled.body
    assert base64.b64encode(b"\xfb" * 32) != base64.urlsafe_b64encode(b"\xfb" * 32)


@pytest.mark.parametrize(
    "answer, state",
    [
        (http_json(payment("INITIATED")), PaymentState.IN_FLIGHT),
        (http_json(payment("IN_FLIGHT")), PaymentState.IN_FLIGHT),
        (http_json(payment("SOMETHING_NEW")), PaymentState.UNKNOWN),
        (http_json(payment("FAILED")), PaymentState.FAILED),
        # Complete, says LND, with a preimage that is none of this hash.
        (http_json(payment("SUCCEEDED")), PaymentState.UNKNOWN),
        (http_json({"code": 5, "message": "m", "details": []}, 404), PaymentState.NOT_FOUND),
        (http_json({"error": {"code": 5, "message": "m"}}, 404), PaymentState.NOT_FOUND),
        (http_json({"error": {"code": 5, "message": "m"}}), PaymentState.NOT_FOUND),
    ],
)
async def test_every_answer_to_a_look_up(answer: bytes, state: PaymentState) -> None:
    status = await look_up(answer)
    assert getattr(status, "state", None) is state


@pytest.mark.parametrize(
    "answer, error",
    [
        (http_json({"code": 2, "message": "boom"}, 500), OutcomeUnknown),
        (http_json({"code": 14, "message": "starting"}, 503), OutcomeUnknown),
        (http_json({"error": {"code": 13, "message": "x"}}), OutcomeUnknown),
        (http_json({"code": 2, "message": "cannot retrieve macaroon"}, 500), BackendAuthError),
        (http_json({"code": 7, "message": "permission denied"}, 403), BackendAuthError),
        (http_json({"code": 16, "message": "unauthenticated"}, 401), BackendAuthError),
        (http_json({"code": 5}, 200), OutcomeUnknown),
    ],
)
async def test_what_is_no_answer_is_no_not_found(answer: bytes, error: type) -> None:
    with pytest.raises(error):
        await look_up(answer)


async def test_a_wrong_preimage_is_reported_without_it(caplog: pytest.LogCaptureFixture) -> None:
    await look_up(http_json(payment("SUCCEEDED")))
    assert HASH in caplog.text
    assert PREIMAGE not in caplog.text


async def test_code_6_is_looked_up_and_not_believed(rig: StandInRig) -> None:
    """LND refuses the same invoice with 409 and code 6, whatever became of the first payment."""
    bolt11 = await rig.their_invoice(50_000)
    first = await pay(rig, bolt11)
    rig.core.requests.clear()
    assert await pay(rig, bolt11) == first
    paths = [path for _, path, _ in rig.core.requests]
    assert paths.index("/v2/router/send") < paths.index("/v2/router/track/{payment_hash}")


@pytest.mark.parametrize("wrapped", [True, False])
async def test_the_words_of_a_pay_error_prove_nothing(rig: StandInRig, wrapped: bool) -> None:
    """Also not "invoice expired": the first payment of this hash may still be under way."""
    bolt11 = await rig.their_invoice(50_000)
    error = {"code": 2, "message": "invoice expired. Valid until yesterday", "details": []}
    info = await rig.backend.node_info()

    def answer(request: Request) -> bytes:
        match request.path:
            case "/v1/getinfo":
                chains = [{"network": "regtest"}]
                words = {"alias": "", "version": "", "identity_pubkey": info.pubkey}
                return http_json({**words, "chains": chains, "synced_to_chain": True})
            case "/v1/balance/channels":
                held = {"msat": "1000000000"}
                return http_json({"local_balance": held, "remote_balance": held})
            case "/v1/channels":
                return http_json({"channels": []})
            case _:
                return http_json({"error": error} if wrapped else error, 500)

    async with saying(answer) as server:
        backend = backend_at(server)
        with pytest.raises(OutcomeUnknown):
            await backend.pay_invoice(
                bolt11, max_fee_msat=ENOUGH_FEE_MSAT, timeout_s=SOON_S, max_cltv_blocks=None
            )
        await backend.aclose()


async def test_without_a_cursor_nothing_is_replayed_and_with_one_what_came_after(
    rig: StandInRig,
) -> None:
    """Settle index 0 means "no backlog": the very first settlement cannot be had again."""
    first, second, third = [await ask(rig) for _ in range(3)]
    await rig.pay_us(first.bolt11)
    await rig.pay_us(second.bolt11)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await take(rig, None, 1)
    [resumed] = await take(rig, "1", 1)
    assert (resumed.payment_hash, resumed.cursor) == (second.payment_hash, "2")
    await rig.pay_us(third.bolt11)
    assert [s.payment_hash for s in await take(rig, "2", 1)] == [third.payment_hash]


async def test_a_quiet_stream_is_asked_for_again_where_it_was(
    rig: StandInRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain stream has no heartbeat, so that a dead one looks like a quiet one."""
    monkeypatch.setattr("billing.lightning.lnd.QUIET_STREAM_S", 0.05)
    seen, later = await ask(rig), await ask(rig)
    await rig.pay_us(seen.bolt11)
    listening = asyncio.create_task(take(rig, "1", 1))
    async with asyncio.timeout(SOON_S):
        while sum(path == "/v1/invoices/subscribe" for _, path, _ in rig.core.requests) < 3:
            await asyncio.sleep(0.01)
    await rig.pay_us(later.bolt11)
    assert [s.payment_hash for s in await listening] == [later.payment_hash]


async def test_the_preimage_of_an_invoice_is_ours_and_no_function_of_its_key_alone(
    rig: StandInRig,
) -> None:
    def made_by(key: bytes) -> LndBackend:
        http = NodeHttp("lnd", rig.url, headers={"Grpc-Metadata-macaroon": lnd.MACAROON})
        return LndBackend(http, http, preimage_key=key)

    invoices = []
    for backend in (made_by(b"a"), made_by(b"b")):
        invoices.append(
            await backend.create_invoice(
                amount_msat=1_000, description="x", expiry_s=60, idempotency_key="same"
            )
        )
        await backend.aclose()
    assert invoices[0].payment_hash != invoices[1].payment_hash


async def test_the_receiving_macaroon_cannot_pay(rig: StandInRig) -> None:
    """Separate credentials: one makes invoices, the other does all else."""
    split = rig.backend_with(receive=lnd.RECEIVE_MACAROON, pay=lnd.MACAROON)
    only = rig.backend_with(receive=lnd.RECEIVE_MACAROON)
    bolt11 = await rig.their_invoice(50_000)
    made = await split.create_invoice(
        amount_msat=1_000, description="x", expiry_s=60, idempotency_key="k"
    )
    assert (await only.lookup_invoice(made.payment_hash)).state is InvoiceState.OPEN
    with pytest.raises(BackendAuthError):
        await only.pay_invoice(bolt11, max_fee_msat=9_999, timeout_s=1.0, max_cltv_blocks=None)
    assert await rig.left_msat(hash_of(bolt11)) == 0
    status = await split.pay_invoice(
        bolt11, max_fee_msat=9_999, timeout_s=SOON_S, max_cltv_blocks=None
    )
    assert status.state is PaymentState.SUCCEEDED
    await split.aclose()
    await only.aclose()


async def test_reserves_and_sleeping_channels_are_not_spendable() -> None:
    constraints = {"chan_reserve_sat": "1000"}
    channels = [
        {
            "active": True,
            "local_balance": "50000",
            "remote_balance": "20000",
            "local_constraints": constraints,
            "remote_constraints": constraints,
        },
        {"active": False, "local_balance": "7000", "remote_balance": "300"},
    ]

    def answer(request: Request) -> bytes:
        if request.path == "/v1/channels":
            return http_json({"channels": channels})
        return http_json(
            {
                "local_balance": {"sat": "57000", "msat": "57000123"},
                "remote_balance": {"sat": "20300", "msat": "20300000"},
                "unsettled_local_balance": {"msat": "5"},
                "unsettled_remote_balance": {"msat": "4000"},
            }
        )

    async with saying(answer) as server:
        backend = backend_at(server)
        balance = await backend.balance()
        await backend.aclose()
    assert balance.spendable_msat == 49_000_123
    assert balance.receivable_msat == 19_000_000
    assert balance.pending_msat == 4_000


async def test_after_a_pay_call_a_failed_look_up_is_outcome_unknown(rig: StandInRig) -> None:
    """Never BackendUnavailable: that would say that nothing was sent."""
    bolt11 = await rig.their_invoice(50_000)
    await rig.backend.node_info()
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    backend = rig.backend
    assert isinstance(backend, LndBackend)

    async def unreachable(payment_hash: str) -> object:
        raise BackendUnavailable("lnd", "lookup_payment", "gone")

    backend.lookup_payment = unreachable  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown):
        await pay(rig, bolt11, timeout_s=0.3)


async def test_money_that_is_gone_after_a_payment_under_way_is_no_refusal(rig: StandInRig) -> None:
    """Sent, then drained, then asked again: what matters is the HTLC that is out."""
    bolt11 = await rig.their_invoice(50_000)
    await rig.go_wrong(FaultKind.HANG, "pay_invoice")
    assert (await pay(rig, bolt11, timeout_s=0.2)).state is PaymentState.IN_FLIGHT
    await rig.drain()
    assert (await pay(rig, bolt11, timeout_s=0.2)).state is PaymentState.IN_FLIGHT
    other = await rig.their_invoice(60_000)
    with pytest.raises(BackendRejected) as refusal:
        await pay(rig, other)
    assert refusal.value.reason == "insufficient_funds"
    await rig.resolve(hash_of(bolt11), settle=True)


# Settings


def test_a_macaroon_is_hex_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "invoice.macaroon"
    file.write_bytes(bytes.fromhex(lnd.MACAROON))
    for macaroon in (lnd.MACAROON, str(file)):
        backend = from_settings(url="https://127.0.0.1:8080", macaroon=macaroon)
        sent = backend._receive._client.headers["Grpc-Metadata-macaroon"]
        assert sent == lnd.MACAROON


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "SATHERD_LND_URL"),
        ({"url": "127.0.0.1:8080", "macaroon": "00"}, "must look like"),
        ({"url": "https://user:pass@node", "macaroon": "00"}, "without user and password"),
        ({"url": "https://node"}, "SATHERD_LND_MACAROON"),
        ({"url": "https://node", "macaroon": "/nowhere/x.macaroon"}, "neither hex nor a file"),
        ({"url": "https://node", "macaroon": "00", "cert": "/nowhere"}, "certificate"),
    ],
)
def test_what_is_wrong_with_settings_is_said(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        from_settings(**settings)
    assert "pass@" not in str(error.value)
