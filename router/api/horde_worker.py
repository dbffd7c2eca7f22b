"""AI Horde's text door, for workers: pop and submit (AH-7…AH-10, KP-2…KP-9).

A pop is answered with 200 whenever there is any way to: workers of this dialect punish everything else
(KP-7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from billing.errors import BadCredential
from router import pull_records
from router.api import payment
from router.api.answers import answer, core_of, read_object
from router.api.horde_client import satoshi
from router.api.horde_errors import HordeRefusal, bad_key, refusal
from router.api.kobold_worker import address_of, count_new, text_of, tokens_of
from router.core import Core
from router.door_ids import Door
from router.errors import BadRequest
from router.pull_gate import NotTheOwner, Offer, Popped
from router.pull_records import LONGEST_KEY, SHORTEST_KEY
from router.pull_sessions import End
from router.sessions import RefusedWorker

router = APIRouter(prefix="/api/v2", tags=["AI Horde"])

# AH-20.
POPS_PER_MINUTE = 3600
DEFAULT_LENGTH, DEFAULT_CONTEXT = 512, 2048
_NO_SECRET = (
    f"A worker's apikey is a secret of its own, of {SHORTEST_KEY} to {LONGEST_KEY} characters, which"
    " keeps its name and its earnings; it need not be bought."
)
MOST_MODELS, MOST_THREADS = 50, 50
# Our codes, and theirs (AH-8).
_SKIPPED = {
    "model_not_served": "models",
    "context_too_short": "max_context_length",
    "max_tokens_too_low": "max_length",
}
_WRONG_OWNER = HordeRefusal(403, "WrongCredentials", "Wrong credentials to submit as this worker.")


@router.post("/generate/text/pop")
async def pop(request: Request) -> Response:
    """A prompt to answer, or why there is none. The first pop of a name keeps it for its apikey.

    `ln_url`: where to pay; a name with a Lightning address in it says it as well. What is earned
    before is kept.
    """
    core = core_of(request)
    try:
        core.limiter.poll(request, "horde-pop", POPS_PER_MINUTE)
        owner_hash = _owner(request)
        offer = _offer(await read_object(request), owner_hash)
        popped = await core.pull_gate.pop(offer, on_new=lambda: count_new(core, request))
        return answer(_job(core, popped) if popped.given else _nothing(popped))
    except NotTheOwner:
        return refusal(_WRONG_OWNER, request)
    except RefusedWorker as refused:
        return _refused(refused, request)
    except BadCredential:
        return bad_key(request, _NO_SECRET)
    except Exception as error:
        return refusal(error, request)


def _owner(request: Request) -> bytes:
    presented = request.headers.get("apikey", "").strip()
    if presented == payment.ANONYMOUS:
        raise HordeRefusal(
            403, "AnonForbiddenWorker", "Anonymous is not allowed to run workers. Choose a key."
        )
    return pull_records.owner_of_key(presented)


def _offer(body: Mapping[str, Any], owner_hash: bytes) -> Offer:
    models = body.get("models")
    if not models:
        raise HordeRefusal(
            400,
            "BadRequest",
            "Unfortunately we cannot accept workers serving unrecognised models at this time",
        )
    if not isinstance(models, list) or len(models) > MOST_MODELS:
        raise BadRequest(f"models must be a list of at most {MOST_MODELS} names", param="models")
    names = [text_of({"models": model}, "models", most=200) for model in models]
    threads = tokens_of(body, "threads", 1)
    if threads > MOST_THREADS:
        raise BadRequest(f"threads may be at most {MOST_THREADS}", param="threads")
    agent = body.get("bridge_agent")
    return Offer(
        door=Door.HORDE,
        name=text_of(body, "name"),
        owner_hash=owner_hash,
        models=tuple(dict.fromkeys(names)),
        max_length=tokens_of(body, "max_length", DEFAULT_LENGTH),
        context_length=tokens_of(body, "max_context_length", DEFAULT_CONTEXT),
        threads=threads,
        agent=agent[:1000] if isinstance(agent, str) and agent.isprintable() else None,
        ln_url=address_of(body),
    )


def _job(core: Core, popped: Popped) -> dict[str, Any]:
    (given,) = popped.given
    return {
        "payload": given.payload,
        "id": given.id,
        "ids": [given.id],
        "ttl": round(core.pull_gate.ttl_s),
        "model": given.model,
        "softprompt": None,
        "skipped": {},
        "messages": [],
        "extra_source_images": [],
    }


def _nothing(popped: Popped) -> dict[str, Any]:
    """KP-4, KP-9: all four keys that any worker reads are there."""
    skipped = {_SKIPPED[code]: n for code, n in popped.skipped.items() if code in _SKIPPED and n}
    messages = []
    if popped.resting:
        messages.append({"message": "This worker is in maintenance mode.", "origin": "router"})
    return {
        "payload": {},
        "id": None,
        "ids": [],
        "softprompt": None,
        "skipped": skipped,
        "messages": messages,
    }


def _refused(refused: RefusedWorker, request: Request) -> Response:
    told = refused.answer
    if told.retryable:
        nothing = _nothing(Popped([]))
        return answer(nothing | {"messages": [{"message": told.message, "origin": "router"}]})
    rc = "WorkerFlaggedMaintenance" if told.code == "banned" else told.code
    status = 403 if told.code == "banned" else 400
    return refusal(HordeRefusal(status, rc, told.message), request)


@router.post("/generate/text/submit")
async def submit(request: Request) -> Response:
    """The answer to a prompt, or `state: faulted`; the reward is in satoshi (AH-10, KP-6)."""
    core = core_of(request)
    try:
        owner_hash = _owner(request)
        body = await read_object(request)
        given_id = text_of(body, "id")
        state = body.get("state") or "ok"
        if state not in ("ok", "censored", "faulted", "csam"):
            raise BadRequest("state must be ok, censored, faulted or csam", param="state")
        text = body.get("generation", "" if state == "faulted" else None)
        if not isinstance(text, str):
            raise BadRequest("generation must be a text", param="generation")
        word = await core.pull_submits.submit(
            given_id, owner_hash, text if state != "faulted" else None
        )
        if word.wrong_owner:
            raise _WRONG_OWNER
        if word.earned_msat is None:
            raise _over(core, given_id, word.ended)
        return answer({"reward": satoshi(word.earned_msat)})
    except BadCredential:
        return bad_key(request, _NO_SECRET)
    except Exception as error:
        return refusal(error, request)


def _over(core: Core, given_id: str, ended: End | None) -> HordeRefusal:
    what = f"Processing Generation with ID {given_id[:40]}"
    match ended:
        case None:
            return HordeRefusal(404, "InvalidJobID", f"{what} does not exist.")
        case End.ABORTED:
            return HordeRefusal(
                400,
                "AbortedGen",
                f"{what} took too long to process and has been aborted! Please check that your worker"
                f" answers within {core.pull_gate.ttl_s:.0f} seconds.",
            )
        case _:
            return HordeRefusal(400, "DuplicateGen", f"{what} already submitted.")
