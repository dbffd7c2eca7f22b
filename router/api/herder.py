"""The Llama-Herder door: its messages over HTTP (peers.md LH-1 ... LH-13).

    Info       what a prompt costs now, six values as texts, in satoshi
    Transfer   `Quantity` satoshi for `X-Prompt` and at most `X-Tokens` tokens; answered when there is
               an answer, or at once with a place in the queue if the client prefers
               `Prefer: respond-async` (RFC 7240)

A herder has one model; here any text model may answer, at the dearest one's price, or the one that
`X-Model` names. What is wrong with a message is found before any money moves (E2-19, E2-20), and what
was paid too little goes back to its payer, never to anybody else (E2-18).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.msat import MSAT_PER_SAT, ceil_div
from router import requests
from router.api import purchase
from router.api.answers import answer, core_of, noted, read_object
from router.api.errors import Problem
from router.api.info import dearest_rates, herder_block, satoshi_text
from router.api.leaving import ClientGone
from router.api.openai_shapes import answer_headers, answered, job_problem
from router.api.purchase import PaymentRequired, Style, payment_body
from router.api.waiting import outcomes
from router.core import Core
from router.errors import BadRequest, FeeTooHigh
from router.following import answer_text
from router.lanes import ANY_MODEL
from worker.protocol import Kind

router = APIRouter(tags=["Llama-Herder"])

MAX_REFERENCE = 200
MOST_SAT = 21_000_000 * 100_000_000
_DIGITS = re.compile(r"[0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class Transfer:
    """A checked message of that action."""

    quantity_sat: int
    prompt: str
    tokens: int
    reference: str | None
    terminations: tuple[str, ...]
    model: str | None

    def as_body(self) -> dict[str, Any]:
        """The completion that it asks for. The reference makes it another request than the last."""
        return {
            "model": self.model or ANY_MODEL,
            "prompt": self.prompt,
            "max_tokens": self.tokens,
            "stop": list(self.terminations),
            "offer_msat": self.quantity_sat * MSAT_PER_SAT,
            "user": self.reference,
        }


@router.post("/herder")
async def herder(request: Request) -> Response:
    """A message to the herder: `{"Action": "Info"}` or `{"Action": "Transfer", "Quantity", …}`."""
    core = core_of(request)
    reference = None
    try:
        message = await read_object(request)
        reference = _reference(message)
        match message.get("Action"):
            case "Info":
                return answer({"Action": "Info-Response", **await _info(core)})
            case "Transfer":
                return await _transfer(core, request, read_transfer(message))
            case _:
                raise BadRequest("Action must be Info or Transfer", param="Action")
    except PaymentRequired as due:
        problem = Problem("payment_required", "pay the invoice and repeat the message", {})
        said = {**payment_body(core, due), "Quantity": _sat_text(due.offer.issued.amount_msat)}
        return _refused(problem, reference, said, challenges=due.offer.challenges)
    except ClientGone:
        return Response(status_code=499)
    except Exception as error:
        return _refused(noted(error, request), reference, {})


def error_body(problem: Problem) -> dict[str, Any]:
    """An error in this dialect."""
    return {"Action": "Transfer-Error", "X-Reason": problem.message, **problem.as_json()}


def _refused(
    problem: Problem,
    reference: str | None,
    said: dict[str, Any],
    headers: dict[str, str] | None = None,
    challenges: Sequence[str] = (),
) -> Response:
    """A message that comes to nothing; nothing was taken for it."""
    reference_of = {"X-Reference": reference} if reference is not None else {}
    body = {**error_body(problem), **reference_of, **said}
    more = {**(headers or {}), **problem.headers}
    return answer(body, status=problem.status, headers=more, challenges=challenges)


# --- Info ---------------------------------------------------------------------------------------


async def _info(core: Core) -> dict[str, str]:
    await core.market.refresh()
    block = herder_block(core, dearest_rates(core, await core.quotes.fees.now()))
    text = (
        f"{block['Name']} {block['Version']}: {block['Base-Fee']} satoshi a prompt and"
        f" {block['Token-Fee']} a token, times {block['Last-Multiplier']};"
        f" {block['Queue-Length']} in the queue"
        f"{'; simulated money' if core.node.simulated else ''}"
    )
    return {**block, "Data": text}


# --- Transfer -----------------------------------------------------------------------------------


def read_transfer(message: dict[str, Any]) -> Transfer:
    """Check a message. Raises BadRequest."""
    prompt = message.get("X-Prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadRequest("X-Prompt must be the prompt as text", param="X-Prompt")
    given = message.get("X-Termination")
    terminations = [] if given is None else given if isinstance(given, list) else [given]
    model = message.get("X-Model")
    if model is not None and not (isinstance(model, str) and model):
        raise BadRequest("X-Model must be the name of a model", param="X-Model")
    return Transfer(
        quantity_sat=_whole(message, "Quantity", most=MOST_SAT),
        prompt=prompt,
        tokens=_whole(message, "X-Tokens", most=requests.HIGHEST_TOKENS),
        reference=_reference(message),
        terminations=tuple(terminations),
        model=model,
    )


def _whole(message: dict[str, Any], name: str, *, most: int) -> int:
    """A whole number above zero; these messages carry numbers as texts."""
    value = message.get(name)
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise BadRequest(f"{name} must be a whole number from 1 to {most}", param=name)
    return value


def _reference(message: dict[str, Any]) -> str | None:
    value = message.get("X-Reference")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not (isinstance(value, str) and len(value) <= MAX_REFERENCE):
        raise BadRequest(
            f"X-Reference must be text of at most {MAX_REFERENCE} characters", param="X-Reference"
        )
    return value


async def _transfer(core: Core, request: Request, transfer: Transfer) -> Response:
    core.limiter.job(request)
    try:
        wanted = purchase.parse(core, request, Kind.COMPLETION, transfer.as_body())
        if transfer.model is None:
            anyone = (replace(item, any_of=(ANY_MODEL,)) for item in wanted.items)
            wanted = replace(wanted, items=tuple(anyone))
        if wanted.terms.max_wait_s is None and purchase.brings_key(request):
            # A herder queues whatever was paid, also while nobody is there to answer (LH-13).
            waits = replace(wanted.terms, max_wait_s=core.settings.default_max_wait_s)
            wanted = replace(wanted, terms=waits)
        at_once = "respond-async" in request.headers.get("prefer", "").lower()
        bought = await purchase.buy(core, request, wanted, Style(attached=not at_once))
    except (BadRequest, FeeTooHigh) as error:
        needed_msat = error.facts.get("base_fee_msat")
        if needed_msat is None:
            raise
        return _insufficient(transfer, needed_msat)
    if at_once:
        return await _queued(core, transfer, bought.job_ids[0])
    (ended,) = await outcomes(core, request, bought)
    job_id = bought.job_ids[0]
    headers = answer_headers([(job_id, ended)])
    said = {"X-Reference": transfer.reference} if transfer.reference is not None else {}
    if answered(ended):
        body = {"Action": "Inference-Response", **said, "Data": answer_text(ended)}
        return answer(body, headers=headers)
    problem = job_problem(ended, job_id)
    refunded = {"Refunded": _sat_text(ended.refunded_msat)}
    return _refused(problem, transfer.reference, refunded, headers)


def _insufficient(transfer: Transfer, needed_msat: int) -> Response:
    """What was sent goes back, with the reason and what was needed (LH-3); nothing was taken."""
    facts = {
        "X-Reason": "Insufficient payment",
        "X-Needed": str(ceil_div(needed_msat, MSAT_PER_SAT)),
    }
    said = {"X-Reference": transfer.reference} if transfer.reference is not None else {}
    body = {"Action": "Transfer", "Quantity": str(transfer.quantity_sat), **said, **facts}
    return answer(body, status=402, headers=facts)


async def _queued(core: Core, transfer: Transfer, job_id: str) -> Response:
    """Where the prompt stands, and where its answer will be."""
    row = await core.jobs.row(job_id)
    view = await core.jobs.view(row)
    body = {
        "Action": "Transfer-Queued",
        **({"X-Reference": transfer.reference} if transfer.reference is not None else {}),
        "Job": job_id,
        "Token": core.jobs.token(job_id),
        "Position": str(view["position"]) if "position" in view else None,
        "Status-Url": f"/jobs/{job_id}",
    }
    return answer(body, status=202, headers={"X-Satherd-Job": job_id})


def _sat_text(amount_msat: int) -> str:
    """Msat as satoshi, exact."""
    return satoshi_text(amount_msat * 1_000_000)
