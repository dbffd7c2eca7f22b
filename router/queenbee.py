"""QueenBee's registration: what an unmodified worker says of itself, and what of it is believed.

The wiki's workers send an address and their hardware (QB-W2, QB-W3), workerbee 0.3.1 all of QB-P3.
Every field is optional. A public key counts only with its signature (QB-P9).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from coincurve import PublicKeyXOnly
from pydantic import BaseModel, ConfigDict, Field

from router import workers
from router.demands import Traits, read_version
from router.queenbee_models import (
    CONTEXT,
    EMBED,
    EMBED_CONTEXT,
    FAST_EMBED,
    INFER,
    Hardware,
    Offers,
    name_for,
)
from router.sessions import Applicant
from worker.protocol import ModelKind, ServedModel

NOT_PAID = "DONT_PAY_ME"
MOST_MODELS = 200
# What the worker fills in after it has signed, and what stood there when it did.
_UNSIGNED: dict[str, Any] = {
    "nv_gpu_count": None,
    "nv_driver_version": None,
    "nv_gpus": [],
    "cl_driver_version": None,
    "cl_gpus": [],
}
_FIELDS = frozenset(
    {*_UNSIGNED, "ln_url", "ln_address", "cpu_count", "disk_space", "vram", "pubkey", "web_gpus"}
    | {"capabilities", "worker_version", "auth_key"}
)


class Card(BaseModel):
    """An accelerator (QB-P4); `memory` in MB."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = Field(default=None, max_length=200)
    memory: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class QueenBeeRegistration(BaseModel):
    """The first frame of a QueenBee worker."""

    model_config = ConfigDict(extra="ignore")

    worker_version: str | None = Field(default=None, max_length=50)
    capabilities: list[str] | None = Field(default=None, max_length=50)
    pubkey: str | None = Field(default=None, max_length=100)
    slug: str | None = Field(default=None, max_length=100)
    sig: str | None = Field(default=None, max_length=200)
    ln_url: str | None = Field(default=None, max_length=2000)
    ln_address: str | None = Field(default=None, max_length=2000)
    # A user's token at QueenBee: read for `gpu_filter`, kept nowhere.
    auth_key: str | None = Field(default=None, max_length=500, repr=False)
    cpu_count: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    disk_space: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    vram: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    nv_gpu_count: int | None = None
    nv_driver_version: str | None = Field(default=None, max_length=100)
    nv_gpus: list[Card] | None = Field(default=None, max_length=100)
    cl_driver_version: str | None = Field(default=None, max_length=200)
    cl_gpus: list[Card] | None = Field(default=None, max_length=100)
    web_gpus: list[Card] | None = Field(default=None, max_length=100)
    models: list[str] | None = None

    @property
    def can(self) -> frozenset[str]:
        """Its capabilities; an absent list is an old worker's (QB-P7)."""
        return frozenset({INFER} if self.capabilities is None else self.capabilities)

    @property
    def pay_to(self) -> str | None:
        """Its address (QB-R23); None for a worker that wants no pay (QB-P6)."""
        address = self.ln_address or self.ln_url
        return None if not address or address.strip() == NOT_PAID else address

    @property
    def hardware(self) -> Hardware:
        """Its machine in our units: the wiki counts in MB and GB, workerbee in bytes and MB (QB-P5)."""
        ram, disk = self.vram or 0.0, self.disk_space or 0.0
        web = bool(self.web_gpus) or self.worker_version == "web"
        return Hardware(
            nv_mb=_memory_mb(self.nv_gpus),
            cl_mb=_memory_mb(self.cl_gpus),
            # No machine has ten million MB of memory, and none that serves has ten million bytes.
            ram_bytes=ram if ram > 10e6 else ram * 1e6,
            disk_mb=disk if self.worker_version else disk * 1000,
            web=web,
        )


def is_queenbee(raw: Any) -> bool:
    """Whether a first frame is a QueenBee worker's; ours names its protocol."""
    return (
        isinstance(raw, Mapping)
        and "protocol" not in raw
        and "worker_key" not in raw
        and not _FIELDS.isdisjoint(raw)
    )


