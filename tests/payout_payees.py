"""The payees' servers of a world of payouts, and the fuse of a process that asks them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from billing.lightning.simulated.network import Network
from billing.outside_http import OutsideAnswer, OutsideHttpError
from billing.outside_url import OutsideRules, OutsideUrl

INVOICE_EXPIRY_S = 600


class CrashNow(BaseException):
    """kill -9."""


@dataclass
class Fuse:
    """`sparks_left` None: it never burns down. `sparks` counts the places that were passed."""

    sparks_left: int | None = None
    sparks: int = 0
    dead: bool = False

    def spark(self) -> None:
        if self.dead or self.sparks == self.sparks_left:
            self.dead = True
            raise CrashNow
        self.sparks += 1


@dataclass
class PayeeServers:
    """All the LNURL-pay servers there are; each user has a wallet on the network.

    `broken` gives users, or whole hosts, something that is wrong with them.
    """

    network: Network
    min_msat: int = 1_000
    max_msat: int = 10_000_000_000
    expiry_s: int = INVOICE_EXPIRY_S
    broken: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    amounts_msat: list[int] = field(default_factory=list)
    last_invoice: str = ""

    async def fetch(self, url: OutsideUrl) -> OutsideAnswer:
        self.asked.append(str(url))
        path, _, query = url.target.partition("?")
        user = path.rpartition("/")[2]
        wrong = self.broken.get(user) or self.broken.get(url.host)
        if wrong == "unreachable":
            raise OutsideHttpError("unreachable", "the server cannot be reached")
        if wrong == "error":
            return self._answer(url, {"status": "ERROR", "reason": "no such user"})
        if path.startswith("/.well-known/"):
            return self._answer(url, self._terms(url.host, user))
        if wrong == "no_invoice":
            return self._answer(url, {"status": "ERROR", "reason": "out of order"})
        fields = parse_qs(query)
        self.comments += fields.get("comment", [])
        self.amounts_msat.append(int(fields["amount"][0]))
        if wrong == "same_invoice" and self.last_invoice:
            return self._answer(url, {"pr": self.last_invoice})
        await self.network.ensure_wallet(user)
        made = await self.network.create_invoice(
            user,
            amount_msat=int(fields["amount"][0]),
            description="for a worker",
            expiry_s=self.expiry_s,
        )
        self.last_invoice = made.bolt11
        return self._answer(url, {"pr": made.bolt11, "routes": []})

    def _terms(self, host: str, user: str) -> dict[str, Any]:
        return {
            "tag": "payRequest",
            "callback": f"https://{host}/cb/{user}",
            "minSendable": self.min_msat,
            "maxSendable": self.max_msat,
            "commentAllowed": 64,
            "metadata": json.dumps([["text/plain", "for a worker"]]),
        }

    def _answer(self, url: OutsideUrl, content: dict[str, Any]) -> OutsideAnswer:
        return OutsideAnswer(200, json.dumps(content).encode(), url)


class PayeeHttp:
    """Stands where OutsideHttp stands: the way of one process to the payees' servers."""

    def __init__(self, servers: PayeeServers, fuse: Fuse) -> None:
        self.rules = OutsideRules()
        self._servers = servers
        self._fuse = fuse

    async def fetch(self, url: OutsideUrl, **_: object) -> OutsideAnswer:
        self._fuse.spark()
        return await self._servers.fetch(url)
