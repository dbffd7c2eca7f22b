"""Messages written out as one prompt, for servers that take nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from worker.errors import JobError
from worker.protocol import FailureCode


class ChatTemplate(StrEnum):
    """How messages become one prompt, for servers that take nothing but a prompt."""

    CHATML = "chatml"
    ALPACA = "alpaca"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class _Style:
    """Before and after a message, for each role; what the answer begins after, and ends at."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    stops: tuple[str, ...]


STYLES = {
    ChatTemplate.CHATML: _Style(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        answer="<|im_start|>assistant\n",
        stops=("<|im_end|>", "<|im_start|>"),
    ),
    ChatTemplate.ALPACA: _Style(
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", "\n\n"),
        answer="### Response:\n",
        stops=("### Instruction:", "### Response:"),
    ),
    ChatTemplate.PLAIN: _Style(
        system=("", "\n"),
        user=("User: ", "\n"),
        assistant=("Assistant: ", "\n"),
        answer="Assistant:",
        stops=("\nUser:",),
    ),
}


def chat_prompt(
    messages: list[dict[str, Any]], template: ChatTemplate
) -> tuple[str, tuple[str, ...]]:
    """The prompt, and the strings that end the answer. Raises JobError for what is not text."""
    style = STYLES[template]
    parts: list[str] = []
    for message in messages:
        match message.get("role"):
            case "system" | "developer":
                before, after = style.system
            case "user":
                before, after = style.user
            case "assistant":
                before, after = style.assistant
            case _:
                raise JobError(FailureCode.BAD_REQUEST, "a message with a role of another kind")
        parts += [before, text_of(message), after]
    if not any(text_of(message) for message in messages):
        raise JobError(FailureCode.BAD_REQUEST, "the prompt is empty")
    return "".join(parts) + style.answer, style.stops


def text_of(message: dict[str, Any]) -> str:
    """A message's text. Raises JobError for images and other things."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content or []
    if not isinstance(parts, list) or any(
        not isinstance(part, dict) or part.get("type", "text") != "text" for part in parts
    ):
        raise JobError(FailureCode.BAD_REQUEST, "this model reads text only")
    return "".join(str(part.get("text", "")) for part in parts)
