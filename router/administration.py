"""What an admin may change. Each change is one transaction with one row in `audit`: who, when, what
it was before and is after. A change that changes nothing leaves no row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from billing import fee_schedule, ledger, payout_control
from billing.fees import Rates
from billing.ledger import Transfer
from billing.payout_states import PayoutState
from router import worker_controls
from router.core import Core
from router.errors import BadRequest, Conflict, NoSuchJob, NoSuchThing
from router.job_states import FINAL, State

WHO = "admin"
DEFAULT_SUBJECT = "default"
PAUSED_MESSAGE = "the operator has paused new work"


@asynccontextmanager
async def changing(core: Core) -> AsyncIterator[Any]:
    """A transaction for one change. Changes wait for one another, so that `before` is the truth."""
    async with core.database.transaction() as connection:
        await connection.execute("select pg_advisory_xact_lock(hashtextextended('audit', 0))")
        yield connection
    core.relay.tell_changed()


async def note(connection: Any, action: str, subject: str, before: Any, after: Any) -> None:
    """Write one change into the audit, unless nothing has changed."""
    if before != after:
        # Not the transaction's time: that is from before it waited for its turn.
        await connection.execute(
            "insert into audit (at, who, action, subject, before, after)"
            " values (clock_timestamp(), $1, $2, $3, $4, $5)",
            WHO,
            action,
            subject,
            json.dumps(before),
            json.dumps(after),
        )


# --- prices and settings ------------------------------------------------------------------------


async def set_fees(core: Core, model: str | None, changes: dict[str, int]) -> Rates:
    """Change rates of a model, None for the default; what is not named stays. Raises BadAmount.

    The next quote uses them, quotes made before keep theirs.
    """
    async with changing(core) as connection:
        schedule = await fee_schedule.load(connection)
        before = schedule.default if model is None else schedule.rates(model)
        after = dataclasses.replace(before, **changes)
        own = model is None or model in schedule.by_model
        if after != before or not own:
            await fee_schedule.change(connection, model=model, rates=after, changed_by=WHO)
        await note(
            connection,
            "fees.set",
            model or DEFAULT_SUBJECT,
            before.as_json() if own else None,
            after.as_json(),
        )
    core.quotes.fees.forget()
    return after


async def remove_fees(core: Core, model: str) -> Rates:
    """Return a model to the default rates. Raises NoSuchThing: it had none of its own."""
    async with changing(core) as connection:
        schedule = await fee_schedule.load(connection)
        if not await fee_schedule.remove(connection, model=model, changed_by=WHO):
            raise NoSuchThing(f"the model {model!r} has no rates of its own", model=model)
        await note(connection, "fees.remove", model, schedule.by_model[model].as_json(), None)
    core.quotes.fees.forget()
    return schedule.default


async def change_settings(core: Core, changes: dict[str, Any]) -> dict[str, int]:
    """Change settings while the router runs. Raises BadRequest, with nothing changed."""
    before = core.runtime.as_json()
    try:
        async with changing(core) as connection:
            await core.runtime.load(connection)
            before = core.runtime.as_json()
            await core.runtime.change(connection, changes)
            after = core.runtime.as_json()
            await note(
                connection,
                "settings.change",
                "settings",
                {name: before[name] for name in changes},
                {name: after[name] for name in changes},
            )
    except BaseException:
        # They were applied before the commit that did not come.
        for name, value in before.items():
            setattr(core.settings, name, value)
        raise
    apply_payout_settings(core)
    return after


def apply_payout_settings(core: Core) -> None:
    """Let the payout runner of this process follow the settings."""
    wanted = dataclasses.replace(
        core.payouts.settings,
        threshold_msat=core.settings.payout_threshold_msat,
        interval_s=core.settings.payout_interval_s,
    )
    if wanted != core.payouts.settings:
        core.payouts.settings = wanted


async def pause(core: Core, message: str | None) -> None:
    """Make no new quotes, and tell clients why; what is paid still runs. None goes on."""
    async with changing(core) as connection:
        await core.runtime.load(connection)
        before = core.runtime.paused
        await core.runtime.pause(connection, message)
        await note(connection, "pause", "router", {"paused": before}, {"paused": message})


# --- workers and jobs ---------------------------------------------------------------------------


async def ban(core: Core, worker_id: str, reason: str | None) -> None:
    """Send a worker away for good; what it has earned stays owed. Raises NoSuchThing."""
    async with changing(core) as connection:
        row = await _worker(connection, worker_id)
        before = _ban_of(row)
        after = {"banned": True, "reason": reason}
        if before != after:
            await connection.execute(
                "update workers set banned_at = coalesce(banned_at, now()), ban_reason = $2"
                " where id = $1",
                worker_id,
                reason,
            )
        await note(connection, "worker.ban", worker_id, before, after)
    worker_controls.cut_off(core, worker_id, "banned")


async def unban(core: Core, worker_id: str) -> None:
    """Let a worker come back. Raises NoSuchThing."""
    async with changing(core) as connection:
        row = await _worker(connection, worker_id)
        await connection.execute(
            "update workers set banned_at = null, ban_reason = null where id = $1", worker_id
        )
        after = {"banned": False, "reason": None}
        await note(connection, "worker.unban", worker_id, _ban_of(row), after)


async def drain(core: Core, worker_id: str, draining: bool) -> None:
    """Give a worker no more jobs, or some again. Raises NoSuchThing."""
    async with changing(core) as connection:
        before = await worker_controls.set_draining(connection, worker_id, draining)
        if before is None:
            raise NoSuchThing("there is no such worker", worker=worker_id)
        action = "worker.drain" if draining else "worker.resume"
        await note(connection, action, worker_id, {"draining": before}, {"draining": draining})
    worker_controls.apply_draining(core, worker_id, draining)


async def _worker(connection: Any, worker_id: str) -> Any:
    row = await connection.fetchrow("select * from workers where id = $1 for update", worker_id)
    if row is None:
        raise NoSuchThing("there is no such worker", worker=worker_id)
    return row


def _ban_of(row: Any) -> dict[str, Any]:
    return {"banned": row["banned_at"] is not None, "reason": row["ban_reason"]}


async def refund(core: Core, job_id: str, amount_msat: int | None, reason: str | None) -> int:
    """Give a payer back what a job was charged, or a part of it, at the router's cost; once.

    None: all of it. Raises NoSuchJob, BadRequest (more than the charge), Conflict (nothing was
    charged, or it was refunded before). Returns the amount in msat.
    """
    async with changing(core) as connection:
        job = await connection.fetchrow("select * from jobs where id = $1 for update", job_id)
        if job is None:
            raise NoSuchJob("there is no such job", job=job_id)
        charged_msat = job["charged_msat"] or 0
        if State(job["state"]) not in FINAL or charged_msat == 0:
            raise Conflict("nothing has been charged for this job", state=job["state"])
        given_msat: int = charged_msat if amount_msat is None else amount_msat
        if not 1 <= given_msat <= charged_msat:
            raise BadRequest(
                f"a refund is at most the charge of {charged_msat} msat", param="amount_msat"
            )
        given = Transfer(
            ledger.GOODWILL, ledger.client(job["account_id"]), given_msat, "goodwill", job_id
        )
        if not await ledger.post(connection, [given]):
            raise Conflict("this job was refunded before", job=job_id)
        after = {"goodwill_msat": given_msat, "reason": reason}
        await note(connection, "job.refund", job_id, {"goodwill_msat": 0, "reason": None}, after)
    return given_msat


# --- payouts ------------------------------------------------------------------------------------


async def retry_payout(core: Core, payout_id: str) -> None:
    """Do the next thing for a payout now, and forget its payee's failures. Raises NoSuchThing."""
    async with changing(core) as connection:
        if not await payout_control.retry(connection, payout_id, now=core.clock()):
            raise NoSuchThing("there is no such payout", payout=payout_id)
        await note(connection, "payout.retry", payout_id, None, {"asked": True})
    core.payouts.wake()


