"""The Python client of a Satherd router: quote, pay through a wallet, stream, watch.

    from client import Client, SimulatedWallet

    router_url = "http://127.0.0.1:8000"
    with Client(router_url, wallet=SimulatedWallet(router_url)) as client:
        for piece in client.stream("Why is the sky blue?", max_tokens=64).text():
            print(piece, end="", flush=True)

`AsyncClient` has the same methods to await. Nothing of router, worker or billing is imported.
"""

from __future__ import annotations

from client.answers import (
    Balance,
    Completion,
    Info,
    Invoice,
    Job,
    Model,
    Purchase,
    Quote,
    TopUp,
)
from client.async_client import AsyncClient, AsyncPromptStream
from client.credentials import L402, ApiKey, ClaimToken, Credential, JobToken, parse_credential
from client.errors import SatherdError
from client.exchange import Patience
from client.sync_client import Client, PromptStream
from client.wallet import AsyncWallet, SimulatedWallet, SyncWallet, Wallet

__all__ = [
    "L402",
    "ApiKey",
    "AsyncClient",
    "AsyncPromptStream",
    "AsyncWallet",
    "Balance",
    "ClaimToken",
    "Client",
    "Completion",
    "Credential",
    "Info",
    "Invoice",
    "Job",
    "JobToken",
    "Model",
    "Patience",
    "PromptStream",
    "Purchase",
    "Quote",
    "SatherdError",
    "SimulatedWallet",
    "SyncWallet",
    "TopUp",
    "Wallet",
    "parse_credential",
]
