"""The simulated network over HTTP: its pages, its Lightning addresses, its process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import httpx
import lnurl
import pytest

from billing import bolt11_codec
from billing.lightning import BackendError, InvoiceState, PaymentState
from billing.lightning.simulated.backend import SimulatedBackend
from billing.lightning.simulated.network import Network
from billing.lightning.simulated.payments import PaymentRecord
from billing.lightning.simulated.serving import NetworkServer

SOON_S = 10.0


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[Network]:
    network = await Network.open(tmp_path)
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
