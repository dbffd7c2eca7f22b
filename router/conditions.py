"""QueenBee's extras of a request: `gpu_filter`, `timeout`, `ft_timeout` (QB-R5, QB-R6). Pure.

A filter that is not understood is refused: ignored, it would let the job go to whom it was kept from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from router.demands import of_conditions, read_version
from router.errors import BadRequest
from worker.protocol import Conditions

LONGEST_S = 86_400.0
MOST_CAPABILITIES = 20
# PostgreSQL's B-trees hold 2704 bytes; the name of a model may have 800 of them.
MOST_PREFIX = 1500
_KEYS = {"min_version", "capabilities", "pubkey", "worker_id", "slug", "user_id"}


def read_conditions(body: Mapping[str, Any]) -> Conditions | None:
    """What a body asks of the worker; None for the many that ask nothing. Raises BadRequest."""
    wanted = body.get("gpu_filter")
    facts = _filter(wanted) if wanted else {}
    facts["timeout_s"] = _seconds(body, "timeout")
    # Between two tokens: an answer that comes in one piece has none to wait for.
    token_s = _seconds(body, "ft_timeout")
    facts["token_s"] = token_s if body.get("stream") is True else None
    asked = {name: value for name, value in facts.items() if value not in (None, [])}
    conditions = Conditions(**asked) if asked else None
    if conditions is not None and len(of_conditions(conditions).prefix) > MOST_PREFIX:
        # It is a part of the name of a lane, which an index must hold.
        raise BadRequest("gpu_filter is too long", param="gpu_filter")
    return conditions


def _filter(wanted: Any) -> dict[str, Any]:
    if not isinstance(wanted, Mapping):
        raise BadRequest("gpu_filter must be an object", param="gpu_filter")
    unknown = [key for key in wanted if key not in _KEYS]
    if unknown:
        raise BadRequest(f"gpu_filter has no {str(unknown[0])[:50]!r}", param="gpu_filter")
    capabilities = wanted.get("capabilities") or []
    if (
        not isinstance(capabilities, list)
        or len(capabilities) > MOST_CAPABILITIES
        or not all(isinstance(name, str) and 0 < len(name) <= 100 for name in capabilities)
    ):
        raise BadRequest("gpu_filter.capabilities must be a list of names", param="gpu_filter")
    version = _name(wanted, "min_version")
    if version is not None and read_version(version) is None:
        raise BadRequest("gpu_filter.min_version must be like 1.2.3", param="gpu_filter")
    return {
        "min_version": version,
        "capabilities": capabilities,
        "worker": _name(wanted, "pubkey") or _name(wanted, "worker_id"),
        "slug": _name(wanted, "slug"),
        "user_id": _name(wanted, "user_id"),
    }


def _name(wanted: Mapping[str, Any], key: str) -> str | None:
    value = wanted.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 200 or "\0" in value:
        raise BadRequest(f"gpu_filter.{key} must be a name", param="gpu_filter")
    return value


def _seconds(body: Mapping[str, Any], name: str) -> float | None:
    """A time limit; None for none, which QueenBee also writes as -1."""
    value = body.get(name)
    if value is None or value == -1:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 < value <= LONGEST_S
    ):
        raise BadRequest(f"{name} must be seconds, at most {LONGEST_S:.0f}", param=name)
    return float(value)