def verified_key(raw: Mapping[str, Any]) -> bytes | None:
    """The public key whose signature a registration carries, 32 bytes; None when it carries none or
    a wrong one (QB-P9).

    BIP 340 over the SHA-256 of the message without `sig` and as it was before the worker filled in
    its accelerators, in Python's compact spelling with sorted keys.
    """
    signed = {key: value for key, value in raw.items() if key != "sig"} | _UNSIGNED
    try:
        public_key = _from_base64(raw.get("pubkey"))
        signature = _signature(str(raw.get("sig") or ""))
        text = json.dumps(signed, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).digest()
        # A key must be 32 bytes and on the curve, a signature 64 bytes.
        if PublicKeyXOnly(public_key).verify(signature, digest):
            return public_key
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def applicant(registration: QueenBeeRegistration, public_key: bytes | None) -> Applicant:
    """Who asks to serve. `slug` tells apart the processes that share one key file (QB-R25)."""
    identity = None
    if public_key is not None:
        identity = workers.hash_identity("queenbee", public_key.hex(), registration.slug or "")
    return Applicant(
        identity=identity,
        models=listed_models(registration),
        ln_url=registration.pay_to,
        hardware=registration.model_dump(
            mode="json",
            exclude={"sig", "auth_key", "ln_url", "ln_address", "pubkey", "models"},
            exclude_none=True,
        )
        | ({"pubkey": registration.pubkey} if public_key is not None else {}),
        offers=offers(registration),
        traits=traits(registration, public_key),
    )


def traits(registration: QueenBeeRegistration, public_key: bytes | None) -> Traits:
    """What clients may filter by (QB-R6). A key counts as a name once it is verified (E1-4)."""
    scheme, _, user_id = (registration.auth_key or "").partition(":")
    return Traits(
        version=read_version(registration.worker_version),
        capabilities=registration.can,
        names=frozenset({registration.pubkey or ""} if public_key is not None else ()),
        slug=registration.slug,
        user_id=user_id if scheme == "uid" else None,
        large=False,
    )


def listed_models(registration: QueenBeeRegistration) -> list[ServedModel]:
    """What it lists, as far as it can do anything with it. The embedded llama server also embeds
    (QB-P10)."""
    served: dict[tuple[ModelKind, str], ServedModel] = {}
    for name in (registration.models or [])[:MOST_MODELS]:
        if not 0 < len(name) <= 200:
            continue
        for kind, context in _kinds(registration, name):
            served[kind, name] = ServedModel(id=name, kind=kind, context_length=context)
    return list(served.values())


def _kinds(registration: QueenBeeRegistration, name: str) -> list[tuple[ModelKind, int]]:
    if name.startswith(FAST_EMBED):
        return [(ModelKind.EMBEDDING, EMBED_CONTEXT)] if EMBED in registration.can else []
    if INFER not in registration.can:
        return []
    return [(ModelKind.TEXT, CONTEXT), (ModelKind.EMBEDDING, CONTEXT)]


def _memory_mb(cards: list[Card] | None) -> float:
    return sum(card.memory or 0.0 for card in cards or ())


def _signature(text: str) -> bytes:
    """The 64 bytes of a signature: base64 in workerbee 0.3.1, hex before. Raises ValueError."""
    return bytes.fromhex(text) if len(text) == 128 else _from_base64(text)


def _from_base64(text: Any) -> bytes:
    """Bytes of URL-safe base64. Raises ValueError."""
    try:
        return base64.b64decode(str(text or ""), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def offers(registration: QueenBeeRegistration) -> Offers:
    """What else than the listed models it would serve."""
    listed = tuple(name for name in registration.models or [] if not name.startswith(FAST_EMBED))
    return Offers(listed, registration.hardware, registration.can)


def own_name(registration: QueenBeeRegistration, model: str) -> str:
    """What the worker calls a model that it was claimed for."""
    if model.startswith(FAST_EMBED):
        return model
    return name_for(model, registration.models or [], registration.hardware) or model
