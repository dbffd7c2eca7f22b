"""How LND's REST interface answers: results, errors of two shapes, and bytes in base64."""

from __future__ import annotations

import base64

from billing.lightning import BackendAuthError, OutcomeUnknown
from billing.lightning.node_http import Fields, Reply


def error(reply: Reply) -> Fields | None:
    """The error of an answer, of either shape."""
    if not isinstance(reply.value, dict):
        return None
    wrapped = reply.value.get("error")
    if isinstance(wrapped, dict):
        return Fields(reply.backend, reply.operation, wrapped)
    return reply.fields() if reply.status != 200 else None


def ok(reply: Reply) -> Fields:
    if reply.status != 200:
        raise _unexpected(reply)
    return reply.fields()


def streamed(reply: Reply) -> Fields:
    if reply.status != 200 or error(reply) is not None:
        raise _unexpected(reply)
    return reply.fields().object("result")


def _unexpected(reply: Reply) -> OutcomeUnknown | BackendAuthError:
    words = code_words(reply)
    # LND answers 500 and code 2 to a macaroon it does not accept, with text only to tell it by. Of
    # a payment that is not believed: the look-up, with the same macaroon, will say the same.
    if reply.operation != "pay_invoice" and any(
        sign in words for sign in ("macaroon", "permission denied", "verification failed")
    ):
        return BackendAuthError("lnd", reply.operation, "the node refuses our macaroon", words)
    return reply.unexpected(words)


def code_words(reply: Reply) -> str:
    found = error(reply)
    return "" if found is None else f"code {found.get('code')}: {found.get('message')}"


def reserve_msat(channel: Fields, side: str) -> int:
    constraints = channel.get(side)
    if not isinstance(constraints, dict):
        return 0
    return channel.object(side).number_or("chan_reserve_sat", 0) * 1000


def hex_of(in_base64: str, operation: str) -> str:
    try:
        return base64.b64decode(in_base64, validate=True).hex()
    except ValueError:
        raise OutcomeUnknown("lnd", operation, "the answer cannot be read", "r_hash") from None
