"""Lists OpenCL devices as JSON, when run as a program.

A program of its own, since a vendor's broken driver may end the process that loads it.
Constants and signatures are those of the OpenCL 1.2 specification, cl.h.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import sys

CL_SUCCESS = 0
CL_DEVICE_TYPE_GPU = 1 << 2
CL_DEVICE_MAX_CLOCK_FREQUENCY = 0x100C
CL_DEVICE_GLOBAL_MEM_SIZE = 0x101F
CL_DEVICE_NAME = 0x102B
CL_DRIVER_VERSION = 0x102D
MAX_DEVICES = 64


def devices() -> list[dict[str, str | int | float]]:
    """GPUs that OpenCL knows: name, memory in MB, clock in MHz, driver. Empty without OpenCL."""
    found = ctypes.util.find_library("OpenCL")
    if found is None:
        return []
    library = ctypes.CDLL(found)
    return [
        {
            "name": _text(library, device, CL_DEVICE_NAME),
            "memory": _number(library, device, CL_DEVICE_GLOBAL_MEM_SIZE, ctypes.c_uint64) / 1e6,
            "clock": _number(library, device, CL_DEVICE_MAX_CLOCK_FREQUENCY, ctypes.c_uint32),
            "driver": _text(library, device, CL_DRIVER_VERSION),
        }
        for platform in _ids(library.clGetPlatformIDs)
        for device in _ids(
            library.clGetDeviceIDs, ctypes.c_void_p(platform), ctypes.c_uint64(CL_DEVICE_TYPE_GPU)
        )
    ]


def _ids(function: ctypes._NamedFuncPointer, *first: object) -> list[int]:  # pyright: ignore[reportPrivateUsage]
    ids = (ctypes.c_void_p * MAX_DEVICES)()
    count = ctypes.c_uint32()
    status = function(*first, ctypes.c_uint32(MAX_DEVICES), ids, ctypes.byref(count))
    return [i for i in ids[: count.value] if i] if status == CL_SUCCESS else []


def _text(library: ctypes.CDLL, device: int, what: int) -> str:
    buffer = ctypes.create_string_buffer(1024)
    library.clGetDeviceInfo(
        ctypes.c_void_p(device), ctypes.c_uint32(what), ctypes.c_size_t(1024), buffer, None
    )
    return buffer.value.decode("utf-8", "replace").strip()


def _number(
    library: ctypes.CDLL, device: int, what: int, kind: type[ctypes.c_uint32 | ctypes.c_uint64]
) -> int:
    value = kind()
    size = ctypes.c_size_t(ctypes.sizeof(value))
    library.clGetDeviceInfo(
        ctypes.c_void_p(device), ctypes.c_uint32(what), size, ctypes.byref(value), None
    )
    return value.value


if __name__ == "__main__":
    json.dump(devices(), sys.stdout)
