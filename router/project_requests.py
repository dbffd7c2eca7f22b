"""What a project registers at the DecentralGPT door, checked (peers.md DG-6, DG-8). Pure.

    type 0   text             chat and completions
    type 1   text to picture  images/generations
    type 2   picture editing  images/edits

Several copies of one model on one machine differ by `cid`, their container: each is a worker of its
own. `ln_url`, `slots`, `context_length` and `max_tokens` are ours, and may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from router.errors import BadRequest
from router.http_endpoints import is_loopback
from router.http_sessions import HttpModel
from router.request_fields import integer
from worker.protocol import ModelKind

KINDS = {0: ModelKind.TEXT, 1: ModelKind.IMAGE, 2: ModelKind.IMAGE_EDIT}
MAX_NAME, MAX_API, MAX_LN_URL = 200, 2000, 2000
MAX_MODELS, MAX_SLOTS = 100, 64
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class ProjectModel:
    """One model of a project."""

    model: str
    api: str
    type: int = 0
    cid: str = ""
    context_length: int = DEFAULT_CONTEXT
    max_tokens: int = 0

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from the other models of its project."""
        return self.model, self.type, self.cid

    def as_http(self) -> HttpModel:
        return HttpModel(
            id=self.model,
            api=self.api,
            kind=KINDS[self.type],
            context_length=self.context_length,
            max_tokens=self.max_tokens,
        )


@dataclass(frozen=True, slots=True)
class Project:
    """A registration. `ln_url` None: it serves unpaid."""

    name: str
    models: tuple[ProjectModel, ...]
    ln_url: str | None = None
    slots: int = 1

    @property
    def is_local(self) -> bool:
        """Whether it names servers on the router's own machine, which no other router reaches."""
        return any(is_loopback(urlsplit(model.api).hostname or "") for model in self.models)

    def by_cid(self) -> dict[str, tuple[ProjectModel, ...]]:
        """The models of each container."""
        groups: dict[str, list[ProjectModel]] = {}
        for model in self.models:
            groups.setdefault(model.cid, []).append(model)
        return {cid: tuple(models) for cid, models in groups.items()}

    def with_model(self, model: ProjectModel) -> Project:
        """With one model more, or another in the place of its namesake."""
        kept = [m for m in self.models if m.key != model.key]
        return replace(self, models=(*kept, model))

    def without_model(self, model: str, cid: str | None) -> Project:
        """Without a model; `cid` None: in whichever container."""
        kept = [m for m in self.models if m.model != model or (cid is not None and m.cid != cid)]
        return replace(self, models=tuple(kept))

    def models_as_json(self) -> list[dict[str, Any]]:
        return [asdict(model) for model in self.models]


def read_project(body: Mapping[str, Any]) -> Project:
    """A whole registration. Raises BadRequest."""
    given = body.get("models")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_MODELS:
        raise BadRequest(f"models must be a list of 1 to {MAX_MODELS}", param="models")
    models = tuple(read_model(model) for model in given)
    if len({model.key for model in models}) != len(models):
        raise BadRequest("models: one is listed twice; copies differ by cid", param="models")
    slots = integer(body, "slots", low=1, high=MAX_SLOTS, default=1)
    assert slots is not None
    return Project(read_name(body), models, _text(body, "ln_url", MAX_LN_URL), slots)


def read_name(body: Mapping[str, Any]) -> str:
    """The name of the project. Raises BadRequest."""
    name = _text(body, "project", MAX_NAME)
    if name is None:
        raise BadRequest("project must be the name of a project", param="project")
    return name


def read_model(given: Any) -> ProjectModel:
    """One model of a registration. Raises BadRequest."""
    if not isinstance(given, Mapping):
        raise BadRequest("a model is an object with model, api and type", param="models")
    model, api = _text(given, "model", MAX_NAME), _text(given, "api", MAX_API)
    if model is None or api is None:
        raise BadRequest("a model needs its name as model, and its URL as api", param="models")
    kind = integer(given, "type", low=0, high=max(KINDS), default=0)
    context = integer(given, "context_length", low=16, high=10_000_000, default=DEFAULT_CONTEXT)
    most = integer(given, "max_tokens", low=0, high=10_000_000, default=0)
    assert kind is not None and context is not None and most is not None
    return ProjectModel(model, api, kind, _text(given, "cid", MAX_NAME) or "", context, most)


def read_cid(body: Mapping[str, Any]) -> str | None:
    """The container that is meant; None for whichever."""
    return _text(body, "cid", MAX_NAME)


def _text(body: Mapping[str, Any], name: str, most: int) -> str | None:
    """A printable text; missing or empty is None."""
    value = body.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > most or not value.isprintable():
        raise BadRequest(f"{name} must be text of at most {most} characters", param=name)
    return value
