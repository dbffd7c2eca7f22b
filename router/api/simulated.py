"""`/simulated/*`: the payer's wallet of the simulated Lightning network. No real money.

Mounted only on a router whose Lightning back end is the simulated one, so that people and examples
can pay without a wallet of their own.
"""

from __future__ import annotations

from typing import Any

import httpx
from fastapi import APIRouter, Request, Response

from router.api.answers import answer, noted, problem_answer, read_object
from router.errors import BadRequest, Conflict

router = APIRouter(prefix="/simulated", tags=["simulated money"])
TIMEOUT_S = 45.0


@router.post("/pay")
async def pay(request: Request) -> Response:
    """Pay an invoice with simulated money; answers with the preimage, as a wallet would."""
    try:
        invoice = (await read_object(request)).get("invoice")
        if not isinstance(invoice, str) or not invoice:
            raise BadRequest("invoice must be a BOLT11 invoice", param="invoice")
        return answer(await _pay(request.app.state.simulated_http, invoice))
    except Exception as error:
        return problem_answer(noted(error, request))


async def _pay(http: httpx.AsyncClient, invoice: str) -> dict[str, Any]:
    try:
        reply = await http.post("/v1/pay", json={"invoice": invoice}, timeout=TIMEOUT_S)
        body = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Conflict("the simulated network did not answer; look the payment up") from error
    if reply.status_code != 200 or not body.get("preimage"):
        why = body.get("message") or body.get("error") or body.get("state") or "refused"
        raise Conflict(f"the simulated payer could not pay: {why}", state=body.get("state"))
    return {
        "preimage": body["preimage"],
        "payment_hash": body.get("payment_hash"),
        "amount_msat": body.get("amount_msat"),
        "fee_msat": body.get("fee_msat"),
        "simulated": True,
    }


@router.get("/wallets")
async def wallets(request: Request) -> Response:
    """The wallets of the simulated network and their balances."""
    http: httpx.AsyncClient = request.app.state.simulated_http
    try:
        reply = await http.get("/v1/wallets", timeout=TIMEOUT_S)
        return answer({"simulated": True, "wallets": reply.json()})
    except (httpx.HTTPError, ValueError) as error:
        return problem_answer(noted(Conflict(f"no answer: {type(error).__name__}"), request))
