"""`satherd prompt` and `satherd quote`: a paying client at the terminal.

The answer goes to standard output, everything else to standard error, so that a prompt can stand in
a pipe. `app` also carries `balance` and `pay` (see `cli.balance`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from cli.balance import balance_app, pay
from cli.options import Key, RouterUrl, explain_errors, open_client, stderr
from cli.router_location import data_dir, find_router_url
from cli.wallets import money, save_credential
from client import Client, Completion, Info, Job, PromptStream, Purchase, Quote
from client.core import DEFAULT_MAX_FEE_MSAT
from client.errors import SatherdError
from client.events import (
    InvoiceDue,
    Paid,
    Position,
    Quoted,
    Reconnecting,
    Restarted,
    StateChanged,
    Text,
)
from client.pricing import invoice_amount_msat

app = typer.Typer(no_args_is_help=True)
app.add_typer(balance_app, name="balance")
app.command("pay")(pay)

CANCELLED = 130  # what a shell reports for a command that was ended by Ctrl-C

Words = Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")]
Model = Annotated[str | None, typer.Option(help="The model; the router's first if not given.")]
System = Annotated[str | None, typer.Option(help="A system message to put before the prompt.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=5, help="How daring the answer is.")]
MultiplierOption = Annotated[
    str | None,
    typer.Option(
        "--multiplier", help="Pay this many times the base fee to be served sooner: 1.25; or auto."
    ),
]
MaxFee = Annotated[
    int, typer.Option(min=0, help="Refuse, before paying, a fee above this many msat.")
]
MaxWait = Annotated[
    int | None, typer.Option(min=1, help="Refund the prompt if it waits longer than this.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
SaveCredential = Annotated[
    Path | None,
    typer.Option(
        "--save-credential",
        help="Keep the payment's credential here: it opens the answer and the change.",
    ),
]


@app.command()
def prompt(
    words: Words,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    multiplier: MultiplierOption = None,
    max_fee_msat: MaxFee = DEFAULT_MAX_FEE_MSAT,
    max_wait_s: MaxWait = None,
    key: Key = None,
    save_credential_to: SaveCredential = None,
    as_json: Json = False,
    router_url: RouterUrl = None,
) -> None:
    """Buy an answer and watch it come: quote, pay, wait your turn, read.

    Pays from a prepaid key if one is given; otherwise with simulated money on a simulated router,
    or with an invoice for your own wallet. Ctrl-C cancels; what was not used is refunded.
    """
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, info):
        stream = client.stream(
            _messages(words, system),
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            fee_multiplier=multiplier,
            max_fee_msat=max_fee_msat,
            max_wait_s=max_wait_s,
        )
        show = Show(stderr, info, keep=save_credential_to, quiet=as_json)
        with stream, _kept_credential(show), _cancelled_by_ctrl_c(client, stream, show):
            for event in stream:
                show.take(event)
        show.finish(stream.completion)
        if as_json:
            typer.echo(json.dumps(_summary(stream.completion, info)))


@app.command()
def quote(
    words: Words,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    multiplier: MultiplierOption = None,
    key: Key = None,
    as_json: Json = False,
    router_url: RouterUrl = None,
) -> None:
    """Ask what a prompt costs now, and how long it would wait. Nothing is owed."""
    with explain_errors(), open_client(find_router_url(router_url), key) as (client, info):
        quoted = client.quote(
            _messages(words, system),
            model=model,
            max_tokens=max_tokens,
            fee_multiplier=multiplier,
            max_fee_msat=None,
        )
    if as_json:
        typer.echo(json.dumps(quoted.raw))
    else:
        Console().print(_quote_table(quoted, info))


class Show:
    """What a person sees of a prompt: a line about the present, and the answer as it comes."""

    def __init__(self, console: Console, info: Info, *, keep: Path | None, quiet: bool) -> None:
        self._console = console
        self._simulated = info.simulated
        self._keep = keep
        self._quiet = quiet
        self._status: Status | None = None
        self.purchase: Purchase | None = None
        self.answering = False

    def take(self, event: object) -> None:
        match event:
            case Quoted(quote):
                self._say(f"The fee is {self._money(quote.offer_msat)} at {quote.multiplier}x.")
            case InvoiceDue(invoice):
                self._say(f"Paying an invoice over {self._money(invoice.amount_msat)} …")
            case Paid(purchase):
                self.purchase = purchase
                if self._keep is not None:
                    save_credential(purchase.credential, self._keep)
                self._present("Paid. Waiting for a worker …")
            case Position() as position:
                self._present(_waiting_line(position))
            case StateChanged(state="running"):
                self._present("A worker is reading the prompt …")
            case Reconnecting(failures=failures):
                self._present(f"The connection was lost; trying again ({failures}) …")
            case Restarted():
                self._say("\nThe worker was lost; another one begins anew:")
            case Text(text=text) if text:
                self._answer(text)

    def finish(self, completion: Completion) -> None:
        """Close the answer with what it cost."""
        self.pause()
        if self._quiet:
            return
        typer.echo()
        charged, refunded = completion.charged_msat, completion.refunded_msat
        self._console.print(
            f"Charged {self._money(charged)}, {self._money(refunded)} of the fee returned.",
            style="dim",
        )
        change_msat = completion.purchase.paid_msat - charged
        if change_msat > 0 and self._keep is not None:
            self._console.print(
                f"{self._money(change_msat)} lie on this payment's account:"
                f" satherd balance show --key @{self._keep}",
                style="dim",
            )

    def pause(self) -> None:
        """Take the moving line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _answer(self, text: str) -> None:
        self.pause()
        self.answering = True
        if not self._quiet:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _present(self, line: str) -> None:
        if self._quiet or self.answering:
            return
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(line)
                self._status.start()
            self._status.update(line)
        else:
            self._console.print(line)

    def _say(self, line: str) -> None:
        self.pause()
        if not self._quiet:
            self._console.print(line, style="dim")

    def _money(self, amount_msat: int) -> str:
        return money(amount_msat, simulated=self._simulated)


