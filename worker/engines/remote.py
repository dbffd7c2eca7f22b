"""What engines in front of an HTTP server share: the server, its errors in our words, SSE data.

aiohttp and not httpx, which the rest of Satherd asks with: where 200 streams run at once, a token costs
the one 20 µs, and the other many times as much (docs/performance.md).
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi
from pydantic_core import from_json, to_json
from yarl import URL

from worker.errors import EngineAbsent, EngineStartError, JobError
from worker.protocol import FailureCode
from worker.settings import WorkerSettings

CONNECT_TIMEOUT_S = 10
# Shorter than what servers keep a connection for (5 s is common), so that none is asked on that it is
# just closing.
KEEP_ALIVE_S = 4
ERROR_BODY_BYTES = 4096
LONGEST_LINE_BYTES = 16 * 2**20
LONGEST_ANSWER_BYTES = 64 * 2**20
BUSY_STATUSES = {429, 503}
BAD_REQUEST_STATUSES = {400, 413, 422}
TOO_LONG_WORDS = (
    "context_length_exceeded",
    "context length",
    "context size",
    "context window",
    "maximum context",
    "too many tokens",
    "prompt is too long",
    "prompt too long",
)
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_JSON = {"Content-Type": "application/json"}
_LOST = (aiohttp.ClientError, TimeoutError)


class Server:
    """An HTTP server at `url`, asked over connections that stay open. `timeout_s`: its longest silence.

    Every method raises JobError, but for `discover` and `answers`.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float) -> None:
        # Without a password, since it stands in messages.
        self.url, authorization = _without_user(url.rstrip("/"))
        if api_key is not None:
            authorization = f"Bearer {api_key}"
        self._headers = {"Authorization": authorization} if authorization is not None else {}
        # `connect` and not `sock_connect`, which does not end the waiting for a proxy.
        self._timeout = aiohttp.ClientTimeout(connect=CONNECT_TIMEOUT_S, sock_read=timeout_s)
        # Until the answer begins: aiohttp's own limit does not hold while a request is not yet read.
        self._begin_s = CONNECT_TIMEOUT_S + 2 * timeout_s
        self._opened: aiohttp.ClientSession | None = None

    async def discover(self, path: str) -> Any:
        """JSON from a server that must be there for the worker to start. Raises EngineStartError."""
        try:
            async with self._ask("GET", path, timeout_s=CONNECT_TIMEOUT_S) as answer:
                status, body = answer.status, await _body(answer)
        except _LOST as error:
            raise EngineAbsent(
                f"no server answers at {self.url} ({type(error).__name__}); "
                "SATHERD_ENGINE_URL names it"
            ) from error
        if status in (401, 403):
            raise EngineStartError(
                f"the server at {self.url} wants a key: set SATHERD_ENGINE_API_KEY"
            )
        if status != 200:
            kind = EngineAbsent if status >= 500 else EngineStartError
            raise kind(f"{self.url}{path} answers with status {status}")
        try:
            return from_json(body)
        except ValueError as error:
            raise EngineStartError(f"{self.url}{path} is not JSON") from error

    async def answers(self, path: str) -> bool:
        """Whether the server is there and well enough to answer a question about itself."""
        try:
            async with self._ask("GET", path, timeout_s=CONNECT_TIMEOUT_S) as answer:
                await _body(answer)
                return answer.status == 200
        except _LOST:
            return False

    async def post(
        self, path: str, body: dict[str, Any], *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """The whole answer to `body`, a JSON object; `timeout_s` limits all of it."""
        data = to_json(body)
        return await self._whole(path, data=data, headers=_JSON, timeout_s=timeout_s)

    async def post_form(
        self, path: str, fields: dict[str, Any], files: dict[str, tuple[str, bytes, str]]
    ) -> dict[str, Any]:
        """The answer to a form of `fields` and of `files`: name, content, media type of each."""
        form = aiohttp.FormData()
        for name, value in fields.items():
            form.add_field(name, str(value))
        for name, (filename, content, media_type) in files.items():
            form.add_field(name, content, filename=filename, content_type=media_type)
        return await self._whole(path, data=form)

    async def _whole(self, path: str, **request: Any) -> dict[str, Any]:
        try:
            async with self._ask("POST", path, **request) as answer:
                await _check(answer)
                return json_object(await _body(answer))
        except _LOST as error:
            raise _lost(error) from error

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event in the answer to `body`.

        Close it (`contextlib.aclosing`) when it is not read to its end: that hangs up.
        """
        try:
            async with self._ask("POST", path, data=to_json(body), headers=_JSON) as answer:
                await _check(answer)
                async for data in sse_data(answer.content.iter_any()):
                    yield data
        except _LOST as error:
            raise _lost(error) from error

    async def aclose(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    @asynccontextmanager
    async def _ask(
        self, method: str, path: str, *, timeout_s: float | None = None, **request: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=timeout_s) if timeout_s else self._timeout
        async with asyncio.timeout(self._begin_s) as beginning:
            async with self._session().request(
                method, self.url + path, timeout=timeout, allow_redirects=False, **request
            ) as answer:
                beginning.reschedule(None)
                yield answer

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(
                # As many jobs as there are slots run at once; no second limit.
                limit=0,
                keepalive_timeout=KEEP_ALIVE_S,
                ssl=_tls() if self.url.startswith("https://") else True,
            )
            self._opened = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                # Not `trust_env`: it reads a .netrc in a thread for each request.
                proxy=_proxy_for(self.url),
            )
        return self._opened


def open_server(settings: WorkerSettings, default_url: str) -> Server:
    """The server that SATHERD_ENGINE_URL names. Raises EngineStartError."""
    url = settings.engine_url or default_url
    if not url.startswith(("http://", "https://")):
        raise EngineStartError("SATHERD_ENGINE_URL must begin with http:// or https://")
    try:
        (URL(url).host or "").encode("idna")
    except ValueError as error:
        raise EngineStartError("SATHERD_ENGINE_URL is no URL") from error
    key = settings.engine_api_key
    return Server(
        url,
        api_key=key.get_secret_value() if key is not None else None,
        timeout_s=settings.engine_timeout_s,
    )


def _without_user(url: str) -> tuple[str, str | None]:
    """A URL without user and password, and the header that says them."""
    whole = URL(url)
    if whole.user is None and whole.password is None:
        return url, None
    login = f"{whole.user or ''}:{whole.password or ''}".encode()
    return str(whole.with_user(None)), f"Basic {b64encode(login).decode()}"


def _proxy_for(url: str) -> str | None:
    """What HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say; none for this machine itself."""
    address = urlsplit(url)
    host = address.hostname or ""
    if host in LOOPBACK or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    # `proxy:3128` is what people write as well.
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _tls() -> ssl.SSLContext:
    """Trusts the system's authorities, and the public ones where the system has no list."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


async def _check(answer: aiohttp.ClientResponse) -> None:
    """Raises the JobError that a refused request means."""
    status = answer.status
    if status < 300:
        return
    words = (await _error_text(answer)).lower()
    if status in BAD_REQUEST_STATUSES:
        if any(sign in words for sign in TOO_LONG_WORDS):
            raise JobError(FailureCode.PROMPT_TOO_LONG, "the server says: prompt too long")
        # Not its words: servers like to quote the request.
        raise JobError(FailureCode.BAD_REQUEST, f"the server refused it with status {status}")
    if status in BUSY_STATUSES:
        raise JobError(FailureCode.OVERLOADED, f"the server is busy (status {status})")
    if status == 404:
        raise JobError(FailureCode.MODEL_NOT_SERVED, "the server does not know model or path")
    raise JobError(FailureCode.ENGINE_ERROR, f"the server answered with status {status}")


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """All of it. Raises ClientPayloadError for one that does not end."""
    body = bytearray()
    async for part in answer.content.iter_any():
        body += part
        if len(body) > LONGEST_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError("an answer without an end")
    return bytes(body)


async def _error_text(answer: aiohttp.ClientResponse) -> str:
    body = b""
    async for part in answer.content.iter_any():
        body += part
        if len(body) >= ERROR_BODY_BYTES:
            break
    return body[:ERROR_BODY_BYTES].decode("utf-8", "replace")


def _lost(error: Exception) -> JobError:
    """The JobError for a server that could not be reached, or broke off."""
    return JobError(FailureCode.ENGINE_ERROR, f"lost the server: {type(error).__name__}")


async def sse_data(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data` of each server-sent event (WHATWG HTML, section 9.2.6). Raises JobError."""
    data: list[bytes] = []
    size = 0
    async for line in _lines(pieces):
        if not line:
            if data:
                yield b"\n".join(data)
                data, size = [], 0
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
            size += len(line)
            if size > LONGEST_LINE_BYTES:
                raise JobError(FailureCode.ENGINE_ERROR, "the server sent an event without an end")
    # A server that ends without the last empty line has still said it.
    if data:
        yield b"\n".join(data)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines that end with LF, CRLF or CR, wherever the pieces are cut."""
    rest = b""
    async for piece in pieces:
        rest += piece
        if b"\r" in rest:
            # A CR at the very end may be half of an end of line.
            held = b"\r" if rest.endswith(b"\r") else b""
            rest = rest.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LONGEST_LINE_BYTES:
            raise JobError(FailureCode.ENGINE_ERROR, "the server sent a line without an end")
    for line in rest.removesuffix(b"\r").split(b"\n") if rest else []:
        yield line


def json_object(text: bytes) -> dict[str, Any]:
    """One JSON object. Raises JobError for anything else."""
    try:
        value = from_json(text)
    except ValueError as error:
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent what is not JSON") from error
    if not isinstance(value, dict):
        raise JobError(FailureCode.ENGINE_ERROR, "the server sent JSON of another shape")
    return value
