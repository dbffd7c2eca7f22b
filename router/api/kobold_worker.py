"""The KoboldAI-cluster door, for workers: pop and submit (KC-5…KC-7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from router.api.answers import answer, core_of, read_object
from router.api.kobold import MAX_NAME, refusal, username_of
from router.core import Core
from router.door_ids import Door
from router.errors import BadRequest
from router.pull_gate import NotTheOwner, Offer
from router.pull_sessions import End
from router.rate_limits import KEY_FAILURES_PER_MINUTE
from router.sessions import RefusedWorker

router = APIRouter(tags=["KoboldAI-cluster"])

# KC-11 allows two a second for each address; here each worker at an address has its own.
POPS_PER_MINUTE, POPS_FROM_ADDRESS = 120, 1200
# Workers that come for the first time, from one address, at either door.
NEW_PER_MINUTE = 60
DEFAULT_LENGTH, DEFAULT_CONTEXT = 512, 2048
MOST_TOKENS = 100_000_000
_SKIPPED = {
    "model": "model_not_served",
    "max_length": "max_tokens_too_low",
    "max_content_length": "context_too_short",
}


@router.post("/generate/pop")
async def pop(request: Request) -> Response:
    """A prompt to answer, or why there is none. The first pop of a name keeps it for its password.

    `ln_url`: where to pay; a name or username that is a Lightning address says it as well. What is
    earned before is kept.
    """
    core = core_of(request)
    try:
        body = await read_object(request)
        core.limiter.poll(request, "kobold-pop", POPS_FROM_ADDRESS)
        offer = await _offer(core, request, body)
        core.limiter.poll(request, f"pop-{offer.name}", POPS_PER_MINUTE)
        popped = await core.pull_gate.pop(offer, on_new=lambda: count_new(core, request))
        if popped.given:
            (given,) = popped.given
            return answer({"id": given.id, "payload": given.payload})
        skipped = {name: popped.skipped.get(code, 0) for name, code in _SKIPPED.items()}
        return answer({"id": None, "skipped": skipped})
    except NotTheOwner as name:
        return _wrong(core, request, str(name))
    except RefusedWorker as refused:
        return answer({"message": refused.answer.message, "code": refused.answer.code}, status=403)
    except Exception as error:
        return refusal(error, request)


async def _owner(core: Core, request: Request, name: str, password: str) -> bytes:
    """Raises TooManyRequests: a password that is new here takes a core for a while to look at."""

    def may_work() -> None:
        core.limiter.poll(request, "kobold-password", KEY_FAILURES_PER_MINUTE)

    return await core.pull_gate.passwords.owner(name, password, before_work=may_work)


async def _offer(core: Core, request: Request, body: Mapping[str, Any]) -> Offer:
    name, password = text_of(body, "name"), text_of(body, "password", most=200)
    return Offer(
        door=Door.KOBOLD,
        name=name,
        owner_hash=await _owner(core, request, name, password),
        models=(text_of(body, "model", most=200),),
        max_length=tokens_of(body, "max_length", DEFAULT_LENGTH),
        context_length=tokens_of(body, "max_content_length", DEFAULT_CONTEXT),
        shown_as=username_of(body).partition("@")[0] or "anonymous",
        ln_url=address_of(body) or _address_in(username_of(body)),
    )


def count_new(core: Core, request: Request) -> None:
    """A name that nobody has is kept for good. Raises TooManyRequests."""
    core.limiter.poll(request, "new workers", NEW_PER_MINUTE)


def text_of(body: Mapping[str, Any], field: str, *, most: int = MAX_NAME) -> str:
    """A needed field that is a name. Raises BadRequest."""
    value = body.get(field)
    if value is None:
        raise BadRequest(
            "Missing required parameter in the JSON body or the post body or the query string",
            param=field,
        )
    if not isinstance(value, str) or not 0 < len(value) <= most or not value.isprintable():
        raise BadRequest(f"{field} must be a text of at most {most} characters", param=field)
    return value


def tokens_of(body: Mapping[str, Any], field: str, default: int) -> int:
    """A limit in tokens. Raises BadRequest."""
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TOKENS:
        raise BadRequest(f"{field} must be a whole number of tokens", param=field)
    return value


def address_of(body: Mapping[str, Any]) -> str | None:
    """Where to pay, if the worker says so. Raises BadRequest."""
    value = body.get("ln_url")
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 2000:
        raise BadRequest("ln_url must be a Lightning address or an LNURL", param="ln_url")
    return value


def _address_in(username: str) -> str | None:
    return username if "@" in username and " " not in username else None


@router.post("/generate/submit")
async def submit(request: Request) -> Response:
    """The answer to a prompt; the reward are its words (KC-7), and the money goes to the worker."""
    core = core_of(request)
    try:
        body = await read_object(request)
        given_id, password = text_of(body, "id"), text_of(body, "password", most=200)
        text = body.get("generation")
        if not isinstance(text, str):
            raise BadRequest("generation must be a text", param="generation")
        name, ended = await core.pull_submits.name_of(given_id)
        if name is None:
            return _over(given_id, ended)
        owner_hash = await _owner(core, request, name, password)
        word = await core.pull_submits.submit(given_id, owner_hash, text)
        if word.wrong_owner:
            return _wrong(core, request, name)
        if word.earned_msat is None:
            return _over(given_id, word.ended)
        return answer({"reward": len(text.split())})
    except Exception as error:
        return refusal(error, request)


def _over(given_id: str, ended: End | None) -> Response:
    what = f"Processing Generation with ID {given_id[:40]}"
    match ended:
        case None:
            return answer(f"{what} does not exist", status=404)
        case End.ABORTED:
            # Its time was over. Told an error, the bridge of this dialect would send it again for
            # ever (RC-7).
            return answer({"reward": 0})
        case _:
            return answer(f"{what} already submitted", status=400)


def _wrong(core: Core, request: Request, name: str) -> Response:
    try:
        core.limiter.failed(request, "worker password", KEY_FAILURES_PER_MINUTE)
    except Exception as throttled:
        return refusal(throttled, request)
    return answer(f"wrong credentials for utilizing instance {name}", status=401)
