"""OpenAI's `response_format` into GBNF, the grammar that llama.cpp keeps an answer to.

The conversion of JSON schemas is the binding's own, with what it gets wrong put right: backslashes,
control characters and characters beyond 16 bits in constants and keys, and the classes and escapes
of regular expressions. Schemas come from strangers: their size is bounded before and after.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, SchemaConverter

from worker.errors import JobError
from worker.protocol import FailureCode

SCHEMA_BYTES = 16_384
GRAMMAR_BYTES = 262_144
MOST_REPEATS = 1000
REPEAT_KEYS = {"minItems", "maxItems", "minLength", "maxLength"}

# What the converter raises for schemas that it does not understand: it checks little.
CONVERTER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)

# In GBNF literals, and in its character classes.
LITERAL_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
CLASS_ESCAPES = {"\\": "\\\\", "[": "\\[", "]": "\\]", "^": "\\x5E", "-": "\\x2D", '"': '\\"'}
REGEX_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": " \\t"}


def grammar_of(response_format: dict[str, Any] | None) -> str | None:
    """GBNF for a `response_format`; None for free text. Raises JobError, BAD_REQUEST."""
    kind = (response_format or {}).get("type", "text")
    if response_format is None or kind == "text":
        return None
    schema = response_format.get("schema")
    if kind == "json_schema":
        wrapped = response_format.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else schema
    elif kind != "json_object":
        raise JobError(FailureCode.BAD_REQUEST, "response_format is of an unknown type")
    if schema is None:
        if kind == "json_schema":
            raise JobError(FailureCode.BAD_REQUEST, "response_format holds no schema")
        return JSON_GBNF
    return _schema_grammar(schema)


def _schema_grammar(schema: Any) -> str:
    text = json.dumps(schema)
    if not isinstance(schema, dict) or len(text) > SCHEMA_BYTES or _repeats_too_often(schema):
        raise JobError(FailureCode.BAD_REQUEST, "the JSON schema is too large")
    converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        # A copy: the converter writes into what it is given.
        converter.visit(converter.resolve_refs(json.loads(text), "schema"), "")
        grammar = converter.format_grammar()
    except CONVERTER_ERRORS as error:
        raise JobError(FailureCode.BAD_REQUEST, "the JSON schema is not understood") from error
    if len(grammar) > GRAMMAR_BYTES:
        raise JobError(FailureCode.BAD_REQUEST, "the JSON schema is too large")
    return grammar


class _Converter(SchemaConverter):
    """The binding's converter, with its literals and patterns put right."""

    def _format_literal(self, literal: str) -> str:
        # Keys and constants come as JSON in ASCII: the model is to write 😀 and not its escapes.
        with contextlib.suppress(ValueError):
            literal = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + "".join(LITERAL_ESCAPES.get(c, c) for c in literal) + '"'

    def _visit_pattern(self, pattern: str, name: str) -> str:
        return super()._visit_pattern(gbnf_pattern(pattern), name)


def gbnf_pattern(pattern: str) -> str:
    """A regular expression with the escapes that GBNF knows. Raises ValueError for others."""
    parts: list[str] = []
    in_class = False
    characters = iter(pattern)
    for character in characters:
        if character != "\\":
            if character in "[]":
                in_class = character == "["
            parts.append(character)
            continue
        escaped = next(characters, "")
        if escaped in REGEX_CLASSES:
            members = REGEX_CLASSES[escaped]
        elif escaped in ("t", "n", "r"):
            members = f"\\{escaped}"
        elif not escaped or escaped.isalnum():
            raise ValueError(f"the escape \\{escaped} is not supported")
        else:
            members = CLASS_ESCAPES.get(escaped, escaped)
        parts.append(members if in_class else f"[{members}]")
    return "".join(parts)


def _repeats_too_often(schema: Any) -> bool:
    """Whether a count in it would blow the grammar up: every repeat is written out there."""
    if isinstance(schema, list):
        return any(_repeats_too_often(entry) for entry in schema)
    if not isinstance(schema, dict):
        return False
    for key, value in schema.items():
        if key in REPEAT_KEYS and isinstance(value, int | float) and value > MOST_REPEATS:
            return True
        if key == "pattern" and any(int(n) > MOST_REPEATS for n in re.findall(r"\d+", str(value))):
            return True
        if _repeats_too_often(value):
            return True
    return False
