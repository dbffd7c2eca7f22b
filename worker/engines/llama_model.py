"""One GGUF file in memory: loading it, its vocabulary, its words about itself.

Nothing here computes. Any thread may ask; contexts made of the model belong to one.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as lib

from worker.errors import EngineStartError, JobError
from worker.protocol import FailureCode

MAGIC = b"GGUF"
LOG_ERROR = 4  # enum ggml_log_level in ggml.h
LONGEST_TOKEN_BYTES = 256

_complaints: deque[str] = deque(maxlen=20)


# llama.cpp keeps a bare pointer to this: it must live as long as the library. What it says is kept
# for the message of a load that fails, and not logged, since it quotes grammars that clients send.
@lib.llama_log_callback
def _keep_complaints(level: int, text: bytes, _data: int) -> None:
    if level == LOG_ERROR:
        _complaints.append(text.decode("utf-8", "replace").strip())


class LlamaModel:
    """A loaded model. `close` it when no context uses it any more."""

    def __init__(
        self, path: Path, *, gpu_layers: int, on_progress: Callable[[float], bool]
    ) -> None:
        """Load it; this takes as long as reading the file. Any thread may do it.

        `on_progress` is called with fractions from 0 to 1, and stops the load by returning False.
        Raises EngineStartError for what is no readable GGUF, or was stopped.
        """
        check_file(path)
        lib.llama_log_set(_keep_complaints, ctypes.c_void_p(0))
        lib.llama_backend_init()
        _complaints.clear()

        @lib.llama_progress_callback
        def call_back(fraction: float, _data: int) -> bool:
            return on_progress(fraction)

        params = lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        # ggml's AMX kernels end the process in the first step with two sequences, or at once
        # (ggml-org/llama.cpp#20824), with small models and large ones. Our own build leaves them out
        # (llama_build.cmake); a library from elsewhere is asked not to use them.
        if built_with_amx(lib.llama_print_system_info()):
            params.use_extra_bufts = False
        params.progress_callback = call_back
        model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            reason = next((line for line in _complaints if line), "llama.cpp gives no reason")
            raise EngineStartError(f"{path} cannot be loaded: {reason}")
        if lib.llama_model_has_encoder(model) and lib.llama_model_has_decoder(model):
            lib.llama_model_free(model)
            raise EngineStartError(f"{path} is an encoder-decoder model, which is not supported")
        self._model: lib.llama_model_p | None = model
        # Prompts are made in other threads than the one that closes: freed memory is never read.
        self._open = threading.Lock()
        # Asked for every token: a call into C would give the interpreter's lock away each time.
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        vocab = lib.llama_model_get_vocab(model)
        assert vocab is not None
        self.vocab = vocab
        self.vocab_size: int = lib.llama_vocab_n_tokens(vocab)
        self.train_context: int = lib.llama_model_n_ctx_train(model)
        self.embedding_size: int = lib.llama_model_n_embd(model)
        self.keeps_state: bool = lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(
            model
        )

    @property
    def handle(self) -> lib.llama_model_p:
        """What contexts are made of."""
        assert self._model is not None, "the model is closed"
        return self._model

    def close(self) -> None:
        """Free it. Twice is harmless."""
        with self._open:
            if self._model is not None:
                lib.llama_model_free(self._model)
                self._model = None

    def tokenize(self, text: str, *, whole_prompt: bool = True) -> list[int]:
        """Token ids of `text`. In a whole prompt the begin token is added if the model wants it.

        Raises JobError when the model is closed.
        """
        # A template may have written the begin token itself: the model must not see it twice.
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (lib.llama_token * room)()
        with self._open:
            self._check_open()
            count = lib.llama_tokenize(
                self.vocab, data, len(data), tokens, room, whole_prompt, True
            )
            begin = self.begin_token
        assert count >= 0, "more tokens than bytes"
        doubled = whole_prompt and count > 1 and tokens[0] == tokens[1] == begin
        return list(tokens[1 if doubled else 0 : count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; control tokens stand for none. Raises JobError."""
        known = self._pieces.get(token)
        if known is None:
            with self._open:
                self._check_open()
                known = self._pieces[token] = self._piece(token, special=False)
        return known

    def special_text(self, token: int) -> str:
        """How a control token is written in templates."""
        return self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _piece(self, token: int, *, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(LONGEST_TOKEN_BYTES)
        size = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]

    def _check_open(self) -> None:
        if self._model is None:
            raise JobError(FailureCode.ENGINE_ERROR, "the model is closed")

    def ends_text(self, token: int) -> bool:
        """Whether the model says by this token that it has finished."""
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = lib.llama_vocab_is_eog(self.vocab, token)
        return known

    @property
    def begin_token(self) -> int:
        """-1 when there is none."""
        return _as_int(lib.llama_vocab_bos(self.vocab))

    @property
    def end_token(self) -> int:
        """-1 when there is none."""
        return _as_int(lib.llama_vocab_eos(self.vocab))

    @property
    def middle_tokens(self) -> tuple[int, int, int] | None:
        """Prefix, suffix and middle markers; None when the model cannot fill in the middle."""
        found = (
            _as_int(lib.llama_vocab_fim_pre(self.vocab)),
            _as_int(lib.llama_vocab_fim_suf(self.vocab)),
            _as_int(lib.llama_vocab_fim_mid(self.vocab)),
        )
        return found if min(found) >= 0 else None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template in the file; None for a model that was not made for chat."""
        text = lib.llama_model_chat_template(self.handle, None)
        return text.decode("utf-8", "replace") if text else None

    def metadata(self, key: str) -> str | None:
        """One value of the file's header. `{arch}` in `key` is the model's architecture."""
        if "{arch}" in key:
            key = key.format(arch=self.metadata("general.architecture"))
        buffer: Any = ctypes.create_string_buffer(1024)
        size = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if size >= 0 else None

    @property
    def writes_text(self) -> bool:
        """False for encoders such as BERT, which only embed."""
        return self.metadata("{arch}.attention.causal") != "false"


def _as_int(token: Any) -> int:
    """ctypes returns plain ints where the binding's types say c_int32."""
    return token


def built_with_amx(system_info: bytes) -> bool:
    """Whether llama.cpp says that it uses the AMX tiles of this processor."""
    return b"AMX_INT8 = 1" in system_info


def check_file(path: Path) -> None:
    """Raises EngineStartError for what cannot be a GGUF file; llama.cpp looks closer."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except FileNotFoundError as error:
        raise EngineStartError(f"there is no model file {path}; SATHERD_MODEL names it") from error
    except OSError as error:
        raise EngineStartError(f"the model file {path} cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise EngineStartError(f"{path} is not a GGUF file")
