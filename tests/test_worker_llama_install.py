"""Building llama-cpp-python: settings, progress, refusals. The build itself takes minutes."""

from __future__ import annotations

import importlib.util
import io
import shlex
import sys
from pathlib import Path

import pytest

from worker import llama_install
from worker.llama_install import (
    InstallError,
    Printer,
    Progress,
    build_environment,
    check_tools,
    install,
    main,
    pip_command,
    run_build,
)

OUTPUT = """\
Using pip 24.0 from /x (python 3.11)
Collecting llama-cpp-python==0.3.36
  Downloading llama_cpp_python-0.3.36.tar.gz (76.6 MB)
  Installing build dependencies: started
  Installing collected packages: scikit-build-core
  *** scikit-build-core 0.11 using CMake 3.25 (wheel)
  *** Configuring CMake...
  -- The C compiler identification is GNU 12.2.0
  *** Building project with Ninja...
  [1/78] Building C object ggml.c.o
  [78/78] Linking CXX shared library libllama.so
  *** Installing project into wheel...
Installing collected packages: diskcache, llama-cpp-python
"""
PHASES = [
    "looking for the source",
    "downloading the source, 77 MB",
    "fetching build tools",
    "configuring",
    "compiling",
    "compiling 1/78",
    "compiling 78/78",
    "packing",
    "installing",
]


def printing(text: str, status: int = 0) -> list[str]:
    """A program that prints `text` to stderr, as compilers do, and ends with `status`."""
    return [sys.executable, "-c", f"import sys; sys.stderr.write({text!r}); sys.exit({status})"]


def test_progress_is_read_from_what_pip_and_ninja_print():
    told: list[str] = []
    run_build(printing(OUTPUT), {}, lambda progress, elapsed_s: told.append(str(progress)))
    assert told == PHASES


def test_a_failed_build_shows_its_last_lines_and_where_the_rest_is():
    with pytest.raises(InstallError, match="CMake Error: no compiler") as caught:
        run_build(printing("x\nCMake Error: no compiler\n", 1), {}, lambda *_: None)
    log = Path(str(caught.value).split(" is in ")[1].split("\n")[0])
    assert log.read_text() == "x\nCMake Error: no compiler\n"
    log.unlink()


def test_the_settings_that_halve_the_build_are_set_and_the_users_own_kept():
    environ = build_environment({"CMAKE_ARGS": "-DMINE=1", "HOME": "/h"}, cuda=False)
    args = shlex.split(environ["CMAKE_ARGS"])
    assert "-DLLAVA_BUILD=OFF" in args and "-DMINE=1" in args
    assert not any("GGML_NATIVE" in arg or "CUDA" in arg for arg in args)
    [included] = [arg for arg in args if arg.startswith("-DCMAKE_PROJECT_llama.cpp_INCLUDE=")]
    assert "set(LLAMA_BUILD_COMMON OFF)" in Path(included.split("=")[1]).read_text()
    assert (environ["SKBUILD_BUILD_TARGETS"], environ["HOME"]) == ("llama", "/h")


def test_cuda_is_a_switch_and_never_comes_from_pips_cache():
    environ = build_environment({}, cuda=True)
    assert "-DGGML_CUDA=on" in shlex.split(environ["CMAKE_ARGS"])
    assert "--no-cache-dir" in pip_command(cuda=True, force=False)
    assert "--no-cache-dir" not in pip_command(cuda=False, force=False)
    assert pip_command(cuda=False, force=False)[-1] == "llama-cpp-python==0.3.36"


def test_nothing_is_done_when_it_is_there(capsys: pytest.CaptureFixture[str]):
    def never(*_: object) -> None:
        raise AssertionError("something was built")

    assert install(never) is False
    assert main([]) == 0
    assert "0.3.36 is installed" in capsys.readouterr().out


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(llama_install.shutil, "which", lambda name: None)
    with pytest.raises(InstallError, match=r"apt install g\+\+"):
        check_tools(cuda=False)


def test_cuda_without_its_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(llama_install, "CUDA_COMPILER", tmp_path / "nvcc")
    monkeypatch.setattr(
        llama_install.shutil, "which", lambda name: None if name == "nvcc" else "/usr/bin/c++"
    )
    with pytest.raises(InstallError, match="nvcc"):
        check_tools(cuda=True)


def test_an_environment_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallError, match="ensurepip"):
        check_tools(cuda=False)


def test_elsewhere_than_on_a_terminal_a_line_is_printed_now_and_then():
    out = io.StringIO()
    printer = Printer(out)
    progress = Progress()
    for second in range(25):
        progress.take(f"[{second + 1}/78] Building")
        printer(progress, second)
    printer.end()
    assert out.getvalue().splitlines() == [
        "[0:00] compiling 1/78",
        "[0:10] compiling 11/78",
        "[0:20] compiling 21/78",
    ]
