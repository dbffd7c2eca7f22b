"""How many threads and slots suit this model on this machine: a short measurement at the start.

A small context of its own, a few steps for each candidate, medians. Threads first, with one sequence;
then slots, with that many threads. Several sequences in one step cost less than each alone, but how
much less depends on the model, its quantisation and the processor: between nothing and three times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import llama_cpp as lib

from worker.engines.llama_model import LlamaModel
from worker.errors import EngineStartError

SLOT_OPTIONS = (1, 2, 4, 8, 16)
BUDGET_S = 3.0
STEPS = 5
# More threads have to be worth it: they are taken from whatever else runs here.
FEWER_THREADS_UP_TO = 1.1
# All cores leave none for the router, a database or a desktop, and threads that wait for a core
# make all others wait: only for a clear gain.
ALL_CORES_FROM = 1.25
ENOUGH_OF_THE_BEST = 0.9
# No answer may be more than five times slower for being written beside others.
SLOWEST_SHARE = 0.2
_PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found. Rates in tokens per second, of all sequences together."""

    threads: int
    slots: int
    thread_rates: dict[int, float] = field(default_factory=dict)
    slot_rates: dict[int, float] = field(default_factory=dict)
    prompt_token_s: float | None = None

    def __str__(self) -> str:
        threads = ", ".join(f"{n}: {rate:.0f}" for n, rate in sorted(self.thread_rates.items()))
        slots = ", ".join(f"{n}: {rate:.0f}" for n, rate in sorted(self.slot_rates.items()))
        return (
            f"{self.threads} threads and {self.slots} slots"
            f" (tokens/s by threads {threads or 'as set'}; by slots {slots or 'as set'})"
        )


def thread_options(cores: int) -> list[int]:
    """Numbers of threads worth trying on `cores` physical cores, in ascending order."""
    return sorted({1, max(1, cores // 2), max(1, cores - 1), cores})


def choose_threads(rates: dict[int, float], cores: int) -> int:
    """The fewest threads that are about as fast as any. Pure."""
    best = 0
    for threads in sorted(rates):
        needed = ALL_CORES_FROM if threads >= cores > 1 else FEWER_THREADS_UP_TO
        if not best or rates[threads] > needed * rates[best]:
            best = threads
    return best


def choose_slots(rates: dict[int, float]) -> int:
    """The fewest slots that make nearly as many tokens as any, none of them too slow. Pure."""
    alone = rates[min(rates)]
    bearable = {n: rate for n, rate in rates.items() if n == 1 or rate / n >= SLOWEST_SHARE * alone}
    enough = ENOUGH_OF_THE_BEST * max(bearable.values())
    return min(n for n, rate in bearable.items() if rate >= enough)


def measure(
    model: LlamaModel,
    *,
    threads: int | None,
    slots: int | None,
    cores: int,
    progress: Callable[[str], object],
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Find what is None of `threads` and `slots`; takes about three seconds at most, apart from one
    step for each candidate. Raises EngineStartError without memory for it."""
    most = min(max(SLOT_OPTIONS), lib.llama_max_parallel_sequences()) if slots is None else 1
    scratch = _Scratch(model, sequences=most, clock=clock)
    try:
        until = clock() + BUDGET_S
        thread_rates: dict[int, float] = {}
        if threads is None:
            progress("measuring threads")
            # The likely best first, in case the time is over soon.
            likely = max(1, cores - 1)
            for option in sorted(thread_options(cores), key=lambda n: (n != likely, -n)):
                if not thread_rates or clock() < until:
                    thread_rates[option] = 1 / scratch.step_s(1, option)
            threads = choose_threads(thread_rates, cores)
        slot_rates: dict[int, float] = {}
        if slots is None:
            progress("measuring slots")
            for option in SLOT_OPTIONS:
                if option <= most and (not slot_rates or clock() < until):
                    slot_rates[option] = option / scratch.step_s(option, threads)
            slots = choose_slots(slot_rates)
        prompt_token_s = scratch.prompt_s(threads) / _PROMPT_TOKENS
        return Measured(threads, slots, thread_rates, slot_rates, prompt_token_s)
    finally:
        scratch.close()


class _Scratch:
    """A context for nothing but taking time."""

    def __init__(self, model: LlamaModel, *, sequences: int, clock: Callable[[], float]) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * 256
        params.n_batch = params.n_ubatch = max(_PROMPT_TOKENS, sequences)
        params.n_seq_max = sequences
        params.kv_unified = False
        params.no_perf = True
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise EngineStartError(
                "no memory to measure with; set SATHERD_SLOTS and SATHERD_THREADS"
            )
        self._handle = handle
        self._clock = clock
        self._token = max(0, model.begin_token)
        self._memory = lib.llama_get_memory(handle)
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def close(self) -> None:
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._handle)

    def step_s(self, sequences: int, threads: int) -> float:
        """Median seconds of a step that writes one token in each of `sequences`."""
        lib.llama_set_n_threads(self._handle, threads, threads)
        self._clear()
        times = []
        for position in range(STEPS + 1):
            times.append(self._decode([(slot, position) for slot in range(sequences)]))
            # A step of a large model takes long enough to be believed.
            if position and sum(times) > BUDGET_S / 6:
                break
        # The first step also sets up what the others find there.
        return median(times[1:] or times)

    def prompt_s(self, threads: int) -> float:
        """Seconds to read `_PROMPT_TOKENS` of one prompt."""
        lib.llama_set_n_threads(self._handle, threads, threads)
        self._clear()
        return self._decode([(0, position) for position in range(_PROMPT_TOKENS)])

    def _decode(self, places: Sequence[tuple[int, int]]) -> float:
        batch = self._batch
        for i, (sequence, position) in enumerate(places):
            batch.token[i] = self._token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = 1
        batch.n_tokens = len(places)
        began = self._clock()
        status = lib.llama_decode(self._handle, batch)
        lib.llama_synchronize(self._handle)
        if status != 0:
            raise EngineStartError(f"the model cannot compute: llama_decode returned {status}")
        return max(self._clock() - began, 1e-9)

    def _clear(self) -> None:
        if self._memory:
            lib.llama_memory_clear(self._memory, True)
