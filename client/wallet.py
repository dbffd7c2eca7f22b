"""Wallets: anything that pays a BOLT11 invoice and tells its preimage.

    def pay(bolt11: str, amount_msat: int) -> str | None        hex; None if the wallet hides it
    async def pay(bolt11: str, amount_msat: int) -> str | None  for the asynchronous client

The client has checked the amount before it calls; what the wallet raises reaches the caller as is.
A wallet is called once per purchase and never again for the same one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpx

from client.challenge import invoice_network
from client.errors import WalletFailed

SyncWallet = Callable[[str, int], str | None]
AsyncWallet = Callable[[str, int], Awaitable[str | None]]
Wallet = SyncWallet | AsyncWallet


class SimulatedWallet:
    """Pays on a router's simulated network; there is no real money in it.

    Works with both clients. Refuses any invoice that is not for the regtest network, so that it can
    stand in a configuration by mistake without harm.
    """

    def __init__(
        self,
        router_url: str,
        *,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = router_url.rstrip("/") + "/simulated/pay"
        self._timeout_s = timeout_s
        self._transport = transport

    def __call__(self, bolt11: str, amount_msat: int) -> str:
        """The preimage in hex. Raises WalletFailed when the simulated network does not pay."""
        return str(self.pay(bolt11)["preimage"])

    def pay(self, bolt11: str) -> dict[str, object]:
        """The network's whole answer: `preimage`, `fee_msat`, `simulated`."""
        try:
            network = invoice_network(bolt11)
        except ValueError as error:
            raise WalletFailed(str(error)) from error
        if network != "regtest":
            raise WalletFailed(f"simulated money cannot pay an invoice of {network}")
        try:
            with httpx.Client(timeout=self._timeout_s, transport=self._transport) as http:
                answer = http.post(self._url, json={"invoice": bolt11})
        except httpx.TransportError as error:
            raise WalletFailed(f"the simulated network did not answer: {error}") from error
        if answer.status_code == 404:
            raise WalletFailed("this router's Lightning network is not a simulated one")
        return _paid(answer)


def _paid(answer: httpx.Response) -> dict[str, object]:
    try:
        body = answer.json()
    except ValueError as error:
        raise WalletFailed(f"the simulated network answered {answer.status_code}") from error
    if answer.status_code >= 400 or not isinstance(body, dict) or "preimage" not in body:
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        raise WalletFailed(f"the simulated network did not pay: {message or answer.status_code}")
    return body
