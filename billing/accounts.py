"""Payers: accounts and their prepaid keys.

A key is `sk-` and 22 URL-safe random characters (131 bits). Only its SHA-256 is stored, so it can be
shown once, when it is made. A key's hash needs no salt or stretching: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import string
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from billing.errors import BadCredential, BillingError

_ALPHABET = string.ascii_letters + string.digits + "-_"
_KEY = re.compile(r"(?:sk-)?([A-Za-z0-9_-]{22})\Z")
MAX_KEYS = 100


class TooManyKeys(BillingError):
    code = "too_many_keys"


@dataclass(frozen=True, slots=True)
class Key:
    """What a presented key is. `limit_msat` None: the whole balance may be spent."""

    id: str
    account_id: str
    label: str | None
    limit_msat: int | None
    spent_msat: int
    can_withdraw: bool
    is_primary: bool
    created_at: datetime


# Many at a time: the system is asked for random bits once for 256 ids, not for each.
_ids: list[str] = []
os.register_at_fork(after_in_child=_ids.clear)


def new_id() -> str:
    """128 random bits in hex."""
    try:
        return _ids.pop()
    except IndexError:
        block = os.urandom(16 * 256).hex()
        _ids.extend(block[i : i + 32] for i in range(32, len(block), 32))
        return block[:32]


def hash_secret(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def normal_key(presented: str) -> str | None:
    """The key in its one spelling, from what was sent with or without `sk-`; None if it is none."""
    match = _KEY.match(presented.strip())
    return f"sk-{match[1]}" if match else None


async def create_account(connection: Any) -> str:
    """A new anonymous payer; returns its id."""
    account_id = new_id()
    await connection.execute("insert into accounts (id) values ($1)", account_id)
    return account_id


async def create_key(
    connection: Any,
    account_id: str,
    *,
    label: str | None = None,
    limit_msat: int | None = None,
    can_withdraw: bool = False,
    is_primary: bool = False,
) -> tuple[str, str]:
    """Make a key of an account; returns (key id, key). The key cannot be had again."""
    count = await connection.fetchval(
        "select count(*) from account_keys where account_id = $1 and revoked_at is null", account_id
    )
    if count >= MAX_KEYS:
        raise TooManyKeys(f"an account has at most {MAX_KEYS} keys")
    key = "sk-" + "".join(secrets.choice(_ALPHABET) for _ in range(22))
    key_id = new_id()
    await connection.execute(
        "insert into account_keys (key_hash, id, account_id, label, limit_msat, can_withdraw,"
        " is_primary) values ($1, $2, $3, $4, $5, $6, $7)",
        hash_secret(key),
        key_id,
        account_id,
        label,
        limit_msat,
        can_withdraw,
        is_primary,
    )
    return key_id, key


async def find_keys(connection: Any, hashes: list[bytes]) -> dict[bytes, Key]:
    """The live keys among the given hashes."""
    rows = await connection.fetch(
        "select * from account_keys where key_hash = any($1::bytea[]) and revoked_at is null",
        hashes,
    )
    return {row["key_hash"]: _key(row) for row in rows}


async def find_key(connection: Any, presented: str) -> Key:
    """The live key that was presented. Raises BadCredential: malformed or unknown."""
    key = normal_key(presented)
    if key is None:
        raise BadCredential("malformed")
    hashed = hash_secret(key)
    found = await find_keys(connection, [hashed])
    if hashed not in found:
        raise BadCredential("unknown")
    return found[hashed]


async def list_keys(connection: Any, account_id: str) -> list[Key]:
    """The live keys of an account, oldest first."""
    rows = await connection.fetch(
        "select * from account_keys where account_id = $1 and revoked_at is null"
        " order by created_at, id",
        account_id,
    )
    return [_key(row) for row in rows]


async def revoke_key(connection: Any, account_id: str, key_id: str) -> bool:
    """Kill a key at once; money stays on the account. False when there is no such live key."""
    done = await connection.fetchval(
        "update account_keys set revoked_at = now()"
        " where id = $1 and account_id = $2 and revoked_at is null returning id",
        key_id,
        account_id,
    )
    return done is not None


async def revoke_primary(connection: Any, account_id: str) -> None:
    """Kill the keys that top-ups of this account have shown."""
    await connection.execute(
        "update account_keys set revoked_at = now()"
        " where account_id = $1 and is_primary and revoked_at is null",
        account_id,
    )


async def spend(
    connection: Any, key_id: str, amount_msat: int, *, over_limit: bool = False
) -> bool:
    """Count a hold against a key's limit; negative gives back. False when the limit forbids it.

    `over_limit`: it is counted all the same, since it was paid for apart.
    """
    done = await connection.fetchval(
        "update account_keys set spent_msat = greatest(0, spent_msat + $2) where id = $1"
        " and (limit_msat is null or $2 <= 0 or $3 or spent_msat + $2 <= limit_msat) returning id",
        key_id,
        amount_msat,
        over_limit,
    )
    return done is not None


def _key(row: Any) -> Key:
    return Key(
        id=row["id"],
        account_id=row["account_id"],
        label=row["label"],
        limit_msat=row["limit_msat"],
        spent_msat=row["spent_msat"],
        can_withdraw=row["can_withdraw"],
        is_primary=row["is_primary"],
        created_at=row["created_at"],
    )
