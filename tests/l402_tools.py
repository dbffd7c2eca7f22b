"""One paid invoice and its tokens, for the tests of L402."""

from __future__ import annotations

import hashlib

import pytest

from billing.errors import BadCredential
from billing.l402 import MasterSecrets, mint, parse_authorization, verify
from billing.l402_caveats import RequestFacts

SECRETS = MasterSecrets(bytes(range(32)))
PREIMAGE = bytes([7]) * 32
PAYMENT_HASH = hashlib.sha256(PREIMAGE).hexdigest()
TOKEN_ID = "c4" * 32
NOW = 1_800_000_000
FACTS = RequestFacts(now_unix_s=NOW, capability="chat")
INVOICE = "lnbcrt10u1pj" + "q" * 40


def token_with(*caveats: str, secrets: MasterSecrets = SECRETS) -> str:
    return mint(secrets, payment_hash=PAYMENT_HASH, token_id=TOKEN_ID, caveats=caveats)


def header(token: str, preimage: bytes = PREIMAGE, scheme: str = "L402") -> str:
    return f"{scheme} {token}:{preimage.hex()}"


def refusal(secrets: MasterSecrets, *values: str) -> str:
    with pytest.raises(BadCredential) as caught:
        verify(secrets, parse_authorization(values))
    return caught.value.reason
