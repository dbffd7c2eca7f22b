"""All parts of a router, made and joined: the only place where that happens."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from billing.invoice_watcher import InvoiceWatcher, Receipt
from billing.invoices import Credit, Purpose
from billing.l402 import MasterSecrets
from billing.lightning import LightningBackend, NodeInfo
from billing.lightning_address import LightningAddresses
from billing.outside_http import OutsideHttp
from billing.outside_url import OutsideRules
from billing.payout_settings import PayoutSettings
from billing.payouts import PayoutRunner
from billing.reconciliation import Reconciler
from billing.withdrawals import Withdrawals
from router import (
    job_endings,
    job_store,
    job_submits,
    plain_endings,
    worker_views,
)
from router.announcing import Announcer
from router.asks import Asks
from router.attempts import Attempts
from router.bus import Bus, Exchange, InProcessBus
from router.checks import Checks
from router.core import Core
from router.data_folder import place_of
from router.database import BatchingWriter, Database
from router.dispatcher import Dispatcher
from router.door_ids import DoorIds
from router.far_calls import FarCalls
from router.far_jobs import FarJobs
from router.far_projects import FarProjects
from router.job_records import Claimed, NewJob, Seat, Submission, Submitted
from router.job_stream import StreamHub
from router.jobs import Jobs
from router.key_ring import KeyRing
from router.maintenance import Maintenance
from router.market import Market
from router.models import Models
from router.nats_bus import NatsBus
from router.paid_quotes import PaidQuotes
from router.presence import Presence
from router.projects import Projects
from router.pull_gate import PullGate
from router.pull_submits import PullSubmits
from router.quotes import Quotes
from router.rate_limits import RateLimits
from router.receipts import Issuer, ReceiptKey
from router.relay import Relay
from router.reputation import Reputation
from router.requests import Limits
from router.runtime_settings import RuntimeSettings
from router.secret_files import master_secrets, receipt_seed, router_id
from router.settings import Settings
from router.webhooks import Webhooks
from router.worker_gate import WorkerGate
from router.workers import Fleet

log = logging.getLogger(__name__)


def join(
    settings: Settings,
    database: Database,
    backend: LightningBackend,
    node: NodeInfo,
    clock: Callable,
    exchange: Exchange | None,
) -> Core:
    secrets = master_secrets(settings)
    this_router = router_id(settings)
    receipt_issuer = Issuer(
        ReceiptKey.from_seed(receipt_seed(settings)),
        settings.public_url or settings.name,
        node.network,
        node.simulated,
    )
    fleet = Fleet()
    models = Models(fleet)
    hub = StreamHub()
    market = Market(database, models)
    end_many = partial(job_endings.end_many, wipe_after_s=settings.wipe_after_s)
    end_plain = partial(
        plain_endings.end_plain, router_id=this_router, wipe_after_s=settings.wipe_after_s
    )
    writer = BatchingWriter(
        database,
        {"submit": lambda connection, rows: _submit_plain(core, connection, rows)},
        {"submit_bound": job_submits.submit_bound},
        # Mostly a cancel that meets a claim of the same job comes before it or after it.
        {"claim": job_store.claim_many, "cancel": end_many},
        # Apart: an ending locks balances after its jobs, and must wait for no job with these in hand.
        {"end": end_plain},
        {"give_back": job_store.give_back_many},
        # One of two claims of the same job may be done alone: it is the one that counts. A submission
        # that is not covered has done nothing. An ending that is told again changes nothing, and its
        # caller looks at how the job has ended.
        single=["claim", "submit", "end"],
    )
    attempts = Attempts(
        database,
        writer,
        models,
        market,
        hub,
        reputation=Reputation(database, fleet),
        max_attempts=settings.max_attempts,
        router_id=this_router,
    )
    relay = Relay(
        _bus(settings, secrets, this_router, exchange), hub, attempts, router_id=this_router
    )
    presence = Presence(
        database,
        models,
        market,
        relay,
        router_id=this_router,
        place=place_of(settings.data_dir),
    )
    presence.minute_tokens_here = attempts.tally.recent.total
    far_calls = FarCalls(relay)
    far_jobs = FarJobs(database, hub, relay, others=lambda: presence.others > 0)
    job_core = Jobs(
        database,
        writer,
        models,
        market,
        hub,
        attempts,
        relay,
        router_id=this_router,
        token_secret=hmac.new(secrets.current, b"job-tokens", hashlib.sha256).digest(),
        max_multiplier=settings.max_multiplier,
    )
    outside = OutsideRules(allow_private=settings.lnurl_allow_private)
    addresses = LightningAddresses(
        OutsideHttp(outside),
        network=node.network,
        own_pubkey=node.pubkey,
        now=clock,
    )
    watcher = InvoiceWatcher(
        database.transaction,
        backend,
        lambda connection, credit: _on_credit(core, connection, credit),
        at_once=lambda receipt: _start_at_once(core, paid, receipt),
        lock=_lock_bumped,
        clock=clock,
    )
    reconciler = Reconciler(
        database.transaction, backend, watcher, clock=clock, on_done=lambda: core.payouts.wake()
    )
    payouts = PayoutRunner(
        database.transaction,
        backend,
        addresses,
        settings=_payout_settings(settings),
        clock=clock,
        reconciled=lambda: reconciler.ready,
        on_older=reconciler.doubt,
    )
    asks = Asks()
    limits = Limits(
        max_n=settings.max_n,
        image_prompt_tokens=settings.image_prompt_tokens,
        max_multiplier=settings.max_multiplier,
        max_wait_s=settings.max_wait_s,
        outside=outside,
    )
    paid = PaidQuotes(database, models, lambda jobs, buy: core.dispatcher.start_bought(jobs, buy))
    quotes = Quotes(
        database, settings, models, backend, watcher, paid, network=node.network, clock=clock
    )
    gate = WorkerGate(
        database,
        settings,
        fleet,
        models,
        attempts,
        addresses,
        asks,
        router_id=this_router,
        clock=clock,
    )
    dispatcher = Dispatcher(
        database,
        writer,
        fleet,
        gate.assign,
        router_id=this_router,
        lease_s=settings.lease_s,
        commission_ppm=lambda: settings.commission_ppm,
        clock=clock,
    )
    maintenance = Maintenance(
        database,
        settings,
        fleet,
        models,
        hub,
        attempts,
        presence,
        router_id=this_router,
        clock=clock,
    )
    pull_gate = PullGate(
        database,
        fleet,
        gate,
        dispatcher,
        attempts,
        market,
        addresses,
        skips=lambda worker: {
            skip.code: skip.count for skip in worker_views.skips(worker, market.counts.steps())
        },
        finer_lanes=maintenance.finer_lanes,
        ttl_s=settings.pull_ttl_s,
        router_id=this_router,
        clock=clock,
    )
    projects = Projects(database, gate, far_calls, alive=presence.alive, router_id=this_router)
    core = Core(
        settings=settings,
        runtime=RuntimeSettings(settings),
        limits=limits,
        router_id=this_router,
        clock=clock,
        database=database,
        writer=writer,
        secrets=secrets,
        receipts=receipt_issuer,
        backend=backend,
        node=node,
        watcher=watcher,
        addresses=addresses,
        payouts=payouts,
        reconciler=reconciler,
        withdrawals=Withdrawals(
            database.transaction,
            backend,
            addresses,
            settings=_payout_settings(settings),
            clock=clock,
            on_planned=payouts.wake,
        ),
        keys=KeyRing(database),
        door_ids=DoorIds(
            database,
            secret=hmac.new(secrets.current, b"door-ids", hashlib.sha256).digest(),
        ),
        limiter=RateLimits(settings),
        fleet=fleet,
        models=models,
        market=market,
        quotes=quotes,
        jobs=job_core,
        attempts=attempts,
        relay=relay,
        far_jobs=far_jobs,
        far_calls=far_calls,
        announcer=Announcer(relay.bus, fleet, relay.tell_work),
        presence=presence,
        gate=gate,
        projects=projects,
        far_projects=FarProjects(
            database, projects, far_calls, is_lost=presence.is_lost, router_id=this_router
        ),
        asks=asks,
        dispatcher=dispatcher,
        pull_gate=pull_gate,
        pull_submits=PullSubmits(pull_gate.handed_out, presence, far_calls, router_id=this_router),
        maintenance=maintenance,
        webhooks=Webhooks(database, receipt_issuer, outside, clock=clock),
        checks=Checks(
            database,
            settings,
            models,
            quotes,
            job_core,
            attempts.reputation,
            limits,
            may_buy=lambda: not core.draining and core.runtime.paused is None,
            clock=clock,
        ),
    )
    attempts.on_work = partial(_on_work, core)
    attempts.on_queued = partial(_on_queued, core)
    relay.on_claimed = core.announcer.claimed
    relay.on_work = core.dispatcher.wake
    far_calls.answer_with("worker-view", partial(_told_of_worker, core))
    relay.on_come = gate.come_elsewhere
    gate.on_admitted = relay.tell_come
    pull_gate.on_asked_here = relay.tell_come
    relay.bus.on_up = partial(_on_bus_up, core)
    gate.on_idle = core.dispatcher.wake
    return core


async def _told_of_worker(core: Core, brings: list[Any]) -> dict[str, Any] | None:
    """What another router tells a worker's owner that is connected here."""
    row = await worker_views.find_by_id(core, brings[0])
    return await worker_views.own_view_here(core, row) if row is not None else None


