"""`satherd demo`: the whole paid story once, over HTTP, as a client and an operator see it.

Exit status 0 only if all of it happened: quoted, challenged, paid, queued, answered, settled, the
worker paid at its Lightning address, the books in balance.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
from pydantic import Field
from rich.console import Console
from rich.table import Table

from cli.one_machine import Machine, UpSettings, one_machine
from cli.serving import START_ERRORS, stop_signal
from cli.settings_flags import BadSettings, complain, read_settings
from cli.up import log_to_file, say_step

screen = Console(highlight=False, soft_wrap=True)

PROMPT = "Tell me a story about a brave rabbit."
MULTIPLIER = "1.5"
OTHERS = 6
PAYOUT_S = 60.0


class DemoSettings(UpSettings):
    """The settings of `satherd up`; the worker takes one job at a time, so that there is a queue."""

    port: int = Field(default=0, ge=0, le=65535)
    slots: int | None = Field(default=1, ge=1)
    payout_interval_s: int = Field(default=1, ge=1)
    prompt: str = Field(default=PROMPT, description="what the client asks")


class StoryFailed(Exception):
    """Something that had to happen did not."""


def run(arguments: Sequence[str]) -> int:
    """Play the story; the exit status."""
    try:
        settings = read_settings(DemoSettings, arguments[1:], prog="satherd demo")
    except BadSettings as error:
        return complain(error)
    if not settings.simulated:
        print("error: the demo plays with simulated money only", file=sys.stderr)
        return 2
    log = log_to_file(settings)
    try:
        asyncio.run(_demo(settings))
    except StoryFailed as error:
        screen.print(f"\n[red]The story did not hold:[/red] {error}\nThe router's log: {log}")
        return 1
    except START_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    screen.print("\n[green]All of it happened.[/green] Keep it running with: satherd up")
    return 0


async def _demo(settings: DemoSettings) -> None:
    stop = asyncio.ensure_future(stop_signal().wait())
    async with (
        one_machine(settings, say_step) as machine,
        httpx.AsyncClient(base_url=machine.url, timeout=60, trust_env=False) as http,
    ):
        told = asyncio.ensure_future(Story(machine, http, settings).tell())
        await asyncio.wait({told, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            told.cancel()
            raise StoryFailed("interrupted")
        told.result()
    stop.cancel()


class Story:
    """The steps, each shown and each checked."""

    def __init__(self, machine: Machine, http: httpx.AsyncClient, settings: DemoSettings) -> None:
        self._machine = machine
        self._http = http
        self._settings = settings
        self._step = 0

    async def tell(self) -> None:
        screen.print("\n[yellow]Simulated Lightning, regtest: no money here is real.[/yellow]")
        model = await self._prices()
        body = {
            "model": model,
            "messages": [{"role": "user", "content": self._settings.prompt}],
            "max_tokens": 160,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        before_msat = await self._worker_wallet_msat()
        others = await self._others(model)
        quote = await self._quote(body)
        challenge = await self._challenge(body)
        credential = await self._pay(challenge)
        await self._look_at_the_queue(challenge, credential)
        usage = await self._answer(body, credential, challenge)
        self._check_charge(usage, quote)
        await self._finish_others(others)
        await self._payout(before_msat)
        await self._trial_balance()

    def _heading(self, words: str) -> None:
        self._step += 1
        screen.print(f"\n[bold]{self._step}. {words}[/bold]")

    async def _get(self, path: str, **options: Any) -> Any:
        reply = await self._http.get(path, **options)
        _must(reply.status_code == 200, f"GET {path} answered {reply.status_code}: {reply.text}")
        return reply.json()

    async def _prices(self) -> str:
        self._heading("The client asks for prices: GET /info")
        info = await self._get("/info")
        _must(info["simulated"] is True, "the router does not say that its money is simulated")
        _must(bool(info["models"]), "no model is served")
        for model in info["models"]:
            fees = model["fees"]
            screen.print(
                f"   {model['id']}: {fees['prompt_fee_msat']} msat a prompt,"
                f" {fees['input_msat_per_mtok']} msat in and {fees['output_msat_per_mtok']} msat out"
                f" per million tokens; {model['workers']} worker, {model['queue_length']} waiting"
            )
        return info["models"][0]["id"]

    async def _quote(self, body: dict[str, Any]) -> dict[str, Any]:
        self._heading("It asks for a quote: POST /quotes")
        reply = await self._http.post("/quotes", json=body | {"fee_multiplier": MULTIPLIER})
        _must(reply.status_code == 201, f"no quote: {reply.text}")
        quote = reply.json()
        screen.print(
            f"   base fee {quote['base_fee_msat']} msat; at {quote['multiplier']}x"
            f" {quote['offer_msat']} msat for {quote['prompt_tokens']} prompt tokens and at most"
            f" {quote['max_tokens']} tokens of answer"
        )
        place = quote["queue"]
        screen.print(
            f"   at that price place {place['position']} in the queue;"
            f" to be next takes {place['multiplier_to_be_next']}x"
        )
        return quote

    async def _others(self, model: str) -> list[asyncio.Task]:
        """Other clients with a prepaid key, who pay the base fee and wait."""
        self._heading(f"{OTHERS} other clients have come first, at the base fee")
        key = {"Authorization": f"Bearer {await self._prepaid_key()}"}
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Tell me a long story about a dragon."}],
            "max_tokens": 500,
        }
        tasks = [
            asyncio.create_task(
                self._http.post("/v1/chat/completions", json=body | {"seed": n}, headers=key)
            )
            for n in range(OTHERS)
        ]
        async with asyncio.timeout(30):
            while (waiting := (await self._get("/info"))["queue_length"]) < OTHERS - 2:
                _must(not all(task.done() for task in tasks), "the other clients were not served")
                await asyncio.sleep(0.01)
        screen.print(f"   the worker answers one of them, {waiting} wait")
        return tasks

    async def _prepaid_key(self) -> str:
        made = (await self._http.post("/balance/topups", json={"amount_msat": 100_000})).json()
        preimage = await self._preimage(made["invoice"])
        credential = {"Authorization": f"L402 {made['l402_token']}:{preimage}"}
        shown = await self._get(f"/balance/topups/{made['payment_hash']}", headers=credential)
        return shown["key"]

    async def _preimage(self, invoice: str) -> str:
        paid = await self._http.post("/simulated/pay", json={"invoice": invoice})
        _must(paid.status_code == 200, f"the payment failed: {paid.text}")
        return paid.json()["preimage"]

    async def _challenge(self, body: dict[str, Any]) -> dict[str, Any]:
        self._heading("It sends the prompt without paying: POST /v1/chat/completions")
        headers = {"X-Fee-Multiplier": MULTIPLIER}
        reply = await self._http.post("/v1/chat/completions", json=body, headers=headers)
        _must(reply.status_code == 402, f"expected 402, got {reply.status_code}: {reply.text}")
        _must(
            reply.headers.get("www-authenticate", "").startswith("L402 "), "no L402 challenge came"
        )
        due = reply.json()
        place = due["quote"]["queue"]
        screen.print(
            f"   402 Payment Required: {due['amount_msat']} msat (simulated);"
            f" place {place['position']} in the queue"
        )
        screen.print(f"   invoice {due['invoice'][:60]}…")
        return due

    async def _pay(self, due: dict[str, Any]) -> dict[str, str]:
        self._heading("It pays the invoice; its wallet learns the preimage")
        preimage = await self._preimage(due["invoice"])
        screen.print("   paid; the invoice is settled, and the prompt stands in the queue")
        return {
            "Authorization": f"L402 {due['l402_token']}:{preimage}",
            "X-Fee-Multiplier": MULTIPLIER,
        }

    async def _look_at_the_queue(self, due: dict[str, Any], credential: dict[str, str]) -> None:
        self._heading("It looks where its prompt stands")
        seen = await self._get(f"/quotes/{due['quote']['quote_id']}", headers=credential)
        _must(seen["state"] == "paid" and len(seen["jobs"]) == 1, f"the quote is not paid: {seen}")
        job = await self._get(seen["jobs"][0]["status_url"], headers=credential)
        waiting = (await self._get("/info"))["queue_length"]
        place = f", place {job['position']} of {waiting}" if "position" in job else ""
        screen.print(f"   {job['state']} at {job['multiplier']}x{place}")

    async def _answer(
        self, body: dict[str, Any], credential: dict[str, str], due: dict[str, Any]
    ) -> dict[str, Any]:
        self._heading(
            "It repeats the prompt with the proof of payment and reads when its turn comes"
        )
        usage: dict[str, Any] = {}
        text = ""
        done = False
        async with self._http.stream(
            "POST", "/v1/chat/completions", json=body, headers=credential
        ) as reply:
            _must(reply.status_code == 200, f"no answer: {reply.status_code}")
            screen.print(f"   job {reply.headers['x-satherd-job']}\n   ", end="")
            async for event in _events(reply):
                if event == "[DONE]":
                    done = True
                    break
                chunk = json.loads(event)
                _must("error" not in chunk, f"the stream broke: {event}")
                for choice in chunk["choices"]:
                    said = choice["delta"].get("content") or ""
                    text += said
                    screen.print(said, end="", markup=False)
                usage = chunk.get("usage") or usage
        screen.print()
        _must(done and bool(text), "the answer was empty or did not end with [DONE]")
        _must(bool(usage), "the answer carried no usage")
        _must(
            usage["satherd"]["fee_msat"] <= due["quote"]["offer_msat"], "more was charged than held"
        )
        return usage

    def _check_charge(self, usage: dict[str, Any], quote: dict[str, Any]) -> None:
        self._heading("The escrow is divided")
        ours = usage["satherd"]
        screen.print(
            f"   {ours['completion_tokens']} tokens charged: {ours['fee_msat']} msat;"
            f" {ours['refund_msat']} msat go back to the client's account"
        )
        _must(
            ours["fee_msat"] + ours["refund_msat"] == quote["offer_msat"],
            "fee and refund do not sum to the offer",
        )

    async def _finish_others(self, others: list[asyncio.Task]) -> None:
        for reply in await asyncio.gather(*others):
            _must(reply.status_code == 200, f"another client was refused: {reply.text}")

    async def _worker_wallet_msat(self) -> int:
        wallets = (await self._get("/simulated/wallets"))["wallets"]
        listed = wallets["wallets"] if isinstance(wallets, dict) else wallets
        return sum(w["balance_msat"] for w in listed if w["name"] not in ("router", "payer"))

    async def _payout(self, before_msat: int) -> None:
        self._heading("The worker is paid at its Lightning address, over LNURL-pay")
        until = time.monotonic() + PAYOUT_S
        while time.monotonic() < until:
            paid = [
                p for p in (await self._admin("/admin/payouts"))["payouts"] if p["state"] == "paid"
            ]
            received_msat = await self._worker_wallet_msat() - before_msat
            if paid and received_msat > 0:
                screen.print(f"   {received_msat} msat arrived (simulated)")
                return
            await asyncio.sleep(0.2)
        raise StoryFailed(f"no payout arrived in {PAYOUT_S:.0f} s")

    async def _admin(self, path: str) -> Any:
        token = {"Authorization": f"Bearer {self._machine.admin_token}"}
        return await self._get(path, headers=token)

    async def _trial_balance(self) -> None:
        self._heading("The operator looks at the books: GET /admin/ledger")
        books = await self._admin("/admin/ledger")
        table = Table(
            "account", "debit msat", "credit msat", title="trial balance (simulated money)"
        )
        for account, balance_msat in books["lines"].items():
            if balance_msat:
                debit = str(balance_msat) if balance_msat > 0 else ""
                table.add_row(account, debit, "" if debit else str(-balance_msat))
        table.add_row("sum", str(books["sum_msat"]), "", style="bold")
        screen.print(table)
        _must(books["sum_msat"] == 0, "the trial balance does not sum to zero")
        _must(not books["problems"], f"the books are not in order: {books['problems']}")


async def _events(reply: httpx.Response) -> AsyncIterator[str]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield line[6:]
        elif line.startswith(": position"):
            screen.print(f"[dim](waiting at {line[2:]})[/dim] ", end="")


def _must(held: bool, otherwise: str) -> None:
    if not held:
        raise StoryFailed(otherwise)
