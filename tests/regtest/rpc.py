"""JSON-RPC over HTTP, as bcoin and Electrum speak it: one connection for each call.

Electrum answers `lnpay` only when the payment has ended, so calls must not wait for each other.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from typing import Any

import httpx

# Reading the machine's certificates for each of thousands of plain connections would take longer
# than all the rest.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class RpcError(Exception):
    """What the server says in `error`."""


@dataclass(frozen=True, slots=True)
class Rpc:
    url: str
    user: str
    password: str

    async def call(self, method: str, params: dict[str, Any] | list[Any]) -> Any:
        """The result. Raises RpcError, and httpx.RequestError where nobody listens."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        async with httpx.AsyncClient(
            auth=(self.user, self.password),
            timeout=httpx.Timeout(10, read=None),
            trust_env=False,
            verify=_NO_CERTIFICATES,
        ) as http:
            answer = await http.post(self.url, json=body)
        try:
            found = answer.json()
        except json.JSONDecodeError:
            raise RpcError(f"{method}: {answer.status_code} {answer.text[:200]}") from None
        if found.get("error"):
            raise RpcError(f"{method}: {found['error']}")
        return found.get("result")
