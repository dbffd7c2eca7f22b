"""A job in our protocol into what the decoder takes: tokens, limits, samplers, grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from worker.engines.llama_grammar import grammar_of
from worker.engines.llama_model import LONGEST_TOKEN_BYTES, LlamaModel
from worker.engines.llama_sampling import SamplerPlan, plan_sampling
from worker.errors import EngineStartError, JobError
from worker.protocol import ChatSpec, CompletionSpec, FailureCode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
CHATML_END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ready for the decoder. `echo` is text to show before the answer."""

    tokens: list[int]
    max_tokens: int
    stops: tuple[str, ...]
    plan: SamplerPlan
    echo: str = ""


class PromptMaker:
    """Makes prompts for one model. Safe in any thread, several at a time."""

    def __init__(self, model: LlamaModel, *, context: int) -> None:
        """Raises EngineStartError for a chat template that is no template."""
        self._model = model
        self._context = context
        template = model.chat_template
        # A model without a template is a base model: ChatML, and its end marker as a stop string,
        # is what llama.cpp's own server does then.
        self._extra_stops = () if template else (CHATML_END,)
        try:
            self._formatter = Jinja2ChatFormatter(
                template or CHATML,
                eos_token=model.special_text(model.end_token),
                bos_token=model.special_text(model.begin_token),
            )
        except jinja2.TemplateError as error:
            raise EngineStartError(f"the model's chat template is broken: {error}") from error

    def make(self, job: ChatSpec | CompletionSpec) -> Prompt:
        """Raises JobError: PROMPT_TOO_LONG, or BAD_REQUEST with a reason."""
        if isinstance(job, ChatSpec):
            return self._chat(job)
        return self._completion(job)

    def tokens_of(self, entry: str | Sequence[int], *, longest: int) -> list[int]:
        """The tokens of a whole prompt: 1 to `longest` of them. Raises JobError."""
        if isinstance(entry, str):
            # No need to tokenize what is too long by any count.
            if len(entry) > longest * LONGEST_TOKEN_BYTES:
                raise _too_long(longest)
            tokens = self._model.tokenize(entry)
        else:
            tokens = list(entry)
            if any(not 0 <= token < self._model.vocab_size for token in tokens):
                raise JobError(FailureCode.BAD_REQUEST, "a token id that the model does not have")
        if not tokens:
            raise JobError(FailureCode.BAD_REQUEST, "the prompt is empty")
        if len(tokens) > longest:
            raise _too_long(longest)
        return tokens

    def _chat(self, job: ChatSpec) -> Prompt:
        messages = [_plain_message(message) for message in job.messages]
        try:
            # The types are those of OpenAI's API; templates take what they find.
            text = self._formatter(
                messages=messages,  # pyright: ignore[reportArgumentType]
                tools=job.tools,  # pyright: ignore[reportArgumentType]
                tool_choice=job.tool_choice,
            ).prompt
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise JobError(
                FailureCode.BAD_REQUEST, "the model's chat template does not take these messages"
            ) from error
        return Prompt(
            tokens=self.tokens_of(text, longest=self._context - 1),
            max_tokens=job.max_tokens,
            stops=(*job.stop, *self._extra_stops),
            plan=plan_sampling(self._model, job.sampling, grammar_of(job.response_format)),
        )

    def _completion(self, job: CompletionSpec) -> Prompt:
        longest = self._context - 1
        if job.suffix:
            tokens = self._around_the_middle(job.prompt, job.suffix, longest)
        else:
            tokens = self.tokens_of(job.prompt, longest=longest)
        echo = job.prompt
        if job.echo and not isinstance(echo, str):
            echo = b"".join(self._model.piece(t) for t in echo).decode("utf-8", "replace")
        return Prompt(
            tokens=tokens,
            max_tokens=job.max_tokens,
            stops=tuple(job.stop),
            plan=plan_sampling(self._model, job.sampling, None),
            echo=echo if job.echo and isinstance(echo, str) else "",
        )

    def _around_the_middle(self, prompt: str | list[int], suffix: str, longest: int) -> list[int]:
        markers = self._model.middle_tokens
        if markers is None:
            raise JobError(FailureCode.BAD_REQUEST, "this model does not take a suffix")
        if len(suffix) > longest * LONGEST_TOKEN_BYTES:
            raise _too_long(longest)
        before, after, middle = markers
        head = self.tokens_of(prompt, longest=longest) if prompt else []
        tail = self._model.tokenize(suffix, whole_prompt=False)
        tokens = [before, *head, after, *tail, middle]
        if len(tokens) > longest:
            raise _too_long(longest)
        return tokens


def _too_long(longest: int) -> JobError:
    return JobError(FailureCode.PROMPT_TOO_LONG, f"the prompt has more than {longest} tokens")


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one string, as most templates want it."""
    content = message.get("content")
    if isinstance(content, list):
        parts: list[str] = []
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                raise JobError(FailureCode.BAD_REQUEST, "this model reads text only")
            parts.append(str(part.get("text", "")))
        content = "".join(parts)
    return {**message, "content": "" if content is None else content}
