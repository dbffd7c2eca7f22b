"""The payout runner: pays workers' batches and clients' withdrawals, never twice, never lost.

    payouts       ★ this: one process's loop; which payouts are worked on, and whether at all
    payout_states ★ states, the rules of resolution; pure
    payout_moves    each move with its transfers, in one transaction (payout_rows, payout_transfers)
    payout_planning who is due, for how much
    payout_sending  an invoice for a payout, and the request to pay it
    payout_resolving    what became of that request
    payout_second_look  before the next one: is what failed still failed?
    reconciliation, payout_memory, foreign_payments   the node's own history against all of it
    payout_lease    one process at a time
    payout_control  pause, resume, retry, an operator's decision
    payout_records  what doors, pages and metrics read
    payout_settings amounts, fees, waits; pure
    withdrawals     a client's money out
    payees          addresses and their back-off

Any number of processes may run one: the lease lets one of them pay, and the fencing token keeps a
holder that lost it from writing. All states are in the database, so there is nothing to resume but
the loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from billing import payout_control
from billing.lightning import BackendAuthError, BackendError, LightningBackend, NodeInfo
from billing.lightning_address import LightningAddresses
from billing.payees import DuePayee, due_payees
from billing.payout_context import Clock, PayoutContext, Transaction
from billing.payout_control import Blocked
from billing.payout_lease import LeaseLost, PayoutLease
from billing.payout_moves import Moved
from billing.payout_planning import PayoutPlanner
from billing.payout_sending import PayoutSender
from billing.payout_settings import PayoutSettings
from billing.payout_states import LONGEST_PAUSE

log = logging.getLogger(__name__)

_SHORTEST_WAIT_S = 0.2
_GRACE_S = 10.0

_DUE = """
select id from payouts
where state = any($1::text[]) and (next_try_at <= $2 or next_try_at > $5)
  and id <> all($3::text[])
