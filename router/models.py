"""Models: what is served, by how many, how long a prompt may be, and what a lane is called."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from router import choices, demands, lanes
from router.dear_memory import DearMemory
from router.demands import Demand
from router.errors import BadRequest, NoWorker, PromptTooLong, RouterError, UnknownModel
from router.lanes import ANY_MODEL, answer_limit
from router.queenbee_models import canonical
from router.workers import FarWorkers, Fleet, Worker
from worker.protocol import MODEL_KIND, TEXT_KINDS, Kind, ModelKind, ServedModel


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model id as clients see it. Lengths in tokens; `tokens_per_s` of its fastest worker."""

    id: str
    kind: ModelKind
    kinds: tuple[ModelKind, ...]
    workers: int
    slots: int
    idle_workers: int
    context_length: int
    max_tokens: int
    tokens_per_s: float | None
    service_s: float | None


# Names cost nothing: of models that nobody serves now, those are known that were seen last.
MOST_KNOWN = 2_000
_LOOKED_AT = 100


class Models:
    """The models of this market. `known` are those of workers that may come back, as they came."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.known: dict[tuple[ModelKind, str], ServedModel] = {}
        self._served: DearMemory[list[ServedModel]] = DearMemory()

    def learn(self, models: Iterable[ServedModel]) -> None:
        for model in models:
            self.known.pop((model.kind, model.id), None)
            self.known[model.kind, model.id] = model
        over = len(self.known) - MOST_KNOWN
        if over > 0:
            self._forget(over)

    def _forget(self, over: int) -> None:
        """Forget the oldest that nobody serves, looking at a few more than are to go."""
        for key in list(self.known)[: over + _LOOKED_AT]:
            model = self.known.pop(key)
            if over <= 0 or self.fleet.serving(*key):
                self.known[key] = model
            else:
                over -= 1

    def lane(
        self,
        kind: Kind,
        model: str,
        *,
        prompt_tokens: int,
        max_tokens: int,
        demand: Demand = demands.NONE,
    ) -> str:
        if demand:
            self.fleet.demanded_at = time.monotonic()
        return demand.prefix + lanes.lane(
            self.fleet.edges,
            kind=MODEL_KIND[kind],
            model=model,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )

    def name_of(self, kind: Kind, model: str) -> str:
        """The model itself, or what one of QueenBee's short names stands for (QB-R15) where nobody
        here has a model of that name."""
        served = MODEL_KIND[kind]
        if (served, model) in self.known or self.fleet.serving(served, model):
            return model
        return canonical(model)

    def lanes_of(self, job: Any) -> list[str]:
        """Where a job waits, from its row or as it was claimed."""
        read = job.__getitem__ if hasattr(job, "__getitem__") else partial(getattr, job)
        named, demand = read("choices"), demands.of_job(read("spec") or "")
        return [
            self.lane(
                Kind(read("kind")),
                model,
                prompt_tokens=read("prompt_tokens"),
                max_tokens=read("max_tokens"),
                demand=demand,
            )
            for model in (choices.models_of(named) if named else [read("model")])
        ]

    def fit(
        self,
        kind: Kind,
        model: str,
        *,
        prompt_tokens: int,
        max_tokens: int | None,
        default_max_tokens: int,
        may_wait: bool,
        demand: Demand = demands.NONE,
    ) -> int:
        """How many tokens a job may produce on some worker of `model`; 0 unless it makes text.

        `max_tokens` None: the default, less if the context allows less. `may_wait` accepts a model
        that only workers not connected now have served. Raises UnknownModel, NoWorker,
        PromptTooLong, BadRequest (max_tokens over every limit).
        """
        offers = self._offers(kind, model, may_wait=may_wait, demand=demand)
        if kind not in TEXT_KINDS:
            _need(offers, prompt_tokens, 0)
            return 0
        _need(offers, prompt_tokens, 1)
        longest = max(min(answer_limit(o), o.context_length - prompt_tokens) for o in offers)
        if max_tokens is None:
            return min(default_max_tokens, longest)
        if max_tokens > longest:
            raise BadRequest(
                f"max_tokens may be at most {longest} for this prompt on {model}",
                param="max_tokens",
                max_tokens_limit=longest,
            )
        return max_tokens

    def fit_any(
        self,
        kind: Kind,
        models: Sequence[str],
        *,
        prompt_tokens: int,
        max_tokens: int | None,
        default_max_tokens: int,
        may_wait: bool,
        demand: Demand = demands.NONE,
    ) -> int:
        """The same for a job that any of `models` may serve: what all can do that can do it at all.

        Raises what `fit` raises for the first of them, where none can.
        """
        named = models
        if ANY_MODEL in models:
            # Thousands may be known: without waiting, only those that are there can do it.
            named = self.text_models() if may_wait else self._listed_text_models()
        fits: list[int] = []
        refused: list[RouterError] = []
        for model in named:
            try:
                fits.append(
                    self.fit(
                        kind,
                        model,
                        prompt_tokens=prompt_tokens,
                        max_tokens=max_tokens,
                        default_max_tokens=default_max_tokens,
                        may_wait=may_wait,
                        demand=demand,
                    )
                )
            except RouterError as error:
                refused.append(error)
        if fits:
            return min(fits)
        # A model that is there but too small says more than one that is not there.
        refused.sort(key=lambda error: isinstance(error, UnknownModel | NoWorker))
        raise refused[0] if refused else NoWorker("no worker that serves text is connected")

    def text_models(self) -> list[str]:
        """All models that were ever served here and take a prompt."""
        return sorted(model for kind, model in self.known if kind is ModelKind.TEXT)

    def _listed_text_models(self) -> list[str]:
        here = (worker for worker in self.fleet.everywhere() if not worker.draining)
        return sorted({m.id for worker in here for m in worker.models if m.kind is ModelKind.TEXT})

    def _offers(
        self, kind: Kind, model: str, *, may_wait: bool, demand: Demand
    ) -> list[ServedModel]:
        served = MODEL_KIND[kind]
        if demand and not may_wait:
            offers = self._offers_that_meet(served, model, demand)
        else:
            offers = self._served(
                (served, model),
                lambda: self._served_now(served, model),
                cheap=self.fleet.is_small,
            )
        known = self.known.get((served, model))
        if not offers and known is None:
            other = next((k for k, name in self.known if name == model), None)
            if other is not None:
                raise BadRequest(f"{model} serves {other}, not {served}", param="model")
            raise UnknownModel(f"no worker has ever served the model {model!r}", model=model)
        if not offers:
            assert known is not None
            if not may_wait:
                raise NoWorker(
                    f"no worker that serves {model} is connected; send X-Max-Wait-S to wait for one",
                    model=model,
                )
            return [known]
        return offers

    def _offers_that_meet(self, kind: ModelKind, model: str, demand: Demand) -> list[ServedModel]:
        """Raises NoWorker, BadRequest: the model is there, but at nobody who meets the demand."""
        workers = self.fleet.serving(kind, model)
        # Of what other routers have, only the sums are known: one of them may meet it.
        able = [w for w in workers if w.traits.meet(demand) or isinstance(w, FarWorkers)]
        if workers and not able and demand.large:
            raise BadRequest("no worker that is connected takes a request of this size")
        if workers and not able:
            raise NoWorker(
                f"no worker that serves {model} meets the gpu_filter;"
                " send X-Max-Wait-S to wait for one",
                model=model,
            )
        return [m for m in (w.serves(kind, model) for w in able) if m is not None]

    def _served_now(self, kind: ModelKind, model: str) -> list[ServedModel]:
        """What is offered of a model, each once however many workers offer the same."""
        here = (worker for worker in self.fleet.everywhere() if not worker.draining)
        offers = (worker.serves(kind, model) for worker in here)
        alike = {(o.context_length, o.max_tokens): o for o in offers if o is not None}
        return list(alike.values())

    def facts(self) -> list[ModelFacts]:
        """All models, those served now and those known, one line for each id."""
        kinds: dict[str, list[ModelKind]] = {}
        for kind, model in sorted(self.known, key=lambda k: (k[1], k[0] != ModelKind.TEXT)):
            kinds.setdefault(model, []).append(kind)
        serving: dict[tuple[ModelKind, str], list[Worker]] = {}
        offering: list[Worker] = []
        for worker in self.fleet.everywhere():
            if worker.draining:
                continue
            if worker.offers is not None:
                offering.append(worker)
                continue
            for served in worker.models:
                serving.setdefault((served.kind, served.id), []).append(worker)
        return [
            self._facts(
                model,
                tuple(have),
                [
                    *serving.get((have[0], model), ()),
                    *(w for w in offering if w.serves(have[0], model) is not None),
                ],
            )
            for model, have in sorted(kinds.items())
        ]

    def _facts(self, model: str, kinds: tuple[ModelKind, ...], workers: list[Worker]) -> ModelFacts:
        offers = [m for m in (w.serves(kinds[0], model) for w in workers) if m is not None]
        offers = offers or [self.known[kinds[0], model]]
        speeds = [w.speeds[model] for w in workers if model in w.speeds]
        return ModelFacts(
            id=model,
            kind=kinds[0],
            kinds=kinds,
            workers=sum(w.stands_for for w in workers),
            slots=sum(w.slots for w in workers),
            idle_workers=sum(w.idle_workers for w in workers),
            context_length=max(o.context_length for o in offers),
            max_tokens=max(answer_limit(o) for o in offers),
            tokens_per_s=max(speeds, default=None),
            service_s=mean_service_s(workers, model),
        )


def mean_service_s(workers: Iterable[Worker], model: str) -> float | None:
    """Seconds that a job of this model took on average; None before the first one."""
    seen = [w.service_s[model] for w in workers if model in w.service_s]
    return sum(seen) / len(seen) if seen else None


def _need(offers: list[ServedModel], prompt_tokens: int, answer_tokens: int) -> None:
    longest = max(o.context_length for o in offers)
    if prompt_tokens + answer_tokens > longest:
        raise PromptTooLong(
            f"the prompt counts {prompt_tokens} tokens; the longest context here is {longest}",
            prompt_tokens=prompt_tokens,
            context_length=longest,
        )
