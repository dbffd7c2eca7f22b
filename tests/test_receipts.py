"""Receipts: what they say, who may have one, what they survive, and how they are checked."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cli import receipt as command
from router.answer_hash import answer_hash, hashes_of
from router.receipts import BadReceipt, ReceiptKey, as_jwk, verified
from tests.door_tools import CHAT, RATES, code, post_job, set_rates, token, until_state
from tests.router_rig import MODEL, Rig

SEED = bytes(range(32))
FACTS = {"job": "j", "fee_msat": 5}


async def receipt(router: Rig, links: dict[str, Any]) -> dict[str, Any]:
    shown = await router.http.get(f"{links['status_url']}/receipt", headers=token(links))
    assert shown.status_code == 200, shown.text
    return shown.json()


async def published(router: Rig) -> list[dict[str, Any]]:
    return (await router.http.get("/.well-known/jwks.json")).json()["keys"]


async def test_a_finished_job_has_a_receipt_that_any_jose_library_can_check(router: Rig):
    await set_rates(router, RATES)
    payer = await router.bearer()
    async with router.worker() as worker:
        links = await post_job(router, payer, fee_multiplier="1.5")
        await worker.serve("Hello there.")
        await until_state(router, links["id"], "succeeded")
        (key,) = await published(router)
        shown = await receipt(router, links)
        facts = verified(shown["receipt"], [key])
        # The same, by the library alone.
        assert jwt.decode(shown["receipt"], jwt.PyJWK(key), algorithms=["EdDSA"]) == facts
        assert facts == shown["facts"]
        assert facts["answer_sha256"] == hashlib.sha256(b"Hello there.").hexdigest()
        (quote,) = await router.query("select request_hash from quotes")
        assert facts["request_sha256"] == quote["request_hash"].hex()
        said = {name: facts[name] for name in ("job", "model", "kind", "state", "worker")}
        assert said == {
            "job": links["id"],
            "model": MODEL,
            "kind": "chat",
            "state": "succeeded",
            "worker": worker.id,
        }
        # (1000 + 3 tokens of 1 msat) at 1.5, rounded up; the rest of the offer went back.
        assert (facts["fee_msat"], facts["refund_msat"]) == (1505, 1596 - 1505)
        assert (facts["completion_tokens"], facts["multiplier"]) == (3, "1.500")
        assert facts["payment_hash"] is None and facts["simulated"] is True
        times = [facts[f"{name}_at"] for name in ("queued", "started", "first_token", "ended")]
        assert times == sorted(times)


async def test_a_receipt_of_a_job_paid_by_invoice_names_the_payment_and_survives_wiping(
    router: Rig,
):
    async with router.worker() as worker:
        serving = asyncio.create_task(worker.serve("Yes."))
        credential, challenge = await router.buy("/v1/chat/completions", CHAT)
        answered = await router.http.post("/v1/chat/completions", json=CHAT, headers=credential)
        await serving
        job_id = answered.headers["x-satherd-job"]
        before = await router.http.get(f"/jobs/{job_id}/receipt", headers=credential)
        facts = before.json()["facts"]
        assert facts["payment_hash"] == challenge.json()["payment_hash"]
        assert facts["answer_sha256"] == hashlib.sha256(b"Yes.").hexdigest()
        async with router.core.database.connection() as connection:
            await connection.execute("update jobs set wipe_at = now() - interval '1 second'")
        await router.core.maintenance.wipe()
        after = await router.http.get(f"/jobs/{job_id}/receipt", headers=credential)
        assert after.json() == before.json()
        for secret in (CHAT["messages"][0]["content"], "Yes.", credential["Authorization"]):
            assert secret not in after.text


async def test_a_job_that_did_not_run_has_a_receipt_for_nothing(router: Rig):
    payer = await router.bearer()
    async with router.worker() as worker:
        await post_job(router, payer)
        await worker.job()
        links = await post_job(router, payer)
        waiting = await router.http.get(f"{links['status_url']}/receipt", headers=token(links))
        assert code(waiting) == (409, "job_not_ended")
        await router.http.delete(links["status_url"], headers=token(links))
        facts = (await receipt(router, links))["facts"]
        assert (facts["state"], facts["fee_msat"], facts["worker"]) == ("cancelled", 0, None)
        assert facts["answer_sha256"] is None and facts["refund_msat"] > 0


async def test_a_receipt_is_for_the_payer_and_the_holder_of_the_token_only(router: Rig):
    async with router.worker() as worker:
        links = await post_job(router, await router.bearer())
        await worker.serve()
        await until_state(router, links["id"], "succeeded")
        path = f"{links['status_url']}/receipt"
        assert code(await router.http.get(path)) == (401, "unauthorized")
        other = await router.bearer()
        assert code(await router.http.get(path, headers=other)) == (403, "forbidden")
        none = await router.http.get("/jobs/nothing/receipt", headers=other)
        assert code(none) == (404, "no_such_job")


async def test_the_keys_of_routers_that_are_gone_stay_published(router: Rig):
    gone = ReceiptKey.from_seed(SEED)
    async with router.core.database.connection() as connection:
        await connection.execute(
            "insert into receipt_keys (kid, public_key) values ($1, $2)", gone.kid, gone.public_raw
        )
    keys = await published(router)
    assert {key["kid"] for key in keys} == {gone.kid, router.core.receipts.key.kid}
    assert verified(gone.sign(FACTS), keys) == FACTS
    kept = router.core.settings.data_dir / "receipt_key"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_text() not in json.dumps(keys)


@pytest.mark.parametrize("what", ["changed", "another key", "no receipt", "none", "nonsense"])
def test_what_is_not_a_genuine_receipt_is_refused(what: str):
    key = ReceiptKey.from_seed(SEED)
    other = Ed25519PrivateKey.generate()
    good = key.sign(FACTS)
    head, body, signature = good.split(".")
    bad = {
        "changed": f"{head}.{body[:-2]}AA.{signature}",
        "another key": jwt.encode(
            FACTS, other, "EdDSA", {"kid": key.kid, "typ": "satherd-receipt"}
        ),
        "no receipt": jwt.encode(FACTS, key.private, "EdDSA", {"kid": key.kid}),
        "none": jwt.encode(FACTS, "", "none", {"kid": key.kid, "typ": "satherd-receipt"}),
        "nonsense": "not.a.receipt",
    }[what]
    assert verified(good, [as_jwk(key.public_raw)]) == FACTS
    with pytest.raises(BadReceipt):
        verified(bad, [as_jwk(key.public_raw)])


def test_answers_of_every_shape_have_a_hash_that_their_reader_can_compute():
    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    chat = {"choices": [{"message": {"content": "A"}}, {"message": {"content": "Ä"}}]}
    assert hashes_of(chat) == [sha(b"A"), sha("Ä".encode())]
    assert answer_hash({"choices": [{"text": "B"}]}) == sha(b"B")
    called = {"choices": [{"message": {"content": None, "tool_calls": [{"b": 1, "a": "x"}]}}]}
    assert answer_hash(called) == sha(b'\n[{"a":"x","b":1}]')
    vector = struct.pack("<2f", 0.1, -2.0)
    assert answer_hash({"data": [{"embedding": [0.1, -2.0]}]}) == sha(vector)
    assert answer_hash({"data": [{"embedding": "zczMPQAAAMA="}]}) == sha(vector)
    assert answer_hash({"data": [{"b64_json": "AQI="}, {"b64_json": "Aw=="}]}) == sha(b"\1\2\3")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        command.run(["receipt", "verify", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


async def test_the_command_checks_signature_answer_and_request(
    router: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    body = {**CHAT, "temperature": 0.5}
    async with router.worker() as worker:
        serving = asyncio.create_task(worker.serve("Hi."))
        payer = await router.bearer()
        answered = await router.http.post("/v1/chat/completions", json=body, headers=payer)
        await serving
        path = f"/jobs/{answered.headers['x-satherd-job']}/receipt"
        shown = await router.http.get(path, headers=payer)
    files = {
        "receipt": shown.text,
        "jws": shown.json()["receipt"],
        "answer": answered.text,
        "text": "Hi.\n",
        "other": "Ho.",
        "request": json.dumps(body),
        "keys": (await router.http.get("/.well-known/jwks.json")).text,
        "wrong": json.dumps(as_jwk(ReceiptKey.from_seed(SEED).public_raw)),
    }
    at = {name: str(tmp_path / name) for name in files}
    for name, text in files.items():
        Path(at[name]).write_text(text)

    def checked(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = run(*arguments)
        out = capsys.readouterr().out
        return status, json.loads(out) if out else {}

    good = ("--answer", at["answer"], "--request", at["request"])
    status, said = await asyncio.to_thread(
        checked, at["receipt"], "--router-url", router.url, *good
    )
    assert status == 0 and said["facts"] == shown.json()["facts"]
    assert said["checks"] == {"signature": True, "answer": True, "request": True}
    assert checked(at["jws"], "--key", at["keys"], "--answer", at["text"])[0] == 0
    raw = router.core.receipts.key.public_raw.hex()
    assert checked(at["jws"], "--key", raw)[0] == 0
    status, said = checked(at["jws"], "--key", raw, "--answer", at["other"])
    assert status == 1 and said["valid"] is False and said["checks"]["signature"] is True
    assert checked(at["jws"], "--key", at["wrong"])[0] == 1
    assert checked(at["answer"], "--key", raw)[0] == 1
    assert checked(at["receipt"], "--router-url", "http://127.0.0.1:9")[0] == 2
    assert checked(str(tmp_path / "absent"), "--key", raw)[0] == 2
