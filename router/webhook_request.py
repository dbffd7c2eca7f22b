"""The field `webhook` of a request: whom to tell when its jobs have ended. Pure.

"https://example.com/hook", or {"url": "https://example.com/hook", "include_result": true}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billing.outside_url import BadOutsideUrl, OutsideRules, parse_outside_url
from router.errors import BadRequest

_FIELDS = frozenset({"url", "include_result"})


@dataclass(frozen=True, slots=True)
class Webhook:
    url: str
    include_result: bool


def read_webhook(body: Mapping[str, Any], rules: OutsideRules) -> str | None:
    """The webhook of a request as it is kept with its jobs; None without one. Raises BadRequest."""
    given = body.get("webhook")
    if given is None or given == "":
        return None
    asked = {"url": given} if isinstance(given, str) else given
    if not isinstance(asked, Mapping) or not set(asked) <= _FIELDS:
        raise BadRequest(
            "webhook must be a URL, or an object with url and include_result", param="webhook"
        )
    url, include_result = asked.get("url"), asked.get("include_result", False)
    if not isinstance(url, str) or not isinstance(include_result, bool):
        raise BadRequest("webhook: url is a text, include_result true or false", param="webhook")
    try:
        # Its host is resolved, and every address of it checked, when it is called.
        parse_outside_url(url, rules)
    except BadOutsideUrl as error:
        raise BadRequest(f"webhook: {error}", param="webhook") from None
    return json.dumps({"url": url, "include_result": include_result})


def stored_webhook(text: str) -> Webhook:
    return Webhook(**json.loads(text))