def _bus(
    settings: Settings, secrets: MasterSecrets, this_router: str, exchange: Exchange | None
) -> Bus:
    if not settings.nats_url:
        return InProcessBus(this_router, exchange)
    # Routers of one market share a secret, and no other market knows its name.
    market = hmac.new(secrets.current, b"bus", hashlib.sha256).hexdigest()[:24]
    return NatsBus(this_router, settings.nats_url.get_secret_value(), market=market)


def _payout_settings(settings: Settings) -> PayoutSettings:
    return dataclasses.replace(
        PayoutSettings(),
        threshold_msat=settings.payout_threshold_msat,
        interval_s=settings.payout_interval_s,
    )


def _on_bus_up(core: Core) -> None:
    """The bus is there, or there again: what was said meanwhile was not heard."""
    core.presence.say()
    core.presence.ask()
    core.relay.ask_all_again()
    core.far_jobs.look_at_all()
    core.dispatcher.wake()


def _on_work(core: Core) -> None:
    """Something waits for a worker, here or at another router."""
    core.dispatcher.wake()
    core.relay.tell_work()


async def _start_at_once(
    core: Core, paid: PaidQuotes, receipt: Receipt
) -> Callable[[], None] | None:
    """What `_on_credit` does for a quote paid in time and in full, with the credit."""
    started = await paid.start(receipt)
    if started is None:
        return None
    return partial(core.jobs.paid, started.job_ids, any_waits=started.waits)


