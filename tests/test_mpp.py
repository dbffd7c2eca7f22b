"""The `Payment` scheme beside L402: the same quote, the same invoice, the same job (AP-2, E5-61)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from billing import mpp
from billing.errors import BadCredential
from billing.l402 import MasterSecrets
from tests.door_tools import CHAT, JOB, balance_msat, code
from tests.l402_tools import INVOICE, PAYMENT_HASH, PREIMAGE, SECRETS
from tests.regtest.programs import ToolMissing, javascript
from tests.router_rig import PATIENCE_S, Rig

PATH = "/v1/chat/completions"
OTHER = CHAT | {"messages": [{"role": "user", "content": "Something else altogether."}]}
UNTIL = datetime(2026, 11, 20, 12, 0, 0, 900_000, tzinfo=UTC)
REALM = "router.example:8443"


def made(**changed: Any) -> dict[str, str]:
    """A challenge's parameters, as a client reads them."""
    terms = {
        "realm": REALM,
        "invoice": INVOICE,
        "payment_hash": PAYMENT_HASH,
        "amount_msat": 21_000,
        "network": "regtest",
        "expires_at": UNTIL,
    }
    text = mpp.challenge(SECRETS, **(terms | changed))
    assert text is not None
    return read_challenge(text)


def read_challenge(text: str) -> dict[str, str]:
    assert text.startswith("Payment ")
    return dict(re.findall(r'([a-z]+)="([^"]*)"', text))


def unpacked(text: str) -> Any:
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def packed(value: Any) -> str:
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def credential(said: dict[str, str], preimage: str = PREIMAGE.hex()) -> str:
    return "Payment " + packed({"challenge": said, "payload": {"preimage": preimage}})


def verified(value: str, *, secrets: MasterSecrets = SECRETS, realm: str = REALM) -> mpp.Verified:
    return mpp.verify(secrets, mpp.parse_authorization([value]), realm=realm)


def refusal(value: str, **options: Any) -> str:
    with pytest.raises(BadCredential) as caught:
        verified(value, **options)
    return caught.value.reason


# --- the scheme itself ----------------------------------------------------------------------------


def test_a_challenge_says_what_the_invoice_says():
    said = made()
    assert (said["realm"], said["method"], said["intent"]) == (REALM, "lightning", "charge")
    # Never later than the invoice itself.
    assert said["expires"] == "2026-11-20T12:00:00Z"
    assert unpacked(said["request"]) == {
        "amount": "21",
        "currency": "sat",
        "methodDetails": {"invoice": INVOICE, "paymentHash": PAYMENT_HASH, "network": "regtest"},
    }
    assert "=" not in said["request"] + said["id"]


def test_the_id_is_the_drafts_hmac_over_seven_slots():
    said = made()
    key = hmac.digest(SECRETS.current, b"payment-challenge", "sha256")
    slots = [REALM, "lightning", "charge", said["request"], said["expires"], "", ""]
    expected = hmac.digest(key, "|".join(slots).encode(), "sha256")
    assert said["id"] == base64.urlsafe_b64encode(expected).decode().rstrip("=")


@pytest.mark.parametrize("changed", [{"amount_msat": 21_500}, {"network": "testnet"}])
def test_what_the_scheme_has_no_words_for_is_not_offered(changed: dict[str, Any]):
    terms: dict[str, Any] = {"realm": REALM, "invoice": INVOICE, "payment_hash": PAYMENT_HASH}
    terms |= {"amount_msat": 21_000, "network": "regtest", "expires_at": UNTIL} | changed
    assert mpp.challenge(SECRETS, **terms) is None


def test_a_paid_challenge_is_verified_without_having_been_stored():
    said = made()
    shown = verified(credential(said))
    assert (shown.payment_hash, shown.challenge_id) == (PAYMENT_HASH, said["id"])
    assert shown.expires_at == UNTIL.replace(microsecond=0)
    # Made with the secret before the last rotation.
    rotated = MasterSecrets(bytes(32), SECRETS.current)
    assert verified(credential(said), secrets=rotated) == shown
    assert refusal(credential(said), secrets=MasterSecrets(bytes(32))) == "unknown"


@pytest.mark.parametrize(
    "form", ["payment {}", "PAYMENT  {}", "Basic eA==, Payment {}", "Payment {}="]
)
def test_a_credential_is_read_in_any_case_padded_and_beside_others(form: str):
    text = credential(made()).partition(" ")[2]
    assert verified(form.format(text)).payment_hash == PAYMENT_HASH


