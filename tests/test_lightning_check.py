"""`satherd lightning check`: what an operator reads, and the exit status, through the command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cli import main
from cli.lightning import examine
from tests.stand_ins import cln, lnd, phoenixd
from tests.stand_ins.rig import StandInRig
from tests.stand_ins.wallet_rig import NwcRig, WalletRig

TOKEN = "0123456789abcdef"


@pytest.fixture(params=["lnd", "cln", "phoenixd"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StandInRig]:
    rig = StandInRig(tmp_path, request.param)
    await rig.start()
    yield rig
    await rig.stop()


def settings_of(rig: StandInRig, *, receive_only: bool = False) -> dict[str, str]:
    match rig.backend.name:
        case "lnd":
            name, credential = "LND_MACAROON", lnd.MACAROON
            limited = lnd.RECEIVE_MACAROON
        case "cln":
            name, credential, limited = "CLN_RUNE", cln.RUNE, cln.RECEIVE_RUNE
        case _:
            name, credential = "PHOENIXD_PASSWORD", phoenixd.PASSWORD
            limited = phoenixd.LIMITED_PASSWORD
    kind = rig.backend.name
    return {
        "SATHERD_ADMIN_TOKEN": TOKEN,
        "SATHERD_LIGHTNING": kind,
        f"SATHERD_{kind.upper()}_URL": rig.url,
        f"SATHERD_{name}": limited if receive_only else credential,
    }


async def check(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """The command, in a thread: it has an event loop of its own."""
    monkeypatch.chdir(tmp_path)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return await asyncio.to_thread(main.main, ["lightning", "check"])


async def test_a_node_that_will_do(
    rig: StandInRig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert await check(settings_of(rig), monkeypatch, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "network     regtest" in printed
    assert "synced      yes" in printed
    assert "100,000,000 sat (outbound" in printed
    assert "5,000 sat (inbound" in printed
    assert "Inbound liquidity" in printed
    assert "Outbound liquidity" not in printed
    assert "A router can work with this node." in printed
    assert "history     can be listed" in printed
    assert ("333 sat (cannot be spent" in printed) is (rig.backend.name == "phoenixd")


async def test_an_empty_node_lacks_outbound_liquidity(rig: StandInRig) -> None:
    await rig.drain()
    report = await examine(rig.backend)
    assert not report.blocking
    assert any(words.startswith("Outbound liquidity") for words in report.missing)


async def test_a_credential_for_invoices_only_is_told_from_one_for_all(
    rig: StandInRig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = await check(settings_of(rig, receive_only=True), monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    if rig.backend.name == "phoenixd":
        # The limited password sees payments; that it cannot make one shows only when it tries.
        assert status == 0
    else:
        assert status == 1
        assert "refuses the credential" in printed
        assert "A router can work with this node." not in printed


async def test_a_wrong_credential_is_said_and_not_printed(
    rig: StandInRig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = "deadbeef" * 4
    settings = {
        name: wrong if value in (lnd.MACAROON, cln.RUNE, phoenixd.PASSWORD) else value
        for name, value in settings_of(rig).items()
    }
    assert await check(settings, monkeypatch, tmp_path) == 1
    shown = capsys.readouterr()
    assert "refuses the credential" in shown.out
    assert wrong not in shown.out + shown.err


async def test_a_node_that_is_not_there(
    rig: StandInRig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(rig)
    settings[f"SATHERD_{rig.backend.name.upper()}_URL"] = "http://127.0.0.1:1"
    assert await check(settings, monkeypatch, tmp_path) == 1
    assert "nothing answers at its address" in capsys.readouterr().out


async def test_a_missing_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, missing in (
        ("lnd", "SATHERD_LND_URL"),
        ("cln", "SATHERD_CLN_URL"),
        ("phoenixd", "SATHERD_PHOENIXD_URL"),
        ("carrier-pigeon", "there is no Lightning back end"),
    ):
        settings = {"SATHERD_ADMIN_TOKEN": TOKEN, "SATHERD_LIGHTNING": kind}
        assert await check(settings, monkeypatch, tmp_path) == 1
        assert missing in capsys.readouterr().err


def test_the_command_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["lightning"]) == 2
    assert "satherd lightning check" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["nwc", "lnbits", "electrum"])
async def test_a_wallet_that_promises_little_says_what_it_cannot(tmp_path: Path, kind: str) -> None:
    rig = NwcRig(tmp_path) if kind == "nwc" else WalletRig(tmp_path, kind)
    await rig.start()
    try:
        report = await examine(rig.backend)
    finally:
        await rig.stop()
    facts = dict(report.facts)
    assert report.blocking == []
    assert facts["network"] == "regtest" and facts["back end"] == kind
    assert facts["history"].startswith("can be listed")
    assert "sets its own routing fee; cannot cancel invoices; whole satoshis only" in facts["can"]
    assert ("the node does not tell" in facts["receivable"]) is (kind != "electrum")


async def test_a_wallet_without_lists_is_usable_and_the_operator_is_told(tmp_path: Path) -> None:
    """Nobody would notice that a restored database has forgotten payments."""
    methods = "pay_invoice get_balance get_info make_invoice lookup_invoice"
    rig = NwcRig(tmp_path, methods=methods)
    await rig.start()
    try:
        report = await examine(rig.backend)
    finally:
        await rig.stop()
    assert report.blocking == []
    assert dict(report.facts)["history"] == "cannot be listed"
    assert any("restored database" in words for words in report.missing)
