"""The Lightning addresses of the simulated wallets: LNURL-pay as LUD-06 and LUD-16 have it.

`worker@127.0.0.1:9740` is asked for at `/.well-known/lnurlp/worker`, and paid by the invoice that
the callback gives. Plain http, for development only. No field may be added to these answers, not
even "simulated": there are payers that refuse an unknown one. The metadata says it in words.
"""

from __future__ import annotations

import json
import re
from typing import Any

from billing.lightning.simulated.network import Network
from billing.lightning.simulated.wallets import Refused, is_name

MIN_SENDABLE_MSAT = 1_000
MAX_SENDABLE_MSAT = 100_000_000_000
_INVOICE_EXPIRY_S = 600
_AMOUNT = re.compile(r"[0-9]{1,15}")


def address_of(user: str, host: str) -> str:
    return f"{user}@{host}"


def pay_request(user: str, host: str) -> dict[str, Any]:
    """The first answer. Any proper name will do; its wallet is made when money is on the way."""
    if not is_name(user):
        return _error("no such user")
    return {
        "tag": "payRequest",
        "callback": f"http://{host}/lnurlp/{user}/callback",
        "minSendable": MIN_SENDABLE_MSAT,
        "maxSendable": MAX_SENDABLE_MSAT,
        "metadata": _metadata(user, host),
    }


async def invoice(network: Network, user: str, host: str, amount_msat: str) -> dict[str, Any]:
    """The second answer: an invoice for the amount, over the hash of the metadata."""
    if not is_name(user):
        return _error("no such user")
    if not _AMOUNT.fullmatch(amount_msat):
        return _error("amount must be a whole number of millisatoshis")
    if not MIN_SENDABLE_MSAT <= int(amount_msat) <= MAX_SENDABLE_MSAT:
        return _error(f"amount must be between {MIN_SENDABLE_MSAT} and {MAX_SENDABLE_MSAT} msat")
    try:
        await network.ensure_wallet(user)
        created = await network.create_invoice(
            user,
            amount_msat=int(amount_msat),
            description=_metadata(user, host),
            expiry_s=_INVOICE_EXPIRY_S,
            hash_description=True,
        )
    except Refused as error:
        return _error(str(error))
    return {"pr": created.bolt11, "routes": []}


def _metadata(user: str, host: str) -> str:
    address = address_of(user, host)
    return json.dumps(
        [
            ["text/plain", f"Simulated sats for {address} (regtest, no real money)"],
            ["text/identifier", address],
        ]
    )


def _error(reason: str) -> dict[str, Any]:
    return {"status": "ERROR", "reason": reason}
