"""Checks on what is sold: jobs that the operator buys to see whether workers do what they are paid for.

    canary      a prompt whose answer must contain what is known
    duplicate   a prompt bought twice; each answer is held against those of other workers

The prompts are the operator's own, never a client's. A check is a job like any other: priced, queued,
claimed, settled and paid by the same code, and a worker is sent nothing that would tell it apart. What
it costs comes from `expenses:checks`. Scores count over many (`router.check_scores`): they make the
worker's `quality`, which is a factor of its score, and a worker whose quality is low waits longer for
its money, as AI Horde does it (AH-35). Nothing of it is lost.

Any router may buy and score; a lock and guards see to it that each thing is done once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from billing import accounts, ledger, payees
from router import check_scores, requests
from router.database import Database, DatabaseUnavailable
from router.errors import BadRequest, RouterError
from router.job_records import NewQuote
from router.job_states import FINAL, State
from router.job_views import time_text
from router.jobs import Jobs
from router.judging import Note
from router.models import Models
from router.quotes import Quotes
from router.reputation import Reputation
from router.requests import Limits
from router.settings import Settings
from worker.protocol import Kind, ModelKind

log = logging.getLogger(__name__)

LOOK_S = 2.0
WAIT_S = 600
DAY = timedelta(days=1)
# One that nobody else answered in this time is not scored at all.
UNCOMPARED = timedelta(days=1)
KEPT_CHARACTERS = 20_000
# Answers are held against those of others for so long; their scores are kept.
ANSWERS_KEPT = timedelta(days=90)
_BATCH = 50

_DUE_PROMPTS = """
select p.* from check_prompts p
where p.model is null or p.model = any($1::text[])
order by (select max(c.created_at) from checks c where c.prompt_id = p.id) nulls first limit 1"""

_SPENT = """
select coalesce(sum(coalesce(j.charged_msat, j.held_msat)), 0)::bigint from checks c
join jobs j on j.id = c.job_id where c.created_at > $1"""

_ENDED = """
select c.id, c.prompt_id, c.created_at, j.id as job_id, j.state, j.worker_id, j.model, j.result
from checks c left join jobs j on j.id = c.job_id
where c.worker_id is null and c.scored_at is null
  and (j.state = any($1::text[]) or (j.id is null and c.created_at < $2))
