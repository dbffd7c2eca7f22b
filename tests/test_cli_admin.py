"""`satherd admin` against a running router: each command, and what it says when it is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cli import admin
from cli.main import main
from tests.router_rig import ADMIN_TOKEN, MODEL, PATIENCE_S, Rig

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}

# What a command printed, and its exit status.
Ran = tuple[int, str, str]
Admin = Callable[..., Awaitable[Ran]]


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ROUTER_URL", "ADMIN_TOKEN", "DATA_DIR"):
        monkeypatch.delenv(f"SATHERD_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def command(router: Rig, capsys: pytest.CaptureFixture[str]) -> Admin:
    """`await command("fees", "show")`: runs it in a thread, since the router runs in this one."""

    async def run(*arguments: str, token: str = ADMIN_TOKEN) -> Ran:
        capsys.readouterr()
        line = ["admin", *arguments, "--router-url", router.url, "--token", token]
        status = await asyncio.to_thread(status_of, line)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


async def as_json(command: Admin, *arguments: str) -> dict[str, Any]:
    status, out, err = await command(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


async def test_new_fees_count_for_the_next_quote_and_stay_in_the_history(
    router: Rig, command: Admin
) -> None:
    async with router.worker():
        before = (await router.http.post("/quotes", json={"kind": "chat", **CHAT})).json()
        status, out, _ = await command("fees", "set", "--prompt-fee-msat", "7000")
        assert status == 0
        assert "(default)" in out and "7000" in out
        after = (await router.http.post("/quotes", json={"kind": "chat", **CHAT})).json()
    assert after["base_fee_msat"] - before["base_fee_msat"] == 6000
    shown = await as_json(command, "fees", "show")
    assert shown["default"]["prompt_fee_msat"] == 7000
    assert shown["default"]["output_msat_per_mtok"] == 600_000
    history = await as_json(command, "fees", "history")
    assert history["history"][0]["fees"]["prompt_fee_msat"] == 7000


async def test_a_model_has_rates_of_its_own_until_they_are_removed(command: Admin) -> None:
    status, out, _ = await command("fees", "set", "a/model", "--output-msat-per-mtok", "5")
    assert status == 0 and "a/model" in out
    shown = await as_json(command, "fees", "show")
    assert shown["models"]["a/model"]["output_msat_per_mtok"] == 5
    assert (await command("fees", "remove", "a/model"))[0] == 0
    assert (await as_json(command, "fees", "show"))["models"] == {}
    status, out, _ = await command("fees", "history", "a/model")
    assert status == 0 and "removed" in out


async def test_fees_without_a_rate_are_refused_before_anything_is_asked(command: Admin) -> None:
    status, _, err = await command("fees", "set")
    assert status == 2
    assert err.startswith("error: name at least one rate")


async def test_settings_change_together_or_not_at_all(command: Admin) -> None:
    status, out, _ = await command("settings", "set", "commission_ppm=1", "quote_ttl_s=60")
    assert status == 0 and "commission_ppm" in out
    status, _, err = await command("settings", "set", "commission_ppm=2", "quote_ttl_s=1")
    assert status == 1
    assert "quote_ttl_s must be a whole number from 10" in err
    settings = (await as_json(command, "settings", "show"))["settings"]
    assert (settings["commission_ppm"], settings["quote_ttl_s"]) == (1, 60)
    status, _, err = await command("settings", "set", "commission_ppm=few")
    assert status == 2
    assert "'commission_ppm=few' is not NAME=WHOLE NUMBER" in err


async def test_workers_are_listed_drained_banned_and_let_in_again(
    router: Rig, command: Admin
) -> None:
    async with router.worker() as worker:
        status, out, _ = await command("workers", "list")
        assert status == 0
        assert worker.id in out and "online" in out and MODEL in out
        assert (await command("workers", "drain", worker.id))[0] == 0
        assert (await as_json(command, "workers", "list"))["workers"][0]["draining"] is True
        assert (await command("workers", "resume", worker.id))[0] == 0
        status, out, _ = await command("workers", "ban", worker.id, "--reason", "wrong answers")
        assert status == 0 and f"{worker.id} is banned" in out
    listed = (await as_json(command, "workers", "list"))["workers"][0]
    assert listed["banned"] is True
    assert listed["ban_reason"] == "wrong answers"
    assert (await command("workers", "unban", worker.id))[0] == 0
    assert (await as_json(command, "workers", "list"))["workers"][0]["banned"] is False
    status, _, err = await command("workers", "ban", "nobody")
    assert status == 1
    assert err.count("\n") == 1 and "[not_found]" in err


async def test_a_job_is_listed_and_its_charge_given_back_once(router: Rig, command: Admin) -> None:
    key = await router.bearer()
    async with router.worker() as worker:
        asked = asyncio.create_task(
            router.http.post("/v1/chat/completions", json=CHAT, headers=key)
        )
        await worker.serve()
        answer = (await asked).json()["usage"]["satherd"]
    status, out, _ = await command("jobs", "list")
    assert status == 0
    assert answer["job"] in out and "succeeded (stop)" in out
    assert (await as_json(command, "jobs", "list", "--state", "failed"))["jobs"] == []
    before = (await router.http.get("/balance", headers=key)).json()["balance_msat"]
    status, out, _ = await command("jobs", "refund", answer["job"], "--reason", "it was nonsense")
    assert status == 0
    assert out == f"{answer['fee_msat']} msat (simulated) given back\n"
    after = (await router.http.get("/balance", headers=key)).json()["balance_msat"]
    assert after - before == answer["fee_msat"]
    status, _, err = await command("jobs", "refund", answer["job"])
    assert status == 1
    assert "refunded before [conflict]" in err
    assert (await router.books()).in_order


async def test_payouts_are_paused_with_a_reason_and_sent_again(command: Admin) -> None:
    assert (await command("payouts", "pause", "--reason", "looking at the node"))[0] == 0
    status, out, _ = await command("payouts", "list")
    assert status == 0
    assert "payouts are paused: looking at the node" in out
    assert (await command("payouts", "resume"))[0] == 0
    assert "paused" not in (await command("payouts", "list"))[1]
    status, _, err = await command("payouts", "retry", "none-such")
    assert status == 1 and "[not_found]" in err


async def test_a_payout_is_decided_by_its_proof_or_as_failed_and_not_by_both(
    command: Admin,
) -> None:
    for arguments in ((), ("--failed", "--preimage", "00" * 32)):
        status, _, err = await command("payouts", "decide", "some-payout", *arguments)
        assert status == 2
        assert "give either --preimage or --failed" in err


async def test_a_paused_router_tells_clients_why_until_it_goes_on(
    router: Rig, command: Admin
) -> None:
    async with router.worker():
        assert (await command("pause", "--message", "back in an hour"))[0] == 0
        refused = await router.http.post("/quotes", json={"kind": "chat", **CHAT})
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "back in an hour"
        assert (await command("resume"))[0] == 0
        made = await router.http.post("/quotes", json={"kind": "chat", **CHAT})
    assert made.status_code == 201


async def test_the_books_stand_beside_what_the_node_holds(router: Rig, command: Admin) -> None:
    await router.key(50_000)
    status, out, _ = await command("ledger")
    assert status == 0
    assert "trial balance (simulated money)" in out
    assert "assets:lightning" in out and "the node holds" in out
    books = await as_json(command, "ledger")
    assert books["booked_msat"] == 50_000
    await router.query("update ledger_balances set balance_msat = balance_msat + 1")
    status, out, _ = await command("ledger")
    assert status == 1
    assert "not in order:" in out and "stored are 50001 msat" in out


async def test_the_audit_shows_only_what_changed(command: Admin) -> None:
    await command("settings", "set", "commission_ppm=1")
    await command("settings", "set", "commission_ppm=2")
    status, out, _ = await command("audit", "--limit", "1")
    assert status == 0
    assert '{"commission_ppm":1}' in out and '{"commission_ppm":2}' in out
    await command("fees", "set", "--prompt-fee-msat", "2000")
    _, out, _ = await command("audit", "--limit", "1")
    assert '{"prompt_fee_msat":1000}' in out and '{"prompt_fee_msat":2000}' in out
    assert "output_msat_per_mtok" not in out


async def test_a_wrong_token_is_refused_in_one_line_that_says_where_to_get_one(
    command: Admin,
) -> None:
    status, out, err = await command("fees", "show", token="wrong")
    assert status == 1 and out == ""
    assert err.count("\n") == 1
    assert "[unauthorized]; give the router's SATHERD_ADMIN_TOKEN by --token" in err


async def test_the_token_and_the_router_of_satherd_up_are_found_in_its_folder(
    router: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "up"
    folder.mkdir()
    line = ["admin", "settings", "show", "--data-dir", str(folder), "--json"]
    (folder / "up.json").write_text(json.dumps({"url": router.url}))
    assert await asyncio.to_thread(status_of, line) == 2
    assert "no admin token: give --token" in capsys.readouterr().err
    (folder / "admin_token").write_text(ADMIN_TOKEN + "\n")
    assert await asyncio.to_thread(status_of, line) == 0
    assert "commission_ppm" in json.loads(capsys.readouterr().out)["settings"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nowhere", "http://"])
def test_where_no_router_answers_one_line_says_what_to_do(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(["admin", "ledger", "--router-url", url, "--token", "x" * 16]) == 1
    assert capsys.readouterr().err == (
        f"error: no router answers at {url.rstrip('/')}: start one with `satherd up`, or name it"
        " with --router-url\n"
    )


@pytest.mark.parametrize(
    ("given", "sorted_out"),
    [
        ("admin fees show --json", "admin --json fees show"),
        ("admin fees --token t show", "admin --token t fees show"),
        ("admin --data-dir=d audit --limit 3", "admin --data-dir=d audit --limit 3"),
        ("admin pause --message --json", "admin --json pause --message"),
        ("admin audit --token", "admin --token audit"),
    ],
)
def test_shared_options_may_stand_anywhere(given: str, sorted_out: str) -> None:
    assert admin.shared_first(given.split()) == sorted_out.split()


async def test_checks_are_added_listed_bought_and_removed(router: Rig, command: Admin) -> None:
    status, out, _ = await command("checks", "add", "Capital of France?", "--expect", "Paris")
    assert status == 0 and out.startswith("canary ")
    assert (await command("checks", "add", "How does a lock work?"))[1].startswith("duplicate ")
    assert (await command("settings", "set", "check_every_s=3600"))[0] == 0
    async with router.worker() as worker:
        await worker.serve("It is Paris.")
        async with asyncio.timeout(PATIENCE_S):
            while not (shown := await as_json(command, "checks", "list"))["workers"]:
                await asyncio.sleep(0.1)
        assert shown["workers"][0]["mean_score"] == 1.0 and shown["spent_in_a_day_msat"] > 0
        _, out, _ = await command("checks", "list")
        assert worker.id in out and "Capital of France?" in out and "one every 3600 s" in out
    for prompt in shown["prompts"]:
        assert (await command("checks", "remove", prompt["id"]))[1].strip() == "removed"
    assert (await as_json(command, "checks", "list"))["prompts"] == []


async def test_a_worker_s_name_neither_breaks_a_list_nor_steers_the_terminal(
    router: Rig, command: Admin
) -> None:
    """Strangers name themselves and their models: "[/x]" is rich's markup, ESC a terminal's."""
    models = [{"id": "[/x] [red]m\x1b[2J", "kind": "text", "context_length": 2048}]
    async with router.worker(models=models):
        status, out, err = await command("workers", "list")
    assert status == 0, err
    assert "[/x] [red]m\\x1b[2J" in out and "\x1b" not in out
