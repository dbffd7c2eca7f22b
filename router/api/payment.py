"""Who pays: a prepaid key, a paid L402 credential, a claim token; or a 402 challenge.

Authorization: Bearer sk-…            the key's account (any scheme word, QB-R2)
apikey: …                             the same at the Kobold and Horde doors, also without `sk-`
Authorization: L402 token:preimage    the account of the invoice, once it is settled
Authorization: Payment …              the same, by the other scheme of the same 402 (billing.mpp)
X-Claim-Token: …                      the same, for wallets that hide preimages
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from billing import accounts, l402, mpp
from billing.accounts import Key
from billing.errors import BadCredential
from billing.invoices import IssuedInvoice, Purpose, State
from billing.l402_caveats import RequestFacts, write_caveats
from billing.lightning import BackendError
from router.api.middleware import RECEIPT
from router.core import Core

# How long a client that says it has paid waits for the stream to say so, before the node is asked.
HEAR_S = 0.2
# What Horde clients send who have no key.
ANONYMOUS = "0000000000"

_KEY = re.compile(r"(?:\S+\s+)?(sk-[A-Za-z0-9_-]{22})\s*\Z")
_OWN_CAPABILITY: dict[str, str] = {Purpose.TOPUP: "topup", Purpose.BUMP: "jobs"}
_SETTLED = frozenset({State.PAID, State.LATE, State.UNDERPAID})


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays. `key` for a prepaid key; `payment_hash` for a credential or claim token."""

    account_id: str
    key: Key | None = None
    payment_hash: str | None = None
    purpose: str | None = None
    reference: str | None = None

    @property
    def limited_key_id(self) -> str | None:
        return self.key.id if self.key and self.key.limit_msat is not None else None

    @property
    def owns_account(self) -> bool:
        """Whether this payer may do with the account what he likes.

        Not so a payment that others may make for an account: a bump by a job's token, a top-up by a
        key with a limit. It proves that it was made, not that its payer may spend what is there.
        """
        if self.key is not None or self.purpose == Purpose.QUOTE:
            return True
        return self.purpose == Purpose.TOPUP and self.reference == self.account_id

    @property
    def may_withdraw(self) -> bool:
        return self.key.can_withdraw if self.key else self.owns_account


def facts(core: Core, capability: str, **about: Any) -> RequestFacts:
    """What a credential's caveats are held against."""
    return RequestFacts(now_unix_s=int(core.clock().timestamp()), capability=capability, **about)


async def identify(
    core: Core, request: Request, about: RequestFacts, *, apikey: bool = False
) -> Payer | None:
    """The payer of a request; None when it brings no credential at all.

    `apikey`: the door's clients may bring a key in the header of that name. Raises BadCredential.
    Reasons in `billing.l402.BUY_AGAIN` deserve a 402, the others a 401.
    """
    values = request.headers.getlist("authorization")
    if apikey:
        key = await _by_apikey(core, request)
        if key is not None:
            return Payer(key.account_id, key=key)
    for value in values:
        match = _KEY.match(value)
        if match:
            key = await core.keys.find(match[1])
            return Payer(key.account_id, key=key)
    credentials = l402.parse_authorization(values)
    if credentials:
        return _within_purpose(await _by_l402(core, credentials, about), about)
    payments = mpp.parse_authorization(values)
    if payments:
        return _within_purpose(await _by_payment(core, request, payments), about)
    claim = request.headers.get("x-claim-token")
    if claim:
        return _within_purpose(await _by_claim(core, claim), about)
    if any(value.strip() for value in values):
        raise BadCredential("unknown")
    return None


async def _by_apikey(core: Core, request: Request) -> Key | None:
    """The key in `apikey`, with or without `sk-` (RC-1); None for none. Raises BadCredential."""
    presented = request.headers.get("apikey", "").strip()
    if presented in ("", ANONYMOUS):
        return None
    return await core.keys.find(presented)


def _within_purpose(payer: Payer, about: RequestFacts) -> Payer:
    """Payments for somebody's account open only what they are about. Raises BadCredential."""
    if not payer.owns_account and about.capability != _OWN_CAPABILITY.get(payer.purpose or ""):
        raise BadCredential("insufficient")
    return payer