limit $3 for update of c skip locked"""

_UNSCORED = """
select c.*, p.expected from checks c join check_prompts p on p.id = c.prompt_id
where c.worker_id is not null and c.scored_at is null limit $1 for update of c skip locked"""

_OTHERS = """
select distinct on (worker_id) answer from checks
where prompt_id = $1 and model = $2 and worker_id <> $3 and answer is not null
order by worker_id, created_at desc limit $4"""

_SCORES = """
select score from checks where worker_id = $1 and score is not null
order by created_at desc limit $2"""


class Checks:
    """Buys checks, and judges what comes back."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        models: Models,
        quotes: Quotes,
        jobs: Jobs,
        reputation: Reputation,
        limits: Limits,
        *,
        may_buy: Callable[[], bool],
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._settings = settings
        self._models = models
        self._quotes = quotes
        self._jobs = jobs
        self._reputation = reputation
        self._limits = limits
        self._may_buy = may_buy
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="checks")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._settings.check_every_s and self._may_buy():
                    await self.buy_if_due()
                await self.judge()
            except DatabaseUnavailable:
                log.warning("checks wait for the database")
            except Exception:
                log.exception("checks: a look failed, going on")

    # --- buying ---------------------------------------------------------------------------------

    async def buy_if_due(self) -> list[str]:
        """Buy the next check, if it is time and there is money for it; the ids of its jobs."""
        now = self._clock()
        async with self._database.transaction() as connection:
            if not await connection.fetchval(
                "select pg_try_advisory_xact_lock(hashtextextended('checks', 0))"
            ):
                return []
            last = await connection.fetchval("select max(created_at) from checks")
            every = timedelta(seconds=self._settings.check_every_s)
            if last is not None and timedelta(0) <= now - last < every:
                return []
            if await connection.fetchval(_SPENT, now - DAY) >= self._settings.check_budget_msat:
                return []
            quote, prompt_id = await self._next(connection)
            if quote is None:
                return []
            ids = [job.id for job in quote.jobs]
            await connection.execute(
                "update checks set answer = null where answer is not null and created_at < $1",
                now - ANSWERS_KEPT,
            )
            # Before the jobs: one that is not known as a check would never be judged.
            await connection.execute(
                "insert into checks (id, prompt_id, job_id, created_at)"
                " select t.id, $2, t.job_id, $3 from unnest($1::text[], $4::text[]) t(id, job_id)",
                [accounts.new_id() for _ in ids],
                prompt_id,
                now,
                ids,
            )
        await self._jobs.submit(quote, account_id=ledger.CHECKS)
        return ids

    async def _next(self, connection: Any) -> tuple[NewQuote | None, str]:
        """The prompt that was used least lately, as a priced request; None: nobody could answer."""
        served = [
            facts.id
            for facts in self._models.facts()
            if facts.kind is ModelKind.TEXT and facts.idle_workers
        ]
        row = await connection.fetchrow(_DUE_PROMPTS, served) if served else None
        if row is None:
            return None, ""
        body = {
            "model": row["model"] or random.choice(served),
            "messages": [{"role": "user", "content": row["prompt"]}],
            "max_tokens": row["max_tokens"],
            "temperature": 0,
            "max_wait_s": WAIT_S,
            "n": 1 if row["expected"] is not None else 2,
        }
        try:
            wanted = requests.parse(Kind.CHAT, body, self._limits)
            return await self._quotes.price(wanted), row["id"]
        except RouterError as error:
            log.warning("check not bought prompt=%s: %s", row["id"], error.message)
            return None, ""

    # --- judging --------------------------------------------------------------------------------

    async def judge(self) -> int:
        """Score the checks that have been answered; returns how many were scored."""
        async with self._database.transaction() as connection:
            await self._take_answers(connection)
            scored = await self._score(connection)
            for worker_id in {worker_id for worker_id, _ in scored}:
                await self._judge_worker(connection, worker_id)
        for worker_id, score in scored:
            if score < check_scores.FAILED_BELOW:
                # Not which job it was: the next one is to be a surprise, too.
                note = Note("check_failed", {"score": round(score, 2)})
                self._reputation.note(worker_id, note)
        return len(scored)

    async def _take_answers(self, connection: Any) -> None:
        """Keep the answers before they are wiped. A job without one says nothing of its quality."""
        ended = await connection.fetch(
            _ENDED, [state.value for state in FINAL], self._clock() - DAY, _BATCH
        )
        for row in ended:
            text = _text(row["result"]) if row["state"] == State.SUCCEEDED else None
            if text is None:
                await self._set_score(connection, row["id"], None)
                continue
            await connection.execute(
                "update checks set worker_id = $2, model = $3, answer = $4 where id = $1",
                row["id"],
                row["worker_id"],
                row["model"],
                text[:KEPT_CHARACTERS],
            )

    async def _score(self, connection: Any) -> list[tuple[str, float]]:
        scored = []
        for row in await connection.fetch(_UNSCORED, _BATCH):
            score = await self._score_of(connection, row)
            if score is not None:
                scored.append((row["worker_id"], score))
            elif self._clock() - row["created_at"] < UNCOMPARED:
                continue
            await self._set_score(connection, row["id"], score)
        return scored

    async def _score_of(self, connection: Any, row: Any) -> float | None:
        if row["expected"] is not None:
            return check_scores.canary_score(row["answer"], json.loads(row["expected"]))
        others = await connection.fetch(
            _OTHERS, row["prompt_id"], row["model"], row["worker_id"], check_scores.OTHERS_KEPT
        )
        return check_scores.duplicate_score(row["answer"], [other["answer"] for other in others])

    async def _set_score(self, connection: Any, check_id: str, score: float | None) -> None:
        await connection.execute(
            "update checks set score = $2, scored_at = $3 where id = $1",
            check_id,
            score,
            self._clock(),
        )

    async def _judge_worker(self, connection: Any, worker_id: str) -> None:
        """Let the scores count: for its quality, and for when it is paid."""
        rows = await connection.fetch(_SCORES, worker_id, check_scores.MOST_CHECKS)
        quality = check_scores.quality([row["score"] for row in rows])
        # Connected workers follow within seconds (`worker_controls.follow`).
        await connection.execute(
            "update workers set quality = $2 where id = $1", worker_id, quality
        )
        held_s = self._settings.failed_checks_hold_s
        bad = quality < check_scores.HELD_BELOW
        until = self._clock() + timedelta(seconds=held_s) if bad and held_s else None
        await payees.hold(connection, worker_id, until)


