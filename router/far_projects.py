"""Changes of a project, at whichever router they are asked for.

A project is kept by one router (`router.projects`). What its owner, a worker key, orders at another one
is passed on to that. If it has died, the one that was asked takes the project over, and the dead one,
should it come back, finds that it is not its any more.

    servers on the router's own machine    the router that was asked: it alone reaches them
    kept there already, or by nobody       the router that was asked
    kept by another that is alive          passed on, and its answer given
    kept by another that has died          taken over

Programs on a router's own machine, which need no key, own what they register at that router only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import asyncpg

from router.database import Database, DatabaseUnavailable
from router.errors import Forbidden, RouterError, RouterSilent
from router.far_calls import FarCalls, NoAnswer
from router.project_requests import Project, ProjectModel
from router.projects import KeptElsewhere, Projects
from router.sessions import RefusedWorker

log = logging.getLogger(__name__)

# Letting a project in may take as long as the check of its address.
ANSWER_S = 20.0

_KEPT_BY = """
select router_id from projects where name = $1 and owner = $2 order by created_at, router_id"""

_TAKE_OVER = """
update projects set router_id = $1 where router_id = $2 and name = $3 and owner = $4"""


class FarProjects:
    """`Projects` of all routers, for changes. Raises what that raises, and RouterSilent: it is not
    known what became of the order, which may be given again."""

    def __init__(
        self,
        database: Database,
        projects: Projects,
        calls: FarCalls,
        *,
        is_lost: Callable[[str], bool],
        router_id: str,
    ) -> None:
        self._database = database
        self._projects = projects
        self._calls = calls
        self._is_lost = is_lost
        self._router_id = router_id
        calls.answer_with("project-change", self._told)

    async def register(
        self, project: Project, owner: bytes | None, *, own_ports: frozenset[int]
    ) -> None:
        try:
            if not await self._passed_on(project, owner, "register"):
                await self._projects.register(project, owner, own_ports=own_ports)
        except KeptElsewhere as there:
            # Registered there for the first time, while it was here.
            await self._pass_on(there.router_id, "register", project, owner)

    async def add_model(
        self, project: Project, owner: bytes | None, *, own_ports: frozenset[int]
    ) -> None:
        try:
            if not await self._passed_on(project, owner, "add_model"):
                await self._projects.add_model(project, owner, own_ports=own_ports)
        except KeptElsewhere as there:
            await self._pass_on(there.router_id, "add_model", project, owner)

    async def remove_model(
        self, name: str, model: str, cid: str | None, owner: bytes | None
    ) -> None:
        named = Project(name, ())
        if not await self._passed_on(named, owner, "remove_model", model, cid):
            await self._projects.remove_model(name, model, cid, owner)

    async def unregister(self, name: str, owner: bytes | None) -> None:
        if not await self._passed_on(Project(name, ()), owner, "unregister"):
            await self._projects.unregister(name, owner)

    async def _passed_on(
        self, project: Project, owner: bytes | None, order: str, *more: Any
    ) -> bool:
        """Whether another router keeps this project, and has done what was ordered."""
        if owner is None or project.is_local:
            return False
        async with self._database.connection() as connection:
            rows = await connection.fetch(_KEPT_BY, project.name, owner)
        kept_by = [row["router_id"] for row in rows]
        if not kept_by or self._router_id in kept_by:
            return False
        for router_id in kept_by:
            if not self._is_lost(router_id):
                await self._pass_on(router_id, order, project, owner, *more)
                return True
        await self._take_over(kept_by[0], project.name, owner)
        return False

    async def _take_over(self, router_id: str, name: str, owner: bytes) -> None:
        try:
            async with self._database.connection() as connection:
                await connection.execute(_TAKE_OVER, self._router_id, router_id, name, owner)
        except asyncpg.UniqueViolationError:
            raise Forbidden("a project of this name here belongs to somebody else") from None
        log.info("project taken over project=%s router=%s", name, router_id)

    async def _pass_on(
        self, router_id: str, order: str, project: Project, owner: bytes | None, *more: Any
    ) -> None:
        assert owner is not None
        try:
            refused = await self._calls.ask(
                router_id,
                "project-change",
                order,
                owner.hex(),
                _as_json(project),
                *more,
                within_s=ANSWER_S,
            )
        except NoAnswer:
            raise RouterSilent("the router of this project does not answer") from None
        if refused is not None:
            raise _error(refused)

    # --- as the router that keeps it --------------------------------------------------------------

    async def _told(self, brings: list[Any]) -> dict[str, Any] | None:
        """Do what another router's caller has ordered. None: it is done; otherwise why not."""
        order, owner_hex, given, *more = brings
        project, owner = _from_json(given), bytes.fromhex(owner_hex)
        try:
            await self._order(order, project, owner, *more)
        except RefusedWorker as refused:
            return {"refused": refused.answer.code, "message": refused.answer.message}
        except RouterError as error:
            return {"code": error.code, "message": error.message, "facts": error.facts}
        except (DatabaseUnavailable, KeptElsewhere):
            return {"code": RouterSilent.code, "message": "not now", "facts": {}}
        return None

    async def _order(self, order: str, project: Project, owner: bytes, *more: Any) -> None:
        match order:
            case "register":
                await self._projects.register(project, owner, own_ports=frozenset())
            case "add_model":
                await self._projects.add_model(project, owner, own_ports=frozenset())
            case "remove_model":
                await self._projects.remove_model(project.name, more[0], more[1], owner)
            case "unregister":
                await self._projects.unregister(project.name, owner)
            case _:
                raise ValueError(f"no such order: {order}")


def _as_json(project: Project) -> dict[str, Any]:
    return {
        "name": project.name,
        "models": [asdict(model) for model in project.models],
        "ln_url": project.ln_url,
        "slots": project.slots,
    }


def _from_json(given: dict[str, Any]) -> Project:
    models = tuple(ProjectModel(**model) for model in given["models"])
    return Project(given["name"], models, given["ln_url"], given["slots"])


def _error(refused: dict[str, Any]) -> Exception:
    """What was raised at the other router."""
    if "refused" in refused:
        return RefusedWorker(refused["refused"], refused["message"])
    error = RouterError(refused["message"], **refused["facts"])
    error.code = refused["code"]
    return error
