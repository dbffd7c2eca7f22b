"""The JSON-RPC of an Electrum daemon: one call, and what its errors prove."""

from __future__ import annotations

import base64
from typing import Any

from billing.lightning import BackendRejected, OutcomeUnknown
from billing.lightning.node_http import READ_TIMEOUT_S, Fields, NodeHttp

NAME = "electrum"


class Refused(Exception):
    """Electrum's own error; its text may quote anything, and is not passed on."""

    def __init__(self, message: str) -> None:
        super().__init__("an error of Electrum's")
        self.message = message


class ElectrumRpc:
    """A daemon at `url`, with its rpcuser and rpcpassword."""

    def __init__(self, url: str, user: str, password: str) -> None:
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._http = NodeHttp(NAME, url, headers={"Authorization": f"Basic {credentials}"})

    async def call(
        self,
        operation: str,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        may_refuse: bool = False,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> Any:
        """The method's result. Raises Refused only if the caller takes it with `may_refuse`."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params or {}}
        reply = await self._http.request(
            operation, "POST", "/", body=body, read_timeout_s=read_timeout_s
        )
        if reply.status != 200:
            raise reply.unexpected(method)
        answer = reply.fields()
        if answer.get("error") is None:
            return answer.get("result")
        message = answer.object("error").get("message")
        if isinstance(message, str) and "wallet not loaded" in message.lower():
            words = "the daemon has no wallet open: electrum load_wallet"
            raise BackendRejected(NAME, operation, words, reason="unsupported")
        if may_refuse:
            raise Refused(message if isinstance(message, str) else "")
        raise unclear(operation, method)

    async def object(
        self,
        operation: str,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        may_refuse: bool = False,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> Fields:
        """The same, for a result that is an object."""
        value = await self.call(
            operation, method, params, may_refuse=may_refuse, read_timeout_s=read_timeout_s
        )
        if not isinstance(value, dict):
            raise OutcomeUnknown(NAME, operation, "the answer cannot be read")
        return Fields(NAME, operation, value)

    async def aclose(self) -> None:
        await self._http.aclose()


def unclear(operation: str, method: str = "") -> OutcomeUnknown:
    return OutcomeUnknown(NAME, operation, "Electrum failed", method)
