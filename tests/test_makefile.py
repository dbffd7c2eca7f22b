"""`make help` and what is printed before anything is made."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = {line.split("\t")[0] for line in make("help").stdout.splitlines()}
    assert listed == set(phony[1].split()) - {"help"}


def test_a_python_that_only_seems_to_be_there_is_passed_over_in_silence(tmp_path: Path):
    """As pyenv has them: a command for each version, of which some only say that they are not it."""
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    made = make("-n", "-B", ".venv/.installed", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "python3" in made.stdout and made.stderr == ""
