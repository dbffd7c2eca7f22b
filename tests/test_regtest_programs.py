"""What a machine without the tools for a real Lightning network is told, and when that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.outcomes import Failed, Skipped

from tests.regtest import programs
from tests.regtest.programs import ToolMissing, installed
from tests.regtest.session import programs_or_skip


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its path but what a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(folder: Path, name: str, text: str = "#!/bin/sh\n") -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("ci, outcome", [("true", Failed), ("", Skipped)])
def test_a_missing_tool_fails_in_ci_and_skips_elsewhere(
    bare: Path, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="node is not installed"):
        programs_or_skip()


def test_each_missing_tool_is_named_with_its_package(bare: Path) -> None:
    put(bare, "node")
    with pytest.raises(ToolMissing, match="apt-get install npm"):
        installed()
    put(bare, "npm")
    with pytest.raises(ToolMissing, match="apt-get install electrum"):
        installed()


def test_another_electrum_is_not_taken(bare: Path) -> None:
    for name in ("node", "npm"):
        put(bare, name)
    put(bare, "interpreter", "#!/bin/sh\necho 4.5.8\n")
    put(bare, "electrum", f"#!{bare}/interpreter\n")
    with pytest.raises(ToolMissing, match=f"{programs.ELECTRUM_VERSION} is wanted.*not 4.5.8"):
        installed()
