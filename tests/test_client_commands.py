"""`satherd prompt`, `quote`, `balance`, `pay` as a person runs them, against a stand-in router."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import wallets
from cli.prompting import app
from cli.router_location import DEFAULT_URL, find_router_url
from cli.wallets import AskingWallet, read_credential
from client import L402, ApiKey
from client.errors import WalletFailed
from tests.contract_server import KEY, WORDS, ContractServer, invoice_for
from tests.either_client import server_fixture  # noqa: F401 - the fixture is used by name

ANSWER = "".join(WORDS)
PROMPT = ["prompt", "Why is the sky blue?", "--max-tokens", "15"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SATHERD_ROUTER_URL", "SATHERD_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SATHERD_DATA_DIR", str(tmp_path / "data"))


def run(server: ContractServer, *arguments: str, **environment: str):
    env = {"SATHERD_ROUTER_URL": server.url, **environment}
    return CliRunner().invoke(app, list(arguments), env=env)


def test_a_prompt_is_bought_and_its_answer_alone_is_standard_output(server):
    result = run(server, *PROMPT)
    assert result.exit_code == 0
    assert result.stdout == ANSWER + "\n"
    assert "1010 msat (simulated) at 1.000x" in result.stderr
    assert "place 2" in result.stderr
    assert "Charged 1010 msat (simulated)" in result.stderr


def test_a_prompt_can_come_from_a_pipe_and_be_answered_in_json(server):
    result = CliRunner().invoke(
        app,
        ["prompt", "-", "--json", "--system", "Be brief.", "--multiplier", "1.5"],
        input="Why?",
        env={"SATHERD_ROUTER_URL": server.url},
    )
    summary = json.loads(result.stdout)
    assert (summary["text"], summary["simulated"], summary["charged_msat"]) == (ANSWER, True, 1010)
    [(_, _, body)] = server.seen("POST", "/quotes")
    assert [message["content"] for message in body["messages"]] == ["Be brief.", "Why?"]
    assert body["fee_multiplier"] == "1.500"


def test_a_prepaid_key_pays(server):
    result = run(server, *PROMPT, SATHERD_KEY=KEY)
    assert (result.exit_code, result.stdout) == (0, ANSWER + "\n")
    assert server.invoices == {}
    assert KEY not in result.stderr


def test_a_fee_over_the_limit_ends_with_the_reason(server):
    result = run(server, *PROMPT, "--max-fee-msat", "1009")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[fee_over_limit]" in result.stderr
    assert "needed_msat: 1010" in result.stderr


def test_a_bad_multiplier_is_a_usage_error(server):
    result = run(server, *PROMPT, "--multiplier", "0.5")
    assert result.exit_code == 2
    assert "between 1 and 1000" in result.stderr


def test_a_router_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("cli.options.CLI_PATIENCE", wallets.Patience(attempts=1))
    result = CliRunner().invoke(app, [*PROMPT, "--router-url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "[unreachable]" in result.stderr
    assert "Traceback" not in result.output


def test_the_credential_is_kept_for_its_owner_only(server, tmp_path):
    path = tmp_path / "paid.txt"
    result = run(server, *PROMPT, "--save-credential", str(path))
    [quote] = server.quotes.values()
    assert read_credential(f"@{path}") == L402(quote.id, quote.preimage)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"--key @{path}" in result.stderr.replace("\n", "")


def test_after_an_error_the_credential_of_a_payment_is_kept(server, tmp_path):
    job = {"id": "j", "state": "failed", "end_reason": "worker_failed"}
    server.faults.events = [("done", {"job": job})]
    result = run(server, *PROMPT)
    assert result.exit_code == 1
    [quote] = server.quotes.values()
    kept = tmp_path / "data" / "credentials" / f"{quote.id}.txt"
    assert read_credential(f"@{kept}") == L402(quote.id, quote.preimage)
    assert quote.preimage not in result.output


def test_ctrl_c_cancels_the_job(server, monkeypatch):
    def interrupt(self, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.prompting.Show._answer", interrupt)
    result = run(server, *PROMPT)
    assert result.exit_code == 130
    [quote] = server.quotes.values()
    assert server.cancelled == quote.job_ids
    assert "Cancelled" in result.stderr


def test_a_quote_is_a_table_or_json_and_owes_nothing(server):
    table = run(server, "quote", "Why?", "--model", "stand-in", "--max-tokens", "10")
    assert "1007 msat (simulated)" in table.stdout
    assert "2000 msat (simulated)" in table.stdout
    quoted = run(server, "quote", "Why?", "--json", "--max-tokens", "10")
    assert json.loads(quoted.stdout)["base_fee_msat"] == 1007
    assert server.invoices == {}


def test_pay_prints_the_preimage(server):
    [invoice] = _open_invoice(server)
    paid = json.loads(run(server, "pay", invoice).stdout)
    assert paid["preimage"] == server.invoices[invoice].preimage
    assert (paid["amount_msat"], paid["simulated"]) == (2000, True)


@pytest.mark.parametrize(
    "invoice", ["lnbc20n1qqqqqqqq", "nonsense", invoice_for(2000)], ids=["mainnet", "no", "unknown"]
)
def test_what_the_simulated_network_cannot_pay_is_refused(server, invoice):
    result = run(server, "pay", invoice)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[wallet_failed]" in result.stderr


def test_balance_shows_tops_up_and_refuses_a_misplaced_key(server):
    shown = json.loads(run(server, "balance", "--key", KEY).stdout)
    assert shown == {"balance_msat": 5000, "held_msat": 1081, "simulated": True}
    topped_up = json.loads(run(server, "balance", "topup", "1500").stdout)
    assert (topped_up["key"], topped_up["balance_msat"]) == (KEY, 2000)
    assert isinstance(read_credential(topped_up["credential"]), L402)
    misplaced = run(server, "balance", "--key", KEY, "topup", "1500")
    assert misplaced.exit_code == 2
    assert len(server.seen("POST", "/balance/topups")) == 1


def test_a_balance_without_a_key_says_what_is_missing(server):
    result = run(server, "balance", "show")
    assert result.exit_code == 1
    assert "prepaid key" in result.stderr


def test_the_router_is_found_where_up_says_it_is(tmp_path, monkeypatch):
    assert find_router_url(None, tmp_path) == DEFAULT_URL
    (tmp_path / "up.json").write_text('{"url": "http://127.0.0.1:8123/"}')
    assert find_router_url(None, tmp_path) == "http://127.0.0.1:8123"
    monkeypatch.setenv("SATHERD_ROUTER_URL", "wss://router.example/worker")
    assert find_router_url(None, tmp_path) == "https://router.example"
    assert find_router_url("http://given", tmp_path) == "http://given"


@pytest.mark.parametrize("content", ["{", "[]", '{"url": 5}'])
def test_a_half_written_up_file_is_as_if_it_were_missing(tmp_path, content):
    (tmp_path / "up.json").write_text(content)
    assert find_router_url(None, tmp_path) == DEFAULT_URL


def test_a_person_is_shown_the_invoice_and_asked_for_the_preimage(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("builtins.input", lambda *_: "  ab12  ")
    wallet = AskingWallet(Console(file=screen, force_terminal=True, highlight=False))
    assert wallet(invoice_for(2000), 2000) == "ab12"
    assert "Pay 2 satoshi" in screen.getvalue()
    monkeypatch.setattr("builtins.input", lambda *_: "")
    assert wallet(invoice_for(2000), 2000) is None


def test_without_a_terminal_nobody_is_asked():
    with pytest.raises(WalletFailed, match="prepaid key"):
        AskingWallet(Console(file=io.StringIO()))(invoice_for(2000), 2000)


def test_a_credential_is_read_from_text_or_file(tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_credential(f"@{tmp_path}/key") == read_credential(KEY) == ApiKey(KEY)
    with pytest.raises(ValueError, match="cannot read"):
        read_credential(f"@{tmp_path}/missing")


def _open_invoice(server: ContractServer) -> list[str]:
    """An unpaid invoice at the server, made by a client that then refuses to pay."""
    server.faults.wrong_preimage = True
    run(server, *PROMPT)
    server.faults.wrong_preimage = False
    return list(server.invoices)
