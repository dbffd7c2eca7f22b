"""Tells clients who asked for it that their jobs have ended, by a POST to a URL of theirs.

    job ends ─▶ pending ─┬─ 2xx ──────────────────▶ delivered
                  ▲      ├─ 410, or a day is over ─▶ given_up
                  └──────┴─ anything else: again after 1, 2, 4, … s, then every hour

The row is written in the transaction that ends the job, and taken by one router at a time for as long
as a call may last, so that a crash at any moment makes a call happen twice at worst: receivers know
a repetition by its `webhook-id`. Calls go through `billing.outside_http`, so that nobody reaches with
them what only we can reach, and never follow a redirect. Payers have their calls made in turn, so many
at once each: slow receivers delay the calls of whoever named them.

Signed as Standard Webhooks 1.0 says, with its asymmetric scheme (`v1a`): an Ed25519 signature of
`{webhook-id}.{webhook-timestamp}.{body}` by the key of the receipts, whose public half is at
`/.well-known/jwks.json`. So no secret is shared, and none is kept.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import orjson

from billing.outside_http import OutsideHttp, OutsideHttpError, OutsideLimits
from billing.outside_url import BadOutsideUrl, OutsideRules, parse_outside_url
from router import receipts, webhook_store
from router.database import Database, DatabaseUnavailable
from router.job_views import job_view, time_text
from router.receipts import Issuer, ReceiptKey

log = logging.getLogger(__name__)

POLL_S = 1.0
AT_ONCE = 32
# Of these each payer has so many to itself, and more only while so many are left for others: a payer
# whose receivers are slow delays its own calls.
SHARE, LEFT_FOR_OTHERS = 4, 8
# Payers that are looked at together, and how often in one turn while calls may begin; the next turn
# goes on behind them. Most have only receivers that are tried in an hour again.
PAYERS, LOOKS = 500, 20
# Longer than any call lasts: until then nobody else calls for the same job.
TAKEN = timedelta(seconds=60)
GIVE_UP_AFTER = timedelta(days=1)
LONGEST_PAUSE_S = 3600.0
GONE = 410
LIMITS = OutsideLimits(total_s=20.0, body_bytes=64 * 1024)


class Webhooks:
    """The loop that calls; one in each router."""

    def __init__(
        self,
        database: Database,
        issuer: Issuer,
        rules: OutsideRules,
        *,
        clock: Callable[[], datetime],
        http: OutsideHttp | None = None,
    ) -> None:
        self._database = database
        self._issuer = issuer
        self._rules = rules
        self._clock = clock
        self._http = http or OutsideHttp(rules, limits=LIMITS)
        self._calls: dict[asyncio.Task[None], str] = {}
        self._looked_to = ""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="webhooks")

    async def stop(self) -> None:
        """Calls under way are broken off; they are made again, here or by another router."""
        tasks = [*self._calls, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self.call_due()
            except DatabaseUnavailable:
                log.warning("webhooks wait for the database")
            except Exception:
                log.exception("webhooks: a look failed, going on")
            await asyncio.sleep(POLL_S)

    async def call_due(self) -> int:
        """Begin as many of the calls that are due as may run at once; returns how many."""
        begun = 0
        for _ in range(LOOKS):
            if len(self._calls) >= AT_ONCE:
                break
            async with self._database.connection() as connection:
                begun += await self._look(connection)
            if not self._looked_to:
                break
        return begun

    async def _look(self, connection: Any) -> int:
        """Begin the calls of the next payers; returns how many."""
        payers = await webhook_store.payers(connection, after=self._looked_to, most=PAYERS)
        self._looked_to = payers[-1] if len(payers) == PAYERS else ""
        begun = await self._begin(connection, payers, SHARE, AT_ONCE - len(self._calls))
        more = AT_ONCE - LEFT_FOR_OTHERS - len(self._calls)
        if more > 0:
            begun += await self._begin(connection, payers, AT_ONCE, more)
        return begun

    async def _begin(self, connection: Any, payers: list[str], share: int, most: int) -> int:
        """Begin calls for these payers, as far as each has less than its share under way."""
        under_way = Counter(self._calls.values())
        shares = {payer: left for payer in payers if (left := share - under_way[payer]) > 0}
        if not shares:
            return 0
        now = self._clock()
        hooks = await webhook_store.take_due(
            connection, shares, now=now, due_again_at=now + TAKEN, most=most
        )
        for hook in hooks:
            task = asyncio.create_task(self._call(hook), name=f"webhook-{hook['id']}")
            self._calls[task] = hook["account_id"]
            task.add_done_callback(self._calls.pop)
        return len(hooks)

    async def _call(self, hook: Any) -> None:
        try:
            status, error = await self._post(hook)
            await self._note(hook, status, error)
        except DatabaseUnavailable:
            log.warning("webhook not noted webhook=%s: it will be called again", hook["id"])
        except Exception:
            log.exception("webhook failed webhook=%s: it will be called again", hook["id"])

    async def _post(self, hook: Any) -> tuple[int | None, str | None]:
        """The status of the answer, or a word for why there was none."""
        async with self._database.connection() as connection:
            row = await receipts.find(connection, hook["job_id"])
        body = orjson.dumps(event(row, self._issuer, include_result=hook["include_result"]))
        headers = signed_headers(self._issuer.key, hook["id"], body, self._clock())
        try:
            url = parse_outside_url(hook["url"], self._rules)
            reply = await self._http.fetch(url, method="POST", body=body, headers=headers)
        except BadOutsideUrl:
            return None, "bad_url"
        except OutsideHttpError as error:
            return None, error.code
        return reply.status, None

    async def _note(self, hook: Any, status: int | None, error: str | None) -> None:
        now = self._clock()
        state, next_try_at = "pending", now + timedelta(seconds=pause_s(hook["tries"]))
        if status is not None and 200 <= status < 300:
            state = "delivered"
        elif status == GONE or next_try_at > hook["created_at"] + GIVE_UP_AFTER:
            state = "given_up"
        async with self._database.connection() as connection:
            await webhook_store.note(
                connection,
                hook["id"],
                state=state,
                status=status,
                error=error,
                next_try_at=next_try_at,
            )
        log.info(
            "webhook called job=%s try=%d state=%s answer=%s",
            hook["job_id"],
            hook["tries"],
            state,
            status or error,
        )


def pause_s(tries: int) -> float:
    """How long to wait after this many tries; not all that failed together come back together."""
    return min(2.0 ** (tries - 1), LONGEST_PAUSE_S) * random.uniform(0.8, 1.2)


def event(row: Any, issuer: Issuer, *, include_result: bool) -> dict[str, Any]:
    """What is told: the job as `GET /jobs/{id}` shows it, and its receipt. Pure.

    The answer only where it was asked for, and only as long as it has not been wiped.
    """
    view = job_view(row)
    if not include_result:
        view.pop("result", None)
    receipt, _ = issuer.receipt(row)
    return {
        "type": f"job.{row['state']}",
        "timestamp": time_text(row["ended_at"]),
        "data": {
            "job": view,
            "receipt": receipt,
            "network": issuer.network,
            "simulated": issuer.simulated,
        },
    }


def signed_headers(key: ReceiptKey, hook_id: str, body: bytes, now: datetime) -> dict[str, str]:
    """The headers of Standard Webhooks; `webhook-key-id` is ours, and names the key in the JWK set."""
    sent_at = str(int(now.timestamp()))
    signature = key.sign_bytes(b".".join((hook_id.encode(), sent_at.encode(), body)))
    return {
        "Content-Type": "application/json",
        "webhook-id": hook_id,
        "webhook-timestamp": sent_at,
        "webhook-signature": f"v1a,{base64.b64encode(signature).decode()}",
        "webhook-key-id": key.kid,
    }
