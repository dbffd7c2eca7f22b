"""The simulated network as a neighbour sees it: its process, its pages, its addresses, its clock,
its limits. What it shares with real nodes is in test_lightning_backends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import lnurl
import pytest
from coincurve import PrivateKey

from billing import bolt11_codec
from billing.lightning import BackendError, InvoiceState, PaymentState
from billing.lightning.connect import UnknownBackend, connect
from billing.lightning.simulated import wallets
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.faults import Fault, FaultKind
from billing.lightning.simulated.network import (
    DATABASE_NAME,
    ConnectionDropped,
    Network,
    NetworkInUse,
)
from billing.lightning.simulated.payments import PaymentRecord, routing_fee_msat
from billing.lightning.simulated.serving import NetworkServer
from billing.lightning.simulated.wallets import Refused

SOON_S = 10.0


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def network(tmp_path: Path, clock: Clock) -> AsyncIterator[Network]:
    network = await Network.open(tmp_path, clock=clock)
    await network.ensure_wallet("worker")
    yield network
    assert (await network.audit()).balances
    await network.aclose()


@pytest.fixture
async def server(network: Network) -> AsyncIterator[NetworkServer]:
    server = NetworkServer(network, port=0)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def web(server: NetworkServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        yield client


async def invoice_of(network: Network, wallet: str = "worker", amount_msat: int = 50_000) -> str:
    record = await network.create_invoice(
        wallet, amount_msat=amount_msat, description="test", expiry_s=600
    )
    return record.bolt11


async def pay(
    network: Network, bolt11: str, *, wallet: str = "router", timeout_s: float = 0.0
) -> PaymentRecord:
    return await network.pay_invoice(wallet, bolt11, max_fee_msat=10**9, timeout_s=timeout_s)


async def balance_msat(network: Network, name: str) -> int:
    return {wallet.name: wallet.balance_msat for wallet in await network.wallets()}[name]


# Money


async def test_amount_and_routing_fee_leave_and_only_the_amount_arrives(network: Network) -> None:
    before = await balance_msat(network, "router")
    payment = await pay(network, await invoice_of(network, amount_msat=50_001))
    assert payment.state == "succeeded"
    assert payment.fee_msat == 1_000 + 51  # 1 sat, and 0.1 % rounded up
    assert await balance_msat(network, "worker") == 50_001
    assert await balance_msat(network, "router") == before - 50_001 - 1_051
    assert (await network.audit()).fees_msat == 1_051


async def test_money_under_way_is_in_the_audit(network: Network) -> None:
    await network.script(Fault(FaultKind.HANG))
    await pay(network, await invoice_of(network))
    audit = await network.audit()
    assert audit.in_flight_msat == 50_000 + routing_fee_msat(50_000)
    assert audit.balances


async def test_a_wallet_pays_no_more_than_it_holds(network: Network) -> None:
    bolt11 = await invoice_of(network, "router", 10_000)
    await network.fund("worker", 11_009)
    with pytest.raises(Refused) as refusal:
        await pay(network, bolt11, wallet="worker")
    assert refusal.value.reason == "insufficient_funds"
    await network.fund("worker", 1)
    assert (await pay(network, bolt11, wallet="worker")).state == "succeeded"
    assert await balance_msat(network, "worker") == 0


async def test_money_that_is_not_there_cannot_be_taken_away(network: Network) -> None:
    with pytest.raises(Refused):
        await network.fund("worker", -1)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_no_money_appears_or_disappears(
    tmp_path: Path, clock: Clock, seed: int
) -> None:
    """The oracle of other tests has to be right itself: at random, with faults and restarts."""
    choose = random.Random(seed)
    network = await Network.open(tmp_path, clock=clock)
    await network.ensure_wallet("worker")
    asked: list[str] = []
    for _ in range(150):
        known = choose.choice(asked) if asked else await invoice_of(network)
        payment_hash = bolt11_codec.decode(known).payment_hash
        match choose.randrange(8):
            case 0 | 1:
                asked.append(await invoice_of(network, "worker", choose.randrange(1, 10**6)))
            case 2 | 3:
                if choose.random() < 0.7:
                    kind = choose.choice(list(FaultKind))
                    await network.script(Fault(kind, delay_s=choose.choice([5, 500, 1000])))
                with contextlib.suppress(Refused, ConnectionDropped):
                    await pay(network, known, wallet=choose.choice(["router", "router", "payer"]))
            case 4:
                await network.resolve(payment_hash, settle=choose.random() < 0.5)
            case 5:
                await network.forget("router", payment_hash)
            case 6:
                clock.now_s += choose.choice([1, 10, 300])
                await network.run_due()
            case 7:
                await network.cancel_invoice("worker", payment_hash)
                await network.aclose()
                network = await Network.open(tmp_path, clock=clock)
        assert (await network.audit()).balances
    received = {record.payment_hash: record for record in await network.received("worker")}
    for bolt11 in asked:
        invoice = bolt11_codec.decode(bolt11)
        left_msat = [
            await network.left_msat(wallet, invoice.payment_hash) for wallet in ("router", "payer")
        ]
        if invoice.payment_hash in received:
            assert sorted(left_msat) == [0, invoice.amount_msat]
        else:
            assert left_msat == [0, 0]
    assert len(received) > 5
    await network.aclose()


# Invoices


async def test_no_answer_about_an_invoice_holds_its_preimage(
    network: Network, web: httpx.AsyncClient
) -> None:
    """Facts sheet 0.8: the preimage is proof of payment, and leaves by the payer's answer only."""
    bolt11 = await invoice_of(network, "router")
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    seen = bolt11
    for _ in ("unpaid", "paid"):
        looked_up = await web.post(
            "/v1/wallets/router/lookup_invoice", json={"payment_hash": payment_hash}
        )
        seen += looked_up.text
        for page in ("/v1/wallets", "/v1/wallets/router", "/v1/wallets/payer", "/v1/audit"):
            seen += (await web.get(page)).text
        paid = await web.post("/v1/pay", json={"invoice": bolt11})
        preimage = paid.json()["preimage"]
    assert sha256(bytes.fromhex(preimage)).hexdigest() == payment_hash
    assert payment_hash in seen
    assert preimage not in seen


