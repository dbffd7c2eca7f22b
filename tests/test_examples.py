"""The examples: their decisions as functions, and each of them run as its reader would run it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests.contract_server import KEY, WORDS
from tests.either_client import server_fixture  # noqa: F401 - the fixture is used by name

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ANSWER = "".join(WORDS)


def load(name: str) -> ModuleType:
    """An example as a module; examples are no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(*command: str, router_url: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example from a reader's place: the repository installed, and nothing else set."""
    environment = {name: value for name, value in os.environ.items() if "SATHERD" not in name}
    environment |= {"SATHERD_ROUTER_URL": router_url, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        input=stdin,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


chatbot = load("chatbot")
agent = load("sentiment_agent")


@pytest.mark.parametrize(
    ("line", "nick", "text"),
    [
        ("anna> hello\n", "anna", "hello"),
        ("hello", "you", "hello"),
        ("a > b", "you", "a > b"),
        ("x> y> z", "x", "y> z"),
        ("2 is> 1", "you", "2 is> 1"),
    ],
)
def test_a_line_of_the_room_is_a_nick_and_a_message(line, nick, text):
    assert chatbot.parse_line(line) == chatbot.Message(nick, text)


def test_the_bot_answers_in_character_with_the_latest_messages():
    latest = [chatbot.Message("you", "hi"), chatbot.Message("bot", "yes?")]
    assert chatbot.prompt_of("Be a farmer.", latest, own_nick="bot") == [
        {"role": "system", "content": "Be a farmer."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
    ]


def test_the_bot_is_told_who_speaks_when_several_do():
    latest = [chatbot.Message("anna", "hi"), chatbot.Message("ben", "ho")]
    contents = [m["content"] for m in chatbot.prompt_of("", latest, own_nick="bot")]
    assert contents == ["anna: hi", "ben: ho"]


@pytest.mark.parametrize(
    ("answer", "sentiment", "decision"),
    [
        ("Positive.", "positive", "buy"),
        (" The mood is NEGATIVE, not positive", "negative", "sell"),
        ("neutral", "neutral", "hold"),
        ("not positive", "neutral", "hold"),
        ("Ankara is the capital of Turkey.", "neutral", "hold"),
        ("", "neutral", "hold"),
        ("unpositively", "neutral", "hold"),
    ],
)
def test_an_opinion_becomes_a_decision(answer, sentiment, decision):
    read = agent.read_sentiment(answer)
    assert (read, agent.DECISIONS[read]) == (sentiment, decision)


def test_trades_move_cash_and_tokens_and_never_below_zero():
    portfolio = agent.Portfolio(cash=15, tokens=0, price=10)
    trades = [portfolio.trade(agent.Decision(name)) for name in ("sell", "hold", "buy", "buy")]
    assert trades == [False, False, True, False]
    assert (portfolio.cash, portfolio.tokens) == (5, 1)
    assert portfolio.trade(agent.Decision.SELL)
    assert (portfolio.cash, portfolio.tokens) == (15, 0)


@pytest.mark.parametrize("name", ["chatbot", "sentiment_agent", "openai_sdk"])
def test_help_says_how_to_run_it(name):
    result = run(sys.executable, f"examples/{name}.py", "--help", router_url="http://unused")
    assert result.returncode == 0
    assert "satherd up" in result.stdout
    assert "--router-url" in result.stdout


def test_the_curl_example_says_how_to_run_it():
    result = run("bash", "examples/curl.sh", "--help", router_url="http://unused")
    assert "bash examples/curl.sh http://127.0.0.1:8000" in result.stdout
    assert result.returncode == 0


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_chatbot_replies_and_counts_what_it_spends(server):
    result = run(
        sys.executable,
        "examples/chatbot.py",
        "--context",
        "2",
        router_url=server.url,
        stdin="anna> hello\nanna> and again\n\nnot read\n",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"satherd> {ANSWER}\n" * 2
    assert "spent 2020 msat (simulated)" in result.stderr
    asked = [body["messages"] for _, _, body in server.seen("POST", "/quotes")]
    assert [message["content"] for message in asked[1][1:]] == [ANSWER, "and again"]


def test_the_agent_decides_once_and_prints_the_outcome(server, tmp_path):
    chat = tmp_path / "chat.txt"
    chat.write_text("old line\n\nanna> great\nben> wonderful\n")
    result = run(
        sys.executable,
        "examples/sentiment_agent.py",
        *("--once", "--chat", str(chat), "--lines", "2", "--key", KEY),
        router_url=server.url,
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert (outcome["answer"], outcome["decision"]) == (ANSWER, "hold")
    assert outcome["charged_msat"] == 1010
    [(_, _, body)] = server.seen("POST", "/quotes")
    question = body["messages"][0]["content"]
    assert "anna> great\nben> wonderful" in question
    assert "old line" not in question


def test_an_agent_without_a_router_says_so_and_fails(tmp_path):
    result = run(
        sys.executable,
        "examples/sentiment_agent.py",
        *("--once", "--chat", str(tmp_path / "missing")),
        router_url="http://127.0.0.1:9",
    )
    assert result.returncode == 1
    assert "no opinion" in result.stderr
