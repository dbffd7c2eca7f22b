"""Single fields of a request body, checked. Raises BadRequest that names the field. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.errors import BadRequest


def flag(body: Mapping[str, Any], name: str) -> bool:
    """True or false; missing is false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", param=name)
    return bool(value)


def integer(
    body: Mapping[str, Any], name: str, *, low: int, high: int, default: int | None = None
) -> int | None:
    """A whole number from `low` to `high`; `default` when it is missing."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return value