async def _submit_plain(core: Core, connection: Any, rows: list[Submission]) -> list[Any]:
    """`job_submits.submit_plain`, with the seats of idle workers."""
    results: list[Any] = []

    async def buy(seats: Sequence[Seat]) -> list[Claimed]:
        results[:] = await job_submits.submit_plain(connection, rows, seats)
        return [
            claimed
            for result in results
            if isinstance(result, Submitted)
            for claimed in result.started
        ]

    await core.dispatcher.start_bought(
        [(job, job.lanes) for row in rows for job in row.quote.jobs], buy
    )
    return results


def _on_queued(core: Core, jobs: Sequence[NewJob]) -> None:
    """Jobs wait, as they were bought here."""
    core.dispatcher.wake()
    core.announcer.queued(jobs)


async def _lock_bumped(connection: Any, purpose: Purpose, reference: str) -> None:
    """Lock the job that a payment raises: it may be ended at the same time. One that is not paid for
    yet holds nothing that could be given back."""
    if purpose is Purpose.BUMP:
        job_id = reference.partition(":")[0]
        await connection.execute("select from jobs where id = $1 for update", job_id)


async def _on_credit(core: Core, connection: Any, credit: Credit) -> Callable[[], None] | None:
    """What a payment starts, in the transaction that credits it; then what to tell the process."""
    match credit.purpose:
        case Purpose.QUOTE:
            jobs_queued = await core.quotes.on_credit(connection, credit)
            return partial(core.jobs.paid, jobs_queued)
        case Purpose.BUMP:
            job_id, _, offer_msat = credit.reference.partition(":")
            await core.jobs.bump_in(connection, job_id, int(offer_msat))
            return core.attempts.on_work
        case Purpose.TOPUP:
            return None
