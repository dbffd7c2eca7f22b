"""Embeddings by llama.cpp: its own context, several texts in one batch, vectors of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp as lib

from worker.engines.llama_model import LlamaModel
from worker.errors import JobError
from worker.protocol import FailureCode

TEXTS_PER_BATCH = 16
DIGITS = 7


class Embedder:
    """Belongs to one thread. Texts of up to `longest` tokens."""

    def __init__(self, model: LlamaModel, *, longest: int, threads: int) -> None:
        """Raises JobError when there is not enough memory for it."""
        params = lib.llama_context_default_params()
        # The mean is taken over one batch: every text must fit into one whole.
        params.n_ctx = longest * TEXTS_PER_BATCH
        params.n_batch = params.n_ubatch = longest
        params.n_seq_max = TEXTS_PER_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.no_perf = True
        params.kv_unified = True
        # Embedding models say how they pool; a model made for writing does not.
        if model.metadata("{arch}.pooling_type") is None:
            params.pooling_type = lib.LLAMA_POOLING_TYPE_MEAN
        handle = lib.llama_init_from_model(model.handle, params)
        if not handle:
            raise JobError(FailureCode.ENGINE_ERROR, "no memory for an embedding context")
        self._handle: lib.llama_context_p | None = handle
        self._memory = lib.llama_get_memory(handle)
        self._encodes = not model.writes_text
        self._size = model.embedding_size
        self._longest = longest
        self._batch = lib.llama_batch_init(longest, 0, 1)

    def close(self) -> None:
        """Free it. Twice is harmless."""
        if self._handle is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._handle)
            self._handle = None

    def take(self, texts: Sequence[Sequence[int]], *, room: int) -> int:
        """How many of `texts`, from the first on, fit into one batch of about `room` tokens, if the
        context has that many. At least one."""
        total = 0
        for count, tokens in enumerate(texts[:TEXTS_PER_BATCH]):
            total += len(tokens)
            if total > min(self._longest, room):
                return max(1, count)
        return min(len(texts), TEXTS_PER_BATCH)

    def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector for each of `texts`, which fit into one batch. Raises JobError."""
        assert self._handle is not None
        place = 0
        for number, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                self._batch.token[place] = token
                self._batch.pos[place] = position
                self._batch.n_seq_id[place] = 1
                self._batch.seq_id[place][0] = number
                self._batch.logits[place] = 1
                place += 1
        self._batch.n_tokens = place
        if self._memory:
            lib.llama_memory_clear(self._memory, True)
        compute = lib.llama_encode if self._encodes else lib.llama_decode
        status = compute(self._handle, self._batch)
        if status != 0:
            raise JobError(FailureCode.ENGINE_ERROR, f"embedding failed with status {status}")
        return [self._vector(number) for number in range(len(texts))]

    def _vector(self, number: int) -> list[float]:
        assert self._handle is not None
        values = lib.llama_get_embeddings_seq(self._handle, number)
        if not values:
            raise JobError(FailureCode.ENGINE_ERROR, "the model gives no embedding for a text")
        vector = [values[i] for i in range(self._size)]
        length = sum(value * value for value in vector) ** 0.5 or 1.0
        # Seven digits are what a 32-bit float holds; seventeen would double the frame.
        return [round(value / length, DIGITS) for value in vector]