def test_nothing_of_a_challenge_can_be_changed():
    """The id is bound to every parameter, also to those that we never send."""
    said = made()
    request = unpacked(said["request"])
    cheaper = packed(request | {"amount": "1"})
    other_hash = packed(request | {"methodDetails": {"paymentHash": "00" * 32}})
    for name, value in (
        ("request", cheaper),
        ("request", other_hash),
        ("expires", "2036-01-01T00:00:00Z"),
        ("id", said["id"][:-1] + "A"),
        ("digest", "sha-256=:abc=:"),
        ("opaque", packed({"a": "b"})),
        ("header", "Payment-Authorization"),
    ):
        assert refusal(credential(said | {name: value})) == "unknown", name
    for name, value in (("realm", "elsewhere"), ("method", "card"), ("intent", "session")):
        assert refusal(credential(said | {name: value})) == "wrong_service", name
    assert refusal(credential(said), realm="elsewhere") == "wrong_service"
    assert refusal(credential(said, "00" * 32)) == "wrong_preimage"


@pytest.mark.parametrize(
    "text",
    [
        "Payment",
        "Payment ",
        "Payment !!!",
        "Payment abc",
        "Payment " + packed([]),
        "Payment " + packed({"challenge": {}, "payload": {}}),
        "Payment " + packed({"challenge": {"id": 5}, "payload": {"preimage": "00" * 32}}),
        "Payment " + packed({"challenge": {}, "payload": {"preimage": "00" * 32}}),
        "Payment " + packed({"challenge": "x", "payload": {"preimage": "00" * 31}}),
        "Payment " + "A" * 20_000,
        "Payment " + base64.urlsafe_b64encode(b"[" * 9_000).decode(),
    ],
)
def test_what_cannot_be_read_is_malformed(text: str):
    with pytest.raises(BadCredential) as caught:
        mpp.parse_authorization([text])
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("text", ["", "Basic eA==", "L402 a:b", "Bearer sk-x", "PaymentX abc"])
def test_other_schemes_are_left_alone(text: str):
    assert mpp.parse_authorization([text]) == []


# --- at the doors ---------------------------------------------------------------------------------


async def asked(router: Rig, path: str = PATH, body: Any = CHAT) -> tuple[dict[str, str], Any]:
    """The Payment challenge of a 402, and its body."""
    reply = await router.http.post(path, json=body)
    assert reply.status_code == 402, reply.text
    first, second = reply.headers.get_list("www-authenticate")
    assert first.startswith("L402 macaroon=")
    return read_challenge(second), reply.json()


async def shown(router: Rig, value: str, path: str = PATH, body: Any = CHAT) -> httpx.Response:
    return await router.http.post(path, json=body, headers={"Authorization": value})


async def test_either_scheme_buys_the_same_job_with_the_same_invoice_once(router: Rig):
    async with router.worker() as worker:
        said, due = await asked(router)
        details = unpacked(said["request"])["methodDetails"]
        assert details["invoice"] == due["invoice"]
        assert details["paymentHash"] == due["payment_hash"]
        assert int(unpacked(said["request"])["amount"]) * 1000 == due["amount_msat"]
        preimage = await router.pay(due["invoice"])
        job = await worker.serve("Once.")
        paid = credential(said, preimage)
        replies = [
            await shown(router, paid),
            await shown(router, f"L402 {due['l402_token']}:{preimage}"),
            await shown(router, paid),
        ]
        for reply in replies:
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-satherd-job"] == job["job_id"]
        await worker.nothing()
        receipt = unpacked(replies[0].headers["payment-receipt"])
        moment = datetime.fromisoformat(receipt.pop("timestamp"))
        assert abs(moment - router.core.clock()) < timedelta(minutes=1)
        assert receipt == {
            "challengeId": said["id"],
            "method": "lightning",
            "reference": due["payment_hash"],
            "status": "success",
        }
        assert "payment-receipt" not in replies[1].headers
        assert replies[0].headers["cache-control"] == "no-store"
        assert preimage not in replies[0].text + replies[0].headers["payment-receipt"]
    assert len(await router.query("select 1 from jobs")) == 1
    assert (await router.books()).in_order


