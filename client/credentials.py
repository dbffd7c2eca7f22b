"""What opens an account at a router, and the headers that show it. Secrets stay out of `repr`.

ApiKey      a prepaid key, `sk-…`
L402        token and preimage of a paid invoice
ClaimToken  for wallets that hide preimages; opens nothing before the payment is settled
JobToken    reads, cancels and bumps one job, and nothing else
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_PREIMAGE = re.compile(r"[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True)
class ApiKey:
    key: str = field(repr=False)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def as_text(self) -> str:
        """What `parse_credential` reads back."""
        return self.key


@dataclass(frozen=True, slots=True)
class L402:
    """`token` is the macaroon in base64, `preimage` 64 hexadecimal digits."""

    token: str = field(repr=False)
    preimage: str = field(repr=False)

    def headers(self) -> dict[str, str]:
        return {"Authorization": self.as_text()}

    def as_text(self) -> str:
        return f"L402 {self.token}:{self.preimage}"


@dataclass(frozen=True, slots=True)
class ClaimToken:
    token: str = field(repr=False)

    def headers(self) -> dict[str, str]:
        return {"X-Claim-Token": self.token}

    def as_text(self) -> str:
        return f"claim {self.token}"


@dataclass(frozen=True, slots=True)
class JobToken:
    token: str = field(repr=False)

    def headers(self) -> dict[str, str]:
        return {"X-Job-Token": self.token}

    def as_text(self) -> str:
        return f"job {self.token}"


Credential = ApiKey | L402 | ClaimToken | JobToken


def parse_credential(value: str | Credential) -> Credential:
    """A credential from its text: `sk-…`, `L402 token:preimage`, `claim …` or `job …`.

    Raises ValueError, which does not repeat the text, for anything else.
    """
    if not isinstance(value, str):
        return value
    scheme, _, rest = value.strip().partition(" ")
    token, _, preimage = rest.strip().rpartition(":")
    match scheme.lower():
        case "l402" | "lsat" if token and _PREIMAGE.match(preimage):
            return L402(token, preimage.lower())
        case "claim" if rest.strip():
            return ClaimToken(rest.strip())
        case "job" if rest.strip():
            return JobToken(rest.strip())
        case _ if not rest and scheme.startswith("sk-"):
            return ApiKey(scheme)
    raise ValueError("a credential is `sk-…`, or `L402 token:preimage`, or `claim …`")
