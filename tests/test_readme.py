"""What the README says: its commands parse, its targets and paths and names exist.

`satherd demo` and `satherd up`, which it promises, are run by test_cli_demo.py and test_cli_up.py;
`make test` is what runs this.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

from cli import admin, ledger, prompting
from cli.main import COMMANDS
from cli.one_machine import UpSettings
from cli.settings_flags import read_settings
from router.settings import Settings
from worker.settings import WorkerSettings

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
# `\` at the end of a line joins it with the next one.
SHELL_LINES = [
    line.partition("  #")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
]
SATHERD_LINES = [line for line in SHELL_LINES if line.startswith("satherd ")]
# Typer brings a Click of its own, whose errors are not importable by a public name.
UsageError = typer.BadParameter.__bases__[0]
SHAPES = {"up": UpSettings, "router": Settings, "worker": WorkerSettings}


def parse(words: list[str]) -> None:
    """Let the command's own parser read the line; nothing is run. Raises what it raises."""
    if words[0] in SHAPES:
        read_settings(SHAPES[words[0]], words[1:], prog=words[0])
        return
    app = {"admin": admin.root, "ledger": ledger.root}.get(words[0], prompting.app)
    command = typer.main.get_command(app)
    if words[0] == "admin":
        words = admin.shared_first(words)
    while hasattr(command, "resolve_command"):
        context = command.make_context("satherd", list(words))
        if not [*context._protected_args, *context.args]:
            return  # a group that is a command of its own, as `admin ledger`
        _, command, words = command.resolve_command(  # pyright: ignore[reportAttributeAccessIssue]
            context, [*context._protected_args, *context.args]
        )
    command.make_context("satherd", list(words))


def test_the_readme_shows_each_kind_of_user_what_to_do() -> None:
    used = {shlex.split(line)[1] for line in SATHERD_LINES}
    assert {"prompt", "quote", "balance", "worker", "admin", "ledger"} <= used
    assert used <= set(COMMANDS)
    assert len(SATHERD_LINES) >= 20


@pytest.mark.parametrize("line", SATHERD_LINES)
def test_a_command_of_the_readme_parses(line: str) -> None:
    parse(shlex.split(line.partition(" > ")[0])[1:])


@pytest.mark.parametrize(
    "line",
    [
        "satherd prompt --colour red hello",
        "satherd admin fees change",
        "satherd worker --modell x",
        "satherd admin fees set --output-msat-per-mtok many",
    ],
)
def test_a_command_that_is_wrong_does_not_parse(line: str) -> None:
    with pytest.raises((UsageError, SystemExit)):
        parse(shlex.split(line)[1:])


def test_the_makes_targets_exist_and_do_what_is_said() -> None:
    used = {line.split()[1] for line in SHELL_LINES if line.startswith("make ")}
    assert {"demo", "test", "up"} <= used
    for target in used:
        dry = subprocess.run(
            ["make", "-n", "--no-print-directory", target],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert dry.returncode == 0, dry.stderr
        wanted = {"demo": "satherd demo", "test": "pytest", "up": "satherd up"}[target]
        assert wanted in dry.stdout


def test_the_paths_of_the_map_exist() -> None:
    table = README.partition("## The map")[2].partition("## One job's life")[0]
    paths = re.findall(r"`([\w./-]+(?:\.py|/))`", table)
    assert len(paths) > 20
    for path in paths:
        assert (REPOSITORY / path).exists(), path


def test_the_names_in_one_jobs_life_exist() -> None:
    names = re.findall(r"`((?:router|billing|worker)(?:\.\w+)+)`", README)
    assert len(names) >= 12
    for name in names:
        parts = name.split(".")
        # The module is the longest beginning that is a file.
        depth = max(
            n
            for n in range(1, len(parts))
            if (REPOSITORY / "/".join(parts[:n])).with_suffix(".py").exists()
        )
        found: object = import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            found = getattr(found, part)
        assert callable(found), name


def test_the_python_of_the_readme_compiles() -> None:
    snippets = [block for language, block in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        compile(snippet, "README.md", "exec")


def test_the_versions_of_python_are_those_of_the_package() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.13"' in project
    assert "Python 3.11 or 3.12" in README
    assert (3, 11) <= sys.version_info[:2] < (3, 13)