def _waiting_line(position: Position) -> str:
    line = f"Waiting at place {position.position}"
    if position.wait_p50_s is not None:
        line += f", about {position.wait_p50_s:.0f} s"
    if not position.servable:
        line += ", no worker for it is connected"
    elif position.position > 1 and position.multiplier_to_be_next:
        line += f"; {position.multiplier_to_be_next}x would be next"
    return line + " …"


@contextmanager
def _kept_credential(show: Show) -> Iterator[None]:
    """After an error that follows a payment, keep what opens the payment's account."""
    try:
        yield
    except SatherdError as error:
        show.pause()
        purchase = show.purchase
        if purchase is not None and purchase.paid_msat:
            path = data_dir() / "credentials" / f"{purchase.quote.id}.txt"
            save_credential(purchase.credential, path)
            stderr.print(f"The payment's credential is kept in {path}")
        raise error


@contextmanager
def _cancelled_by_ctrl_c(client: Client, stream: PromptStream, show: Show) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        show.pause()
        jobs = [_ended(client, job, stream) for job in stream.cancel()]
        charged_msat = sum(job.charged_msat for job in jobs)
        stderr.print(f"\nCancelled; charged {charged_msat} msat." if jobs else "\nCancelled.")
        raise typer.Exit(CANCELLED) from None


def _ended(client: Client, job: Job, stream: PromptStream) -> Job:
    """A cancelled job once its worker has stopped, which is when its charge is known."""
    if job.ended or stream.purchase is None:
        return job
    return client.follow(job.id, stream.purchase.credential)


def _messages(words: str, system: str | None) -> list[dict[str, Any]]:
    text = sys.stdin.read() if words == "-" else words
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def _summary(completion: Completion, info: Info) -> dict[str, Any]:
    return {
        "text": completion.text,
        "paid_msat": completion.purchase.paid_msat,
        "charged_msat": completion.charged_msat,
        "refunded_msat": completion.refunded_msat,
        "simulated": info.simulated,
        "jobs": [dict(job.raw) for job in completion.jobs],
    }


def _quote_table(quoted: Quote, info: Info) -> Table:
    queue = quoted.raw.get("queue") or {}
    wait_s = queue.get("wait_s") or {}
    simulated = info.simulated
    table = Table("", "", show_header=False, box=None)
    rows = {
        "base fee": money(quoted.base_fee_msat, simulated=simulated),
        "multiplier": f"{quoted.multiplier}x",
        "fee": money(quoted.offer_msat, simulated=simulated),
        "invoice": money(invoice_amount_msat(quoted.offer_msat), simulated=simulated),
        "prompt tokens": quoted.prompt_tokens,
        "answer, at most": f"{quoted.max_tokens} tokens",
        "place in the queue": queue.get("position", "?"),
        "wait": f"{wait_s.get('p50', '?')} s, nine times of ten under {wait_s.get('p90', '?')} s",
        "to be next": f"{queue.get('multiplier_to_be_next', '?')}x",
        "valid until": quoted.raw.get("expires_at", "?"),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table
