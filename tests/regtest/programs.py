"""What the network is made of, and where that comes from: npm and PyPI, into `.cache/regtest`.

Electrum is Debian's (apt-get install electrum), and so are node and npm: those are looked for, not
installed. What is there already is used again; two test runs at once install it once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = REPOSITORY / ".cache" / "regtest"
NPM_PACKAGES = {"bcoin": "1.0.2", "lnurl": "0.27.0", "@getalby/lightning-tools": "9.0.1"}
# Later ones hold each answer back for up to a second.
ELECTRUMX = "e-x==1.17.0"
ELECTRUM_VERSION = "4.3.4"
INSTALL_TIMEOUT_S = 600


class ToolMissing(Exception):
    """This machine lacks something that is not ours to install; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Programs:
    """`electrum_python` is the interpreter that Debian's electrum runs in; `modules` is the
    folder of the packages from npm."""

    node: str
    modules: Path
    electrumx: Path
    electrum_python: str


def installed() -> Programs:
    """Everything, installed where it was not. Raises ToolMissing."""
    node, npm = _tool("node", "nodejs"), _tool("npm", "npm")
    electrum_python = _electrum_python(Path(_tool("electrum", "electrum")))
    with _alone():
        modules = _install_npm(npm)
        electrumx = _install_electrumx()
    return Programs(node, modules, electrumx, electrum_python)


def javascript() -> tuple[str, Path]:
    """node, and the folder of the packages from npm, without the rest. Raises ToolMissing."""
    node, npm = _tool("node", "nodejs"), _tool("npm", "npm")
    with _alone():
        return node, _install_npm(npm)


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed (apt-get install {package})")
    return found


def _electrum_python(electrum: Path) -> str:
    # An interpreter of pyenv or of an environment does not have Debian's modules.
    python = electrum.read_text().partition("\n")[0].removeprefix("#!").strip()
    asked = subprocess.run(
        [python, "-c", "from electrum.version import ELECTRUM_VERSION as v; print(v)"],
        capture_output=True,
        text=True,
    )
    version = asked.stdout.strip()
    if version != ELECTRUM_VERSION:
        raise ToolMissing(f"Electrum {ELECTRUM_VERSION} is wanted, as in Debian 12, not {version}")
    return python


@contextmanager
def _alone() -> Iterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_npm(npm: str) -> Path:
    folder = FOLDER / "npm"
    wanted = {"private": True, "dependencies": NPM_PACKAGES}
    manifest, complete = folder / "package.json", folder / "complete"
    if not complete.exists() or json.loads(manifest.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        manifest.write_text(json.dumps(wanted))
        # Their scripts would compile what is not needed here.
        _run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
        complete.touch()
    return folder / "node_modules"


def _install_electrumx() -> Path:
    folder = FOLDER / ELECTRUMX.replace("==", "-")
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], FOLDER)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, ELECTRUMX], FOLDER)
        complete.touch()
    return folder / "bin" / "electrumx_server"


def _run(command: list[str], folder: Path) -> None:
    ran = subprocess.run(
        command,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
    )
    if ran.returncode:
        raise AssertionError(f"{' '.join(command)} failed: {ran.stdout[-2000:]}")
