"""What a 402 answer asks for, and what an invoice says of itself. Pure.

The header is read as all its writers write it: `token=` or the older `macaroon=`, scheme `L402` or
`LSAT` in any case, parameters in any order, unknown ones ignored, other schemes before or after.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SCHEME = re.compile(r"(?:^|,)\s*(?:L402|LSAT)\s+", re.IGNORECASE)
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))')
_HUMAN_PART = re.compile(r"ln(bcrt|tbs|bc|tb|sb)(?:([1-9][0-9]*)([munp]?))?\Z")
_NETWORKS = {"bc": "mainnet", "tb": "testnet", "tbs": "signet", "sb": "simnet", "bcrt": "regtest"}
_DECI_MSAT_PER_UNIT = {"": 10**12, "m": 10**9, "u": 10**6, "n": 10**3, "p": 1}


@dataclass(frozen=True, slots=True)
class Challenge:
    """`token` goes back with the invoice's preimage; `claim_token` only if the body names one."""

    token: str = field(repr=False)
    invoice: str
    claim_token: str | None = field(default=None, repr=False)


def parse_challenge(
    headers: Iterable[str], facts: Mapping[str, Any] | None = None
) -> Challenge | None:
    """The first L402 challenge in these `WWW-Authenticate` values; None when there is none.

    `facts` are those of the body's error; they hold the claim token.
    """
    for value in headers:
        for match in _SCHEME.finditer(value):
            parameters = _parameters(value[match.end() :])
            token = parameters.get("token") or parameters.get("macaroon")
            invoice = parameters.get("invoice")
            if token and invoice:
                claim = _find(facts or {}, "claim_token")
                return Challenge(token, invoice, claim if isinstance(claim, str) else None)
    return None


def invoice_amount_msat(invoice: str) -> int | None:
    """The amount in a BOLT11 invoice's human-readable part, in msat; None when it names none.

    Raises ValueError for what is no invoice, and for a fraction of a msat. The signature is not
    checked here: that is the wallet's business, and the wallet pays what this part says.
    """
    _, amount, unit = _human_part(invoice)
    if not amount:
        return None
    deci_msat = int(amount) * _DECI_MSAT_PER_UNIT[unit]
    if deci_msat % 10:
        raise ValueError("the invoice's amount is not a whole number of msat")
    return deci_msat // 10


def invoice_network(invoice: str) -> str:
    """`mainnet`, `testnet`, `signet`, `simnet` or `regtest`. Raises ValueError for no invoice."""
    prefix, _, _ = _human_part(invoice)
    return _NETWORKS[prefix]


def is_preimage_of(preimage: str, payment_hash: str) -> bool:
    """Whether the SHA-256 of `preimage` is `payment_hash`; both in hexadecimal."""
    try:
        digest = hashlib.sha256(bytes.fromhex(preimage)).hexdigest()
    except ValueError:
        return False
    return digest == payment_hash.lower()


def _human_part(invoice: str) -> tuple[str, str, str]:
    text = invoice.strip()
    if text.lower().startswith("lightning:"):
        text = text[len("lightning:") :]
    if text not in (text.lower(), text.upper()):
        raise ValueError("an invoice is written in one case, lower or upper")
    # The data part of bech32 has no "1", so the last one is the separator.
    human, separator, data = text.lower().rpartition("1")
    match = _HUMAN_PART.match(human)
    if not separator or not match or len(data) < 6:
        raise ValueError("this is not a BOLT11 invoice")
    return match[1], match[2] or "", match[3] or ""


def _parameters(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    position = 0
    while match := _PARAMETER.match(text, position):
        found.setdefault(match[1].lower(), match[2] if match[2] is not None else match[3])
        position = match.end()
    return found


def _find(facts: Mapping[str, Any], name: str) -> Any:
    """A field of the body's error, or of an object one level inside it."""
    if name in facts:
        return facts[name]
    inner = (value for value in facts.values() if isinstance(value, Mapping))
    return next((value[name] for value in inner if name in value), None)
