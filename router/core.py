"""The parts of a running router, joined by `router.joining` and handed to the front doors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from billing.invoice_watcher import InvoiceWatcher
from billing.l402 import MasterSecrets
from billing.lightning import LightningBackend, NodeInfo
from billing.lightning_address import LightningAddresses
from billing.payouts import PayoutRunner
from billing.reconciliation import Reconciler
from billing.withdrawals import Withdrawals
from router.announcing import Announcer
from router.asks import Asks
from router.attempts import Attempts
from router.checks import Checks
from router.database import BatchingWriter, Database
from router.dispatcher import Dispatcher
from router.door_ids import DoorIds
from router.far_calls import FarCalls
from router.far_jobs import FarJobs
from router.far_projects import FarProjects
from router.jobs import Jobs
from router.key_ring import KeyRing
from router.maintenance import Maintenance
from router.market import Market
from router.models import Models
from router.presence import Presence
from router.projects import Projects
from router.pull_gate import PullGate
from router.pull_submits import PullSubmits
from router.quotes import Quotes
from router.rate_limits import RateLimits
from router.receipts import Issuer
from router.relay import Relay
from router.requests import Limits
from router.runtime_settings import RuntimeSettings
from router.settings import Settings
from router.webhooks import Webhooks
from router.worker_gate import WorkerGate
from router.workers import Fleet


@dataclass(slots=True)
class Core:
    """Everything a front door may need. `node` is what the Lightning node said at the start."""

    settings: Settings
    runtime: RuntimeSettings
    limits: Limits
    router_id: str
    clock: Callable[[], datetime]
    database: Database
    writer: BatchingWriter
    secrets: MasterSecrets
    receipts: Issuer
    backend: LightningBackend
    node: NodeInfo
    watcher: InvoiceWatcher
    addresses: LightningAddresses
    payouts: PayoutRunner
    reconciler: Reconciler
    withdrawals: Withdrawals
    keys: KeyRing
    door_ids: DoorIds
    fleet: Fleet
    models: Models
    market: Market
    quotes: Quotes
    jobs: Jobs
    limiter: RateLimits
    attempts: Attempts
    relay: Relay
    far_jobs: FarJobs
    far_calls: FarCalls
    announcer: Announcer
    presence: Presence
    gate: WorkerGate
    projects: Projects
    far_projects: FarProjects
    asks: Asks
    dispatcher: Dispatcher
    pull_gate: PullGate
    pull_submits: PullSubmits
    maintenance: Maintenance
    webhooks: Webhooks
    checks: Checks
    draining: bool = False
