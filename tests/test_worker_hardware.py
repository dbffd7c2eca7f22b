"""What a machine is found to have, and that looking for it never fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker import hardware
from worker.hardware import parse_nvidia_smi, physical_cores, survey
from worker.opencl import devices


def test_this_machine_has_processors_disk_and_memory(tmp_path: Path):
    found = survey(tmp_path / "not" / "there" / "yet")
    assert found.cpu_count == os.cpu_count()
    assert found.disk_space and found.vram and found.vram > 10**7
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_nvidia_smi_is_read_with_commas_and_holes():
    text = (
        "NVIDIA H200, GPU-1, 143771, 1980, 570.124\n"
        '"Odd, Inc. X", GPU-2, [N/A], [Not Supported], 570.124\n'
        "NVIDIA-SMI has failed\n"
    )
    gpus, driver = parse_nvidia_smi(text)
    assert driver == "570.124"
    assert [(gpu.name, gpu.uuid) for gpu in gpus] == [
        ("NVIDIA H200", "GPU-1"),
        ("Odd, Inc. X", "GPU-2"),
    ]
    # QB-P4: megabytes, of which nvidia-smi's MiB are a little larger.
    assert gpus[0].memory == pytest.approx(150754.8, abs=0.1)
    assert (gpus[0].clock, gpus[0].clock_unit) == (1980, "MHz")
    assert (gpus[1].memory, gpus[1].clock) == (None, None)


def test_a_machine_without_a_gpu_has_none():
    assert parse_nvidia_smi("") == ([], None)
    assert isinstance(devices(), list)


def test_a_probe_that_fails_hangs_or_raves_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hardware, "PROBE_TIMEOUT_S", 0.3)
    monkeypatch.setenv("PATH", str(tmp_path))
    for script in ("exit 9", "exec /bin/sleep 30", "printf '\\377\\376,,,,\\n'"):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert survey(tmp_path).cpu_count == os.cpu_count()
    program.chmod(0o644)
    assert survey(tmp_path).nv_gpu_count == 0


def test_gpus_that_a_program_lists_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Card, GPU-1, 100, 900, 1.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = survey(tmp_path)
    assert (found.nv_gpu_count, found.nv_driver_version) == (1, "1.0")
