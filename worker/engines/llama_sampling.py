"""How the next token is drawn: a chain of llama.cpp samplers for each answer, and a grammar.

What a request leaves open is llama.cpp's own default (common.h): temperature 0.8, top-k 40, top-p
0.95, min-p 0.05. Values are clamped to where 32-bit floats stay finite: a logit that is not a
number would end the whole process inside llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import llama_cpp as lib
import numpy as np

from worker.engines.llama_model import LlamaModel
from worker.errors import JobError
from worker.protocol import FailureCode, Sampling

TEMPERATURE = 0.8
TOP_K = 40
TOP_P = 0.95
MIN_P = 0.05
COLDEST = 1e-3
REPEAT_WINDOW = 64
LEAST_REPEAT_PENALTY = 0.1
STRONGEST_BIAS = 100.0
MAX_BIASES = 1024
TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True, slots=True)
class SamplerPlan:
    """All that a sampler chain is made of, checked. `grammar` is GBNF."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    biases: tuple[tuple[int, float], ...]
    grammar: str | None


def plan_sampling(model: LlamaModel, sampling: Sampling, grammar: str | None) -> SamplerPlan:
    """Fill in what the request leaves open. Raises JobError for a bias on no token."""
    repeat = sampling.repeat_penalty
    seed = secrets.randbits(32) if sampling.seed is None else sampling.seed & 0xFFFFFFFF
    # The highest seed is llama.cpp's word for "any".
    if seed == lib.LLAMA_DEFAULT_SEED:
        seed -= 1
    return SamplerPlan(
        temperature=TEMPERATURE if sampling.temperature is None else sampling.temperature,
        top_k=TOP_K if sampling.top_k is None else min(sampling.top_k, model.vocab_size),
        top_p=TOP_P if sampling.top_p is None else sampling.top_p,
        min_p=MIN_P if sampling.min_p is None else sampling.min_p,
        repeat_penalty=1.0 if not repeat else max(repeat, LEAST_REPEAT_PENALTY),
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        seed=seed,
        biases=_biases(model, sampling.logit_bias or {}),
        grammar=grammar,
    )


def _biases(model: LlamaModel, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise JobError(FailureCode.BAD_REQUEST, f"more than {MAX_BIASES} entries in logit_bias")
    checked: list[tuple[int, float]] = []
    for text, bias in biases.items():
        if not text.isascii() or not text.isdecimal() or int(text) >= model.vocab_size:
            raise JobError(FailureCode.BAD_REQUEST, "logit_bias names a token that is not there")
        # Never minus infinity: a grammar may leave only this token.
        checked.append((int(text), max(-STRONGEST_BIAS, min(bias, STRONGEST_BIAS))))
    return tuple(checked)


class Sampler:
    """Draws the tokens of one answer. Belongs to the decoder's thread; `close` it."""

    def __init__(self, model: LlamaModel, plan: SamplerPlan, *, max_tokens: int) -> None:
        """Raises JobError for a grammar that is none."""
        self._size = model.vocab_size
        self._grammar = None
        if plan.grammar is not None:
            with silent_stderr():
                self._grammar = lib.llama_sampler_init_grammar(
                    model.vocab, plan.grammar.encode("utf-8", "replace"), b"root"
                )
            if not self._grammar:
                raise JobError(FailureCode.BAD_REQUEST, "the grammar cannot be used")
        self._chain = make_chain(model, plan, max_tokens=max_tokens)

    def close(self) -> None:
        lib.llama_sampler_free(self._chain)
        if self._grammar is not None:
            lib.llama_sampler_free(self._grammar)

    def draw(self, context: lib.llama_context_p, index: int) -> int | None:
        """The next token, from the logits at `index` of the last batch.

        None: the grammar allows no token at all. llama.cpp would take any, and then end the process
        because it does not fit; so the grammar is asked first, and apart from the rest.
        """
        if self._grammar is None:
            return lib.llama_sampler_sample(self._chain, context, index)
        candidates = np.empty(self._size, dtype=TOKEN_DATA)
        logits = lib.llama_get_logits_ith(context, index)
        candidates["id"] = np.arange(self._size)
        candidates["logit"] = np.ctypeslib.as_array(logits, shape=(self._size,))
        candidates["p"] = 0
        array = lib.llama_token_data_array(
            data=candidates.ctypes.data_as(lib.llama_token_data_p),
            size=self._size,
            selected=-1,
            sorted=False,
        )
        candidates_ref: Any = ctypes.byref(array)
        lib.llama_sampler_apply(self._grammar, candidates_ref)
        best = int(np.argmax(candidates["logit"]))
        if not np.isfinite(candidates["logit"][best]):
            return None
        lib.llama_sampler_apply(self._chain, candidates_ref)
        drawn = candidates[array.selected]
        # A draw may fall beyond the last allowed token when probabilities do not add up to 1.
        token = int(drawn["id"]) if np.isfinite(drawn["logit"]) else best
        lib.llama_sampler_accept(self._grammar, token)
        lib.llama_sampler_accept(self._chain, token)
        return token


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """For what llama.cpp prints there by itself: all of a grammar that it cannot read.

    A grammar is made of what a client sent, which must reach no log. What other threads print in
    these microseconds is lost with it.
    """
    try:
        kept = os.dup(2)
    except OSError:
        # A service without a stderr has nothing to keep quiet.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def make_chain(model: LlamaModel, plan: SamplerPlan, *, max_tokens: int) -> lib.llama_sampler_p:
    """Everything but the grammar; free it with `llama_sampler_free`."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if plan.biases:
        array = (lib.llama_logit_bias * len(plan.biases))(*plan.biases)
        bias = lib.llama_sampler_init_logit_bias(model.vocab_size, len(array), array)
        lib.llama_sampler_chain_add(chain, bias)
    _add_penalties(chain, model, plan, max_tokens)
    if plan.temperature < COLDEST:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain
    if plan.top_k:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(plan.top_k))
    if plan.top_p < 1:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(plan.top_p, 1))
    if plan.min_p > 0:
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(plan.min_p, 1))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(plan.temperature))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(plan.seed))
    return chain


def _add_penalties(
    chain: lib.llama_sampler_p, model: LlamaModel, plan: SamplerPlan, max_tokens: int
) -> None:
    """Penalties look at the answer only: OpenAI's at all of it, llama.cpp's at its last tokens."""
    size = model.vocab_size
    if plan.repeat_penalty != 1:
        repeat = lib.llama_sampler_init_penalties(size, REPEAT_WINDOW, plan.repeat_penalty, 0, 0)
        lib.llama_sampler_chain_add(chain, repeat)
    if plan.presence_penalty or plan.frequency_penalty:
        rest = lib.llama_sampler_init_penalties(
            size, max(1, max_tokens), 1, plan.frequency_penalty, plan.presence_penalty
        )
        lib.llama_sampler_chain_add(chain, rest)
