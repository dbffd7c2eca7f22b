"""Debian's Electrum 4.3.4 with what a test needs and its RPC lacks; run by Debian's own Python.

    python electrum_node.py ARGUMENTS OF electrum

    add_invoice     exact in msat, with a description hash (LUD-06) or to be held; no address used up
    wait_invoice    returns when the state is another than `known`, or at the time-out
    hold            keep the HTLC of an invoice that was made already
    settle_held, cancel_held    what becomes of the HTLC of a held invoice
    refuse_once     give the next HTLC of an invoice back
    set_mood        what to do with whatever comes: take, hold or refuse it
    list_held       the HTLCs that are kept now

Nothing installed is changed. A hold lives in memory only: a payee that is killed and started again
takes the HTLC. With REGTEST_NO_FILES=1 the wallet file is not written after it has been made.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
import runpy
import shutil
import sys
from collections import defaultdict
from typing import Any

from electrum.commands import Commands, command, command_options
from electrum.invoices import PR_PAID, Invoice
from electrum.lnaddr import lnencode
from electrum.lnonion import (
    OnionFailureCode,
    OnionRoutingFailure,
    generate_cipher_stream,
    get_bolt04_onion_key,
    get_ecdh,
    xor_bytes,
)
from electrum.lnpeer import Peer
from electrum.lnworker import LNWallet
from electrum.wallet_db import WalletDB

# By payment hash in hex. A hold is open, accepted, settled or canceled.
holds: dict[str, str] = {}
refused_once: set[str] = set()
mood = "take"
waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

_fulfill = Peer.maybe_fulfill_htlc
_process = Peer.process_unfulfilled_htlc
_set_request_status = LNWallet.set_request_status
_write = WalletDB.write


def _tell(key: str) -> None:
    for event in waiting[key]:
        event.set()


def maybe_fulfill_htlc(self, **arguments):
    htlc = arguments["htlc"]
    key = htlc.payment_hash.hex()
    if mood == "hold":
        holds.setdefault(key, "open")
    held = holds.get(key)
    if held == "canceled" or key in refused_once or (held is None and mood == "refuse"):
        refused_once.discard(key)
        # The same invoice again is another try.
        holds.pop(key, None)
        height = self.network.get_local_height()
        raise OnionRoutingFailure(
            code=OnionFailureCode.INCORRECT_OR_UNKNOWN_PAYMENT_DETAILS,
            data=htlc.amount_msat.to_bytes(8, "big") + height.to_bytes(4, "big"),
        )
    preimage, trampoline = _fulfill(self, **arguments)
    if preimage is None or held not in ("open", "accepted"):
        return preimage, trampoline
    holds[key] = "accepted"
    _tell(key)
    return None, None


def process_unfulfilled_htlc(self, **arguments):
    """A hop wraps an error on its way back (BOLT 4). Electrum 4.3.4 does not, and a payer that
    cannot read the error fails over it: it calls the payment in progress until it is restarted."""
    preimage, forwarded, error = _process(self, **arguments)
    if error is not None:
        secret = get_ecdh(self.privkey, arguments["onion_packet"].public_key)
        stream = generate_cipher_stream(get_bolt04_onion_key(b"ammag", secret), len(error))
        error = xor_bytes(error, stream)
    return preimage, forwarded, error


def set_request_status(self, payment_hash, status):
    key = payment_hash.hex()
    # Electrum would call it paid as soon as the HTLC is there.
    if holds.get(key) in ("open", "accepted"):
        return
    _set_request_status(self, payment_hash, status)
    _tell(key)


def write(self, storage):
    if not storage.file_exists():
        _write(self, storage)


@command("wnl")
async def add_invoice(
    self,
    amount_msat,
    memo="",
    expiry=3600,
    description_for_hash=None,
    hold=False,
    wallet: Any = None,
):
    lightning = wallet.lnworker
    address, bolt11 = lightning.create_invoice(
        amount_msat=amount_msat,
        message=memo,
        expiry=expiry,
        fallback_address=None,
        write_to_disk=False,
    )
    if description_for_hash is not None:
        address.tags = [
            ("h", description_for_hash) if tag[0] == "d" else tag for tag in address.tags
        ]
        bolt11 = lnencode(address, lightning.node_keypair.privkey)
    request = Invoice(
        outputs=[],
        message=memo,
        time=address.date,
        amount_msat=amount_msat,
        exp=expiry,
        height=0,
        bip70=None,
        lightning_invoice=bolt11,
    )
    key = wallet.add_payment_request(request)
    if hold:
        holds[key] = "open"
    return {"payment_hash": key, "bolt11": bolt11}


def _state(wallet, key):
    if key in holds:
        return holds[key]
    paid = wallet.lnworker.get_payment_status(bytes.fromhex(key)) == PR_PAID
    return "settled" if paid else "open"


@command("wnl")
async def wait_invoice(self, payment_hash, known="open", timeout=30, wallet=None):
    if _state(wallet, payment_hash) == known:
        event = asyncio.Event()
        waiting[payment_hash].add(event)
        try:
            await asyncio.wait_for(event.wait(), timeout)
        except TimeoutError:
            pass
        finally:
            waiting[payment_hash].discard(event)
    return _state(wallet, payment_hash)


@command("wnl")
async def hold(self, payment_hash, wallet=None):
    holds[payment_hash] = "open"


@command("n")
async def set_mood(self, mood):
    globals().update(mood=mood)


@command("n")
async def list_held(self):
    return [key for key, held in holds.items() if held == "accepted"]


@command("wnl")
async def refuse_once(self, payment_hash, wallet=None):
    refused_once.add(payment_hash)


@command("wnl")
async def settle_held(self, payment_hash, wallet=None):
    assert holds[payment_hash] == "accepted", holds[payment_hash]
    holds[payment_hash] = "settled"


@command("wnl")
async def cancel_held(self, payment_hash, wallet=None):
    assert holds[payment_hash] in ("open", "accepted"), holds[payment_hash]
    holds[payment_hash] = "canceled"
    _tell(payment_hash)


Peer.maybe_fulfill_htlc = maybe_fulfill_htlc
Peer.process_unfulfilled_htlc = process_unfulfilled_htlc
LNWallet.set_request_status = set_request_status
if os.environ.get("REGTEST_NO_FILES"):
    WalletDB.write = write
for method in (
    add_invoice,
    wait_invoice,
    hold,
    refuse_once,
    set_mood,
    list_held,
    settle_held,
    cancel_held,
):
    setattr(Commands, method.__name__, method)
# Electrum's command line wants a help text for every option.
for option in ("expiry", "description_for_hash", "hold", "known", "mood"):
    command_options.setdefault(option, (None, option))

if __name__ == "__main__":
    sys.argv[0] = str(shutil.which("electrum"))
    runpy.run_path(sys.argv[0], run_name="__main__")
