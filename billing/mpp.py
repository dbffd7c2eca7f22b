"""The `Payment` HTTP scheme (MPP), beside L402: another way to say the same about the same invoice.

    challenge()            what a 402 carries in a later WWW-Authenticate header
    parse_authorization()  [Credential]    what a request brings
    verify()               Verified        ours, and its holder knows the preimage
    receipt()              what an answer that was paid so carries in Payment-Receipt

A challenge is not stored: its id is an HMAC over its parameters, so that nothing of it can be
changed. As with L402 (billing.l402) a preimage is not yet payment: the caller's own record of the
settlement is. And as there, a credential stands for what was bought with it: shown again it gets
the same again, and never buys twice.

Only `method="lightning"` and `intent="charge"`. BadCredential reasons are those of billing.l402:
`malformed` and `wrong_preimage` cannot be cured, `unknown` (no challenge of ours as it stands) and
`wrong_service` (another realm, method or intent) by buying again.

Sources: draft-httpauth-payment-01 and draft-lightning-charge-00 (paymentauth.org), with two
deviations for the payer's sake: a challenge that has expired is refused only while nobody has paid
it, and an answer that was paid for may be fetched again. `digest` is left out, since a client in use
does not return it; what a payment has bought is bound to its request by our own record.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from billing.errors import BadCredential
from billing.l402 import MasterSecrets

METHOD, INTENT = "lightning", "charge"
MAX_CREDENTIALS = 4
_TEXT_MAX = 16_384
_MSAT_PER_SAT = 1000
# The networks that the draft has words for.
_NETWORKS = frozenset({"mainnet", "regtest", "signet"})
# Slots of the HMAC after realm, method, intent and request; the last only where there is one.
_OPTIONAL = ("expires", "digest", "opaque")
_LAST = "header"

_CREDENTIAL = re.compile(r"(?:^|,)\s*payment\s+([A-Za-z0-9_-]+={0,2})\s*(?=,|$)", re.IGNORECASE)
_NAMES_SCHEME = re.compile(r"(?:^|,)\s*payment(?:\s|$)", re.IGNORECASE)
_PREIMAGE = re.compile(r"[0-9a-fA-F]{64}")
_REALM = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


@dataclass(frozen=True, slots=True)
class Credential:
    """An echoed challenge and a preimage; nothing in it is verified."""

    challenge: dict[str, str]
    preimage: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Verified:
    """A challenge of ours, shown with its preimage. Not proof of payment."""

    challenge_id: str
    payment_hash: str
    expires_at: datetime


def realm_of(public_url: str | None) -> str:
    """The name of the protection space: where strangers reach this router."""
    authority = (public_url or "").partition("://")[2].partition("/")[0]
    return authority if _REALM.fullmatch(authority) else "satherd"


def challenge(
    secrets: MasterSecrets,
    *,
    realm: str,
    invoice: str,
    payment_hash: str,
    amount_msat: int,
    network: str,
    expires_at: datetime,
) -> str | None:
    """The value of a WWW-Authenticate header; None where the scheme has no words for the invoice:
    a fraction of a satoshi, a network that it does not know."""
    if amount_msat % _MSAT_PER_SAT or network not in _NETWORKS:
        return None
    details = {"invoice": invoice, "paymentHash": payment_hash, "network": network}
    request = _encode(
        {
            "amount": str(amount_msat // _MSAT_PER_SAT),
            "currency": "sat",
            "methodDetails": details,
        }
    )
    said = {
        "realm": realm,
        "method": METHOD,
        "intent": INTENT,
        "request": request,
        "expires": _rfc3339(expires_at),
    }
    parameters = {"id": _id(secrets.current, said), **said}
    return "Payment " + ", ".join(f'{name}="{value}"' for name, value in parameters.items())


def parse_authorization(values: Sequence[str]) -> list[Credential]:
    """The Payment credentials in all Authorization headers of a request. An empty list: none is
    there. Raises BadCredential("malformed") when there are some and none can be read."""
    found: list[Credential] = []
    for value in values:
        for match in _CREDENTIAL.finditer(value):
            credential = _read(match[1])
            if credential is not None and len(found) < MAX_CREDENTIALS:
                found.append(credential)
    if not found and any(_NAMES_SCHEME.search(value) for value in values):
        raise BadCredential("malformed")
    return found


def verify(secrets: MasterSecrets, credentials: Iterable[Credential], *, realm: str) -> Verified:
    """The first whose challenge is ours as it stands, and whose preimage opens its payment hash.

    Raises BadCredential: `wrong_service`, `unknown`, `wrong_preimage`.
    """
    worst = BadCredential("unknown")
    for credential in credentials:
        try:
            return _verify(secrets, credential, realm)
        except BadCredential as error:
            worst = error
    raise worst


def receipt(challenge_id: str, payment_hash: str, settled_at: datetime) -> str:
    """The value of Payment-Receipt. It names the payment hash, which is no secret."""
    return _encode(
        {
            "challengeId": challenge_id,
            "method": METHOD,
            "reference": payment_hash,
            "status": "success",
            "timestamp": _rfc3339(settled_at),
        }
    )


def _verify(secrets: MasterSecrets, credential: Credential, realm: str) -> Verified:
    said = credential.challenge
    if (said["realm"], said["method"], said["intent"]) != (realm, METHOD, INTENT):
        raise BadCredential("wrong_service")
    if not _made_by_us(secrets, said):
        raise BadCredential("unknown")
    # What we have signed we have written ourselves, so it can be read.
    payment_hash = _decode(said["request"])["methodDetails"]["paymentHash"]
    shown = hashlib.sha256(credential.preimage).hexdigest()
    if not hmac.compare_digest(shown, payment_hash):
        raise BadCredential("wrong_preimage")
    expires_at = datetime.fromisoformat(said["expires"])
    return Verified(said["id"], payment_hash, expires_at)


def _made_by_us(secrets: MasterSecrets, said: dict[str, str]) -> bool:
    return any(
        hmac.compare_digest(_id(master, said), said["id"])
        for master in (secrets.current, secrets.previous)
        if master is not None
    )


def _id(master: bytes, said: dict[str, str]) -> str:
    key = hmac.digest(master, b"payment-challenge", hashlib.sha256)
    slots = [said["realm"], said["method"], said["intent"], said["request"]]
    slots += [said.get(name, "") for name in _OPTIONAL]
    slots += [said[_LAST]] if _LAST in said else []
    return _base64(hmac.digest(key, "|".join(slots).encode(), hashlib.sha256))


def _read(text: str) -> Credential | None:
    if len(text) > _TEXT_MAX:
        return None
    try:
        value = _decode(text)
        said, preimage = value["challenge"], value["payload"]["preimage"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(preimage, str) or not _PREIMAGE.fullmatch(preimage):
        return None
    if not isinstance(said, dict) or not all(
        isinstance(one, str) and one.isascii() for one in said.values()
    ):
        return None
    if not {"id", "realm", "method", "intent", "request", "expires"} <= said.keys():
        return None
    return Credential(said, bytes.fromhex(preimage))


def _encode(value: dict[str, Any]) -> str:
    """As JCS (RFC 8785) has it: for plain texts, names in order and no spaces."""
    return _base64(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _decode(text: str) -> Any:
    """Raises ValueError."""
    try:
        raw = base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), b"-_", True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return json.loads(raw)


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _rfc3339(moment: datetime) -> str:
    """Cut to the second, so that it is never later than the invoice's own expiry."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
