"""HTTP to a Lightning node: one client, no retries, and what each failure proves.

    no connection, TLS or DNS failure, no free connection   -> BackendUnavailable
    anything after the request has begun to leave           -> OutcomeUnknown
    401, 403                                                -> BackendAuthError

Every other status is the back end's to read: nodes differ in what they mean by it. A response may
hold preimages of unpaid invoices, so none is logged and none is put into an error.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from billing.lightning import BackendAuthError, BackendUnavailable, OutcomeUnknown, bounded_answer
from billing.lightning.kept_http import KeptHttp, NoAnswer, NotSent
from billing.public_tls import public_tls

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
# Paying calls may each wait for an HTLC, and the others must not wait behind them.
_CONNECTIONS = 128
# For streams alone.
_LIMITS = httpx.Limits(max_connections=16, max_keepalive_connections=0)
# A code of a node, or a word of its, in an error's detail: long enough to find, short enough to log.
_DETAIL_MAX = 200


class StreamQuiet(Exception):
    """Nothing came on a stream for as long as was asked; it may be dead, or there was nothing."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A node's whole answer. `value` is its JSON, or None where it is none; `text` is what it said
    then."""

    backend: str
    operation: str
    status: int
    value: Any
    text: str

    def fields(self) -> Fields:
        """The answer as an object. Raises OutcomeUnknown when it is none."""
        if not isinstance(self.value, dict):
            raise OutcomeUnknown(self.backend, self.operation, "the answer cannot be read")
        return Fields(self.backend, self.operation, self.value)

    def unexpected(self, detail: str = "") -> OutcomeUnknown:
        """What to raise for an answer that says nothing certain."""
        words = f"HTTP {self.status} {detail}".strip()
        return OutcomeUnknown(self.backend, self.operation, "the node failed", words[:_DETAIL_MAX])


class Fields:
    """An object of a node's, read strictly: what is missing or misshapen raises OutcomeUnknown."""

    def __init__(self, backend: str, operation: str, values: Mapping[str, Any]) -> None:
        self._backend = backend
        self._operation = operation
        self._values = values

    def get(self, name: str) -> Any:
        """What is there, of whatever shape; None when it is not."""
        return self._values.get(name)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str):
            raise self._bad(name)
        return value

    def number(self, name: str) -> int:
        """An integer, also one in a string, as LND writes 64 bits, or in a string of `…msat`."""
        value = self._values.get(name)
        if isinstance(value, str):
            digits = value.removesuffix("msat")
            if digits.removeprefix("-").isascii() and digits.removeprefix("-").isdigit():
                return int(digits)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self._bad(name)

    def number_or(self, name: str, default: int) -> int:
        return default if self._values.get(name) is None else self.number(name)

    def object(self, name: str) -> Fields:
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self._bad(name)
        return Fields(self._backend, self._operation, value)

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; a missing one is empty."""
        return read_objects(self._backend, self._operation, self._values.get(name), name)

    def _bad(self, name: str) -> OutcomeUnknown:
        return OutcomeUnknown(
            self._backend, self._operation, "the answer lacks a field, or has it misshapen", name
        )


def read_objects(backend: str, operation: str, value: Any, name: str) -> list[Fields]:
    """A list of objects, or OutcomeUnknown; None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise OutcomeUnknown(backend, operation, "the answer lacks a field", name)
    return [Fields(backend, operation, part) for part in value]


