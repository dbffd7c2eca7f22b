"""Files that are no model: a clear error, and never a crash."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import llama_cpp as lib
import pytest

from worker import demo_model
from worker.engines import open_engine
from worker.engines.llama_cpp import LlamaCppEngine
from worker.engines.llama_model import LlamaModel, built_with_amx
from worker.errors import EngineStartError
from worker.settings import WorkerSettings


async def start_error(path: Path, slots: int = 1, context: int | None = None) -> str:
    engine = LlamaCppEngine(path, name="m", slots=slots, threads=1, context=context)
    with pytest.raises(EngineStartError) as caught:
        await engine.start(lambda fraction, words: None)
    await engine.aclose()
    return str(caught.value)


async def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    message = await start_error(tmp_path / "absent.gguf")
    assert "absent.gguf" in message and "SATHERD_MODEL" in message


async def test_a_folder_is_no_model(tmp_path: Path):
    assert str(tmp_path) in await start_error(tmp_path)


async def test_a_file_of_another_kind_is_no_model(tmp_path: Path):
    for content in (b"", b"GG", b"PK\x03\x04 something else"):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        assert "not a GGUF file" in await start_error(path)


@pytest.mark.parametrize("size", [4, 24, 1000, 60_000, 1_000_000, 2_247_000])
async def test_a_file_cut_short_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "short.gguf"
    path.write_bytes(demo_model.PATH.read_bytes()[:size])
    assert "short.gguf cannot be loaded" in await start_error(path)


async def test_a_header_full_of_nonsense_is_refused(tmp_path: Path):
    path = tmp_path / "nonsense.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40) + b"\xff" * 4000)
    assert "cannot be loaded" in await start_error(path)


async def test_an_architecture_that_llama_cpp_does_not_know_is_told(tmp_path: Path):
    path = tmp_path / "strange.gguf"
    data = demo_model.PATH.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxxxa"))
    assert "lxxxa" in await start_error(path)


async def test_a_chat_template_that_is_none_is_told(tmp_path: Path):
    path = tmp_path / "template.gguf"
    data = demo_model.PATH.read_bytes()
    assert data.count(b"{% endfor %}") == 1
    path.write_bytes(data.replace(b"{% endfor %}", b"{% enfdor %}"))
    assert "chat template is broken" in await start_error(path)


def test_a_load_can_be_stopped():
    seen: list[float] = []

    def until_half(fraction: float) -> bool:
        seen.append(fraction)
        return fraction < 0.5

    with pytest.raises(EngineStartError):
        LlamaModel(demo_model.PATH, gpu_layers=0, on_progress=until_half)
    assert 0.5 <= seen[-1] < 1


async def test_a_bug_while_starting_ends_the_wait_for_it(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    seen: list[object] = []
    monkeypatch.setattr("threading.excepthook", lambda args: seen.append(args.exc_type))
    monkeypatch.setattr(LlamaCppEngine, "_prepare", broken)
    assert "broke" in await start_error(demo_model.PATH)
    assert seen == [ZeroDivisionError]


async def test_after_a_refused_file_a_good_one_loads(tmp_path: Path):
    await start_error(tmp_path / "absent.gguf")
    engine = LlamaCppEngine(demo_model.PATH, name="m", slots=1, threads=1)
    await engine.start(lambda fraction, words: None)
    assert engine.models
    await engine.aclose()


async def test_more_slots_than_llama_cpp_has_are_refused():
    assert "slots" in await start_error(demo_model.PATH, slots=1024, context=16)


def test_the_demo_model_is_the_default_and_carries_its_name():
    engine = open_engine(WorkerSettings(_env_file=None))  # pyright: ignore[reportCallIssue]
    assert isinstance(engine, LlamaCppEngine)
    assert demo_model.PATH.stat().st_size == 2_247_168


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    for name in list(sys.modules):
        if name.startswith("worker.engines.llama"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(EngineStartError, match="satherd install-engine"):
        open_engine(WorkerSettings(_env_file=None))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("info", "amx"),
    [(b"CPU : AVX512_VNNI = 1 | AMX_INT8 = 1 | REPACK = 1", True), (b"CPU : AVX2 = 1", False)],
)
def test_a_library_with_amx_kernels_is_recognised(info: bytes, amx: bool):
    assert built_with_amx(info) is amx


def test_the_amx_kernels_which_crash_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """ggml-org/llama.cpp#20824: with them a second sequence ends the process."""
    asked: list[bool] = []
    monkeypatch.setattr(lib, "llama_print_system_info", lambda: b"AMX_INT8 = 1")

    def load(path: bytes, params: lib.llama_model_params) -> None:
        asked.append(bool(params.use_extra_bufts))

    monkeypatch.setattr(lib, "llama_model_load_from_file", load)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(EngineStartError):
        LlamaModel(file, gpu_layers=0, on_progress=lambda fraction: True)
    assert asked == [False]
