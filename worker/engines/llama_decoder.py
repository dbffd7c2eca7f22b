"""Continuous batching: many sequences in one context, one `llama_decode` for all of them per step.

    add ──> prompt is fed, a part of it in each step ──> one token in each step ──> ended
                    └── cancelled between two steps, at any time ──┘

Each slot is a stream of its own in the context (`kv_unified` off: on a CPU that is the faster way
with many sequences, and a cached prompt costs the others nothing). What a slot has computed stays
there when its sequence ends. A new prompt that begins like it goes on from there; one that begins
like the prompt of another slot gets a copy.

All of this belongs to one thread. Of a sink only `cancelled` is read here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import llama_cpp as lib

from worker.engines import Sink
from worker.engines.llama_model import LlamaModel
from worker.engines.llama_pace import PromptPace, ThreadPace
from worker.engines.llama_sampling import Sampler, SamplerPlan
from worker.engines.text_stream import TextStream
from worker.errors import EngineStartError
from worker.protocol import FinishReason

BATCH_TOKENS = 512
WORTH_COPYING_TOKENS = 16


class DecodeError(Exception):
    """llama.cpp could not compute a step. All sequences are gone, the context is usable."""


@dataclass(slots=True, eq=False)
class Answer:
    """One answer in the making. `pending` are tokens that the context has not seen yet."""

    slot: int
    pending: list[int]
    left: int
    text: TextStream
    sampler: Sampler
    sink: Sink
    made: int = 0
    unsent: int = 0


@dataclass(slots=True, eq=False)
class _Slot:
    """A stream of the context, and the tokens that it has computed."""

    index: int
    tokens: list[int] = field(default_factory=list)
    used_at: int = 0
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What one step did for one answer. `ending` None: it goes on."""

    answer: Answer
    text: str
    tokens: int
    ending: FinishReason | None


