"""`satherd receipt verify`: a receipt against its router's public key, and the texts it is about."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import orjson
import typer

from cli.admin_access import fail
from cli.router_location import find_router_url
from router.answer_hash import hashes_of, text_hash
from router.receipts import BadReceipt, as_jwk, verified
from router.requests import request_hash
from worker.protocol import Kind

root = typer.Typer(no_args_is_help=True, add_completion=False)
app = typer.Typer(no_args_is_help=True, help="Receipts of jobs.")
root.add_typer(app, name="receipt")

KEYS_PATH = "/.well-known/jwks.json"
TIMEOUT_S = 15.0


@root.callback()
def _satherd() -> None:
    """Satherd's commands."""


@app.callback()
def _receipt() -> None:
    """Receipts of jobs, signed by the router that sold them."""


def run(arguments: Sequence[str]) -> int:
    """Run it; the exit status of a failure comes as SystemExit."""
    root(args=list(arguments), prog_name="satherd")
    return 0


@app.command()
def verify(
    file: Annotated[
        Path, typer.Argument(help="What `GET /jobs/ID/receipt` answered, or the bare JWS.")
    ],
    router_url: Annotated[
        str | None, typer.Option(help="The router whose published keys are used.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The public key instead: a file with a JWK or a JWK set, or 64 hex digits."
        ),
    ] = None,
    answer: Annotated[
        Path | None,
        typer.Option(help="The answer: its JSON in OpenAI's shape, or the bare text."),
    ] = None,
    request: Annotated[
        Path | None, typer.Option(help="The JSON body of the request that was paid for.")
    ] = None,
) -> None:
    """Check a receipt, and print what it says as JSON.

    Exit status 0: it holds. 1: the signature, the answer or the request does not. 2: it could not
    be checked.
    """
    keys = _keys(key) if key else _published(find_router_url(router_url))
    try:
        facts = verified(_jws(_read(file)), keys)
    except BadReceipt as error:
        raise fail(f"this receipt is not good: {error}") from error
    checks = {"signature": True}
    if answer is not None:
        checks["answer"] = _is_of_answer(facts, _read(answer))
    if request is not None:
        checks["request"] = _is_of_request(facts, _read(request))
    print(json.dumps({"valid": all(checks.values()), "checks": checks, "facts": facts}, indent=2))
    for name, holds in checks.items():
        if not holds:
            raise fail(f"the receipt is genuine, but for another {name}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise fail(f"{path} cannot be read: {error.strerror}", 2) from error


def _jws(text: bytes) -> str:
    try:
        given = json.loads(text)
        return given["receipt"] if isinstance(given, dict) else str(given)
    except (ValueError, KeyError):
        return text.decode(errors="replace").strip()


def _published(router_url: str) -> list[dict[str, Any]]:
    try:
        shown = httpx.get(f"{router_url}{KEYS_PATH}", timeout=TIMEOUT_S).raise_for_status()
        return shown.json()["keys"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise fail(f"the keys of {router_url} cannot be had: {error!r}", 2) from error


def _keys(given: str) -> list[dict[str, Any]]:
    if len(given) == 64 and not Path(given).exists():
        try:
            return [as_jwk(bytes.fromhex(given))]
        except ValueError as error:
            raise fail("--key: a public key has 64 hex digits", 2) from error
    try:
        found = json.loads(_read(Path(given)))
        keys = found.get("keys", [found])
        return [as_jwk(_raw(one)) for one in keys]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fail(f"--key: {given} holds no Ed25519 JWK", 2) from error


def _raw(jwk: dict[str, Any]) -> bytes:
    return base64.urlsafe_b64decode(jwk["x"] + "=" * (-len(jwk["x"]) % 4))


def _is_of_answer(facts: dict[str, Any], given: bytes) -> bool:
    wanted = facts["answer_sha256"]
    found = {text_hash(given.decode(errors="replace"))}
    # Files written by editors and shells end in a line feed that the answer does not have.
    found.add(text_hash(given.decode(errors="replace").removesuffix("\n")))
    try:
        shape = json.loads(given)
        found.update(hashes_of(shape.get("result", shape)))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return wanted in {one.hex() for one in found}


def _is_of_request(facts: dict[str, Any], given: bytes) -> bool:
    try:
        body = orjson.loads(given)
    except orjson.JSONDecodeError as error:
        raise fail("--request: the body is not JSON", 2) from error
    return request_hash(Kind(facts["kind"]), body).hex() == facts["request_sha256"]
