"""A wallet of the simulated network as a `LightningBackend`. Its money is nobody's money."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from billing.lightning import (
    Capabilities,
    Invoice,
    InvoiceState,
    InvoiceStatus,
    NodeBalance,
    NodeInfo,
    OutcomeUnknown,
    PaymentState,
    PaymentStatus,
    SentPayment,
    Settlement,
)
from billing.lightning.simulated.network import NETWORK, PAGE, Network
from billing.lightning.simulated.transport import NAME, Http, InProcess, Transport
from billing.lightning.simulated.wallets import ROUTER

_INVOICE_STATES = {
    "open": InvoiceState.OPEN,
    "held": InvoiceState.OPEN,
    "settled": InvoiceState.SETTLED,
    "canceled": InvoiceState.CANCELED,
    "expired": InvoiceState.EXPIRED,
    "not_found": InvoiceState.NOT_FOUND,
}
_PAYMENT_STATES = {
    "in_flight": PaymentState.IN_FLIGHT,
    "succeeded": PaymentState.SUCCEEDED,
    "failed": PaymentState.FAILED,
    "not_found": PaymentState.NOT_FOUND,
}


class SimulatedBackend:
    """The node `wallet` of a network that `transport` reaches: `in_process` or `over_http`."""

    name = NAME
    capabilities = Capabilities(
        granularity_msat=1,
        description_max_bytes=639,
        description_hash=False,
        fee_limit=True,
        cancel_invoice=True,
        push="cursor",
        refuses_duplicate_hash=True,
        checks_expiry=True,
        failed_is_definitive=True,
    )

    def __init__(self, transport: Transport, *, wallet: str = ROUTER) -> None:
        self._transport = transport
        self._wallet = wallet

    @classmethod
    def in_process(cls, network: Network, *, wallet: str = ROUTER) -> SimulatedBackend:
        return cls(InProcess(network), wallet=wallet)

    @classmethod
    def over_http(cls, url: str, *, wallet: str = ROUTER) -> SimulatedBackend:
        """`url` is where `python -m billing.lightning.simulated` listens."""
        return cls(Http(url), wallet=wallet)

    async def node_info(self) -> NodeInfo:
        answer = await self._call("node_info", {})
        return NodeInfo(
            pubkey=answer["pubkey"],
            alias=answer["alias"],
            version="simulated, no real money",
            network=NETWORK,
            synced=True,
            simulated=True,
        )

    async def balance(self) -> NodeBalance:
        answer = await self._call("balance", {})
        return NodeBalance(answer["balance_msat"], None, answer["pending_msat"])

    async def create_invoice(
        self, *, amount_msat: int, description: str, expiry_s: int, idempotency_key: str
    ) -> Invoice:
        answer = await self._call(
            "create_invoice",
            {
                "amount_msat": amount_msat,
                "description": description,
                "expiry_s": expiry_s,
                "idempotency_key": idempotency_key,
            },
        )
        return Invoice(
            payment_hash=answer["payment_hash"],
            bolt11=answer["bolt11"],
            amount_msat=answer["amount_msat"],
            created_at=_time(answer["created_at_s"]),
            expires_at=_time(answer["expires_at_s"]),
        )

    async def lookup_invoice(self, payment_hash: str) -> InvoiceStatus:
        answer = await self._call("lookup_invoice", {"payment_hash": payment_hash})
        state = _INVOICE_STATES.get(answer["state"], InvoiceState.UNKNOWN)
        if state is not InvoiceState.SETTLED:
            return InvoiceStatus(payment_hash, state)
        return InvoiceStatus(
            payment_hash=payment_hash,
            state=state,
            amount_received_msat=answer["amount_received_msat"],
            settled_at=_time(answer["settled_at_s"]),
            cursor=answer["cursor"],
        )

    async def cancel_invoice(self, payment_hash: str) -> bool:
        answer = await self._call("cancel_invoice", {"payment_hash": payment_hash})
        return answer["canceled"] is True

    async def settlements(self, cursor: str | None) -> AsyncIterator[Settlement]:
        """None, or a cursor of another node, replays everything from the node's beginning."""
        async for values in self._transport.settlements(self._wallet, cursor):
            yield _settlement(_Answer("settlements", values))

    async def received_since(self, since: datetime) -> AsyncIterator[Settlement]:
        after: str | None = None
        while True:
            asked = {"since_s": since.timestamp(), "after": after}
            page = (await self._call("list_received", asked))["received"]
            for values in page:
                settlement = _settlement(_Answer("list_received", values))
                after = settlement.cursor
                yield settlement
            if len(page) < PAGE:
                return

    async def sent_since(self, since: datetime) -> AsyncIterator[SentPayment]:
        after = 0
        while True:
            asked = {"since_s": since.timestamp(), "after": after}
            page = (await self._call("list_sent", asked))["sent"]
            for values in page:
                answer = _Answer("list_sent", values)
                after = answer["payment_id"]
                yield SentPayment(
                    payment_hash=answer["payment_hash"],
                    state=_PAYMENT_STATES.get(answer["state"], PaymentState.UNKNOWN),
                    amount_msat=answer["amount_msat"],
                    fee_msat=answer["fee_msat"],
                    sent_at=_time(answer["sent_at_s"]),
                )
            if len(page) < PAGE:
                return

    async def worst_case_fee_msat(self, amount_msat: int) -> int | None:
        return None

    async def pay_invoice(
        self, bolt11: str, *, max_fee_msat: int, timeout_s: float, max_cltv_blocks: int | None
    ) -> PaymentStatus:
        answer = await self._call(
            "pay_invoice",
            {
                "bolt11": bolt11,
                "max_fee_msat": max_fee_msat,
                "timeout_s": timeout_s,
                "max_cltv_blocks": max_cltv_blocks,
            },
            timeout_s=timeout_s,
        )
        return _payment_status(answer["payment_hash"], answer)

    async def lookup_payment(self, payment_hash: str) -> PaymentStatus:
        answer = await self._call("lookup_payment", {"payment_hash": payment_hash})
        return _payment_status(payment_hash, answer)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _call(
        self, operation: str, arguments: dict[str, Any], *, timeout_s: float = 0.0
    ) -> _Answer:
        answer = await self._transport.call(self._wallet, operation, arguments, timeout_s=timeout_s)
        return _Answer(operation, answer)


