"""The nodes of the simulated network: `router`, `payer`, and a wallet for each Lightning address.

Money enters by `fund` only, and is then in a balance, in an HTLC under way, or spent on routing
fees: `audit` adds it all up, at any moment.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from functools import lru_cache

from coincurve import PrivateKey

from billing.lightning.simulated.store import Transaction

ROUTER = "router"
PAYER = "payer"
# What a new network begins with: 1 BTC to pay workers, 100 BTC to buy prompts with.
START_BALANCE_MSAT = {ROUTER: 100_000_000_000, PAYER: 10_000_000_000_000}
WALLETS_MAX = 10_000
_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,63}")

WALLET_SCHEMA = """
CREATE TABLE IF NOT EXISTS wallet (
    name TEXT PRIMARY KEY,
    secret BLOB NOT NULL,
    pubkey TEXT NOT NULL UNIQUE,
    balance_msat INTEGER NOT NULL CHECK (balance_msat >= 0),
    funded_msat INTEGER NOT NULL,
    settled_count INTEGER NOT NULL DEFAULT 0
) STRICT;
"""


class Refused(Exception):
    """The network will not do this, and has done nothing. `reason` as in `BackendRejected`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Wallet:
    name: str
    pubkey: str
    secret: bytes
    balance_msat: int
    pending_msat: int  # out in HTLCs, fees included


@dataclass(frozen=True, slots=True)
class Audit:
    """All the money of the network. It balances when funded = held + in flight + fees."""

    funded_msat: int
    held_msat: int
    in_flight_msat: int
    fees_msat: int

    @property
    def balances(self) -> bool:
        return self.funded_msat == self.held_msat + self.in_flight_msat + self.fees_msat


def find(transaction: Transaction, name: str) -> Wallet:
    """The wallet of that name. Raises Refused when there is none."""
    row = transaction.row(
        "SELECT *, (SELECT coalesce(sum(amount_msat + fee_msat), 0) FROM payment"
        " WHERE payment.wallet = wallet.name AND state = 'in_flight') AS pending_msat"
        " FROM wallet WHERE name = ?",
        name,
    )
    if row is None:
        raise Refused("refused", "no such wallet on the simulated network")
    return Wallet(
        row["name"], row["pubkey"], row["secret"], row["balance_msat"], row["pending_msat"]
    )


def names(transaction: Transaction) -> list[str]:
    return [row["name"] for row in transaction.rows("SELECT name FROM wallet ORDER BY name")]


def is_name(name: str) -> bool:
    """Whether a wallet may have this name: the user part of a Lightning address."""
    return _NAME.fullmatch(name) is not None


def ensure(transaction: Transaction, name: str) -> None:
    """Make the wallet unless it is there. Raises Refused for a bad name, or one too many."""
    if transaction.row("SELECT 1 FROM wallet WHERE name = ?", name) is not None:
        return
    if not is_name(name):
        raise Refused("malformed", "not a name for a wallet")
    count = transaction.row("SELECT count(*) AS count FROM wallet")
    if count is not None and count["count"] >= WALLETS_MAX:
        raise Refused("quota", f"the simulated network has {WALLETS_MAX} wallets already")
    secret = secrets.token_bytes(32)
    balance_msat = START_BALANCE_MSAT.get(name, 0)
    transaction.run(
        "INSERT INTO wallet (name, secret, pubkey, balance_msat, funded_msat)"
        " VALUES (?, ?, ?, ?, ?)",
        name,
        secret,
        key_of(secret).public_key.format().hex(),
        balance_msat,
        balance_msat,
    )


def fund(transaction: Transaction, name: str, amount_msat: int) -> None:
    """Give a wallet money from nowhere; a negative amount takes it away again."""
    wallet = find(transaction, name)
    if wallet.balance_msat + amount_msat < 0:
        raise Refused("insufficient_funds", "the wallet holds less than that")
    transaction.run(
        "UPDATE wallet SET balance_msat = balance_msat + ?, funded_msat = funded_msat + ?"
        " WHERE name = ?",
        amount_msat,
        amount_msat,
        name,
    )


def audit(transaction: Transaction) -> Audit:
    money = transaction.row(
        "SELECT sum(funded_msat) AS funded, sum(balance_msat) AS held FROM wallet"
    )
    out = transaction.row(
        "SELECT coalesce(sum(amount_msat + fee_msat) FILTER (WHERE state = 'in_flight'), 0) AS out,"
        " coalesce(sum(fee_msat) FILTER (WHERE state = 'succeeded'), 0) AS fees FROM payment"
    )
    assert money is not None and out is not None
    return Audit(money["funded"], money["held"], out["out"], out["fees"])


@lru_cache(maxsize=1024)
def key_of(secret: bytes) -> PrivateKey:
    """The signing key; deriving its public half takes longer than a signature."""
    return PrivateKey(secret)