async def test_keys_and_preimages_are_random(network: Network, tmp_path_factory: Any) -> None:
    other = await Network.open(tmp_path_factory.mktemp("other"))
    keys = {wallet.pubkey for wallet in [*await network.wallets(), *await other.wallets()]}
    assert len(keys) == 5
    await other.aclose()


async def test_an_invoice_of_another_key_over_the_same_hash_is_not_paid(network: Network) -> None:
    """Somebody who knows a hash cannot have it paid at a price of their own."""
    genuine = bolt11_codec.decode(await invoice_of(network))
    forged = bolt11_codec.sign(
        PrivateKey(),
        prefix="bcrt",
        amount_msat=1_000_000,
        payment_hash=bytes.fromhex(genuine.payment_hash),
        payment_secret=b"\x01" * 32,
        created_at_s=int(genuine.created_at.timestamp()),
        expiry_s=600,
        description="forged",
    )
    payment = await pay(network, forged)
    assert (payment.state, payment.failure_code) == ("failed", "no_route")


async def test_an_htlc_that_arrives_after_the_expiry_is_refused(
    network: Network, clock: Clock
) -> None:
    await network.script(Fault(FaultKind.DELAY, delay_s=700))
    bolt11 = await invoice_of(network)
    assert (await pay(network, bolt11)).state == "in_flight"
    clock.now_s += 701
    await network.run_due()
    payment = await network.lookup_payment("router", bolt11_codec.decode(bolt11).payment_hash)
    assert payment is not None
    assert (payment.state, payment.failure_code) == ("failed", "incorrect_payment_details")


# Faults


async def test_a_fault_happens_as_often_as_it_was_scripted(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, times=2))
    states = [(await pay(network, await invoice_of(network))).state for _ in range(3)]
    assert states == ["failed", "failed", "succeeded"]
    assert await network.scripted() == []


async def test_a_fault_may_be_for_one_payee(network: Network) -> None:
    await network.ensure_wallet("other")
    await network.script(Fault(FaultKind.FAIL, payee="other"))
    assert (await pay(network, await invoice_of(network, "worker"))).state == "succeeded"
    assert (await pay(network, await invoice_of(network, "other"))).state == "failed"


async def test_faults_of_different_kinds_meet_in_one_call(network: Network, clock: Clock) -> None:
    for kind in (FaultKind.DROP_AFTER, FaultKind.FORGET, FaultKind.DELAY):
        await network.script(Fault(kind, delay_s=50))
    bolt11 = await invoice_of(network)
    with pytest.raises(ConnectionDropped):
        await pay(network, bolt11)
    assert await balance_msat(network, "worker") == 0
    clock.now_s += 51
    await network.run_due()
    assert await network.lookup_payment("router", bolt11_codec.decode(bolt11).payment_hash) is None
    assert await balance_msat(network, "worker") == 50_000


