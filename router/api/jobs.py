"""Our own doors: quotes and jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.errors import BadCredential
from billing.msat import parse_decimal
from router import following
from router.api import payment, purchase, sse
from router.api.answers import answer, core_of, noted, problem_answer, read_object
from router.api.errors import Problem, problem_of
from router.api.job_access import open_job, payer_of
from router.api.own_door import OwnDoorRoute
from router.api.payment import Payer
from router.api.purchase import PaymentRequired, payment_body, quote_json
from router.api.quote_events import quote_events
from router.core import Core
from router.database import DatabaseUnavailable
from router.errors import (
    BadRequest,
    Forbidden,
    JobWiped,
    NotEnoughBalance,
    RouterError,
)
from router.job_views import outcome_of, time_text
from router.quotes import StoredQuote
from worker.protocol import Kind

router = APIRouter(tags=["quotes and jobs"], route_class=OwnDoorRoute)


def payment_answer(core: Core, due: PaymentRequired) -> Response:
    """402 in our own dialect."""
    facts = payment_body(core, due)
    problem = Problem("payment_required", "pay the invoice and repeat the request", facts)
    return answer({**problem.as_json(), **facts}, status=402, challenges=due.offer.challenges)


def _refused(error: Exception, request: Request) -> Response:
    if isinstance(error, PaymentRequired):
        return payment_answer(core_of(request), error)
    return problem_answer(noted(error, request))


def _kind(body: dict[str, Any]) -> Kind:
    named = body.get("kind")
    if named is None:
        named = "chat" if "messages" in body else "embedding" if "input" in body else "completion"
    if not isinstance(named, str) or named not in set(Kind):
        raise BadRequest(f"kind must be one of {', '.join(Kind)}", param="kind")
    return Kind(named)


# --- quotes -------------------------------------------------------------------------------------


@router.post("/quotes")
async def make_quote(request: Request) -> Response:
    """What a request would cost, held for ten minutes. Nothing is owed and no invoice is made."""
    core = core_of(request)
    try:
        core.limiter.job(request)
        await purchase.refuse_when_closed(core)
        body = await read_object(request)
        wanted = purchase.parse(core, request, _kind(body), body)
        await core.market.refresh()
        quote = await core.quotes.price(wanted)
        core.limiter.unpaid(request, quote.characters)
        stored = await core.quotes.store(quote)
        assert stored.quote is not None
        left_s = core.settings.quote_ttl_s
        return answer(quote_json(core, stored.quote, expires_in_s=left_s), status=201)
    except Exception as error:
        return _refused(error, request)


@router.post("/quotes/{quote_id}/invoice")
async def make_invoice(request: Request, quote_id: str) -> Response:
    """An invoice for a quote; paying it in time queues the quote's jobs at once."""
    core = core_of(request)
    try:
        core.limiter.invoice(request)
        await purchase.refuse_when_closed(core)
        issued = await core.quotes.issue_for(quote_id)
        offer = payment.offer(core, issued)
        return answer({"quote_id": quote_id, **offer.as_json(core)}, status=201)
    except Exception as error:
        return _refused(error, request)


@router.get("/quotes/{quote_id}")
async def get_quote(request: Request, quote_id: str) -> Response:
    """A quote's state; to its payer also its jobs."""
    core = core_of(request)
    try:
        payer = await _payer_if_any(core, request, "quotes")
        stored = await core.quotes.get(quote_id)
        body: dict[str, Any] = {
            "quote_id": stored.id,
            "state": _shown_state(core, stored),
            "base_fee_msat": stored.base_fee_msat,
            "offer_msat": stored.offer_msat,
            "expires_at": time_text(stored.expires_at),
            "expires_in_s": max(0, int((stored.expires_at - core.clock()).total_seconds())),
            "simulated": core.node.simulated,
        }
        if stored.state == "late":
            body["credited_msat"] = await _credited_msat(core, stored)
        if payer is not None and payer.account_id == stored.account_id:
            rows = await core.jobs.of_quote(quote_id)
            body["jobs"] = [_job_links(core, row["id"]) | {"state": row["state"]} for row in rows]
        return answer(body)
    except Exception as error:
        return _refused(error, request)


