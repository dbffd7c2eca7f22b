"""A small HTTP server that speaks the contract as a client sees it, with faults on request.

It stands for a router in the tests of the client alone: lost connections, refusals and wrong
invoices cannot be had from a real one on demand. The real one: tests/test_client_with_router.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-" + "k" * 22
FEES = {
    "prompt_fee_msat": 1000,
    "input_msat_per_mtok": 200000,
    "output_msat_per_mtok": 600000,
    "image_fee_msat": 50000,
}
WORDS = ["Blue ", "light ", "scatters ", "more."]


@dataclass
class StandInQuote:
    id: str
    body: dict[str, Any]
    base_fee_msat: int
    offer_msat: int
    models: list[str]
    preimage: str = field(default_factory=lambda: secrets.token_hex(32))
    paid: bool = False

    @property
    def payment_hash(self) -> str:
        return hashlib.sha256(bytes.fromhex(self.preimage)).hexdigest()

    @property
    def amount_msat(self) -> int:
        return -(-self.offer_msat // 1000) * 1000

    @property
    def job_ids(self) -> list[str]:
        return [f"{self.id}-{index}" for index in range(len(self.models))]


@dataclass
class Faults:
    """What goes wrong next. Counted down where it is a number."""

    cut_events_after: list[int] = field(default_factory=list)
    answers: dict[str, list[tuple[int, dict[str, str], dict[str, Any]]]] = field(
        default_factory=dict
    )
    drop: Counter[str] = field(default_factory=Counter)
    invoice: Callable[[str], str] | None = None
    quote: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    resend_seen_events: bool = False
    unseen_payments: int = 0
    wrong_preimage: bool = False
    events: list[tuple[str, dict[str, Any]]] | None = None


class ContractServer:
    def __init__(self) -> None:
        self.quotes: dict[str, StandInQuote] = {}
        self.invoices: dict[str, StandInQuote] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.submitted: dict[str, str] = {}
        self.cancelled: list[str] = []
        server = self

        class Handler(_Handler):
            contract = server

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False  # so that closing waits for them and their sockets
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def seen(self, method: str, pattern: str) -> list[tuple[str, dict[str, str], Any]]:
        """Path, headers and body of the requests that came for a pattern, in order."""
        return [
            (path, headers, body)
            for verb, path, headers, body in self.requests
            if verb == method and re.fullmatch(pattern, path)
        ]


@contextmanager
def running_server() -> Iterator[ContractServer]:
    server = ContractServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join(timeout=5)
        server.http.server_close()


def invoice_for(amount_msat: int) -> str:
    """Text that looks like a regtest invoice over whole satoshis; nobody checks its signature."""
    return f"lnbcrt{amount_msat // 100}n1{secrets.token_hex(20).replace('1', 'q')}"


class _Handler(BaseHTTPRequestHandler):
    contract: ContractServer
    protocol_version = "HTTP/1.1"
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.contract.requests.append((method, self.path, headers, body))
        faults = self.contract.faults
        if faults.drop[self.path] > 0:
            faults.drop[self.path] -= 1
            self.close_connection = True
            return
        if scripted := faults.answers.get(self.path):
            status, extra, payload = scripted.pop(0)
            self._answer(status, payload, extra)
            return
        for verb, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and verb == method:
                getattr(self, name)(*match.groups(), body)
                return
        self._error(404, "not_found", "nothing here")

    # --- prices and payment ---------------------------------------------------------------------

    def info(self, _: Any) -> None:
        model = {
            "id": "stand-in",
            "kind": "text",
            "fees": FEES,
            "queue_length": 0,
            "last_multiplier": "1.000",
            "multiplier_to_be_next": "1.000",
            "servable": True,
        }
        model |= self.contract.faults.model
        self._answer(
            200, {"simulated": True, "network": "regtest", "fees": FEES, "models": [model]}
        )

    def quote(self, body: dict[str, Any]) -> None:
        text = "".join(message["content"] for message in body.get("messages", []))
        tokens, max_tokens = -(-len(text.encode()) // 4), body.get("max_tokens") or 1024
        each = 1000 + -(-(200000 * tokens + 600000 * max_tokens) // 1_000_000)
        models = body.get("models") or [body["model"]] * body.get("n", 1)
        milli = round(float(body.get("fee_multiplier", 1)) * 1000)
        base = each * len(models)
        quote = StandInQuote(
            secrets.token_hex(8), body, base, -(-base * milli // 1000), list(models)
        )
        self.contract.quotes[quote.id] = quote
        answer = {
            "quote_id": quote.id,
            "base_fee_msat": base,
            "offer_msat": body.get("offer_msat", quote.offer_msat),
            "multiplier": f"{milli / 1000:.3f}",
            "prompt_tokens": tokens,
            "max_tokens": max_tokens,
            "fees": FEES,
            "items": [{"model": model, "base_fee_msat": each} for model in models],
            "queue": {"position": 3},
        }
        self._answer(200, answer | self.contract.faults.quote)

    def quote_invoice(self, quote_id: str, _: Any) -> None:
        self._answer(200, self._invoice(self.contract.quotes[quote_id]))

    def pay(self, body: dict[str, Any]) -> None:
        quote = self.contract.invoices.get(body["invoice"])
        if quote is None:
            self._error(404, "no_route", "nobody knows this invoice")
            return
        quote.paid = True
        preimage = "00" * 32 if self.contract.faults.wrong_preimage else quote.preimage
        self._answer(200, {"preimage": preimage, "fee_msat": 1, "simulated": True})

    def quote_state(self, quote_id: str, _: Any) -> None:
        quote = self.contract.quotes[quote_id]
        if self._opens(quote):
            jobs = [{"id": job_id, "state": "queued"} for job_id in quote.job_ids]
            self._answer(200, {"quote_id": quote_id, "state": "paid", "jobs": jobs})

    # --- jobs -----------------------------------------------------------------------------------

    def submit(self, body: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self._error(402, "insufficient_balance", "too little", balance_msat=5, fee_msat=1081)
            return
        if "quote_id" in body:
            quote = self.contract.quotes[body["quote_id"]]
        else:
            quote = StandInQuote(secrets.token_hex(8), body, 1010, 1010, [body["model"]])
            self.contract.quotes[quote.id] = quote
        self.contract.submitted[self.headers["Idempotency-Key"]] = quote.id
        quote.paid = True
        jobs = [
            {"id": job_id, "token": f"token-{job_id}", "status_url": f"/jobs/{job_id}"}
            for job_id in quote.job_ids
        ]
        self._answer(202, {"quote_id": quote.id, "jobs": jobs})

    def events(self, quote_id: str, _: Any) -> None:
        quote = self.contract.quotes[quote_id]
        if not self._opens(quote):
            return
        faults = self.contract.faults
        seen = int(self.headers.get("Last-Event-ID") or 0)
        script = list(enumerate(faults.events or self._script(quote), start=1))
        if not faults.resend_seen_events:
            script = [(seq, event) for seq, event in script if seq > seen]
        cut_after = faults.cut_events_after.pop(0) if faults.cut_events_after else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b": hello\n\n")
        for count, (seq, (name, data)) in enumerate(script):
            if count == cut_after:
                # Half an event: what is not ended by an empty line has to come again.
                self.wfile.write(f"id: {seq}\nevent: {name}\nda".encode())
                break
            self.wfile.write(
                f"id: {seq}\nevent: {name}\ndata: {json.dumps({**data, 'seq': seq})}\n\n".encode()
            )
        self.close_connection = True

    def job(self, job_id: str, _: Any) -> None:
        quote = self.contract.quotes[job_id.split("-")[0]]
        self._answer(200, self._ended(quote, job_id))

    def cancel(self, job_id: str, _: Any) -> None:
        self.contract.cancelled.append(job_id)
        self._answer(200, {"id": job_id, "state": "cancelled"})

    def bump(self, job_id: str, body: dict[str, Any]) -> None:
        quote = self.contract.quotes[job_id.split("-")[0]]
        bump = self.contract.quotes.setdefault(
            f"bump{quote.id}", StandInQuote(f"bump{quote.id}", body, 1000, 1000, ["stand-in"])
        )
        if self.headers.get("Authorization") != f"L402 {bump.id}:{bump.preimage}":
            due = self._invoice(bump)
            challenge = f'macaroon="{bump.id}", invoice="{due["invoice"]}", version="0"'
            self._error(
                402,
                "payment_required",
                "pay the difference",
                {"WWW-Authenticate": f'L402 {challenge}, token="{bump.id}"'},
                claim_token=f"claim{bump.id}",
            )
            return
        self._answer(200, {"id": job_id, "state": "queued", "multiplier": "2.000"})

    def balance(self, _: Any) -> None:
        self._answer(200, {"balance_msat": 5000, "held_msat": 1081})

    def topup(self, body: dict[str, Any]) -> None:
        quote = StandInQuote(secrets.token_hex(8), body, 0, body["amount_msat"], [])
        self.contract.quotes[quote.payment_hash] = quote
        self._answer(200, self._invoice(quote))

    def topup_state(self, payment_hash: str, _: Any) -> None:
        quote = self.contract.quotes[payment_hash]
        if self._opens(quote):
            self._answer(200, {"key": KEY, "balance_msat": quote.amount_msat})

    # --- helpers --------------------------------------------------------------------------------

    def _invoice(self, quote: StandInQuote) -> dict[str, Any]:
        invoice = invoice_for(quote.amount_msat)
        if self.contract.faults.invoice is not None:
            invoice = self.contract.faults.invoice(invoice)
        self.contract.invoices[invoice] = quote
        return {
            "invoice": invoice,
            "payment_hash": quote.payment_hash,
            "amount_msat": quote.amount_msat,
            "l402_token": quote.id,
            "claim_token": f"claim{quote.id}",
        }

    def _opens(self, quote: StandInQuote) -> bool:
        """Whether the request shows this quote's credential; answers 401 or 402 when not."""
        shown = {
            f"L402 {quote.id}:{quote.preimage}": quote.paid,
            f"Bearer {KEY}": quote.paid,
        }
        paid = shown.get(self.headers.get("Authorization", ""))
        if self.headers.get("X-Claim-Token") == f"claim{quote.id}":
            paid = quote.paid
        if paid is None:
            self._error(401, "unauthorized", "this credential opens nothing")
            return False
        if not paid or self.contract.faults.unseen_payments > 0:
            self.contract.faults.unseen_payments -= 1
            self._error(402, "payment_required", "not settled yet")
            return False
        return True

    def _script(self, quote: StandInQuote) -> Iterator[tuple[str, dict[str, Any]]]:
        for job_id in quote.job_ids:
            yield "position", {"job": job_id, "position": 2, "wait_s": {"p50": 1.5, "p90": 3}}
            yield "state", {"job": job_id, "state": "running", "attempt": 1}
            for word in WORDS:
                yield "chunk", {"job": job_id, "text": word}
            yield "done", {"job": self._ended(quote, job_id)}

    def _ended(self, quote: StandInQuote, job_id: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(WORDS)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {
            "id": job_id,
            "state": "succeeded",
            "model": quote.models[quote.job_ids.index(job_id)],
            "charged_msat": 1010,
            "refunded_msat": 71,
            "result": {"choices": [choice]},
        }

    def _error(
        self, status: int, code: str, message: str, headers: Any = None, **facts: Any
    ) -> None:
        self._answer(status, {"error": {"code": code, "message": message, **facts}}, headers)

    def _answer(self, status: int, payload: dict[str, Any], headers: Any = None) -> None:
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


_ROUTES = [
    ("GET", "/info", "info"),
    ("POST", "/quotes", "quote"),
    ("POST", "/quotes/([^/]+)/invoice", "quote_invoice"),
    ("GET", "/quotes/([^/]+)", "quote_state"),
    ("GET", "/quotes/([^/]+)/events", "events"),
    ("POST", "/simulated/pay", "pay"),
    ("POST", "/jobs", "submit"),
    ("GET", "/jobs/([^/]+)", "job"),
    ("DELETE", "/jobs/([^/]+)", "cancel"),
    ("POST", "/jobs/([^/]+)/bump", "bump"),
    ("GET", "/balance", "balance"),
    ("POST", "/balance/topups", "topup"),
    ("GET", "/balance/topups/([^/]+)", "topup_state"),
]
