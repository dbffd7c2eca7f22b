"""The `satherd` command: its table, its help, and how it says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main as main_module
from cli.main import COMMANDS, main
from cli.router_location import find_router_url
from cli.settings_table import rows
from router.settings import Settings
from worker.settings import WorkerSettings

REPOSITORY = Path(__file__).parent.parent

# command -> words that its help must contain
HELP = {
    "up": ("--data-dir", "--engine", "SATHERD_DATA_DIR"),
    "demo": ("--prompt", "--slots"),
    "prompt": ("--multiplier", "--max-wait-s", "--key"),
    "quote": ("--max-tokens", "--json"),
    "balance": ("topup", "withdraw", "keys"),
    "receipt": ("verify",),
    "pay": ("INVOICE", "simulated"),
    "router": ("--database-url", "--admin-token", "--lightning"),
    "worker": ("--ln-url", "--engine-url", "llama_cpp|openai|koboldcpp|echo"),
    "install-engine": ("--cuda", "--force"),
    "admin": ("fees", "payouts", "--token", "--json"),
    "ledger": ("check",),
    "lightning": ("check",),
    "migrate": ("--database-url",),
    "simulated-lightning": ("--data-dir", "--port"),
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests, and no `.env`."""
    for name in ("PORT", "DATA_DIR", "ROUTER_URL", "ADMIN_TOKEN", "LIGHTNING", "ENGINE"):
        monkeypatch.delenv(f"SATHERD_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    """The exit status, whether it is returned or raised."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",)])
def test_the_overview_names_every_command(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    for name in COMMANDS:
        assert name in shown


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    name, number = capsys.readouterr().out.split()
    assert name == "satherd"
    assert number.count(".") == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_mentions_its_options(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    shown = capfd.readouterr().out
    for words in HELP[command]:
        assert words.lower() in shown.lower(), words


def test_a_command_that_there_is_not_is_status_2_and_says_where_to_look(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("serve") == 2
    assert capsys.readouterr().err == ("error: there is no command 'serve'; see `satherd --help`\n")


@pytest.mark.parametrize("command", ["up", "router", "worker", "migrate", "demo"])
def test_a_flag_that_there_is_not_is_status_2_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--no-such-flag", "1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--no-such-flag" in error
    assert f"see `satherd {command} --help`" in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("router", "--port", "many"), "SATHERD_PORT: Input should be a valid integer"),
        (("up", "--port", "65536"), "SATHERD_PORT: Input should be less than or equal to 65535"),
        (("router", "--rate-limits", "maybe"), "SATHERD_RATE_LIMITS: Input should be 'on' or"),
        (("router", "--admin-token", "short"), "SATHERD_ADMIN_TOKEN must have at least 16"),
        (("router", "--lightning", "lnd"), "SATHERD_ADMIN_TOKEN must have at least 16"),
        (("worker", "--engine", "steam"), "SATHERD_ENGINE: Input should be 'llama_cpp'"),
        (("worker", "--router-url", "nowhere"), "SATHERD_ROUTER_URL: the router's URL must"),
    ],
)
def test_a_setting_that_cannot_be_used_is_status_78_in_one_line(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 78
    error = capsys.readouterr().err
    assert error.startswith(f"error: {complaint}")
    assert error.count("\n") == 1


def test_a_wrong_variable_is_named_as_a_wrong_flag_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SATHERD_PORT", "many")
    assert run("router") == 78
    assert capsys.readouterr().err.startswith("error: SATHERD_PORT: ")


def test_a_secret_that_is_wrong_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("worker", "--worker-key", "hunter2hunter2") == 78
    shown = capsys.readouterr()
    assert "SATHERD_WORKER_KEY: a worker key has 32 to 128 characters" in shown.err
    assert "hunter2" not in shown.out + shown.err


def test_a_command_whose_packages_are_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_module: str) -> None:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    monkeypatch.setattr(main_module, "import_module", missing)
    assert run("router") == 1
    assert "pip install 'satherd[router]'" in capsys.readouterr().err


def test_a_worker_and_a_client_import_nothing_of_a_router() -> None:
    """The base install has neither FastAPI nor asyncpg."""
    script = (
        "import sys, cli.main, cli.worker_command, cli.client_commands;"
        "print([m for m in sys.modules if m.split('.')[0] in ('router', 'billing', 'fastapi')])"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout == "[]\n", shown.stderr


def test_help_shows_defaults_and_never_a_secret() -> None:
    found = {row.name: row for row in rows(Settings)}
    assert found["port"].flag == "--port"
    assert found["port"].variable == "SATHERD_PORT"
    assert found["port"].default == "8000"
    assert found["admin_token"].default == ""
    assert found["lnurl_allow_private"].values == "true|false"
    assert {row.name: row.values for row in rows(WorkerSettings)}["min_fees"] == "JSON"


def test_the_router_is_the_one_named_then_the_variable_then_the_one_that_runs_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_router_url(None, tmp_path) == "http://127.0.0.1:8000"
    (tmp_path / "up.json").write_text(json.dumps({"url": "http://127.0.0.1:8123"}))
    assert find_router_url(None, tmp_path) == "http://127.0.0.1:8123"
    monkeypatch.setenv("SATHERD_ROUTER_URL", "wss://router.example/worker")
    assert find_router_url(None, tmp_path) == "https://router.example"
    assert find_router_url("http://other.example/", tmp_path) == "http://other.example"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": 5}'])
def test_a_half_written_note_of_a_starting_router_is_passed_over(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "up.json").write_text(content)
    assert find_router_url(None, tmp_path) == "http://127.0.0.1:8000"
