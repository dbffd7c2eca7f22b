"""What this machine has, in the words of a QueenBee registration (QB-W2, QB-P4, QB-P5).

Nothing here fails: what cannot be found out is left out. Units are QueenBee's: `disk_space` is the
free MB of the data directory's disk, `vram` the available main memory in bytes.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from worker.protocol import Gpu

PROBE_TIMEOUT_S = 10
NVIDIA_QUERY = "name,uuid,memory.total,clocks.max.sm,driver_version"


class Hardware(BaseModel):
    """Facts that a registration carries. All may be unknown."""

    cpu_count: int | None = None
    disk_space: int | None = None
    vram: int | None = None
    nv_gpu_count: int | None = None
    nv_driver_version: str | None = None
    nv_gpus: list[Gpu] = []
    cl_driver_version: str | None = None
    cl_gpus: list[Gpu] = []


def survey(data_dir: Path) -> Hardware:
    """Look at everything. Runs other programs, for ten seconds each at most: use a thread."""
    nvidia, nvidia_driver = nvidia_gpus()
    opencl, opencl_driver = opencl_gpus()
    return Hardware(
        cpu_count=os.cpu_count(),
        disk_space=free_disk_mb(data_dir),
        vram=available_memory_bytes(),
        nv_gpu_count=len(nvidia),
        nv_driver_version=nvidia_driver,
        nv_gpus=nvidia,
        cl_driver_version=opencl_driver,
        cl_gpus=opencl,
    )


def physical_cores() -> int:
    """Cores that this process may use, counting two threads of one core once. At least 1."""
    try:
        allowed = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return max(1, os.cpu_count() or 1)
    siblings: set[str] = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def free_disk_mb(path: Path) -> int | None:
    """Free space in MB where `path` is, or will be."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free // 1_000_000
        except OSError:
            continue
    return None


def available_memory_bytes() -> int | None:
    """Main memory that a program could get now; None where /proc/meminfo does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and rest.split():
            return int(rest.split()[0]) * 1024
    return None


def nvidia_gpus() -> tuple[list[Gpu], str | None]:
    """NVIDIA devices and the driver's version, as nvidia-smi tells them; memory in MB."""
    text = _output("nvidia-smi", f"--query-gpu={NVIDIA_QUERY}", "--format=csv,noheader,nounits")
    return parse_nvidia_smi(text)


def parse_nvidia_smi(text: str) -> tuple[list[Gpu], str | None]:
    """Devices in nvidia-smi's CSV; `[N/A]` and lines that are no device are passed over."""
    gpus: list[Gpu] = []
    driver = None
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != NVIDIA_QUERY.count(",") + 1:
            continue
        name, uuid, memory_mb, clock_mhz, driver = row
        # nvidia-smi counts in MiB.
        memory = _number(memory_mb)
        clock = _number(clock_mhz)
        gpus.append(
            Gpu(
                name=name,
                uuid=uuid,
                memory=None if memory is None else memory * 1.048576,
                clock=None if clock is None else int(clock),
                clock_unit="MHz",
            )
        )
    return gpus, driver


def opencl_gpus() -> tuple[list[Gpu], str | None]:
    """OpenCL's GPUs and the first one's driver version."""
    # -P keeps the program's own folder off the import path.
    text = _output(sys.executable, "-P", str(Path(__file__).with_name("opencl.py")))
    try:
        found: list[dict[str, Any]] = json.loads(text or "[]")
        gpus = [Gpu.model_validate({**device, "clock_unit": "MHz"}) for device in found]
    except (ValueError, ValidationError, TypeError):
        return [], None
    return gpus, str(found[0].get("driver")) if found else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _output(*command: str) -> str:
    """What a program prints; nothing when it is absent, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""