async def test_faults_can_be_called_off(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, times=100))
    await network.clear_faults()
    assert (await pay(network, await invoice_of(network))).state == "succeeded"


async def test_another_wallet_is_spared(network: Network) -> None:
    await network.script(Fault(FaultKind.FAIL, wallet="router"))
    payment = await pay(network, await invoice_of(network), wallet="payer")
    assert payment.state == "succeeded"


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": FaultKind.HANG, "operation": "balance"},
        {"kind": FaultKind.FORGET, "operation": "create_invoice"},
        {"kind": FaultKind.FAIL, "operation": "dance"},
        {"kind": FaultKind.FAIL, "times": 0},
        {"kind": FaultKind.DELAY, "delay_s": -1.0},
        {"kind": FaultKind.DELAY, "delay_s": float("nan")},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Fault(**fault)


async def test_a_held_htlc_keeps_others_from_the_same_invoice(network: Network) -> None:
    await network.script(Fault(FaultKind.HANG))
    bolt11 = await invoice_of(network)
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    assert (await pay(network, bolt11)).state == "in_flight"
    other = await pay(network, bolt11, wallet="payer")
    assert (other.state, other.failure_code) == ("failed", "incorrect_payment_details")
    assert not await network.cancel_invoice("worker", payment_hash)
    assert await network.resolve(payment_hash, settle=False) == 1
    assert (await pay(network, bolt11, wallet="payer")).state == "succeeded"


async def test_what_nobody_sent_cannot_be_resolved(network: Network) -> None:
    assert await network.resolve("00" * 32, settle=True) == 0


# Wallets


async def test_wallets_are_made_up_to_a_limit(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wallets, "WALLETS_MAX", 4)
    await network.ensure_wallet("one.more+tag")
    await network.ensure_wallet("one.more+tag")
    with pytest.raises(Refused) as refusal:
        await network.ensure_wallet("too-many")
    assert refusal.value.reason == "quota"


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "a" * 65, "é", ".hidden", "a\n"])
async def test_a_wallet_has_a_name_that_an_address_may_have(network: Network, name: str) -> None:
    with pytest.raises(Refused):
        await network.ensure_wallet(name)


# Opening


@pytest.mark.parametrize("name", ["mainnet", "bitcoin", "testnet", "signet"])
async def test_it_opens_for_no_network_but_regtest(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="regtest only"):
        await Network.open(tmp_path, network=name)
    assert not (tmp_path / DATABASE_NAME).exists()


async def test_one_directory_is_open_once(network: Network, tmp_path: Path) -> None:
    with pytest.raises(NetworkInUse):
        await Network.open(tmp_path)


async def test_an_htlc_under_way_arrives_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    first = await Network.open(tmp_path, clock=clock)
    await first.ensure_wallet("worker")
    await first.script(Fault(FaultKind.DELAY, delay_s=100))
    await first.script(Fault(FaultKind.FAIL))
    bolt11 = await invoice_of(first)
    assert (await pay(first, bolt11)).state == "in_flight"
    await first.aclose()

    clock.now_s += 101
    second = await Network.open(tmp_path, clock=clock)
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    async with asyncio.timeout(SOON_S):
        while (payment := await second.lookup_payment("router", payment_hash)) is None or (
            payment.state == "in_flight"
        ):
            await asyncio.sleep(0.01)
    assert payment.state == "succeeded"
    # The script survives as well.
    assert (await pay(second, await invoice_of(second))).state == "failed"
    await second.aclose()


def test_a_back_end_is_found_by_name() -> None:
    backend = connect("simulated", url="http://127.0.0.1:9740")
    assert backend.name == "simulated"
    assert backend.capabilities.push == "cursor"


def test_asking_for_connect_imports_no_back_end() -> None:
    """An operator with one node needs the dependencies of that one only."""
    script = (
        "import sys, billing.lightning.connect\n"
        "print([name for name in sys.modules if name.startswith('billing.lightning.')])"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.strip() == "['billing.lightning.connect']"


def test_an_unknown_back_end_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UnknownBackend, match=r"'lightnig'; there is: simulated"):
        connect("lightnig")


