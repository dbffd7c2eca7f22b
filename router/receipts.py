"""Receipts: what was sold to whom for how much, signed by the router, for each job that has ended.

A receipt is a compact JWS (RFC 7515, EdDSA over Ed25519) of plain facts that stay in the job's row
when its texts are wiped. It is signed when it is asked for, never when a job ends. It holds hashes of
request and answer, not the texts, and nothing that opens anything.

The private key is a file of the router's own. The public keys of all routers that ever used this
database are in the table `receipt_keys`, so that any of them publishes all of them, and a receipt can
be checked after its router is gone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from billing.fees import format_multiplier
from router.errors import JobNotEnded
from router.job_states import FINAL, State
from router.job_views import time_text

TYPE = "satherd-receipt"
ALGORITHM = "EdDSA"

# A receipt does not become valid or invalid with time, and the clocks of clients are wrong.
_NO_CLOCK: Any = {"verify_aud": False, "verify_iat": False, "verify_exp": False}

_FACTS = """
select j.*, q.request_hash, q.payment_hash from jobs j join quotes q on q.id = j.quote_id
where j.id = $1"""


class BadReceipt(Exception):
    """It was not signed by this key, or it is no receipt."""


@dataclass(frozen=True, slots=True)
class ReceiptKey:
    """A router's own key. `kid` names its public half."""

    private: Ed25519PrivateKey
    kid: str

    @classmethod
    def from_seed(cls, seed: bytes) -> ReceiptKey:
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return cls(private, key_id(private.public_key().public_bytes_raw()))

    @property
    def public_raw(self) -> bytes:
        return self.private.public_key().public_bytes_raw()

    def sign_bytes(self, data: bytes) -> bytes:
        """A bare signature, for what is no JWS (webhooks)."""
        return self.private.sign(data)

    def sign(self, facts: dict[str, Any]) -> str:
        headers = {"kid": self.kid, "typ": TYPE}
        return jwt.encode(facts, self.private, algorithm=ALGORITHM, headers=headers)


def key_id(public_raw: bytes) -> str:
    """The key's JWK thumbprint (RFC 7638, RFC 8037)."""
    jwk = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(public_raw)}
    text = json.dumps(jwk, sort_keys=True, separators=(",", ":"))
    return _base64url(hashlib.sha256(text.encode()).digest())


def as_jwk(public_raw: bytes) -> dict[str, str]:
    """A public key as `/.well-known/jwks.json` shows it."""
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": _base64url(public_raw),
        "kid": key_id(public_raw),
        "alg": ALGORITHM,
        "use": "sig",
    }


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def publish(connection: Any, key: ReceiptKey) -> None:
    """Make the public key known to all routers of this database. Safe to repeat."""
    await connection.execute(
        "insert into receipt_keys (kid, public_key) values ($1, $2) on conflict do nothing",
        key.kid,
        key.public_raw,
    )


async def published(connection: Any) -> list[dict[str, str]]:
    """All public keys that receipts here were ever signed with, the newest first."""
    rows = await connection.fetch("select public_key from receipt_keys order by created_at desc")
    return [as_jwk(row["public_key"]) for row in rows]


async def find(connection: Any, job_id: str) -> Any:
    """The row of a job with all that its receipt says; None when there is none."""
    return await connection.fetchrow(_FACTS, job_id)


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who signs: the key, the router's name or address, and whether its money is real."""

    key: ReceiptKey
    name: str
    network: str
    simulated: bool

    def receipt(self, row: Any) -> tuple[str, dict[str, Any]]:
        """A job's receipt, signed, and what it says. Raises JobNotEnded."""
        said = facts(row, issuer=self.name, network=self.network, simulated=self.simulated)
        return self.key.sign(said), said


def facts(row: Any, *, issuer: str, network: str, simulated: bool) -> dict[str, Any]:
    """What a receipt says. Raises JobNotEnded."""
    if State(row["state"]) not in FINAL:
        raise JobNotEnded("a job has its receipt when it has ended", state=row["state"])
    # A job that was never queued was never paid for, whatever was offered.
    paid = row["seq"] is not None
    held_msat, fee_msat = (row["held_msat"] if paid else 0), row["charged_msat"] or 0
    usage = json.loads(row["usage"])["satherd"] if row["usage"] else {}
    return {
        "iss": issuer,
        "iat": int(row["ended_at"].timestamp()),
        "job": row["id"],
        "kind": row["kind"],
        "model": row["model"],
        "state": row["state"],
        "end_reason": row["end_reason"],
        "worker": row["worker_id"],
        "request_sha256": row["request_hash"].hex(),
        "answer_sha256": row["answer_hash"].hex() if row["answer_hash"] else None,
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": usage.get("completion_tokens", 0),
        "multiplier": format_multiplier(row["multiplier_milli"]),
        "fee_msat": fee_msat,
        "refund_msat": held_msat - fee_msat,
        "payment_hash": row["payment_hash"] if paid else None,
        **{name: time_text(row[name]) for name in ("queued_at", "started_at", "first_token_at")},
        "ended_at": time_text(row["ended_at"]),
        "network": network,
        "simulated": simulated,
    }


def verified(receipt: str, keys: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a receipt that one of these public keys (JWKs) has signed. Raises BadReceipt."""
    try:
        header = jwt.get_unverified_header(receipt)
        key = next((k for k in keys if k.get("kid") == header.get("kid")), None)
        if key is None:
            raise BadReceipt("it was signed with a key that is not among those of this router")
        if header.get("typ") != TYPE:
            raise BadReceipt("it is signed, but it is no receipt")
        public = jwt.PyJWK(key, algorithm=ALGORITHM).key
        assert isinstance(public, Ed25519PublicKey)
        return jwt.decode(receipt, public, algorithms=[ALGORITHM], options=_NO_CLOCK)
    except jwt.PyJWTError as error:
        raise BadReceipt(f"the signature does not hold: {error}") from error
