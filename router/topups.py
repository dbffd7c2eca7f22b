"""Top-ups: an invoice that, once paid, is a balance, and the one time that its key is shown.

A top-up without a credential makes an account, and its payment is a name for it. One that comes
with a key pays into that key's account and shows no key: else a key with a spending limit, or
whoever it was given to, could buy itself a better one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from billing import accounts, invoices, ledger
from billing.accounts import Key
from billing.invoices import IssuedInvoice, Purpose
from billing.msat import ceil_to_sat
from router.core import Core
from router.errors import BadRequest, Forbidden, NoSuchThing


@dataclass(frozen=True, slots=True)
class TopUp:
    """A paid top-up. `key` is there the one time that it is shown; `own_account` False: the money
    went to the account of the key that asked for the top-up."""

    state: str
    received_msat: int
    balance_msat: int
    own_account: bool
    key: str | None = field(default=None, repr=False)


def own_account(row: Any) -> bool:
    """Whether an invoice's row is of a top-up whose payer owns the account."""
    return row["reference"] == row["account_id"]


async def issue(
    core: Core, amount_msat: int, *, account_id: str | None = None, key: Key | None = None
) -> IssuedInvoice:
    """An invoice for at least `amount_msat`, in whole satoshis. `account_id` None: a new account.

    `key` is the prepaid key that asks, if one does. Raises BadRequest, BackendError.
    """
    settings = core.settings
    asked_msat = ceil_to_sat(amount_msat)
    if not settings.min_amount_msat <= asked_msat <= settings.max_amount_msat:
        raise BadRequest(
            f"amount_msat must lie between {settings.min_amount_msat} and"
            f" {settings.max_amount_msat}",
            param="amount_msat",
        )
    payment_hash, bolt11, expires_at = await invoices.request_invoice(
        core.backend,
        amount_msat=asked_msat,
        description=f"{settings.name} top-up",
        expiry_s=settings.topup_ttl_s,
        network=core.node.network,
    )
    async with core.database.transaction() as connection:
        account_id = account_id or await accounts.create_account(connection)
        return await invoices.store_invoice(
            connection,
            payment_hash=payment_hash,
            bolt11=bolt11,
            amount_msat=asked_msat,
            account_id=account_id,
            purpose=Purpose.TOPUP,
            reference=key.id if key else account_id,
            expires_at=expires_at,
            first_check_at=core.watcher.first_check_at(),
        )


async def find(core: Core, payment_hash: str) -> Any:
    """The row of a top-up's invoice. Raises NoSuchThing."""
    async with core.database.connection() as connection:
        return await _find(connection, payment_hash, "")


async def collect(core: Core, payment_hash: str) -> TopUp:
    """A settled top-up, with its key if it has not been shown before.

    The row is locked, so that of two readers at once one gets the key. Raises NoSuchThing,
    TooManyKeys.
    """
    async with core.database.transaction() as connection:
        row = await _find(connection, payment_hash, " for update")
        key = None
        if own_account(row) and row["key_shown_at"] is None:
            key = await _new_key(connection, core, row)
        return await _as_it_stands(connection, row, key)


async def show(core: Core, payment_hash: str) -> TopUp:
    """A settled top-up, without its key. Raises NoSuchThing."""
    async with core.database.connection() as connection:
        return await _as_it_stands(connection, await _find(connection, payment_hash, ""), None)


async def rotate(core: Core, payment_hash: str) -> TopUp:
    """Kill the keys that top-ups of this account have shown, and make a new one.

    Raises NoSuchThing, and Forbidden where the account is not the payer's own.
    """
    async with core.database.transaction() as connection:
        row = await _find(connection, payment_hash, " for update")
        if not own_account(row):
            raise Forbidden("this payment went to the account of a key; it cannot replace that key")
        await accounts.revoke_primary(connection, row["account_id"])
        made = await _as_it_stands(connection, row, await _new_key(connection, core, row))
    core.keys.forget()
    return made


async def _find(connection: Any, payment_hash: str, lock: str) -> Any:
    row = await connection.fetchrow(
        f"select * from invoices where payment_hash = $1 and purpose = $2{lock}",
        payment_hash,
        Purpose.TOPUP.value,
    )
    if row is None:
        raise NoSuchThing("there is no such top-up")
    return row


async def _new_key(connection: Any, core: Core, row: Any) -> str:
    _, key = await accounts.create_key(connection, row["account_id"], is_primary=True)
    await connection.execute(
        "update invoices set key_shown_at = $2 where payment_hash = $1",
        row["payment_hash"],
        core.clock(),
    )
    return key


async def _as_it_stands(connection: Any, row: Any, key: str | None) -> TopUp:
    return TopUp(
        state=row["state"],
        received_msat=row["received_msat"] or 0,
        balance_msat=await ledger.balance_msat(connection, ledger.client(row["account_id"])),
        own_account=own_account(row),
        key=key,
    )
