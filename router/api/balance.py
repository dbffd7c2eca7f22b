"""The payer's account: what it holds, and top-ups. Keys and withdrawals have files of their own."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from billing import accounts, l402, ledger
from billing.errors import BadCredential
from billing.invoices import Purpose
from router import topups
from router.api import payment
from router.api.answers import answer, core_of, read_object
from router.api.errors import Problem
from router.api.own_door import OwnDoorRoute, identify, only, owner, whole_number
from router.core import Core
from router.errors import Forbidden, NoSuchThing
from router.job_views import time_text
from router.topups import TopUp

router = APIRouter(tags=["balance"], route_class=OwnDoorRoute)

# Live jobs only: each branch is served by a partial index, whatever the number of ended jobs.
_HELD = """
with live as (
    select id from jobs where state = 'running' and account_id = $1
    union all
    select id from jobs where state = 'queued' and account_id = $1)
select coalesce(sum(b.balance_msat), 0)::bigint
from live join ledger_balances b on b.account = $2 || live.id"""


@router.get("/balance")
async def show_balance(request: Request) -> Response:
    """What the account holds, and what is held for jobs that have not ended."""
    core = core_of(request)
    payer = await owner(core, request, "balance")
    async with core.database.transaction("repeatable_read") as connection:
        balance_msat = await ledger.balance_msat(connection, ledger.client(payer.account_id))
        held_msat = await connection.fetchval(_HELD, payer.account_id, ledger.escrow(""))
    body: dict[str, Any] = {
        "balance_msat": balance_msat,
        "held_msat": held_msat,
        "network": core.node.network,
        "simulated": core.node.simulated,
    }
    if payer.key is not None and payer.key.limit_msat is not None:
        body["limit_msat"] = payer.key.limit_msat
        body["spent_msat"] = payer.key.spent_msat
    return answer(body)


@router.post("/balance/topups")
async def make_topup(request: Request) -> Response:
    """An invoice that becomes a balance when it is paid: of the key that asks, or of a new account.

    `amount_msat` is rounded up to whole satoshis.
    """
    core = core_of(request)
    body = await read_object(request)
    only(body, "amount_msat")
    amount_msat = whole_number(
        body,
        "amount_msat",
        low=core.settings.min_amount_msat,
        high=core.settings.max_amount_msat,
    )
    assert amount_msat is not None
    payer = await identify(core, request, "topup")
    if payer is not None and not payer.owns_account:
        raise Forbidden("this payment went to somebody's account; it is not a name for it")
    core.limiter.invoice(request)
    issued = await topups.issue(
        core,
        amount_msat,
        account_id=payer.account_id if payer else None,
        key=payer.key if payer else None,
    )
    offer = payment.offer(core, issued)
    return answer({"purpose": Purpose.TOPUP.value, **offer.as_json(core)}, status=201)


@router.get("/balance/topups/{payment_hash}")
async def show_topup(request: Request, payment_hash: str) -> Response:
    """What became of a top-up. The first time that it is seen to be paid it shows the key.

    402 while it is unpaid. Only its own credential or claim token shows the key; the key that asked
    for a top-up sees how it stands.
    """
    core = core_of(request)
    try:
        payer = await owner(core, request, "topup")
    except BadCredential as error:
        if error.reason == "unpaid":
            return await _unpaid(core, request, payment_hash)
        raise
    if payer.payment_hash == payment_hash:
        return answer(_paid(core, payment_hash, await topups.collect(core, payment_hash)))
    row = await topups.find(core, payment_hash)
    if payer.key is None or row["account_id"] != payer.account_id:
        raise NoSuchThing("there is no such top-up")
    if row["settled_at"] is None:
        return _waiting(core, row)
    return answer(_paid(core, payment_hash, await topups.show(core, payment_hash)))


@router.post("/balance/topups/{payment_hash}/rotate")
async def rotate_key(request: Request, payment_hash: str) -> Response:
    """A new key in place of the one that the top-up has shown, which is dead from now on."""
    core = core_of(request)
    payer = await owner(core, request, "keys")
    if payer.payment_hash != payment_hash:
        await topups.find(core, payment_hash)
        raise Forbidden("only the credential or claim token of this top-up can do this")
    return answer(_paid(core, payment_hash, await topups.rotate(core, payment_hash)))


async def _unpaid(core: Core, request: Request, payment_hash: str) -> Response:
    row = await topups.find(core, payment_hash)
    if not _is_shown_for(request, row):
        raise NoSuchThing("there is no such top-up")
    return _waiting(core, row)


def _is_shown_for(request: Request, row: Any) -> bool:
    """Whether the credential that was found unpaid is that of this invoice."""
    claim = request.headers.get("x-claim-token")
    if claim is not None and accounts.hash_secret(claim) == row["claim_hash"]:
        return True
    credentials = l402.parse_authorization(request.headers.getlist("authorization"))
    tokens = {(t.payment_hash, t.token_id) for c in credentials for t in c.tokens}
    return (row["payment_hash"], row["token_id"].hex()) in tokens


def _waiting(core: Core, row: Any) -> Response:
    left_s = int((row["expires_at"] - core.clock()).total_seconds())
    facts = {
        "state": "expired" if left_s <= 0 else row["state"],
        "payment_hash": row["payment_hash"],
        "amount_msat": row["amount_msat"],
        "expires_at": time_text(row["expires_at"]),
        "expires_in_s": max(0, left_s),
        "simulated": core.node.simulated,
    }
    problem = Problem("payment_required", "the invoice of this top-up is not paid", facts)
    return answer({**problem.as_json(), **facts}, status=402)


def _paid(core: Core, payment_hash: str, topup: TopUp) -> dict[str, Any]:
    body: dict[str, Any] = {
        "payment_hash": payment_hash,
        "state": topup.state,
        "received_msat": topup.received_msat,
        "balance_msat": topup.balance_msat,
        "network": core.node.network,
        "simulated": core.node.simulated,
    }
    if topup.key is not None:
        body["key"] = topup.key
    elif topup.own_account:
        body["message"] = "the key was shown before; POST …/rotate makes another"
    else:
        body["message"] = "credited to the account of the key that asked; it is still the key"
    return body