order by next_try_at, id limit $4"""

_NEXT_DUE = """
select min(next_try_at) from payouts
where state in ('planned', 'sending') and next_try_at > $1"""


def utc_now() -> datetime:
    return datetime.now(UTC)


class PayoutRunner:
    """Pays. `clock` gives every time that is written; `settings` may be replaced while it runs.

    `addresses` should know the node's own key, so that our own invoices are refused. `reconciled`
    says whether node and books were compared since the start: before that, nothing is sent. `on_older`
    is called when the database turns out to be an older one than it was: they are to be compared anew.
    """

    def __init__(
        self,
        transaction: Transaction,
        backend: LightningBackend,
        addresses: LightningAddresses,
        *,
        settings: PayoutSettings | None = None,
        clock: Clock = utc_now,
        jitter: Callable[[], float] = random.random,
        reconciled: Callable[[], bool] = lambda: True,
        on_older: Callable[[], None] = lambda: None,
    ) -> None:
        self._reconciled = reconciled
        self._context = PayoutContext(
            transaction=transaction,
            backend=backend,
            addresses=addresses,
            lease=PayoutLease(transaction, clock, on_older=on_older),
            settings=settings or PayoutSettings(),
            clock=clock,
            jitter=jitter,
        )
        self._planner = PayoutPlanner(self._context)
        self._sender = PayoutSender(self._context)
        self._working: dict[str, asyncio.Task[None]] = {}
        # Two turns at once could start the same payout twice.
        self._one_turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._stopping = False
        self._turned_at = clock()
        self._loop: asyncio.Task[None] | None = None

    @property
    def settings(self) -> PayoutSettings:
        return self._context.settings

    @settings.setter
    def settings(self, settings: PayoutSettings) -> None:
        self._context.settings = settings
        self.wake()

    @property
    def is_the_one(self) -> bool:
        """Whether this process held the lease when it last looked."""
        return self._context.lease.token is not None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="payouts")

    def wake(self) -> None:
        """There may be something to do: a payout planned, a payee due, a pause ended."""
        self._wake.set()

    async def stop(self) -> None:
        """Start nothing more, let what is under way end for some seconds, hand the lease on.

        What is cut off then is looked up by whoever runs next.
        """
        self._stopping = True
        self.wake()
        if self._loop is not None:
            await self._loop
        if self._working:
            await asyncio.wait(self._working.values(), timeout=_GRACE_S)
        for task in self._working.values():
            task.cancel()
        await asyncio.gather(*self._working.values(), return_exceptions=True)
        await self._context.lease.release()

    async def run_once(self) -> int:
        """One turn, to the end of all that it starts; how many payouts and payees that were."""
        async with self._one_turn:
            tasks = await self._turn()
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            wait_s = self.settings.idle_s
            try:
                async with self._one_turn:
                    await self._turn()
                wait_s = await self._wait_s()
            except Exception as error:
                # Whatever it was, the database first of all: what is written stands, so go on.
                log.warning("payouts: a turn failed, going on: %r", error)
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _turn(self) -> list[asyncio.Task[None]]:
        """Start what is due; returns the tasks."""
        context = self._context
        self._turned_at = context.clock()
        paid_before = self.is_the_one
        if not await context.lease.hold(context.settings.lease_s):
            return []
        if not paid_before:
            log.info("payouts: this router is the one that pays now")
        async with context.transaction() as connection:
            paused = await payout_control.is_paused(connection)
        node, blocked = await self._ask_node()
        if blocked is None and context.short_of_balance:
            blocked, context.short_of_balance = Blocked.INSUFFICIENT_BALANCE, False
            may_send = True
        else:
            may_send = blocked is None
        async with context.transaction() as connection:
            await payout_control.set_blocked(connection, blocked, now=context.clock())
        if node is None:
            return []
        started = await self._start_payouts(node, may_send=may_send and not paused)
        if may_send and not paused:
            started += await self._start_payees(node)
        return started

    async def _ask_node(self) -> tuple[NodeInfo | None, Blocked | None]:
        """The node as it is, and what keeps it from paying."""
        context = self._context
        try:
            node = await context.backend.node_info()
        except BackendAuthError as error:
            log.error("payouts: the node refuses our key: %s", error)
            return None, Blocked.NODE_REFUSES_KEY
        except BackendError as error:
            log.warning("payouts: the node cannot be asked: %s", error)
            return None, Blocked.NODE_UNREACHABLE
        if not node.synced:
            return node, Blocked.NODE_NOT_SYNCED
        if not self._reconciled():
            return node, Blocked.NOT_RECONCILED
        async with context.transaction() as connection:
            elsewhere = await connection.fetchval(
                "select 1 from payout_attempts where state = 'submitted' and node_pubkey <> $1"
                " limit 1",
                node.pubkey,
            )
        return node, Blocked.NODE_CHANGED if elsewhere is not None else None

    async def _start_payouts(self, node: NodeInfo, *, may_send: bool) -> list[asyncio.Task[None]]:
        """What was sent is looked up whatever else is the matter; the rest if it may be sent."""
        context = self._context
        async with context.transaction() as connection:
            due = await connection.fetch(
                _DUE,
                ["planned", "sending"] if may_send else ["sending"],
                context.clock(),
                list(self._working),
                self._free(),
                # No pause is longer, so this was written by a clock that has been set back since.
                context.clock() + LONGEST_PAUSE,
            )
        return [self._start(row["id"], self._sender.advance(row["id"], node)) for row in due]

    async def _start_payees(self, node: NodeInfo) -> list[asyncio.Task[None]]:
        if self._free() == 0:
            return []
        context = self._context
        async with context.transaction() as connection:
            due = await due_payees(
                connection,
                context.settings,
                now=context.clock(),
                limit=self._free(),
                except_ids=list(self._working),
            )
        return [self._start(payee.id, self._plan_and_send(payee, node)) for payee in due]

    async def _plan_and_send(self, payee: DuePayee, node: NodeInfo) -> None:
        planned = await self._planner.plan(payee)
        if planned is None:
            return
        payout_id, terms = planned
        # From here on it goes by the payout's own name, so that no other turn takes it up.
        task = asyncio.current_task()
        assert task is not None
        self._working[payout_id] = task
        try:
            await self._sender.advance(payout_id, node, terms)
        finally:
            del self._working[payout_id]

    def _free(self) -> int:
        return max(0, self.settings.at_once - len(self._working))

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guard(name, work), name=f"payout-{name}")
        self._working[name] = task
        task.add_done_callback(lambda _: self._working.pop(name, None))
        return task

    async def _guard(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except LeaseLost:
            log.warning("payouts: another process has taken over, leaving %s to it", name)
        except Moved:
            log.info("payouts: %s was moved by somebody else", name)
        except BackendError as error:
            log.warning("payouts: %s waits for the node: %s", name, error)
        except Exception as error:
            # One payout that cannot be worked on must not keep the others from being paid.
            log.exception("payouts: %s failed, it will be tried again: %r", name, error)

    async def _wait_s(self) -> float:
        """Until the next payout is due, within limits."""
        async with self._context.transaction() as connection:
            # What was due before this turn, and is not being worked on, may not be sent for now.
            due_at = await connection.fetchval(_NEXT_DUE, self._turned_at)
        if due_at is None:
            return self.settings.idle_s
        left_s = (due_at - self._context.clock()).total_seconds()
        return min(max(left_s, _SHORTEST_WAIT_S), self.settings.idle_s)