class NodeHttp:
    """One set of credentials at one node. `certificate` is a PEM file to trust as an authority,
    in place of the public ones."""

    def __init__(
        self,
        backend: str,
        url: str,
        *,
        headers: Mapping[str, str],
        certificate: Path | None = None,
    ) -> None:
        self._backend = backend
        tls = trusting(certificate) if certificate else public_tls()
        self._calls = KeptHttp(
            url, headers=headers, tls=tls, connect_timeout_s=CONNECT_TIMEOUT_S, most=_CONNECTIONS
        )
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={**headers, **bounded_answer.IDENTITY},
            verify=tls,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=_LIMITS,
            trust_env=False,
            follow_redirects=False,
        )

    async def request(
        self,
        operation: str,
        method: str,
        path: str,
        *,
        body: Any = None,
        form: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> Reply:
        """One request and its whole answer, of any status but 401 and 403."""
        content, content_type = b"", "application/json"
        if form is not None:
            content, content_type = urlencode(form).encode(), "application/x-www-form-urlencoded"
        elif body is not None:
            content = json.dumps(body).encode()
        try:
            status, answer = await self._calls.request(
                method,
                f"{path}?{urlencode(query)}" if query else path,
                body=content,
                content_type=content_type,
                read_timeout_s=read_timeout_s,
            )
        except NotSent as error:
            raise self._unreachable(operation, str(error)) from None
        except NoAnswer as error:
            raise self._unanswered(operation, str(error)) from None
        self._refuse_unauthorized(operation, status)
        return self._reply(operation, status, answer)

    async def lines(
        self,
        operation: str,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        read_timeout_s: float,
    ) -> AsyncIterator[Reply]:
        """A stream of JSON lines, each as a reply of its own; one whole reply where the status is
        not 200. Ends where the node ends it. Raises StreamQuiet after `read_timeout_s` of nothing.
        """
        try:
            async with self._client.stream(
                method,
                path,
                json=body,
                params=None if query is None else dict(query),
                timeout=httpx.Timeout(read_timeout_s, connect=CONNECT_TIMEOUT_S),
            ) as response:
                self._refuse_unauthorized(operation, response.status_code)
                if response.status_code != 200:
                    said = await bounded_answer.whole(response)
                    yield self._reply(operation, response.status_code, said)
                    return
                async for line in bounded_answer.lines(response):
                    yield self._reply(operation, 200, line)
        except httpx.ReadTimeout:
            raise StreamQuiet from None
        except httpx.RequestError as error:
            raise self._failed(operation, error) from None
        except bounded_answer.TooLong as error:
            raise self._unanswered(operation, f"AnswerTooLong: {error}") from None

    async def aclose(self) -> None:
        # Shielded, so that a cancelled shutdown does not leave sockets behind.
        await asyncio.shield(self._client.aclose())
        await self._calls.aclose()

    def _refuse_unauthorized(self, operation: str, status: int) -> None:
        if status in (401, 403):
            raise BackendAuthError(
                self._backend, operation, "the node refuses our credentials", f"HTTP {status}"
            )

    def _reply(self, operation: str, status: int, content: bytes) -> Reply:
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        return Reply(self._backend, operation, status, value, text)

    def _failed(
        self, operation: str, error: httpx.RequestError
    ) -> BackendUnavailable | OutcomeUnknown:
        kind = type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
            return self._unreachable(operation, f"{kind}: {error}")
        return self._unanswered(operation, kind)

    def _unreachable(self, operation: str, detail: str) -> BackendUnavailable:
        words = "the Lightning node cannot be reached"
        return BackendUnavailable(self._backend, operation, words, detail[:_DETAIL_MAX])

    def _unanswered(self, operation: str, detail: str) -> OutcomeUnknown:
        return OutcomeUnknown(self._backend, operation, "no answer came", detail)


def trusting(certificate: Path) -> ssl.SSLContext:
    """TLS that trusts this certificate and no other. Raises ValueError in words for the operator."""
    try:
        return ssl.create_default_context(cafile=str(certificate))
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"the certificate {certificate} cannot be read: {error}") from None


def checked_url(name: str, url: str | None, *, example: str) -> str:
    """A node's address without its trailing slash, or ValueError in words for the operator."""
    if not url:
        raise ValueError(f"set SATHERD_{name}_URL: where the node listens, such as {example}")
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise ValueError(f"SATHERD_{name}_URL must look like {example}, without user and password")
    return url.rstrip("/")