@pytest.mark.parametrize(
    "settings", [{}, {"url": "127.0.0.1:9740"}, {"url": "http://x", "network": "mainnet"}]
)
def test_a_back_end_with_settings_it_cannot_use_says_so(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="simulated Lightning network"):
        connect("simulated", **settings)


# Over HTTP


async def test_every_answer_of_ours_says_that_it_is_simulated(
    network: Network, web: httpx.AsyncClient
) -> None:
    bolt11 = await invoice_of(network, "router")
    answers = [
        await web.get("/"),
        await web.get("/health"),
        await web.get("/v1/wallets"),
        await web.get("/v1/audit"),
        await web.get("/v1/nothing"),
        await web.get("/v1/wallets/nobody"),
        await web.post("/v1/pay", json={"invoice": bolt11}),
        await web.post("/v1/pay", content=b"{"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 409, 200, 400]
    assert all(answer.json()["simulated"] is True for answer in answers)


async def test_the_payer_pays_over_http(network: Network, web: httpx.AsyncClient) -> None:
    bolt11 = await invoice_of(network, "router", 21_000)
    answer = (await web.post("/v1/pay", json={"invoice": bolt11})).json()
    assert answer["state"] == "succeeded"
    assert answer["amount_msat"] == 21_000
    preimage = bytes.fromhex(answer["preimage"])
    assert sha256(preimage).hexdigest() == bolt11_codec.decode(bolt11).payment_hash


async def test_a_wallet_shows_what_it_received_and_paid(
    network: Network, web: httpx.AsyncClient
) -> None:
    await pay(network, await invoice_of(network, "worker", 50_000))
    worker = (await web.get("/v1/wallets/worker")).json()
    assert worker["balance_msat"] == 50_000
    assert [item["amount_received_msat"] for item in worker["received"]] == [50_000]
    router = (await web.get("/v1/wallets/router")).json()
    assert [(item["payee"], item["state"]) for item in router["paid"]] == [("worker", "succeeded")]


async def test_faults_are_scripted_and_resolved_over_http(
    network: Network, web: httpx.AsyncClient
) -> None:
    body = {"kind": "hang", "payee": "worker", "times": 2}
    scripted = (await web.post("/v1/faults", json=body)).json()["faults"]
    assert [(fault["kind"], fault["payee"], fault["times"]) for fault in scripted] == [
        ("hang", "worker", 2)
    ]
    bolt11 = await invoice_of(network)
    payment_hash = bolt11_codec.decode(bolt11).payment_hash
    assert (await pay(network, bolt11)).state == "in_flight"
    assert (await web.delete("/v1/faults")).json()["faults"] == []
    ended = await web.post(f"/v1/payments/{payment_hash}/resolve", json={"settle": True})
    assert ended.json()["ended"] == 1
    assert await balance_msat(network, "worker") == 50_000
    forgotten = await web.post(f"/v1/payments/{payment_hash}/forget", json={})
    assert forgotten.json()["forgotten"] == 1
    assert await network.lookup_payment("router", payment_hash) is None


async def test_a_wallet_is_funded_over_http(web: httpx.AsyncClient) -> None:
    funded = await web.post("/v1/wallets/worker/fund", json={"amount_msat": 7_000})
    assert funded.json()["balance_msat"] == 7_000


@pytest.mark.parametrize(
    "path, body",
    [
        (
            "/v1/wallets/router/create_invoice",
            {"amount_msat": "1", "description": "", "expiry_s": 1},
        ),
        (
            "/v1/wallets/router/create_invoice",
            {"amount_msat": 1.5, "description": "", "expiry_s": 1},
        ),
        (
            "/v1/wallets/router/create_invoice",
            {"amount_msat": True, "description": "", "expiry_s": 1},
        ),
        (
            "/v1/wallets/router/create_invoice",
            {"amount_msat": 1, "description": "\ud800", "expiry_s": 1},
        ),
        (
            "/v1/wallets/router/create_invoice",
            {"amount_msat": 2**70, "description": "", "expiry_s": 1},
        ),
        ("/v1/wallets/router/create_invoice", {"amount_msat": 1}),
        ("/v1/wallets/router/dance", {}),
        ("/v1/wallets/router/balance", {"surprise": 1}),
        ("/v1/wallets/router/lookup_payment", {"payment_hash": None}),
        ("/v1/pay", {}),
        ("/v1/pay", {"invoice": 5}),
        ("/v1/pay", []),
        ("/v1/faults", {"kind": "explode"}),
        ("/v1/faults", {"kind": "delay", "delay_s": 1e300}),
        ("/v1/payments/00/resolve", {"settle": "yes"}),
    ],
)
async def test_a_request_that_cannot_be_understood_is_a_400(
    web: httpx.AsyncClient, path: str, body: object
) -> None:
    answer = await web.post(path, content=json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["reason"] == "malformed"


async def test_a_body_too_large_is_a_400(web: httpx.AsyncClient) -> None:
    answer = await web.post("/v1/pay", content=b" " * 70_000)
    assert answer.status_code == 400


@pytest.mark.parametrize("after", ["-1", "x", "5", "a" * 16 + "-", "a" * 16 + "-" + "9" * 30])
async def test_a_stream_after_nonsense_is_refused(web: httpx.AsyncClient, after: str) -> None:
    answer = await web.get("/v1/wallets/router/settlements", params={"after": after})
    assert answer.status_code == 409
    assert answer.json()["reason"] == "malformed"


async def test_a_cursor_of_a_network_that_was_deleted_replays_the_new_one(
    network: Network, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Or a router that keeps its books over a fresh network would hear of nothing for long."""
    for _ in range(3):
        await pay(network, await invoice_of(network, "router"), wallet="payer")
    old = (await network.received("router"))[-1]
    fresh = await Network.open(tmp_path_factory.mktemp("fresh"))
    await pay(fresh, await invoice_of(fresh, "router"), wallet="payer")
    async with asyncio.timeout(SOON_S):
        first = await anext(aiter(fresh.settlements("router", old.cursor)))
    assert first == (await fresh.received("router"))[0]
    await fresh.aclose()


async def test_a_stream_of_nobody_is_refused(web: httpx.AsyncClient) -> None:
    assert (await web.get("/v1/wallets/nobody/settlements")).status_code == 409


async def test_a_server_that_stops_ends_its_streams(network: Network) -> None:
    server = NetworkServer(network, port=0)
    await server.start()
    backend = SimulatedBackend.over_http(server.url)
    listening = asyncio.ensure_future(anext(aiter(backend.settlements(None))))
    await backend.node_info()
    async with asyncio.timeout(SOON_S):
        await server.stop()
        with pytest.raises(BackendError):
            await listening
    await backend.aclose()


# Lightning addresses


async def test_an_address_is_paid_by_lnurl(network: Network, web: httpx.AsyncClient) -> None:
    """LUD-16, then LUD-06: the request, the invoice over the hash of the metadata, the money."""
    request = (await web.get("/.well-known/lnurlp/alice")).json()
    assert request["tag"] == "payRequest"
    host = web.base_url.netloc.decode()
    assert dict(json.loads(request["metadata"]))["text/identifier"] == f"alice@{host}"
    assert request["callback"] == f"http://{host}/lnurlp/alice/callback"
    answer = (await web.get(request["callback"], params={"amount": 123_000})).json()
    invoice = bolt11_codec.decode(answer["pr"])
    assert invoice.amount_msat == 123_000
    assert invoice.network == "regtest"
    assert invoice.description_hash == sha256(request["metadata"].encode()).hexdigest()
    assert (await pay(network, answer["pr"])).state == "succeeded"
    assert await balance_msat(network, "alice") == 123_000


async def test_the_lnurl_package_takes_our_answers(web: httpx.AsyncClient) -> None:
    """The strictest reader we know: an unknown field in either answer would be an error."""
    request = lnurl.LnurlPayResponse(**(await web.get("/.well-known/lnurlp/alice")).json())
    answer = (await web.get(str(request.callback), params={"amount": 5_000})).json()
    action = lnurl.LnurlPayActionResponse(**answer)
    assert action.pr.startswith("lnbcrt50n1")


@pytest.mark.parametrize("amount", ["", "abc", "-5000", "999", "100000000001", "5e3", "1" * 400])
async def test_an_amount_that_cannot_be_had_is_an_lnurl_error(
    web: httpx.AsyncClient, amount: str
) -> None:
    answer = await web.get("/lnurlp/alice/callback", params={"amount": amount})
    assert answer.json()["status"] == "ERROR"
    assert "pr" not in answer.json()


async def test_a_name_that_is_none_is_an_lnurl_error(
    network: Network, web: httpx.AsyncClient
) -> None:
    for path in ("/.well-known/lnurlp/UPPER", "/lnurlp/UPPER/callback?amount=5000"):
        assert (await web.get(path)).json()["status"] == "ERROR"
    assert "UPPER" not in {wallet.name for wallet in await network.wallets()}


async def test_asking_for_an_address_makes_no_wallet(
    network: Network, web: httpx.AsyncClient
) -> None:
    await web.get("/.well-known/lnurlp/mistyped")
    assert "mistyped" not in {wallet.name for wallet in await network.wallets()}


async def test_a_strange_host_header_does_not_get_into_the_callback(
    web: httpx.AsyncClient,
) -> None:
    answer = await web.get("/.well-known/lnurlp/alice", headers={"Host": "evil.example/x?"})
    assert answer.json()["callback"].startswith("http://127.0.0.1:")


# The process


async def _serve(data_dir: Path, *options: str) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "billing.lightning.simulated",
        "--data-dir",
        str(data_dir),
        "--port",
        "0",
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(SOON_S):
        line = (await process.stdout.readline()).decode()
    assert line.startswith("ready: http://127.0.0.1:")
    assert "no real money" in line
    return process, line.split()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_stops_cleanly_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    process, url = await _serve(tmp_path)
    backend = SimulatedBackend.over_http(url)
    listening = asyncio.ensure_future(anext(aiter(backend.settlements(None))))
    await backend.node_info()
    process.send_signal(number)
    async with asyncio.timeout(SOON_S):
        output, errors = await process.communicate()
        with pytest.raises(BackendError):
            await listening
    assert (process.returncode, output, errors) == (0, b"", b"")
    await backend.aclose()


async def test_a_second_process_on_the_same_directory_is_told_why_not(
    network: Network, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "billing.lightning.simulated",
        "--data-dir",
        str(tmp_path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(SOON_S):
        output, errors = await process.communicate()
    assert process.returncode == 1
    assert output == b""
    assert b"another process has" in errors and b"Traceback" not in errors


async def test_what_it_answered_survives_a_kill(tmp_path: Path) -> None:
    """kill -9 while invoices are made and paid: all that was answered is still true afterwards."""
    process, url = await _serve(tmp_path, "--parent-pid", str(os.getpid()))
    router = SimulatedBackend.over_http(url)
    payer = SimulatedBackend.over_http(url, wallet="payer")
    paid: list[str] = []

    async def buy(number: int) -> None:
        invoice = await router.create_invoice(
            amount_msat=1_000, description="x", expiry_s=60, idempotency_key=str(number)
        )
        status = await payer.pay_invoice(
            invoice.bolt11, max_fee_msat=10_000, timeout_s=5, max_cltv_blocks=None
        )
        assert status.state is PaymentState.SUCCEEDED
        paid.append(invoice.payment_hash)
        if len(paid) == 25:
            process.kill()

    results = await asyncio.gather(*(buy(n) for n in range(100)), return_exceptions=True)
    errors = [result for result in results if result is not None]
    assert all(isinstance(error, BackendError) for error in errors), errors
    assert errors and len(paid) >= 25
    async with asyncio.timeout(SOON_S):
        await process.communicate()
    await router.aclose()
    await payer.aclose()

    process, url = await _serve(tmp_path)
    router = SimulatedBackend.over_http(url)
    for payment_hash in paid:
        assert (await router.lookup_invoice(payment_hash)).state is InvoiceState.SETTLED
    async with httpx.AsyncClient(base_url=url, trust_env=False) as web:
        assert (await web.get("/v1/audit")).json()["balances"] is True
    await router.aclose()
    process.terminate()
    async with asyncio.timeout(SOON_S):
        await process.communicate()


async def test_it_goes_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Started by a process that is then killed, as `satherd up` may be."""
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'billing.lightning.simulated',"
        " '--data-dir', sys.argv[1], '--port', '0', '--parent-pid', str(os.getpid())],"
        " stdout=subprocess.PIPE)\n"
        "print(child.stdout.readline().decode().split()[1], flush=True)\n"
        "child.wait()\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    async with asyncio.timeout(SOON_S):
        url = (await parent.stdout.readline()).decode().strip()
        backend = SimulatedBackend.over_http(url)
        await backend.node_info()
        parent.kill()
        await parent.communicate()
        while True:
            try:
                await backend.node_info()
            except BackendError:
                break
            await asyncio.sleep(0.02)
    await backend.aclose()