def _shown_state(core: Core, stored: StoredQuote) -> str:
    if stored.state == "open" and stored.expires_at <= core.clock():
        return "expired"
    return stored.state


async def _credited_msat(core: Core, stored: StoredQuote) -> int:
    async with core.database.connection() as connection:
        received = await connection.fetchval(
            "select received_msat from invoices where payment_hash = $1", stored.payment_hash
        )
    return received or 0


@router.get("/quotes/{quote_id}/events")
async def follow_quote(request: Request, quote_id: str) -> Response:
    """One stream for the payment and all jobs of a quote."""
    core = core_of(request)
    try:
        # First the payer: finding out who pays may be what settles the quote.
        await _payer_if_any(core, request, "quotes")
        stored = await core.quotes.get(quote_id)

        async def is_mine(stored: StoredQuote) -> bool:
            payer = await _payer_if_any(core, request, "quotes")
            return payer is not None and payer.account_id == stored.account_id

        last = request.headers.get("last-event-id")
        return sse.EventStream(quote_events(core, stored, is_mine=is_mine, last_event_id=last))
    except Exception as error:
        return _refused(error, request)


# --- jobs ---------------------------------------------------------------------------------------


@router.post("/jobs")
async def make_jobs(request: Request) -> Response:
    """Buy jobs: from a balance, with a credential, or by paying the 402's invoice.

    `{"quote_id"}` starts a stored quote from a prepaid key.
    """
    core = core_of(request)
    try:
        core.limiter.job(request)
        body = await read_object(request)
        if "quote_id" in body:
            return await _start_quote(core, request, body["quote_id"])
        bought = await purchase.buy(core, request, purchase.parse(core, request, _kind(body), body))
        return _accepted(core, bought.quote_id, bought.job_ids)
    except Exception as error:
        return _refused(error, request)


async def _start_quote(core: Core, request: Request, quote_id: Any) -> Response:
    if not isinstance(quote_id, str):
        raise BadRequest("quote_id must be text", param="quote_id")
    payer = await payer_of(core, request, "quotes")
    stored = await core.quotes.get(quote_id)
    if not (stored.state == "paid" and stored.account_id == payer.account_id):
        await purchase.refuse_when_closed(core)
        if payer.limited_key_id is not None:
            raise Forbidden("a key with a spending limit cannot start a stored quote")
        await core.quotes.start_from_balance(quote_id, payer.account_id, None)
    rows = await core.jobs.of_quote(quote_id)
    ids = tuple(row["id"] for row in rows)
    core.jobs.paid(ids)
    return _accepted(core, quote_id, ids)


def _accepted(core: Core, quote_id: str, job_ids: tuple[str, ...]) -> Response:
    jobs = [_job_links(core, job_id) for job_id in job_ids]
    return answer({"quote_id": quote_id, "jobs": jobs}, status=202)


def _job_links(core: Core, job_id: str) -> dict[str, str]:
    return {
        "id": job_id,
        "token": core.jobs.token(job_id),
        "status_url": f"/jobs/{job_id}",
        "events_url": f"/jobs/{job_id}/events",
    }


