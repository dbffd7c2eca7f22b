"""Builds llama-cpp-python for this machine: `satherd install-engine [--cuda] [--force]`.

The same without the rest of Satherd: `python -m worker.llama_install`.

There is no ready-made wheel of it on PyPI, so it is compiled here, once. Left alone that is 193
steps; two parts of it are for programs that we do not use (images, and the helpers of llama.cpp's
own tools), and without them it is 78: two minutes on two quiet cores, up to seven on busy ones.
`GGML_NATIVE` stays on: the library uses what this processor can do, and is of no use on another.
Only the AMX kernels of newer Intel processors are left out, because they crash (llama_build.cmake).

    --cuda     for an NVIDIA GPU: needs the CUDA toolkit (nvcc), and takes several times as long
    --force    build again although it is installed, as after adding --cuda
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from worker.errors import WorkerError

VERSION = "0.3.36"
REQUIREMENT = f"llama-cpp-python=={VERSION}"
BUILD_SETTINGS = Path(__file__).with_name("llama_build.cmake")
CUDA_COMPILER = Path("/usr/local/cuda/bin/nvcc")
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
TOLD_EVERY_S = 10
LAST_LINES = 30

# What pip and the build back end say when a part of the work begins.
PHASES = tuple(
    (re.compile(sign), phase)
    for sign, phase in (
        (r"Collecting llama-cpp-python", "looking for the source"),
        (r"\s*Downloading llama_cpp_python", "downloading the source, 77 MB"),
        (r"\s*Using cached llama_cpp_python", "taking it from pip's cache"),
        (r"\s*Installing build dependencies: started", "fetching build tools"),
        (r"\s*\*\*\* Configuring CMake", "configuring"),
        (r"\s*\*\*\* Building project", "compiling"),
        (r"\s*\*\*\* Installing project", "packing"),
        (r"Installing collected packages:.*llama", "installing"),
    )
)


class InstallError(WorkerError):
    """The library could not be built. The message says what is missing or where to look."""


class Progress:
    """How far a build is, by what it prints."""

    def __init__(self) -> None:
        self.phase = "starting"
        self.step = 0
        self.steps = 0

    def take(self, line: str) -> bool:
        """Read one line of output. True when it told something new."""
        if found := NINJA_STEP.match(line):
            self.phase, self.step, self.steps = "compiling", int(found[1]), int(found[2])
            return True
        for sign, phase in PHASES:
            if phase != self.phase and sign.match(line):
                self.phase, self.step, self.steps = phase, 0, 0
                return True
        return False

    def __str__(self) -> str:
        return f"{self.phase} {self.step}/{self.steps}" if self.steps else self.phase


Report = Callable[[Progress, float], object]
"""Called when there is progress, with the seconds since the beginning."""


def installed_version() -> str | None:
    """The version that this Python would import; None when there is none."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "of unknown version"


def build_environment(environ: Mapping[str, str], *, cuda: bool) -> dict[str, str]:
    """The environment that makes the build short. CMAKE_ARGS that are set already are kept."""
    args = [
        "-DLLAVA_BUILD=OFF",
        f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={BUILD_SETTINGS}",
        *(["-DGGML_CUDA=on"] if cuda else []),
    ]
    kept = environ.get("CMAKE_ARGS", "")
    return {
        **environ,
        "CMAKE_ARGS": f"{shlex.join(args)} {kept}".strip(),
        "SKBUILD_BUILD_TARGETS": "llama",
    }


def pip_command(*, cuda: bool, force: bool) -> list[str]:
    """pip's cache holds a wheel by its name only: one built for CUDA must not come from it."""
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--progress-bar", "off"]
    if cuda or force:
        command += ["--no-cache-dir", "--force-reinstall"]
    return [*command, REQUIREMENT]


def check_tools(*, cuda: bool) -> None:
    """Raises InstallError for what pip would need minutes to find missing."""
    if importlib.util.find_spec("pip") is None:
        raise InstallError("pip is not in this environment; `python -m ensurepip` puts it there")
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if not any(name and shutil.which(name) for name in compilers):
        raise InstallError("no C++ compiler found; on Debian or Ubuntu: apt install g++")
    if cuda and not (os.environ.get("CUDACXX") or shutil.which("nvcc") or CUDA_COMPILER.exists()):
        raise InstallError("--cuda needs the CUDA toolkit, and there is no nvcc")


def install(report: Report, *, cuda: bool = False, force: bool = False) -> bool:
    """Build and install it into this Python's environment. False: it is there already.

    Takes minutes. Raises InstallError; nothing has been changed then.
    """
    if installed_version() is not None and not force:
        return False
    check_tools(cuda=cuda)
    run_build(pip_command(cuda=cuda, force=force), build_environment(os.environ, cuda=cuda), report)
    return True


def run_build(command: Sequence[str], environ: Mapping[str, str], report: Report) -> None:
    """Run pip and report what its output tells. Raises InstallError with the end of it."""
    began = time.monotonic()
    progress = Progress()
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    with tempfile.NamedTemporaryFile(
        "w", prefix="satherd-llama-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        with subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as build:
            assert build.stdout is not None
            for line in build.stdout:
                log.write(line)
                last.append(line.rstrip())
                if progress.take(line):
                    report(progress, time.monotonic() - began)
        if build.returncode != 0:
            tail = "\n".join(last)
            raise InstallError(f"the build failed; all of its output is in {log.name}\n{tail}")
    os.unlink(log.name)


class Printer:
    """A Report for people: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._live = out.isatty()
        self._phase = ""
        self._told_at = 0.0

    def __call__(self, progress: Progress, elapsed_s: float) -> None:
        minutes, seconds = divmod(int(elapsed_s), 60)
        line = f"[{minutes}:{seconds:02}] {progress}"
        if self._live:
            print(f"\r\x1b[K{line}", end="", flush=True, file=self._out)
        elif progress.phase != self._phase or elapsed_s - self._told_at >= TOLD_EVERY_S:
            self._phase, self._told_at = progress.phase, elapsed_s
            print(line, flush=True, file=self._out)

    def end(self) -> None:
        if self._live:
            print(file=self._out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="satherd install-engine",
        description=f"{summary}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cuda", action="store_true", help="build for an NVIDIA GPU")
    parser.add_argument("--force", action="store_true", help="build although it is installed")
    options = parser.parse_args(arguments)
    there = installed_version()
    if there is not None and not options.force:
        print(f"llama-cpp-python {there} is installed")
        return 0
    print(f"building {REQUIREMENT} for this machine: two to seven minutes, once", flush=True)
    printer = Printer(sys.stdout)
    try:
        install(printer, cuda=options.cuda, force=options.force)
    except InstallError as error:
        printer.end()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    printer.end()
    print("llama-cpp-python is installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
