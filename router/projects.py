"""Projects whose models are reached by HTTP: registered, changed, taken out, and kept.

A project belongs to whoever registered it: a worker key, or programs on the router's own machine. Only
its owner changes it; what he orders at another router comes by way of `router.far_projects`. Each of
its containers is one worker (`router.http_sessions`); the table has what was registered, and a router
lets its own projects in again when it starts, and for as long as one that should be there is not, from
time to time.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from router import workers
from router.database import Database, DatabaseUnavailable
from router.errors import Forbidden, NoSuchThing
from router.far_calls import FarCalls, NoAnswer
from router.http_sessions import HttpSession, HttpWorker
from router.named_locks import NamedLocks
from router.project_requests import Project, ProjectModel
from router.sessions import RefusedWorker
from router.worker_gate import WorkerGate

log = logging.getLogger(__name__)

AGAIN_S = 15.0
# So many are let in again at once.
BACK_AT_ONCE = 8
# How long other routers may take to say which workers of a project they have.
PEERS_S = 2.0

_SAVE = """
insert into projects (router_id, name, owner, has_key_identity, ln_url, slots, models)
values ($1, $2, $3, $4, $5, $6, $7)
on conflict (router_id, name) do update set ln_url = excluded.ln_url, slots = excluded.slots,
    models = excluded.models"""

# One first registration of a project by a key at a time, at all routers.
_ALONE = "select pg_advisory_xact_lock(hashtextextended($1 || ':' || encode($2, 'hex'), 7))"

_ELSEWHERE = "select router_id from projects where name = $1 and owner = $2 and router_id <> $3"


class KeptElsewhere(Exception):
    """Another router keeps this project: it was registered there meanwhile."""

    def __init__(self, router_id: str) -> None:
        super().__init__(router_id)
        self.router_id = router_id


class Projects:
    """The projects of this router."""

    def __init__(
        self,
        database: Database,
        gate: WorkerGate,
        calls: FarCalls,
        *,
        alive: Callable[[], list[str]],
        router_id: str,
    ) -> None:
        self._database = database
        self._gate = gate
        self._calls = calls
        self._alive = alive
        calls.answer_with("project-peers", self._told_peers)
        self._router_id = router_id
        self._sessions: dict[tuple[str, str], HttpSession] = {}
        self._locks = NamedLocks()
        self._back_at_once = asyncio.Semaphore(BACK_AT_ONCE)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name="projects")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def register(
        self, project: Project, owner: bytes | None, *, own_ports: frozenset[int]
    ) -> None:
        """Let a project in, or change it to this. `owner` None: this machine.

        Raises Forbidden, RefusedWorker (bad URLs, bad address), and what the gate raises; a project
        that was there is then as it was, but what is refused only by the gate may have left it.
        KeptElsewhere: another router was the first to let it in.
        """
        async with self._alone(owner, project.name):
            await self._register(project, owner, own_ports)

    async def add_model(
        self, project: Project, owner: bytes | None, *, own_ports: frozenset[int]
    ) -> None:
        """Add the one model of `project` to what is registered under its name, or replace it there."""
        async with self._alone(owner, project.name):
            row = await self._row(project.name)
            if row is not None:
                _check_owner(row, owner)
                project = _project(row).with_model(project.models[0])
            await self._register(project, owner, own_ports)

    async def remove_model(
        self, name: str, model: str, cid: str | None, owner: bytes | None
    ) -> None:
        """Take one model out; with the last one the project goes. Raises Forbidden, NoSuchThing."""
        async with self._alone(owner, name):
            row = await self._existing(name, owner)
            before = _project(row)
            left = before.without_model(model, cid)
            if len(left.models) == len(before.models):
                raise NoSuchThing("this project has no such model", param="model")
            if left.models:
                await self._register(left, owner, frozenset())
            else:
                await self._remove(name)

    async def unregister(self, name: str, owner: bytes | None) -> None:
        """Take a project out; what its models are at goes to others. Raises Forbidden, NoSuchThing."""
        async with self._alone(owner, name):
            await self._existing(name, owner)
            await self._remove(name)

    async def names(self, most: int) -> list[str]:
        """The projects of this market, of all its routers."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select distinct name from projects order by name limit $1", most
            )
        return [row["name"] for row in rows]

    async def models(self, name: str, most: int) -> list[str]:
        """The models of a project, each once. Raises NoSuchThing."""
        async with self._database.connection() as connection:
            rows = await connection.fetch("select * from projects where name = $1", name)
        if not rows:
            raise NoSuchThing("there is no such project", param="project")
        found = (model.model for row in rows for model in _project(row).models)
        return sorted(set(found))[:most]

    def serving(self, name: str, model: str) -> list[HttpSession]:
        """The workers here that serve a model of a project now."""
        return [
            session
            for (project, _), session in self._sessions.items()
            if project == name
            and not session.closed
            and any(served.id == model for served in session.worker.models)
        ]

    async def peers(self, name: str, model: str, most: int) -> list[tuple[str, int]]:
        """The market's workers that serve a model of a project now: public ids and free slots.

        Those of another router are left out while that does not answer.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select router_id from projects where name = $1 and router_id = any($2::text[])",
                name,
                self._alive(),
            )
        told = await asyncio.gather(
            *(
                self._calls.ask(
                    row["router_id"], "project-peers", name, model, most, within_s=PEERS_S
                )
                for row in rows
            ),
            return_exceptions=True,
        )
        found = self._peers_here(name, model)
        for peers in told:
            if not isinstance(peers, BaseException):
                found += [(worker_id, free) for worker_id, free in peers]
            elif not isinstance(peers, NoAnswer):
                raise peers
        return found[:most]

    async def _told_peers(self, brings: list[Any]) -> list[tuple[str, int]]:
        name, model, most = brings
        return self._peers_here(name, model)[:most]

    def _peers_here(self, name: str, model: str) -> list[tuple[str, int]]:
        return [(s.worker.id, s.worker.free_slots) for s in self.serving(name, model)]

    # --- one at a time: of a name, and of an owner, whose first project is told from the others ----

    @asynccontextmanager
    async def _alone(self, owner: bytes | None, name: str) -> AsyncIterator[None]:
        """Others go on meanwhile: letting a project in may take as long as its address's server."""
        async with AsyncExitStack() as stack:
            if owner is not None:
                await stack.enter_async_context(self._locks.of(owner))
            await stack.enter_async_context(self._locks.of(name))
            yield

    async def _register(
        self, project: Project, owner: bytes | None, own_ports: frozenset[int]
    ) -> None:
        row = await self._row(project.name)
        if row is not None:
            _check_owner(row, owner)
        has_key_identity = (
            row["has_key_identity"] if row is not None else await self._is_first_of(owner)
        )
        await self._let_in(project, owner, has_key_identity, own_ports)
        async with self._database.transaction() as connection:
            if row is None and owner is not None and not project.is_local:
                await self._refuse_second(connection, project.name, owner)
            await connection.execute(
                _SAVE,
                self._router_id,
                project.name,
                owner,
                has_key_identity,
                project.ln_url,
                project.slots,
                json.dumps(project.models_as_json()),
            )
        log.info("project registered project=%s models=%d", project.name, len(project.models))

    async def _refuse_second(self, connection: Any, name: str, owner: bytes) -> None:
        await connection.execute(_ALONE, name, owner)
        first = await connection.fetchval(_ELSEWHERE, name, owner, self._router_id)
        if first is not None:
            self._cut_project(name)
            raise KeptElsewhere(first)

    async def _let_in(
        self,
        project: Project,
        owner: bytes | None,
        has_key_identity: bool,
        own_ports: frozenset[int] = frozenset(),
    ) -> None:
        groups = project.by_cid()
        for place, (cid, models) in enumerate(groups.items()):
            by_key = has_key_identity and place == 0 and owner is not None
            described = HttpWorker(
                identity=owner if by_key and owner else _identity(owner, project.name, cid),
                models=tuple(model.as_http() for model in models),
                name=project.name,
                slots=project.slots,
                ln_url=project.ln_url,
            )
            session = await self._gate.register_http(described, own_ports=own_ports)
            self._sessions[project.name, cid] = session
        self._cut(
            key for key in list(self._sessions) if key[0] == project.name and key[1] not in groups
        )

    async def _remove(self, name: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                "delete from projects where router_id = $1 and name = $2", self._router_id, name
            )
        self._cut_project(name)
        log.info("project unregistered project=%s", name)

    def _cut_project(self, name: str) -> None:
        self._cut([key for key in self._sessions if key[0] == name])

    def _cut(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            self._sessions.pop(key).cut("unregistered", blame="nobody")

    async def _row(self, name: str) -> Any:
        async with self._database.connection() as connection:
            return await connection.fetchrow(
                "select * from projects where router_id = $1 and name = $2", self._router_id, name
            )

    async def _existing(self, name: str, owner: bytes | None) -> Any:
        row = await self._row(name)
        if row is None:
            raise NoSuchThing("there is no such project here", param="project")
        _check_owner(row, owner)
        return row

    async def _is_first_of(self, owner: bytes | None) -> bool:
        """Whether a key has no project yet: its first is the worker that `GET /workers/me` shows."""
        if owner is None:
            return False
        async with self._database.connection() as connection:
            return not await connection.fetchval(
                "select exists (select 1 from projects where owner = $1 and has_key_identity)",
                owner,
            )

    # --- keeping them there --------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            try:
                await self._bring_back()
            except DatabaseUnavailable:
                log.warning("projects wait for the database")
            except Exception:
                log.exception("projects could not be looked after, going on")
            await asyncio.sleep(AGAIN_S)

    async def _bring_back(self) -> None:
        """Let in what is registered and not there, and out what another router has taken over."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "select * from projects where router_id = $1", self._router_id
            )
        kept = {row["name"] for row in rows}
        for name in {name for name, _ in self._sessions} - kept:
            await self._let_go(name)
        away = [row for row in rows if not self._is_all_there(_project(row))]
        done = await asyncio.gather(*map(self._bring_one_back, away), return_exceptions=True)
        for error in done:
            if isinstance(error, BaseException):
                raise error

    async def _let_go(self, name: str) -> None:
        async with self._locks.of(name):
            if await self._row(name) is None:
                self._cut_project(name)

    async def _bring_one_back(self, row: Any) -> None:
        # In this order: who waits for another project of its owner takes no turn from others.
        async with self._alone(row["owner"], row["name"]), self._back_at_once:
            # It may have been changed, or taken out, while it waited for its turn.
            row = await self._row(row["name"])
            if row is None or self._is_all_there(project := _project(row)):
                return
            with suppress(RefusedWorker):
                await self._let_in(project, row["owner"], row["has_key_identity"])
                log.info("project is there again project=%s", project.name)

    def _is_all_there(self, project: Project) -> bool:
        return all(self._is_there(project.name, cid) for cid in project.by_cid())

    def _is_there(self, name: str, cid: str) -> bool:
        session = self._sessions.get((name, cid))
        if session is None:
            return False
        # The same key may be serving over a socket meanwhile: it is not taken from that.
        return not session.closed or session.worker.id in self._gate.sessions


def _check_owner(row: Any, owner: bytes | None) -> None:
    if row["owner"] != owner:
        raise Forbidden("this project belongs to somebody else")


def _identity(owner: bytes | None, name: str, cid: str) -> bytes:
    return workers.hash_identity("project", owner.hex() if owner else "", name, cid)


def _project(row: Any) -> Project:
    models = tuple(ProjectModel(**model) for model in json.loads(row["models"]))
    return Project(row["name"], models, row["ln_url"], row["slots"])