@router.get("/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> Response:
    """A job and, once it has ended, its answer."""
    core = core_of(request)
    try:
        row = await open_job(core, request, job_id)
        await core.jobs.touch(row["id"], wipe_after_s=core.settings.wipe_after_s)
        return answer(await core.jobs.view(row))
    except Exception as error:
        return _refused(error, request)


@router.get("/jobs/{job_id}/events")
async def follow_job(request: Request, job_id: str) -> Response:
    """A job as it happens; `Last-Event-ID` resumes after what was seen."""
    core = core_of(request)
    try:
        row = await open_job(core, request, job_id)
        ended = outcome_of(row)
        if ended is not None and ended.wiped:
            raise JobWiped("the answer has been deleted", job=row["id"])
        after = _last_seq(request.headers.get("last-event-id"))
        return sse.EventStream(_events(core, row["id"], after))
    except Exception as error:
        return _refused(error, request)


def _last_seq(text: str | None) -> int | None:
    if text is None or not text.strip():
        return None
    if not text.strip().isdigit() or len(text) > 18:
        raise BadRequest("Last-Event-ID must be the id of an event of this stream")
    return int(text)


async def _events(core: Core, job_id: str, after: int | None) -> AsyncGenerator[bytes, None]:
    try:
        async for event in following.follow(core.jobs, job_id, after_seq=after, place_at_once=True):
            if event is None:
                yield sse.comment("waiting")
                continue
            data = {"job": job_id, "seq": event.seq, **event.data}
            if event.outcome is not None:
                view = await core.jobs.view(await core.jobs.row(job_id))
                data = {"job": view, "seq": event.seq}
            yield sse.event(event.kind, data, event.seq)
    except (RouterError, DatabaseUnavailable) as error:
        yield sse.event("error", {"job": job_id, **problem_of(error).as_json()})


@router.post("/jobs/{job_id}/bump")
async def bump(request: Request, job_id: str) -> Response:
    """Raise the offer of a waiting job to a new total; without balance, 402 for the difference."""
    core = core_of(request)
    try:
        row = await open_job(core, request, job_id)
        body = await read_object(request)
        offer_msat, multiplier = _bump_terms(core, body)
        try:
            return answer(
                await core.jobs.bump(row["id"], offer_msat=offer_msat, multiplier=multiplier)
            )
        except NotEnoughBalance as error:
            return await _bump_invoice(core, request, row, error)
    except Exception as error:
        return _refused(error, request)


def _bump_terms(core: Core, body: dict[str, Any]) -> tuple[int | None, Any]:
    offer_msat, multiplier = body.get("offer_msat"), body.get("fee_multiplier")
    if (offer_msat is None) == (multiplier is None):
        raise BadRequest("give offer_msat or fee_multiplier")
    if multiplier is not None:
        try:
            return None, parse_decimal(multiplier)
        except ValueError as error:
            raise BadRequest(f"fee_multiplier: {error}", param="fee_multiplier") from None
    if isinstance(offer_msat, bool) or not isinstance(offer_msat, int) or offer_msat < 0:
        raise BadRequest("offer_msat must be a whole number of msat", param="offer_msat")
    return offer_msat, None


async def _bump_invoice(
    core: Core, request: Request, row: Any, error: NotEnoughBalance
) -> Response:
    core.limiter.invoice(request)
    issued = await core.quotes.issue_bump(
        row, offer_msat=error.facts["offer_msat"], missing_msat=error.facts["missing_msat"]
    )
    offer = payment.offer(core, issued)
    facts = {"offer_msat": error.facts["offer_msat"], **offer.as_json(core)}
    problem = Problem("payment_required", "pay the difference to raise this job", facts)
    return answer({**problem.as_json(), **facts}, status=402, challenges=offer.challenges)


@router.delete("/jobs/{job_id}")
async def cancel(request: Request, job_id: str) -> Response:
    """Cancel a job: free while it waits, settled as it stands while it runs. 202: it runs at a router
    that has not answered, and will be cancelled there."""
    core = core_of(request)
    try:
        row = await open_job(core, request, job_id)
        ended = await core.jobs.cancel(row["id"])
        view = await core.jobs.view(await core.jobs.row(row["id"]))
        return answer(view, status=200 if ended else 202)
    except Exception as error:
        return _refused(error, request)


async def _payer_if_any(core: Core, request: Request, capability: str) -> Payer | None:
    try:
        return await payment.identify(core, request, payment.facts(core, capability))
    except BadCredential:
        return None
