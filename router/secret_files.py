"""What a router makes for itself once and keeps in its data directory, readable by its owner only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from billing.l402 import MasterSecrets
from router.settings import Settings


def kept(path: Path, length_bytes: int) -> str:
    """The hex text in a file, made of random bytes if there is none; safe to race for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        text = path.read_text().strip()
        if len(text) != 2 * length_bytes:
            raise ValueError(
                f"{path} is damaged: it should hold {2 * length_bytes} hex digits"
            ) from None
        return text
    text = secrets.token_hex(length_bytes)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return text


def master_secrets(settings: Settings) -> MasterSecrets:
    """What L402 tokens and job tokens are made with: from the settings, or a file of our own.

    Routers that share a database must share the secret (`SATHERD_SECRET`).
    """
    if settings.secret is not None:
        previous = settings.previous_secret
        return MasterSecrets(
            settings.secret.get_secret_value().encode(),
            previous.get_secret_value().encode() if previous else None,
        )
    return MasterSecrets(bytes.fromhex(kept(settings.data_dir / "secret", 32)))


def receipt_seed(settings: Settings) -> bytes:
    """What this router's key for receipts is made from; each router has its own."""
    return bytes.fromhex(kept(settings.data_dir / "receipt_key", 32))


def router_id(settings: Settings) -> str:
    """This router's name in the database: the same after a restart."""
    return kept(settings.data_dir / "router_id", 16)