class Decoder:
    """One context of `slots` streams, each for `context` tokens of prompt and answer together."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        slots: int,
        context: int,
        threads: ThreadPace,
        prompts: PromptPace,
    ) -> None:
        """Raises EngineStartError when there is not enough memory for it."""
        if slots > lib.llama_max_parallel_sequences():
            raise EngineStartError(
                f"at most {lib.llama_max_parallel_sequences()} slots are possible"
            )
        params = lib.llama_context_default_params()
        params.n_ctx = slots * context
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = slots
        params.n_threads = params.n_threads_batch = threads.now
        params.kv_unified = False
        params.swa_full = True
        params.no_perf = True
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise EngineStartError(
                f"no memory for {slots} slots of {context} tokens; "
                "lower SATHERD_SLOTS or SATHERD_CONTEXT"
            )
        self._model = model
        self._handle: lib.llama_context_p | None = handle
        memory = lib.llama_get_memory(handle)
        assert memory is not None, "a model that writes has a memory"
        self._memory = memory
        self._context = context
        self._slots = [_Slot(index) for index in range(slots)]
        self._steps = 0
        self._thread_pace, self._threads_now = threads, threads.now
        self._prompt_pace = prompts
        self._batch = batch = lib.llama_batch_init(BATCH_TOKENS, 0, 1)
        # Read once: every look through the ctypes structure makes a new pointer object.
        self._b_token, self._b_pos, self._b_logits = batch.token, batch.pos, batch.logits
        self._b_seq_id = [batch.seq_id[i] for i in range(BATCH_TOKENS)]
        for i in range(BATCH_TOKENS):
            batch.n_seq_id[i] = 1
        self.active: list[Answer] = []

    def close(self) -> None:
        """Free it. Twice is harmless."""
        if self._handle is not None:
            self.drop_all()
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._handle)
            self._handle = None

    @property
    def has_room(self) -> bool:
        return len(self.active) < len(self._slots)

    @property
    def side_room(self) -> int:
        """How many tokens may be computed elsewhere before the next step, for nobody to notice."""
        return self._prompt_pace.room(len(self.active), sys.maxsize)

    def add(
        self,
        prompt: Sequence[int],
        plan: SamplerPlan,
        *,
        max_tokens: int,
        stops: Sequence[str],
        sink: Sink,
    ) -> Answer:
        """Start an answer; there must be room, and the prompt must fit. Raises JobError."""
        assert 0 < len(prompt) < self._context
        left = min(max_tokens, self._context - len(prompt))
        sampler = Sampler(self._model, plan, max_tokens=left)
        slot, known = self._slot_for(prompt)
        answer = Answer(
            slot=slot.index,
            pending=list(prompt[known:]),
            left=left,
            text=TextStream(stops),
            sampler=sampler,
            sink=sink,
        )
        slot.answer = answer
        slot.used_at = self._steps
        self.active.append(answer)
        return answer

    def step(self) -> list[Output]:
        """Compute once for everybody. Raises DecodeError; every answer is dropped then."""
        self._steps += 1
        outputs = [
            self._end(answer, FinishReason.CANCELLED)
            for answer in list(self.active)
            if answer.sink.cancelled
        ]
        writers, sampled_at = self._fill_batch()
        if not self._batch.n_tokens:
            return outputs
        assert self._handle is not None
        self._decode(self._handle, writers)
        for answer, index in sampled_at:
            token = answer.sampler.draw(self._handle, index)
            output = self._take_token(answer, token)
            if output is not None:
                outputs.append(output)
        return outputs

    def _decode(self, handle: lib.llama_context_p, writers: int) -> None:
        """Compute the batch, which holds one token for each of `writers` and parts of prompts."""
        threads = self._thread_pace.now
        if threads != self._threads_now:
            lib.llama_set_n_threads(handle, threads, threads)
            self._threads_now = threads
        began = time.perf_counter()
        status = lib.llama_decode(handle, self._batch)
        if status != 0:
            self.drop_all()
            raise DecodeError(f"llama_decode returned {status}")
        # A GPU may still be at it; drawing a token would wait for it anyway.
        lib.llama_synchronize(handle)
        seconds = time.perf_counter() - began
        prompt_tokens = self._batch.n_tokens - writers
        if prompt_tokens:
            self._prompt_pace.observe(seconds, prompt_tokens=prompt_tokens)
        else:
            self._thread_pace.observe(seconds, writers=writers)

    def drop_all(self) -> None:
        """Forget every answer and everything computed."""
        for answer in list(self.active):
            self._release(answer)
        for slot in self._slots:
            self._forget(slot)

    # --- a step ----------------------------------------------------------------------------------

    def _fill_batch(self) -> tuple[int, list[tuple[Answer, int]]]:
        """Put tokens into the batch. Returns how many answers only go on by one token, and who gets
        a new token, at which place."""
        place = 0
        sampled_at: list[tuple[Answer, int]] = []
        # Those that are writing come first, with one token each: prompts take what is left of a
        # batch, and no more than keeps the step short for the others.
        waiting = sorted(self.active, key=lambda s: len(s.pending))
        writers = sum(1 for answer in waiting if len(answer.pending) == 1 and answer.made)
        room = writers + self._prompt_pace.room(writers, BATCH_TOKENS - writers)
        for answer in waiting:
            slot = self._slots[answer.slot]
            part = answer.pending[: room - place]
            if not part:
                continue
            position = len(slot.tokens)
            for token in part:
                self._b_token[place] = token
                self._b_pos[place] = position
                self._b_seq_id[place][0] = answer.slot
                self._b_logits[place] = 0
                place += 1
                position += 1
            slot.tokens += part
            del answer.pending[: len(part)]
            if not answer.pending:
                self._b_logits[place - 1] = 1
                sampled_at.append((answer, place - 1))
        self._batch.n_tokens = place
        return writers, sampled_at

    def _take_token(self, answer: Answer, token: int | None) -> Output | None:
        if token is None or self._model.ends_text(token):
            return self._end(answer, FinishReason.STOP)
        answer.made += 1
        answer.unsent += 1
        answer.left -= 1
        text = answer.text.feed(self._model.piece(token))
        if answer.text.stopped:
            return self._end(answer, FinishReason.STOP, text)
        if answer.left <= 0:
            return self._end(answer, FinishReason.LENGTH, text)
        answer.pending.append(token)
        if not text:
            return None
        tokens, answer.unsent = answer.unsent, 0
        return Output(answer, text, tokens, None)

    def _end(self, answer: Answer, reason: FinishReason, text: str = "") -> Output:
        text += answer.text.flush()
        self._release(answer)
        return Output(answer, text, answer.unsent, reason)

    def _release(self, answer: Answer) -> None:
        answer.sampler.close()
        self._slots[answer.slot].answer = None
        self.active.remove(answer)

    # --- slots and what they remember ------------------------------------------------------------

    def _slot_for(self, prompt: Sequence[int]) -> tuple[_Slot, int]:
        """A free slot that holds the first n tokens of `prompt`, and nothing else; and n."""
        free = [slot for slot in self._slots if slot.answer is None]
        oldest = min(free, key=lambda slot: slot.used_at)
        # A model with a running state cannot go back to an earlier token.
        if self._model.keeps_state:
            self._forget(oldest)
            return oldest, 0
        shared, source = max(
            ((common_prefix(slot.tokens, prompt), slot) for slot in self._slots),
            key=lambda pair: pair[0],
        )
        # At least one token must be computed, for there to be something to draw from.
        shared = min(shared, len(prompt) - 1)
        if shared < WORTH_COPYING_TOKENS:
            self._forget(oldest)
            return oldest, 0
        goes_on = source.answer is None and 2 * shared >= len(source.tokens)
        if goes_on or source is oldest:
            return source, self._keep(source, shared)
        self._forget(oldest)
        # Between streams only whole copies exist; what differs is cut off after.
        lib.llama_memory_seq_cp(self._memory, source.index, oldest.index, -1, -1)
        oldest.tokens = list(source.tokens)
        return oldest, self._keep(oldest, shared)

    def _keep(self, slot: _Slot, count: int) -> int:
        """Cut a slot down to its first `count` tokens. Returns how many are really left."""
        if lib.llama_memory_seq_rm(self._memory, slot.index, count, -1):
            del slot.tokens[count:]
        else:
            self._forget(slot)
        return len(slot.tokens)

    def _forget(self, slot: _Slot) -> None:
        lib.llama_memory_seq_rm(self._memory, slot.index, -1, -1)
        slot.tokens.clear()


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    # Slices are compared in C; a loop over tokens would cost milliseconds for a long prompt.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
