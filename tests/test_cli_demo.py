"""`satherd demo`: the story is told once more here, with the echo engine in the model's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import main

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.timeout(180)
def test_the_demo_ends_with_all_of_it_and_its_sums_are_zero(tmp_path: Path) -> None:
    told = subprocess.run(
        [
            *(sys.executable, "-m", "cli.main", "demo"),
            *("--engine", "echo", "--data-dir", str(tmp_path / "demo")),
        ],
        cwd=REPOSITORY,
        # Its words take a moment, like a model's, so that the other clients are seen waiting.
        env={name: value for name, value in os.environ.items() if "SATHERD" not in name}
        | {"SATHERD_ECHO_TOKEN_S": "0.004"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    steps = [int(number) for number in re.findall(r"^(\d+)\. ", told.stdout, re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 8
    assert "no money here is real" in told.stdout
    assert "402 Payment Required" in told.stdout
    assert re.search(r"[1-9]\d* msat arrived \(simulated\)", told.stdout)
    assert re.search(r"│ sum +│ 0 +│", told.stdout)
    assert "All of it happened." in told.stdout
    # What the README quotes is what the demo prints.
    quoted = (REPOSITORY / "README.md").read_text().partition("make demo\n```")[2]
    headings = re.findall(r"^\d+\. [^:(\n]+", quoted.partition("```\n\nThe model")[0], re.MULTILINE)
    assert len(headings) >= 7
    for heading in headings:
        assert heading.strip() in told.stdout, heading


def test_the_demo_is_not_played_with_real_money(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["demo", "--lightning", "lnd", "--admin-token", "x" * 32, "--data-dir", str(tmp_path)]
    assert main(line) == 2
    assert capsys.readouterr().err == "error: the demo plays with simulated money only\n"