async def _by_l402(core: Core, credentials: list[l402.Credential], about: RequestFacts) -> Payer:
    try:
        token = l402.verify(core.secrets, credentials)
    except BadCredential as error:
        if error.reason == "forged" and not await _known(core, credentials):
            raise BadCredential("unknown") from None
        raise
    row = await _invoice(core, "payment_hash", token.payment_hash)
    if row is None or row["token_id"].hex() != token.token_id:
        raise BadCredential("unknown")
    if row["state"] not in _SETTLED:
        row = await _look_again(core, row)
    token.admit(about, settled=row["state"] in _SETTLED)
    return _payer(row)


async def _by_payment(core: Core, request: Request, credentials: list[mpp.Credential]) -> Payer:
    shown = mpp.verify(core.secrets, credentials, realm=realm(core))
    row = await _invoice(core, "payment_hash", shown.payment_hash)
    if row is None:
        raise BadCredential("unknown")
    if row["state"] not in _SETTLED:
        row = await _look_again(core, row)
    if row["state"] not in _SETTLED:
        raise BadCredential("expired" if core.clock() >= shown.expires_at else "unpaid")
    request.scope[RECEIPT] = mpp.receipt(
        shown.challenge_id, shown.payment_hash, row["settled_at"] or core.clock()
    )
    return _payer(row)


async def _known(core: Core, credentials: list[l402.Credential]) -> bool:
    for credential in credentials:
        for token in credential.tokens:
            row = await _invoice(core, "payment_hash", token.payment_hash)
            if row is not None and row["token_id"].hex() == token.token_id:
                return True
    return False


async def _by_claim(core: Core, claim: str) -> Payer:
    row = await _invoice(core, "claim_hash", accounts.hash_secret(claim))
    if row is None:
        raise BadCredential("unknown")
    if row["state"] not in _SETTLED:
        row = await _look_again(core, row)
    if row["state"] not in _SETTLED:
        raise BadCredential("unpaid")
    return _payer(row)


async def _look_again(core: Core, row: Any) -> Any:
    """Our record may be a moment behind the node: wait for its word, then ask it once."""
    await core.watcher.hear(row["payment_hash"], within_s=HEAR_S)
    heard = await _invoice(core, "payment_hash", row["payment_hash"])
    if heard["state"] in _SETTLED:
        return heard
    try:
        await core.watcher.check(row["payment_hash"])
    except BackendError:
        return row
    return await _invoice(core, "payment_hash", row["payment_hash"])


async def _invoice(core: Core, column: str, value: Any) -> Any:
    assert column in ("payment_hash", "claim_hash")
    async with core.database.connection() as connection:
        return await connection.fetchrow(f"select * from invoices where {column} = $1", value)


def _payer(row: Any) -> Payer:
    return Payer(
        row["account_id"],
        payment_hash=row["payment_hash"],
        purpose=row["purpose"],
        reference=row["reference"],
    )


@dataclass(frozen=True, slots=True)
class Offer:
    """An invoice with the credentials that its payment makes valid."""

    issued: IssuedInvoice
    token: str = field(repr=False)
    simulated: bool
    network: str
    payment_challenge: str | None = field(repr=False)

    def as_json(self, core: Core) -> dict[str, Any]:
        left_s = (self.issued.expires_at - core.clock()).total_seconds()
        return {
            "invoice": self.issued.bolt11,
            "payment_hash": self.issued.payment_hash,
            "amount_msat": self.issued.amount_msat,
            "expires_at": self.issued.expires_at.isoformat().replace("+00:00", "Z"),
            "expires_in_s": max(0, int(left_s)),
            "l402_token": self.token,
            "claim_token": self.issued.claim_token,
            "network": self.network,
            "simulated": self.simulated,
        }

    @property
    def challenges(self) -> list[str]:
        """What a 402 says of it, a WWW-Authenticate header each. L402 comes first: some of its
        clients read only the first."""
        first = l402.challenge(self.token, self.issued.bolt11)
        return [first] if self.payment_challenge is None else [first, self.payment_challenge]


def offer(core: Core, issued: IssuedInvoice) -> Offer:
    """The credentials for a fresh invoice."""
    token = l402.mint(
        core.secrets,
        payment_hash=issued.payment_hash,
        token_id=issued.token_id.hex(),
        caveats=write_caveats(),
    )
    challenge = mpp.challenge(
        core.secrets,
        realm=realm(core),
        invoice=issued.bolt11,
        payment_hash=issued.payment_hash,
        amount_msat=issued.amount_msat,
        network=core.node.network,
        expires_at=issued.expires_at,
    )
    return Offer(issued, token, core.node.simulated, core.node.network, challenge)


def realm(core: Core) -> str:
    return mpp.realm_of(core.settings.public_url)
