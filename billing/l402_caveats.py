"""The restrictions that an L402 token of ours may carry, and whether a request keeps within them.

A caveat is `key=value`. Whoever holds a token may append caveats, so that he can hand on a weaker
token; he cannot take any away. A key that is repeated must be at least as strict as before, and
every occurrence is enforced (L4-6 of the peer rules).

    key                   value                      a repeat    a request
    services              llm:0[,name:tier...]       a subset    names `llm`
    llm_capabilities      chat,embeddings,...        a subset    asks for one of them
    llm_valid_until       unix seconds               <=          comes no later
    llm_quote             quote id                   equal       belongs to it
    llm_model             model name                 equal       asks for no other
    llm_max_tokens        whole number               <=          asks for no more
    llm_max_multiplier    decimal, 1 or more         <=          offers no more
    llm_budget_msat       whole number               <=          spends no more
    llm_request_sha256    hex digest                 equal       is that very request

Every other key that begins with `llm_` is refused: a restriction that we do not know must not be
void in silence. All remaining keys belong to others and are skipped, as the specification asks.
A fact that a request does not have (None) keeps within no caveat about it: a token for one model
reads no balance and withdraws nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.errors import BadCredential

SERVICE = "llm"

_NUMBER = re.compile(r"[0-9]{1,18}")
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_WORD = re.compile(r"[a-z0-9_-]{1,64}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SERVICE = re.compile(r"([a-z0-9_-]{1,64}):([0-9]{1,3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What a token's caveats are held against. None: the request has nothing of that sort.

    `capability` is what is being done (`chat`, `embeddings`, `withdraw`, ...), `models` all models
    named, `max_tokens` and `multiplier_milli` the largest of any job, `spend_msat` what this token
    will have spent in all once this request is charged, `request_sha256` lower-case hex.
    """

    now_unix_s: int
    capability: str
    quote_id: str | None = None
    models: frozenset[str] | None = None
    max_tokens: int | None = None
    multiplier_milli: int | None = None
    spend_msat: int | None = None
    request_sha256: str | None = None


def write_caveats(
    *,
    capabilities: Sequence[str] | None = None,
    valid_until_unix_s: int | None = None,
    quote_id: str | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    max_multiplier: Decimal | None = None,
    budget_msat: int | None = None,
    request_sha256: str | None = None,
) -> tuple[str, ...]:
    """The caveats of a new token, `services=llm:0` first. ValueError if one could not be read back.

    A token that pays for more than one request of its account must not carry `quote_id`,
    `model` or `request_sha256`: clients keep one credential per domain and send it on every path.
    """
    if any("," in capability for capability in capabilities or ()):
        raise ValueError("a capability is one word")
    values = {
        "services": f"{SERVICE}:0",
        "llm_capabilities": None if capabilities is None else ",".join(capabilities),
        "llm_valid_until": valid_until_unix_s,
        "llm_quote": quote_id,
        "llm_model": model,
        "llm_max_tokens": max_tokens,
        "llm_max_multiplier": None if max_multiplier is None else f"{max_multiplier:f}",
        "llm_budget_msat": budget_msat,
        "llm_request_sha256": request_sha256,
    }
    for key, value in values.items():
        if value is not None and _RULES[key].read(str(value)) is None:
            raise ValueError(f"{key} has no such value")
    return tuple(f"{key}={value}" for key, value in values.items() if value is not None)


def check_caveats(caveats: Iterable[bytes], facts: RequestFacts) -> None:
    """Return if `facts` keep within every caveat; raise BadCredential otherwise.

    `malformed`: a caveat of ours is unreadable, unknown, or weaker than an earlier one.
    `wrong_service`, `expired`, `insufficient`: a good token, but not one for this request.
    """
    strictest: dict[str, Any] = {}
    for caveat in caveats:
        key, value = _split(caveat)
        if key is None:
            continue
        rule = _RULES[key]
        limit = rule.read(value)
        if limit is None or (key in strictest and not rule.as_strict(limit, strictest[key])):
            raise BadCredential("malformed")
        strictest[key] = limit
    # The signature made the order binding, so the last of each key is the strictest.
    for key, limit in strictest.items():
        if not _RULES[key].keeps(limit, facts):
            raise BadCredential(_RULES[key].reason)


def _split(caveat: bytes) -> tuple[str | None, str]:
    """A caveat's key, if it is one of ours, and its value. Raises BadCredential("malformed")."""
    text = caveat.decode("utf-8", errors="replace")
    key, equals, value = text.partition("=")
    if key in _RULES and equals:
        return key, value
    # `llm_model = x` or `LLM_MODEL=x` was meant to restrict, and must not pass as a stranger's.
    meant = key.strip().lower()
    if meant == "services" or meant.startswith(f"{SERVICE}_"):
        raise BadCredential("malformed")
    return None, ""


@dataclass(frozen=True, slots=True)
class _Rule:
    read: Callable[[str], Any]  # the value, or None when it is malformed
    as_strict: Callable[[Any, Any], bool]  # is the first at least as strict as the second
    keeps: Callable[[Any, RequestFacts], bool]
    reason: str = "insufficient"


def _read_number(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None


def _read_decimal(text: str) -> Decimal | None:
    return Decimal(text) if _DECIMAL.fullmatch(text) else None


def _read_name(text: str) -> str | None:
    return text if 0 < len(text) <= 200 and text.isprintable() else None


def _read_digest(text: str) -> str | None:
    return text.lower() if _DIGEST.fullmatch(text) else None


def _read_words(text: str) -> frozenset[str] | None:
    words = text.split(",")
    return frozenset(words) if all(_WORD.fullmatch(word) for word in words) else None


def _read_services(text: str) -> dict[str, int] | None:
    tiers: dict[str, int] = {}
    for item in text.split(","):
        match = _SERVICE.fullmatch(item)
        if match is None or match[1] in tiers:
            return None
        tiers[match[1]] = int(match[2])
    return tiers


def _fewer_services(later: dict[str, int], earlier: dict[str, int]) -> bool:
    return all(name in earlier and tier <= earlier[name] for name, tier in later.items())


def _at_most(fact: int | None, limit: int | Decimal) -> bool:
    return fact is not None and fact <= limit


def _no_more(later: Any, earlier: Any) -> bool:
    return later <= earlier  # for numbers as for sets


def _same(later: Any, earlier: Any) -> bool:
    return later == earlier


_RULES: dict[str, _Rule] = {
    "services": _Rule(
        _read_services, _fewer_services, lambda limit, _: SERVICE in limit, "wrong_service"
    ),
    "llm_capabilities": _Rule(_read_words, _no_more, lambda limit, f: f.capability in limit),
    "llm_valid_until": _Rule(
        _read_number, _no_more, lambda limit, f: f.now_unix_s <= limit, "expired"
    ),
    "llm_quote": _Rule(_read_name, _same, lambda limit, f: f.quote_id == limit),
    "llm_model": _Rule(_read_name, _same, lambda limit, f: f.models == frozenset({limit})),
    "llm_max_tokens": _Rule(_read_number, _no_more, lambda limit, f: _at_most(f.max_tokens, limit)),
    "llm_max_multiplier": _Rule(
        _read_decimal, _no_more, lambda limit, f: _at_most(f.multiplier_milli, limit * 1000)
    ),
    "llm_budget_msat": _Rule(
        _read_number, _no_more, lambda limit, f: _at_most(f.spend_msat, limit)
    ),
    "llm_request_sha256": _Rule(_read_digest, _same, lambda limit, f: f.request_sha256 == limit),
}