def from_settings(
    *, url: str | None = None, wallet: str | None = None, network: str | None = None
) -> SimulatedBackend:
    """The back end for a network that another process serves at `url`.

    Raises ValueError without a url, and when `network` names any other than regtest.
    """
    if network not in (None, NETWORK):
        raise ValueError(
            f"the simulated Lightning network is {NETWORK} only and cannot be used on {network}"
        )
    if not url or not url.startswith(("http://", "https://")):
        raise ValueError("the simulated Lightning network needs its url, http://host:port")
    return SimulatedBackend.over_http(url, wallet=wallet or ROUTER)


class _Answer(dict[str, Any]):
    """What the network said. A missing key means that it was not the network that spoke."""

    def __init__(self, operation: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._operation = operation

    def __missing__(self, key: str) -> Any:
        raise OutcomeUnknown(NAME, self._operation, "the answer lacks a field", key)


def _payment_status(payment_hash: str, answer: _Answer) -> PaymentStatus:
    state = _PAYMENT_STATES.get(answer["state"], PaymentState.UNKNOWN)
    if state is PaymentState.FAILED:
        return PaymentStatus(payment_hash, state, failure_code=answer["failure_code"])
    if state is not PaymentState.SUCCEEDED:
        return PaymentStatus(payment_hash, state)
    preimage = answer["preimage"]
    if sha256(bytes.fromhex(preimage)).hexdigest() != payment_hash:
        # The rule of every back end: without the preimage nothing has been proved.
        return PaymentStatus(payment_hash, PaymentState.UNKNOWN, failure_code="wrong_preimage")
    return PaymentStatus(
        payment_hash,
        state,
        preimage=preimage,
        amount_msat=answer["amount_msat"],
        fee_msat=answer["fee_msat"],
    )


def _settlement(answer: _Answer) -> Settlement:
    return Settlement(
        payment_hash=answer["payment_hash"],
        amount_received_msat=answer["amount_received_msat"],
        settled_at=_time(answer["settled_at_s"]),
        cursor=answer["cursor"],
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
