"""What strangers may put into a request to the simulated network: names and types, checked."""

from __future__ import annotations

from typing import Any

from billing.lightning.simulated.faults import Fault, FaultKind

# SQLite holds 64 bits; sums must fit too.
_INT_MAX = 2**53
_TEXT_MAX = 8192


class Malformed(Exception):
    """The request cannot be understood. Nothing was done."""


# name: (type, may be left out or null)
_ARGUMENTS: dict[str, dict[str, tuple[type, bool]]] = {
    "node_info": {},
    "balance": {},
    "create_invoice": {
        "amount_msat": (int, False),
        "description": (str, False),
        "expiry_s": (int, False),
        "idempotency_key": (str, True),
    },
    "lookup_invoice": {"payment_hash": (str, False)},
    "cancel_invoice": {"payment_hash": (str, False)},
    "pay_invoice": {
        "bolt11": (str, False),
        "max_fee_msat": (int, False),
        "timeout_s": (float, False),
        "max_cltv_blocks": (int, True),
    },
    "lookup_payment": {"payment_hash": (str, False)},
    "list_received": {"since_s": (float, False), "after": (str, True)},
    "list_sent": {"since_s": (float, False), "after": (int, True)},
    "pay": {"invoice": (str, False)},
    "fund": {"amount_msat": (int, False)},
    "resolve": {"settle": (bool, False)},
    "forget": {"wallet": (str, True)},
    "fault": {
        "kind": (str, False),
        "operation": (str, True),
        "wallet": (str, True),
        "payee": (str, True),
        "delay_s": (float, True),
        "times": (int, True),
    },
}


def check_arguments(operation: str, body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation. Raises Malformed on a missing, unknown or mistyped one."""
    wanted = _ARGUMENTS.get(operation)
    if wanted is None:
        raise Malformed("no such operation")
    if unknown := body.keys() - wanted.keys():
        raise Malformed(f"unknown argument: {min(unknown)[:50]!a}")
    arguments: dict[str, Any] = {}
    for name, (kind, optional) in wanted.items():
        value = body.get(name)
        if value is None:
            if not optional:
                raise Malformed(f"{name} is missing")
            continue
        if not _is_a(value, kind):
            raise Malformed(f"{name} is not a usable {kind.__name__}")
        arguments[name] = value
    return arguments


def fault_from(body: dict[str, Any]) -> Fault:
    """A fault as JSON has it. Raises Malformed."""
    arguments = check_arguments("fault", body)
    try:
        kind = FaultKind(arguments.pop("kind"))
        return Fault(kind, **arguments)
    except ValueError as error:
        raise Malformed(str(error)) from None


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        # Comparisons with NaN are false, so it does not get through.
        return isinstance(value, int | float) and -_INT_MAX < value < _INT_MAX
    if kind is int:
        return isinstance(value, int) and -_INT_MAX < value < _INT_MAX
    if kind is str:
        return isinstance(value, str) and len(value) <= _TEXT_MAX and _is_storable(value)
    return False


def _is_storable(text: str) -> bool:
    """Half a surrogate pair is valid JSON and no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
