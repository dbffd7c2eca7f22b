"""`satherd lightning check`: is the configured Lightning node one that a router can work with?

It asks and changes nothing: no invoice is made and nothing is paid. Each credential is tried with a
look-up of a hash that cannot exist.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from billing.errors import BillingError
from billing.lightning import (
    BackendAuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    Capabilities,
    LightningBackend,
    NodeBalance,
    NodeInfo,
)
from billing.lightning.connect import connect
from billing.lightning.phoenixd import PhoenixdBackend
from cli.router_location import simulated_url
from cli.settings_flags import BadSettings, complain, read_settings
from router.settings import Settings, backend_settings

USAGE = "usage: satherd lightning check [FLAGS]      satherd lightning check --help"
NETWORKS = frozenset({"mainnet", "testnet", "signet", "regtest"})
_NO_HASH = "00" * 32
# Below this a worker's first payout, with its routing fee, does not leave.
_LITTLE_MSAT = 10_000_000


@dataclass(slots=True)
class Report:
    """What was found. `blocking` keeps a router from working, `missing` from working well."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    blocking: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def run(arguments: Sequence[str]) -> int:
    """Print the report; 0 when the node can be used, 1 when not, 2 for a wrong command line."""
    if list(arguments[1:2]) != ["check"]:
        print(USAGE, file=sys.stdout if "--help" in arguments else sys.stderr)
        return 0 if "--help" in arguments else 2
    try:
        settings = read_settings(Settings, arguments[2:], prog="satherd lightning check")
    except BadSettings as error:
        return complain(error)
    if settings.simulated and settings.simulated_url is None:
        settings.simulated_url = simulated_url(settings.data_dir)
    try:
        report = asyncio.run(_check(settings))
    except (BillingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(report)
    return 1 if report.blocking else 0


async def _check(settings: Settings) -> Report:
    backend = connect(settings.lightning, **backend_settings(settings))
    try:
        return await examine(backend)
    finally:
        await backend.aclose()


async def examine(backend: LightningBackend) -> Report:
    """Ask the node about itself. What it does not answer is in the report, not raised."""
    report = Report(facts=[("back end", backend.name)])
    try:
        node = await backend.node_info()
    except BackendError as error:
        report.blocking.append(f"The node says nothing of itself: {_explained(error)}")
        return report
    _describe_node(report, node)
    try:
        _describe_money(report, backend, await backend.balance())
        if isinstance(backend, PhoenixdBackend):
            _describe_fee_credit(report, await backend.fee_credit_msat())
    except BackendError as error:
        report.blocking.append(f"The node does not tell what it holds: {_explained(error)}")
    await _try_credentials(report, backend)
    await _try_lists(report, backend)
    report.facts.append(("can", _capabilities(backend.capabilities)))
    return report


def _describe_node(report: Report, node: NodeInfo) -> None:
    label = " (simulated: no real money)" if node.simulated else ""
    report.facts += [
        ("network", node.network + label),
        ("alias", node.alias or "none"),
        ("node id", node.pubkey),
        ("version", node.version),
        ("synced", "yes" if node.synced else "no"),
    ]
    if node.network not in NETWORKS:
        report.blocking.append(f"The node's network is unknown to Satherd: {node.network!r}.")
    if not node.synced:
        report.blocking.append(
            "The node has not caught up with the chain. Wait until it has; until then payments"
            " fail or hang."
        )


def _describe_money(report: Report, backend: LightningBackend, balance: NodeBalance) -> None:
    receivable_msat = balance.receivable_msat
    shown = "the node does not tell" if receivable_msat is None else _sat(receivable_msat)
    report.facts += [
        ("spendable", f"{_sat(balance.spendable_msat)} (outbound: what workers can be paid)"),
        ("receivable", f"{shown} (inbound: what clients can pay in)"),
        ("pending", f"{_sat(balance.pending_msat)} on its way out"),
    ]
    if receivable_msat is not None and receivable_msat < _LITTLE_MSAT:
        report.missing.append(
            "Inbound liquidity: the first payments in are turned into it, for a fee of phoenixd's."
            if backend.name == "phoenixd"
            else "Inbound liquidity: clients can pay in next to nothing. Buy a channel towards this"
            " node, or spend from one that it has."
        )
    if balance.spendable_msat < _LITTLE_MSAT:
        report.missing.append(
            "Outbound liquidity: workers can be paid next to nothing until clients have paid in,"
            " or you put money into a channel."
        )


def _describe_fee_credit(report: Report, fee_credit_msat: int) -> None:
    report.facts.append(("fee credit", f"{_sat(fee_credit_msat)} (cannot be spent or paid back)"))
    if fee_credit_msat:
        report.missing.append(
            "A channel of its own: what came in so far is fee credit, which workers cannot be paid"
            " from."
        )


async def _try_credentials(report: Report, backend: LightningBackend) -> None:
    for purpose, ask in (
        ("invoices", backend.lookup_invoice),
        ("payments", backend.lookup_payment),
    ):
        try:
            await ask(_NO_HASH)
        except BackendError as error:
            report.blocking.append(f"{purpose.capitalize()} cannot be seen: {_explained(error)}")
            report.facts.append((purpose, "no"))
        else:
            report.facts.append((purpose, "can be seen"))


async def _try_lists(report: Report, backend: LightningBackend) -> None:
    """Whether the node's own history can be compared with the books."""
    try:
        for lists in (backend.received_since, backend.sent_since):
            async for _ in lists(datetime.now(UTC)):
                pass  # of this moment: nothing, or next to it
    except BackendRejected as error:
        report.facts.append(("history", "cannot be listed"))
        report.missing.append(
            "A list of what the node did: without it nobody notices payments that a restored database"
            f" has forgotten. [{error}]"
        )
    except BackendError as error:
        report.facts.append(("history", "cannot be listed"))
        report.blocking.append(
            "The node's history cannot be read, and nothing is paid out before it was compared with"
            f" the books: {_explained(error)}"
        )
    else:
        report.facts.append(("history", "can be listed, and is compared with the books"))


def _explained(error: BackendError) -> str:
    match error:
        case BackendUnavailable():
            return f"nothing answers at its address. Is it running, and the URL right? [{error}]"
        case BackendAuthError():
            return f"it refuses the credential. Does that have the permission? [{error}]"
        case _:
            return f"{error.safe_message}. [{error}]"


def _capabilities(can: Capabilities) -> str:
    push = {
        "cursor": "tells of payments at once and again after a break",
        "live": "tells of payments at once",
        "none": "tells of payments only when asked",
    }
    words = [
        push[can.push],
        "keeps to a fee limit" if can.fee_limit else "sets its own routing fee",
        "cancels invoices" if can.cancel_invoice else "cannot cancel invoices",
        "whole satoshis only" if can.granularity_msat == 1000 else "millisatoshis",
    ]
    return "; ".join(words)


def _sat(msat: int) -> str:
    return f"{msat / 1000:,.0f} sat" if msat % 1000 == 0 else f"{msat / 1000:,.3f} sat"


def _print(report: Report) -> None:
    width = max(len(name) for name, _ in report.facts)
    for name, words in report.facts:
        print(f"{name:<{width}}  {words}")
    for heading, lines in (
        ("It cannot be used:", report.blocking),
        ("What is missing:", report.missing),
    ):
        if lines:
            print(f"\n{heading}")
            for line in lines:
                print(f"- {line}")
    if not report.blocking:
        print("\nA router can work with this node.")