def _text(result: str | None) -> str | None:
    if result is None:
        return None
    message = json.loads(result)["choices"][0].get("message") or {}
    return message.get("content") or ""


# --- what the operator does ---------------------------------------------------------------------


async def add_prompt(
    connection: Any,
    *,
    prompt: str,
    expected: Sequence[str] | None,
    model: str | None,
    max_tokens: int,
) -> dict[str, Any]:
    """A prompt to check with. With `expected` a canary, without a duplicate. Raises BadRequest."""
    if not prompt.strip():
        raise BadRequest("prompt must not be empty", param="prompt")
    if expected is not None and not (expected and all(part.strip() for part in expected)):
        raise BadRequest("expected must name at least one text", param="expected")
    row = await connection.fetchrow(
        "insert into check_prompts (id, prompt, expected, model, max_tokens)"
        " values ($1, $2, $3, $4, $5) returning *",
        accounts.new_id(),
        prompt,
        None if expected is None else json.dumps(list(expected)),
        model,
        max_tokens,
    )
    return _prompt_view(row)


async def remove_prompt(connection: Any, prompt_id: str) -> dict[str, Any] | None:
    """Take a prompt away with its results; workers keep the quality that they came to. None: there
    is no such prompt."""
    row = await connection.fetchrow(
        "delete from check_prompts where id = $1 returning *", prompt_id
    )
    if row is None:
        return None
    await connection.execute("delete from checks where prompt_id = $1", prompt_id)
    return _prompt_view(row)


async def overview(connection: Any, *, now: datetime) -> dict[str, Any]:
    """The prompts, what workers came to, and what it has cost."""
    prompts = await connection.fetch(
        "select p.*, count(c.score) as answers, avg(c.score) as mean_score from check_prompts p"
        " left join checks c on c.prompt_id = p.id group by p.id order by p.created_at"
    )
    workers = await connection.fetch(
        "select c.worker_id, w.name, count(*) as checks, avg(c.score) as mean_score, w.quality,"
        " y.held_until from checks c join workers w on w.id = c.worker_id"
        " left join payees y on y.id = c.worker_id where c.score is not null"
        " group by c.worker_id, w.name, w.quality, y.held_until order by w.quality, c.worker_id"
    )
    spent_msat = await connection.fetchval(_SPENT, now - DAY)
    return {
        "prompts": [
            {**_prompt_view(row), "answers": row["answers"], "mean_score": _rounded(row)}
            for row in prompts
        ],
        "workers": [
            {
                "id": row["worker_id"],
                "name": row["name"],
                "checks": row["checks"],
                "mean_score": _rounded(row),
                "quality": round(row["quality"], 4),
                "held_until": time_text(row["held_until"]),
            }
            for row in workers
        ],
        "spent_in_a_day_msat": spent_msat,
    }


def _rounded(row: Any) -> float | None:
    return None if row["mean_score"] is None else round(row["mean_score"], 4)


def _prompt_view(row: Any) -> dict[str, Any]:
    return {
        "id": row["id"],
        "kind": "duplicate" if row["expected"] is None else "canary",
        "prompt": row["prompt"],
        "expected": None if row["expected"] is None else json.loads(row["expected"]),
        "model": row["model"],
        "max_tokens": row["max_tokens"],
    }
