"""No secret and no text of a client in any log line (E1-17, E4-44, E6-10)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router import logs
from router.database import DatabaseUnavailable
from tests.door_tools import CHAT, event_stream, post_job, until_state
from tests.router_rig import ADMIN_TOKEN, PATIENCE_S, Rig, running_rig

PROMPT = "ZEBRA-7319 my most secret question"
ANSWER = "GIRAFFE-5127 the answer to it"
MISTAKE = "OKAPI-4401 what a library said of it"
BODY = CHAT | {"messages": [{"role": "user", "content": PROMPT}]}


class Kept(logging.Handler):
    """Every record, as it was before any formatter."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.getMessage()} {record.args!r}")


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """The router's own logging, to a file, from DEBUG on; put back afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    named = ("httpx", "httpcore", "uvicorn", "alembic", "websockets")
    levels = {name: logging.getLogger(name).level for name in named}
    logs.set_up("json", file=tmp_path / "router.log")
    handler = Kept()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    for opened in root.handlers:
        if isinstance(opened, logging.FileHandler):
            opened.close()
    root.handlers[:], root.level = before[0], before[1]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


async def _story(router: Rig) -> list[str]:
    """Buy, ask, fail, cancel, be refused, in every way; all secrets that were used."""
    http = router.http
    topup = (await http.post("/balance/topups", json={"amount_msat": 100_000})).json()
    preimage = await router.pay(topup["invoice"])
    proof = {"Authorization": f"L402 {topup['l402_token']}:{preimage}"}
    key = (await http.get(f"/balance/topups/{topup['payment_hash']}", headers=proof)).json()["key"]
    bearer = {"Authorization": f"Bearer {key}"}
    secrets = [key, preimage, topup["l402_token"], topup["claim_token"], ADMIN_TOKEN]
    async with router.worker(slots=3) as worker:
        secrets.append(worker.key)
        challenge = (await http.post("/v1/chat/completions", json=BODY)).json()
        paid = await router.pay(challenge["invoice"])
        secrets += [paid, challenge["l402_token"], challenge["claim_token"]]
        await worker.serve(ANSWER)
        for headers in (
            {"Authorization": f"L402 {challenge['l402_token']}:{paid}"},
            {"X-Claim-Token": challenge["claim_token"]},
        ):
            again = await http.post("/v1/chat/completions", json=BODY, headers=headers)
            assert ANSWER in again.text
        links = await post_job(router, bearer, messages=BODY["messages"])
        secrets.append(links["token"])
        job = await worker.job()
        token = {"Authorization": f"Bearer {links['token']}"}
        async with event_stream(router, links["events_url"], token) as stream:
            await worker.say(job, ANSWER)
            await stream.until("chunk")
            await worker.send(
                {"type": "failed", "job_id": job["job_id"], "attempt": 1, "code": "engine_error"}
                | {"message": f"could not read {PROMPT}"}
            )
            await stream.until("done")
        cancelled = await post_job(router, bearer, messages=BODY["messages"])
        await worker.job()
        await http.delete(cancelled["status_url"], headers=bearer)
        await http.get("/admin/fees", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
        await http.get("/admin/fees", headers={"Authorization": f"Bearer {ADMIN_TOKEN}x"})
        await _be_refused(router, key, challenge["l402_token"], paid)
        waiting = await post_job(router, bearer, messages=BODY["messages"])
        await worker.send({"type": PROMPT, "text": ANSWER})
        await asyncio.wait_for(worker.socket.wait_closed(), PATIENCE_S)
        await until_state(router, waiting["id"], "queued")
    return secrets


async def _be_refused(router: Rig, key: str, token: str, preimage: str) -> None:
    """Requests that hold the secrets in the wrong places."""
    http = router.http
    tries: list[tuple[Any, dict[str, str]]] = [
        (BODY | {"max_tokens": -1}, {"Authorization": f"Bearer {key}"}),
        (BODY | {"model": PROMPT}, {"Authorization": f"Bearer {key}"}),
        (BODY, {"Authorization": f"Bearer {key[:-1]}"}),
        (BODY, {"Authorization": f"L402 {token[:-4]}AAAA:{preimage}"}),
        (BODY, {"X-Claim-Token": key}),
        ({"messages": PROMPT}, {}),
    ]
    for body, headers in tries:
        await http.post("/v1/chat/completions", json=body, headers=headers)
    await http.post("/v1/chat/completions", content=f'{{"messages": "{PROMPT}')
    await http.get(f"/jobs/{key}", headers={"Authorization": f"Bearer {key}"})


def _found(lines: list[str], secrets: list[str]) -> list[str]:
    words = [*secrets, "ZEBRA-7319", "GIRAFFE-5127", "OKAPI-4401"]
    return [line for line in lines for word in words if word in line]


async def test_a_whole_story_leaves_no_secret_and_no_text_in_any_line(
    tmp_path: Path, database_url: str, kept: Kept
):
    async with running_rig(tmp_path, database_url) as router:
        secrets = await _story(router)
    assert len(kept.lines) > 15
    assert _found(kept.lines, secrets) == []
    written = (tmp_path / "router.log").read_text().splitlines()
    assert _found(written, secrets) == []
    # The lines are structured, and say of each job how it ended and who had it.
    events = [json.loads(line) for line in written]
    assert all(event["event"] and event["timestamp"].endswith("Z") for event in events)
    ended = [e["event"] for e in events if e["event"].startswith("job ended job=")]
    assert any(
        re.search(r"job=[0-9a-f]{32} state=succeeded .*worker=[0-9a-f]{32} ", line)
        for line in ended
    )


async def test_a_fault_that_nobody_expected_is_logged_without_its_words(
    tmp_path: Path, database_url: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
):
    async with running_rig(tmp_path, database_url) as router:

        async def broken(*_: Any, **__: Any) -> None:
            try:
                raise ValueError(f"{MISTAKE}: {PROMPT}")
            except ValueError as error:
                raise ExceptionGroup(MISTAKE, [RuntimeError(PROMPT)]) from error

        monkeypatch.setattr(router.core.quotes, "price", broken)
        reply = await router.http.post("/v1/chat/completions", json=BODY)
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        assert not _found([reply.text], [])
    written = (tmp_path / "router.log").read_text()
    assert _found([written], []) == []
    (line,) = [json.loads(x) for x in written.splitlines() if "a request failed" in x]
    for kind in ("builtins.ValueError", "builtins.RuntimeError", "ExceptionGroup"):
        assert kind in line["exception"]
    # The way to the fault is there.
    assert "in broken" in line["exception"] and os.path.basename(__file__) in line["exception"]


def test_what_looks_like_a_credential_is_blacked_out_wherever_it_comes_from(
    tmp_path: Path, kept: Kept
):
    secrets = {
        "a key": f"sk-{'aB3_' * 5}ab",
        "a job token": "jt-" + "0a" * 20,
        "a header": "Authorization: L402 AgELTDQwMg==:" + "ab" * 32,
        "a bearer": "Bearer abcdefghijklmnop",
        "a preimage": "preimage=" + "ab" * 32,
        "a worker key": "'worker_key': '" + "cd" * 32 + "'",
    }
    for secret in secrets.values():
        logging.getLogger("a.library").warning("GET /x %s", secret)
    lines = (tmp_path / "router.log").read_text().splitlines()
    assert len(lines) == len(secrets)
    for (what, secret), line in zip(secrets.items(), lines, strict=True):
        assert logs.HIDDEN in line, what
        assert re.split(r"[ :='-]+", secret.strip("'"))[-1] not in line, what


def test_an_error_keeps_what_names_the_fault(tmp_path: Path, kept: Kept):
    log = logging.getLogger("router.test")
    try:
        raise DatabaseUnavailable(MISTAKE) from ConnectionRefusedError(111, MISTAKE)
    except DatabaseUnavailable:
        log.exception("the database is away")
    line = json.loads((tmp_path / "router.log").read_text())
    assert "errno=111" in line["exception"]
    assert "router.database.DatabaseUnavailable" in line["exception"]
    assert MISTAKE not in line["exception"]
