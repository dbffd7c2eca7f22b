"""Which models a QueenBee worker can serve: those it lists, and those its hardware can hold. Pure.

QueenBee never asked what a worker has: any worker large enough was sent any name, and fetched the
model (QB-R7, QB-P23). The size of a model is read from its name (QB-R8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.protocol import ModelKind, ServedModel

INFER, EMBED, PAINT = "llama-infer", "fast-embed", "sdxl"
# What an embedded llama server gives a context when nobody says otherwise, and what fits
# fastembed's models (QB-P14).
CONTEXT, EMBED_CONTEXT, IMAGE_CONTEXT = 2048, 512, 8192
GPUTOPIA = "gputopia/"
UNKNOWN_SIZE = 13.0
# Bytes for each parameter, by the digit of the quantisation.
_QUANTS = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 8: 1.0}
_OTHER_QUANT = 2.0
# "8x7b": eight experts of seven.
_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)b(?![a-z0-9])")
_QUANT = re.compile(r"(?<![a-z0-9])i?q(\d+)(?![0-9])")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)
WEB = "webgpu/"
FAST_EMBED = "fastembed:"
# A worker that nearly holds a model offloads the rest of its layers ("close", QB-R7).
_NEARLY = 1.2
_WEB_WORKER_RAM = 8e9
# No model is larger (`model_size`); a web worker with enough memory for any says so.
_ANY_SIZE = 1e6
# Nor is any so small; and the digits of numbers near zero cannot be told.
_NO_SIZE = 1e-6


@dataclass(frozen=True, slots=True)
class Alias:
    """Names of one model: as people wrote it, at Hugging Face, and as web workers call it."""

    pattern: re.Pattern[str]
    repository: str
    web: str


# QB-R15. The third is written 17B by a slip that clients have copied.
ALIASES = (
    Alias(
        re.compile(r"vicuna.*\b7b\b.*\bq4", re.IGNORECASE),
        "TheBloke/vicuna-7B-v1.5-GGUF:Q4_K_M",
        "webgpu/vicuna-v1-7b-q4f32_0",
    ),
    Alias(
        re.compile(r"llama-2.*\b13b\b.*\bq4", re.IGNORECASE),
        "TheBloke/Llama-2-13B-chat-GGUF:Q4_K_M",
        "webgpu/Llama-2-13b-chat-hf-q4f32_1",
    ),
    Alias(
        re.compile(r"llama-2.*\b17b\b.*\bq4", re.IGNORECASE),
        "TheBloke/Llama-2-7B-Chat-GGUF:Q4_K_M",
        "webgpu/Llama-2-7b-chat-hf-q4f32_1",
    ),
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A worker's machine: memory of its accelerators in MB, host memory in bytes, disk in MB."""

    nv_mb: float = 0.0
    cl_mb: float = 0.0
    ram_bytes: float = 0.0
    disk_mb: float = 0.0
    web: bool = False

    def holds(self, size: float) -> bool:
        """QB-R7. A machine without an accelerator never does (RC-6)."""
        need_bytes = size * 75e6
        if self.web:
            return self.ram_bytes > min(need_bytes, _WEB_WORKER_RAM)
        largest_mb = max(self.nv_mb, self.cl_mb) * _NEARLY
        return (
            largest_mb > size * 1000 and self.ram_bytes > need_bytes and self.disk_mb > size * 1500
        )

    def largest(self) -> float:
        """The size below which it holds every model, rounded down to two digits: machines differ
        in each byte, and are summed up by what they can do."""
        size = self.ram_bytes / 75e6
        if self.web:
            size = _ANY_SIZE if self.ram_bytes > _WEB_WORKER_RAM else size
        else:
            most_mb = max(self.nv_mb, self.cl_mb) * _NEARLY
            size = min(size, most_mb / 1000, self.disk_mb / 1500)
        if size < _NO_SIZE:
            return 0.0
        step = 10.0 ** (math.floor(math.log10(size)) - 1)
        return min(math.floor(size / step) * step, _ANY_SIZE)

    @classmethod
    def that_holds(cls, largest: float, *, web: bool) -> Hardware:
        """A machine of which this is the largest size."""
        return cls(
            nv_mb=largest * 1000 / _NEARLY,
            ram_bytes=largest * 75e6,
            disk_mb=largest * 1500,
            web=web,
        )