async def test_it_opens_the_other_doors_of_what_was_bought(router: Rig):
    async with router.worker() as worker:
        said, due = await asked(router, "/jobs", JOB)
        paid = credential(said, await router.pay(due["invoice"]))
        queued = await shown(router, paid, "/jobs", JOB)
        assert queued.status_code == 202 and "payment-receipt" in queued.headers
        await worker.serve("Hi.")
        assert await balance_msat(router, {"Authorization": paid}) > 0
        state = await router.http.get(
            f"/quotes/{due['quote']['quote_id']}", headers={"Authorization": paid}
        )
        assert state.json()["state"] == "paid" and state.json()["jobs"]
    assert "payment-receipt" not in (await router.http.get("/info")).headers


async def test_a_preimage_is_worth_nothing_before_the_settlement(router: Rig):
    """Nodes show it early, and every node of the route learns it."""
    async with router.worker() as worker:
        said, due = await asked(router)
        stored = await router.network._store.run(
            lambda tx: tx.row(
                "SELECT preimage FROM invoice WHERE payment_hash = ?", due["payment_hash"]
            )
        )
        assert stored is not None
        preimage = stored["preimage"].hex()
        assert hashlib.sha256(bytes.fromhex(preimage)).hexdigest() == due["payment_hash"]
        refused = await shown(router, credential(said, preimage))
        assert refused.status_code == 402 and "payment-receipt" not in refused.headers
        assert len(refused.headers.get_list("www-authenticate")) == 2
        await worker.nothing()


async def test_what_was_not_bought_here_gets_a_fresh_challenge_or_a_refusal(router: Rig):
    async with router.worker() as worker:
        said, due = await asked(router)
        preimage = await router.pay(due["invoice"])
        await worker.serve("Once.")
        for changed in ({"realm": "elsewhere"}, {"expires": "2036-01-01T00:00:00Z"}):
            again = await shown(router, credential(said | changed, preimage))
            assert again.status_code == 402, changed
            assert again.json()["invoice"] != due["invoice"]
        for wrong in (credential(said, "00" * 32), "Payment nonsense"):
            refused = await shown(router, wrong)
            assert code(refused) == (401, "unauthorized")
            assert "www-authenticate" not in refused.headers
        # It names an account with what is left on it, which does not pay for another request.
        other = await shown(router, credential(said, preimage), body=OTHER)
        assert other.status_code == 402
        await worker.nothing()


async def test_an_unpaid_challenge_ends_with_its_invoice_and_a_paid_one_does_not(
    router: Rig, monkeypatch: pytest.MonkeyPatch
):
    """The draft refuses both; what was paid for can be fetched again, and money is not lost."""
    core = router.core
    async with router.worker() as worker:
        paid_for, due = await asked(router)
        preimage = await router.pay(due["invoice"])
        await worker.serve("Once.")
        unpaid, _ = await asked(router)
        later = core.clock() + timedelta(days=1)
        monkeypatch.setattr(core, "clock", lambda: later)
        assert (await shown(router, credential(paid_for, preimage))).status_code == 200
        assert code(await shown(router, credential(unpaid)))[0] == 401  # not even its preimage
        await worker.nothing()


@pytest.mark.parametrize("knows", ["both", "payment"])
async def test_a_foreign_client_pays_by_whichever_scheme_it_knows(router: Rig, knows: str):
    """@getalby/lightning-tools 9: L402 where both are offered, else the Payment scheme."""
    try:
        node, modules = await asyncio.to_thread(javascript)
    except ToolMissing as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    async with router.worker() as worker:
        process = await asyncio.create_subprocess_exec(
            node,
            f"{os.path.dirname(__file__)}/mpp_pay.mjs",
            str(modules),
            router.url,
            knows,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        serving = asyncio.create_task(worker.serve("Hello, stranger."))
        async with asyncio.timeout(6 * PATIENCE_S):
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()[-2000:]
            await serving
    said = json.loads(out)
    assert said["payments"] == 1 and said["status"] == [200, 200]
    assert "Hello, stranger." in said["answers"][0]
    scheme = "Payment " if knows == "payment" else "L402 "
    assert [status for status, _ in said["seen"]] == [402, 200, 200]
    assert said["seen"][1][1].startswith(scheme)
    assert (said["receipt"] is not None) is (knows == "payment")
    assert len(await router.query("select 1 from jobs")) == 1
