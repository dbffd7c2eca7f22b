"""`satherd admin workers`, `jobs` and `payouts`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.admin_access import Access, fail, segment, table

workers_app = typer.Typer(no_args_is_help=True, help="Who serves, and who may not.")
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs, without what was asked or answered.")
payouts_app = typer.Typer(no_args_is_help=True, help="What workers and clients are sent.")

Id = Annotated[str, typer.Argument(help="The id, as `list` shows it.")]
Reason = Annotated[str | None, typer.Option(help="Why; it is kept in the audit.")]
Limit = Annotated[int, typer.Option(min=1, max=100, help="How many.")]
Cursor = Annotated[str | None, typer.Option(help="Go on where a list ended.")]


@workers_app.command("list")
def list_workers(context: typer.Context, limit: Limit = 50, cursor: Cursor = None) -> None:
    """All workers, newest first."""
    access: Access = context.obj
    answer = access.get("/workers", limit=limit, cursor=cursor)
    heads = ("id", "name", "state", "models", "busy", "done", "failed", "pays to", "pending msat")
    rows = [
        (
            w["id"],
            w["name"],
            _worker_state(w),
            ", ".join(sorted({model["id"] for model in w["models"]})),
            f"{w['busy']}/{w['slots']}",
            w["jobs_done"],
            w["jobs_failed"],
            w["ln_url"] or "nobody",
            w["pending_msat"],
        )
        for w in answer["workers"]
    ]
    access.show(answer, table(None, heads, rows), *_more(answer["cursor"]))


def _worker_state(worker: dict) -> str:
    if worker["banned"]:
        return "banned"
    if not worker["online"]:
        return "offline"
    return "draining" if worker["draining"] else "online"


def _more(cursor: str | None) -> list[str]:
    return [f"there are more: --cursor {cursor}"] if cursor else []


@workers_app.command("ban")
def ban_worker(context: typer.Context, worker: Id, reason: Reason = None) -> None:
    """Send a worker away, now and whenever it comes back; what it has earned stays owed."""
    access: Access = context.obj
    answer = access.post(f"/workers/{segment(worker)}/ban", reason=reason)
    access.show(answer, f"{worker} is banned")


@workers_app.command("unban")
def unban_worker(context: typer.Context, worker: Id) -> None:
    """Let a worker come back."""
    access: Access = context.obj
    access.show(access.post(f"/workers/{segment(worker)}/unban"), f"{worker} may come back")


@workers_app.command("drain")
def drain_worker(context: typer.Context, worker: Id) -> None:
    """Give a worker no more jobs; it finishes what it has."""
    access: Access = context.obj
    access.show(access.post(f"/workers/{segment(worker)}/drain"), f"{worker} gets no more jobs")


@workers_app.command("resume")
def resume_worker(context: typer.Context, worker: Id) -> None:
    """Give a drained worker jobs again."""
    access: Access = context.obj
    access.show(access.post(f"/workers/{segment(worker)}/resume"), f"{worker} gets jobs again")


@jobs_app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only those of this model.")] = None,
    worker: Annotated[str | None, typer.Option(help="Only those that this worker tried.")] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> None:
    """Jobs, newest first; --json shows every attempt and its error."""
    access: Access = context.obj
    answer = access.get(
        "/jobs", state=state, model=model, worker=worker, limit=limit, cursor=cursor
    )
    heads = ("id", "created", "model", "state", "tries", "multiplier", "held msat", "charged msat")
    rows = [
        (
            j["id"],
            j["created_at"],
            j["model"],
            f"{j['state']} ({j['end_reason']})" if j["end_reason"] else j["state"],
            j["attempt"],
            j["multiplier"],
            j["held_msat"],
            j["charged_msat"],
        )
        for j in answer["jobs"]
    ]
    access.show(answer, table(None, heads, rows), *_more(answer["cursor"]))


@jobs_app.command("refund")
def refund_job(
    context: typer.Context,
    job: Id,
    amount_msat: Annotated[
        int | None, typer.Option(min=1, help="A part of it; without this, all it was charged.")
    ] = None,
    reason: Reason = None,
) -> None:
    """Give back what a job was charged, at the router's cost; once."""
    access: Access = context.obj
    answer = access.post(f"/jobs/{segment(job)}/refund", amount_msat=amount_msat, reason=reason)
    simulated = " (simulated)" if answer["simulated"] else ""
    access.show(answer, f"{answer['goodwill_msat']} msat{simulated} given back")


@payouts_app.command("list")
def list_payouts(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="planned, sending, paid or failed.")] = None,
    kind: Annotated[str | None, typer.Option(help="worker or withdrawal.")] = None,
    worker: Annotated[str | None, typer.Option(help="Only those of this worker.")] = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> None:
    """Payouts and withdrawals, newest first; --json shows preimages, the proofs of payment."""
    access: Access = context.obj
    answer = access.get(
        "/payouts", state=state, kind=kind, worker=worker, limit=limit, cursor=cursor
    )
    heads = ("id", "created", "kind", "to", "amount msat", "fee msat", "state", "tries", "note")
    rows = [
        (
            p["id"],
            p["created_at"],
            p["kind"],
            p["target"],
            p["amount_msat"],
            p["fee_msat"],
            p["state"],
            p["attempts"],
            p["alert"] or p["error"],
        )
        for p in answer["payouts"]
    ]
    notes = _more(answer["cursor"])
    if answer["paused"]:
        notes.append(f"payouts are paused: {answer['paused']} (satherd admin payouts resume)")
    if answer["blocked"]:
        notes.append(f"nothing is sent for now: {answer['blocked']}")
    title = "simulated money" if answer["simulated"] else None
    access.show(answer, table(title, heads, rows), *notes)


@payouts_app.command("retry")
def retry_payout(context: typer.Context, payout: Id) -> None:
    """Do the next thing for this payout now, instead of when it is due."""
    access: Access = context.obj
    access.show(access.post(f"/payouts/{segment(payout)}/retry"), f"{payout} is tried now")


@payouts_app.command("decide")
def decide_payout(
    context: typer.Context,
    payout: Id,
    preimage: Annotated[str | None, typer.Option(help="It was paid: the proof.")] = None,
    fee_msat: Annotated[int | None, typer.Option(min=0, help="What routing cost.")] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="It was not paid, and never will be.")
    ] = False,
) -> None:
    """Say how a payout has ended that waits for a person who has looked at the node."""
    access: Access = context.obj
    if (preimage is None) != failed:
        raise fail("give either --preimage or --failed, after you have looked at the node", 2)
    answer = access.post(
        f"/payouts/{segment(payout)}/decide",
        preimage=preimage,
        fee_msat=fee_msat,
        failed=failed or None,
    )
    access.show(answer, f"{payout} is {answer['state']}")


@payouts_app.command("pause")
def pause_payouts(context: typer.Context, reason: Reason = None) -> None:
    """Send nothing more; what is on its way is still looked up."""
    access: Access = context.obj
    access.show(access.post("/payouts/pause", reason=reason), "payouts are paused")


@payouts_app.command("resume")
def resume_payouts(context: typer.Context) -> None:
    """Send again what is due."""
    access: Access = context.obj
    access.show(access.post("/payouts/resume"), "payouts are sent again")