@dataclass(frozen=True, slots=True)
class Offers:
    """What a worker would serve that it has not listed: called with a kind and a name, it gives the
    model under that name, or None."""

    listed: tuple[str, ...]
    hardware: Hardware
    can: frozenset[str]

    def __call__(self, kind: ModelKind, model: str) -> ServedModel | None:
        if model.startswith(FAST_EMBED):
            fits = kind is ModelKind.EMBEDDING and EMBED in self.can
            return _served(kind, model, EMBED_CONTEXT) if fits else None
        if kind is ModelKind.IMAGE:
            # Its owner has said that it can; names of both forms are fetched (QB-P15).
            fits = PAINT in self.can and (model.startswith(GPUTOPIA) or is_repository(model))
            return _served(kind, model, IMAGE_CONTEXT) if fits else None
        if kind not in (ModelKind.TEXT, ModelKind.EMBEDDING) or INFER not in self.can:
            return None
        fits = name_for(model, self.listed, self.hardware) is not None
        return _served(kind, model, CONTEXT) if fits else None

    def as_json(self) -> dict[str, Any]:
        """As other routers are told of it: alike for workers that would serve the same."""
        return {
            "largest": self.hardware.largest(),
            "web": self.hardware.web,
            "can": sorted(self.can & {INFER, EMBED, PAINT}),
        }

    @classmethod
    def read(cls, said: Mapping[str, Any], listed: Iterable[str]) -> Offers:
        """What another router has said, of workers that list these names."""
        hardware = Hardware.that_holds(said["largest"], web=said["web"])
        return cls(tuple(listed), hardware, frozenset(said["can"]))


def _served(kind: ModelKind, model: str, context: int) -> ServedModel:
    return ServedModel(id=model, kind=kind, context_length=context)


def model_size(name: str) -> float:
    """Billions of parameters times bytes for each (QB-R8), all digits read (E1-10)."""
    if name.startswith(FAST_EMBED):
        return 1.0
    text = name.lower()
    size, rest = UNKNOWN_SIZE, text
    found = _PARAMETERS.search(text)
    if found:
        size, rest = int(found[1] or 1) * float(found[2]), text[found.end() :]
    quant = _QUANT.search(rest)
    return size * _QUANTS.get(int(quant[1]), _OTHER_QUANT) if quant else size


def canonical(name: str) -> str:
    """The name of the repository for one of QueenBee's short names (QB-R15), else the name itself."""
    alias = _alias(name)
    return alias.repository if alias and "/" not in name else name


def _alias(name: str) -> Alias | None:
    if name.startswith(WEB):
        return None
    return next((a for a in ALIASES if a.repository == name or a.pattern.match(name)), None)


def name_for(asked: str, listed: Iterable[str], hardware: Hardware) -> str | None:
    """What a worker of llama models calls the model that was asked for; None: it has none such.

    Its own lists first (RC-4), then what its hardware could fetch and hold.
    """
    for name in listed:
        if is_same(asked, name):
            return name
    if hardware.web:
        alias = _alias(asked)
        web_name = asked if asked.startswith(WEB) else alias.web if alias else None
        return web_name if web_name and hardware.holds(model_size(web_name)) else None
    return asked if is_repository(asked) and hardware.holds(model_size(asked)) else None


def is_repository(name: str) -> bool:
    """Whether a worker could fetch a model of this name from Hugging Face (QB-W6)."""
    return not name.startswith(WEB) and _REPOSITORY.fullmatch(name) is not None


def is_same(asked: str, listed: str) -> bool:
    """Whether two names say the same file: a worker lists `repo:Q8` for `…Q8_0…` (RC-4).

    K-quants have several sizes of one beginning (Q4_K_S, Q4_K_M), and match exactly.
    """
    if asked == listed:
        return True
    (repo, _, quant), (listed_repo, _, listed_quant) = asked.partition(":"), listed.partition(":")
    if repo != listed_repo or not quant or not listed_quant:
        return False
    quant, listed_quant = quant.lower(), listed_quant.lower()
    long, short = sorted((quant, listed_quant), key=len, reverse=True)
    return quant == listed_quant or (long.startswith(short + "_") and "_k" not in long)