async def decide_payout(
    core: Core, payout_id: str, preimage: str | None, fee_msat: int
) -> PayoutState:
    """Say how a payout has ended that nothing but a look at the node can tell.

    Raises NoSuchThing, and NotForAPerson unless the payout waits for just this.
    """
    async with changing(core) as connection:
        before = await connection.fetchval("select state from payouts where id = $1", payout_id)
        if before is None:
            raise NoSuchThing("there is no such payout", payout=payout_id)
        state = await payout_control.decide(
            connection, payout_id, preimage=preimage, fee_msat=fee_msat, now=core.clock()
        )
        after = {"state": state.value, "fee_msat": fee_msat if preimage else None}
        await note(connection, "payout.decide", payout_id, {"state": before}, after)
    core.payouts.wake()
    return state


async def pause_payouts(core: Core, why: str | None) -> str | None:
    """Send nothing more; what is on its way is still looked up. None goes on.

    Returns why payouts are paused now: what nobody has confirmed goes on pausing them.
    """
    async with changing(core) as connection:
        before = (await payout_control.control_state(connection)).paused_why
        if why is None:
            await payout_control.resume(connection)
        else:
            await payout_control.pause(connection, why, now=core.clock())
        after = (await payout_control.control_state(connection)).paused_why
        await note(connection, "payouts.pause", "payouts", {"paused": before}, {"paused": after})
    core.payouts.wake()
    return after
