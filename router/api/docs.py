"""`/docs`: the documentation of the API as a page that needs nothing from outside.

The page renders /openapi.json, to which this module adds what FastAPI cannot know: the table of
error codes, how requests are paid, and a body to copy for each request that has one.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.openapi.utils import get_openapi

from router.api.errors import STATUSES

router = APIRouter(include_in_schema=False)

_CHAT = {"messages": [{"role": "user", "content": "Tell me a story about a brave rabbit."}]}
# (method, path) -> a body that is accepted as it stands; MODEL is one of `GET /v1/models`.
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/quotes"): {
        "kind": "chat",
        "model": "MODEL",
        **_CHAT,
        "max_tokens": 64,
        "fee_multiplier": "1.25",
    },
    ("post", "/jobs"): {"kind": "chat", "model": "MODEL", **_CHAT, "max_tokens": 64},
    ("post", "/jobs/{job_id}/bump"): {"fee_multiplier": "2"},
    ("post", "/v1/chat/completions"): {
        "model": "MODEL",
        **_CHAT,
        "max_tokens": 64,
        "stream": True,
    },
    ("post", "/v1/completions"): {"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 64},
    ("post", "/v1/embeddings"): {"model": "MODEL", "input": ["a rabbit", "a hare"]},
    ("post", "/v1/images/generations"): {
        "model": "MODEL",
        "prompt": "a brave rabbit",
        "size": "1024x1024",
        "response_format": "b64_json",
    },
    ("post", "/v1/images/edits"): {
        "model": "MODEL",
        "prompt": "make it night",
        "image": "https://pictures.example/rabbit.png",
    },
    ("post", "/api/v0/ai/project/register"): {
        "project": "DecentralGPT",
        "models": [
            {"model": "MODEL", "api": "http://127.0.0.1:1042/v1/chat/completions", "type": 0}
        ],
        "ln_url": "you@wallet.example",
    },
    ("post", "/herder"): {
        "Action": "Transfer",
        "Quantity": "5",
        "X-Prompt": "Once upon a time",
        "X-Tokens": "20",
        "X-Reference": "1",
    },
    ("post", "/remotejobs/v2/jobs"): {
        "app": "gridrepublic:text-inference",
        "commandLine": '{"inputs": ["When does 1+1=10?"]}',
        "tag": "MODEL",
        "hours": 1,
    },
    ("post", "/generate/prompt"): {
        "prompt": "Once upon a time",
        "username": "Alice",
        "models": [],
        "params": {"n": 1, "max_length": 80, "temperature": 0.7},
    },
    ("post", "/generate/pop"): {
        "username": "Bob",
        "password": "a secret that keeps the name",
        "name": "gpu1 you@wallet.example",
        "model": "MODEL",
        "max_length": 512,
        "max_content_length": 2048,
    },
    ("post", "/api/v2/generate/text/async"): {
        "prompt": "Once upon a time",
        "models": [],
        "params": {"n": 1, "max_length": 80, "max_context_length": 1024},
    },
    ("post", "/api/v2/generate/text/pop"): {
        "name": "gpu1 you@wallet.example",
        "models": ["MODEL"],
        "max_length": 512,
        "max_context_length": 2048,
        "threads": 1,
    },
    ("post", "/balance/topups"): {"amount_msat": 100_000},
    ("post", "/balance/keys"): {"label": "for the chatbot", "limit_msat": 50_000},
    ("post", "/balance/withdrawals"): {"address": "you@wallet.example", "amount_msat": 50_000},
    ("post", "/simulated/pay"): {"invoice": "lnbcrt…"},
    ("put", "/admin/fees"): {"prompt_fee_msat": 1000, "output_msat_per_mtok": 600_000},
    ("put", "/admin/fees/{model}"): {"output_msat_per_mtok": 900_000},
    ("put", "/admin/settings"): {"commission_ppm": 40_000},
    ("post", "/admin/checks"): {
        "prompt": "What is the capital of France?",
        "expected": ["Paris"],
    },
}

_SECURITY = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "A prepaid key, `sk-…`: see `POST /balance/topups`.",
    },
    "l402": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`L402 TOKEN:PREIMAGE`: pay the invoice of a 402 answer, then repeat the"
        " request with its `l402_token` and the preimage that the wallet learned.",
    },
    "payment": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`Payment CREDENTIAL` (paymentauth.org, method lightning, intent charge): the"
        " other challenge of the same 402, for the same invoice; its answer has `Payment-Receipt`.",
    },
    "claim": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Claim-Token",
        "description": "The `claim_token` that came with an invoice, for wallets that hide preimages.",
    },
    "apikey": {
        "type": "apiKey",
        "in": "header",
        "name": "apikey",
        "description": "A prepaid key, where AI Horde's clients send theirs; a worker's own secret.",
    },
    "admin": {
        "type": "http",
        "scheme": "bearer",
        "description": "The operator's `SATHERD_ADMIN_TOKEN`.",
    },
    "worker": {
        "type": "http",
        "scheme": "bearer",
        "description": "A worker's own key, which its earnings belong to.",
    },
}
_PAYER = ["key", "l402", "payment", "claim"]
# The groups of the page, in its order, with what a reader should know of each.
_TAGS = {
    "prices": "What is sold, for how much, and how long it takes.",
    "quotes and jobs": "Our own door: priced, paid, followed, raised, cancelled, receipted.",
    "OpenAI": "For anything that speaks OpenAI's API; DecentralGPT's clients use these paths too.",
    "DecentralGPT": "Chats by node or by project, and model servers that register as workers. The"
    " status of nearly every error is 500, as a node of that system has it; `code` says what.",
    "KoboldAI-cluster": "Prompts whose answers are asked for by an id, and workers that poll.",
    "AI Horde": "Its API v2 for texts, for clients and for workers. Kudos are satoshi.",
    "GridRepublic": "Jobs for several inputs and models, asked for by ids that open them.",
    "Llama-Herder": "Its messages, as JSON over HTTP.",
    "balance": "Prepaid keys, top-ups, and money taken out again.",
    "workers": "For a worker, by its own key; and who is connected, as QueenBee tells it.",
    "admin": "For the operator.",
    "operations": "Health, metrics, published keys.",
    "simulated money": "The payer of the simulated Lightning network. Not on a router with real money.",
}
# tag -> what opens its operations; paid ones answer 402 to whoever brings nothing.
_OPENED_BY = {
    "quotes and jobs": _PAYER,
    "OpenAI": _PAYER,
    "Llama-Herder": _PAYER,
    "GridRepublic": _PAYER,
    "balance": _PAYER,
    "admin": ["admin"],
    "workers": ["worker"],
    "DecentralGPT": [*_PAYER, "worker"],
    "KoboldAI-cluster": ["apikey", *_PAYER],
    "AI Horde": ["apikey", *_PAYER],
}
# Where a rule of another system is kept is for who reads the code.
_RULE_IDS = re.compile(r" \((?:[A-Z]{2}-[A-Z]?\d+(?:, )?)+\)")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {
    "": ("docs.html", "text/html; charset=utf-8"),
    "docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "docs.css": ("docs.css", "text/css; charset=utf-8"),
}


@router.get("/docs")
def page() -> Response:
    """The page; its script and its style come from here too."""
    return _file("")


@router.get("/docs/docs.js")
def script() -> Response:
    return _file("docs.js")


@router.get("/docs/docs.css")
def style() -> Response:
    return _file("docs.css")


def _file(name: str) -> Response:
    source, media_type = _FILES[name]
    text = (files("router") / "web" / source).read_text("utf-8")
    return Response(text, media_type=media_type, headers=_HEADERS)


def describe(app: FastAPI) -> None:
    """Let the application's OpenAPI document say how to pay and what can go wrong."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                )
            )
        return app.openapi_schema

    app.openapi = openapi


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    document["x-error-codes"] = [
        {"code": code, "status": status, "meaning": meaning}
        for code, (status, meaning) in STATUSES.items()
    ]
    document["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    parts = document.setdefault("components", {})
    parts["securitySchemes"] = _SECURITY
    parts.setdefault("schemas", {})["Problem"] = _problem_schema()
    parts["responses"] = {
        "Problem": {
            "description": "Something went wrong; `code` says what. The doors of other dialects"
            " render the same codes in their own shape.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            # Nothing here is checked by FastAPI, so its own error never comes.
            operation["responses"].pop("422", None)
            if "description" in operation:
                operation["description"] = _RULE_IDS.sub("", operation["description"])
            operation["responses"]["default"] = {"$ref": "#/components/responses/Problem"}
            ways = [way for tag in operation.get("tags", []) for way in _OPENED_BY.get(tag, [])]
            if ways:
                operation["security"] = [{way: []} for way in ways]
            example = EXAMPLES.get((method, path))
            if example is not None:
                operation["requestBody"] = {
                    "content": {
                        "application/json": {"schema": {"type": "object"}, "example": example}
                    }
                }
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    return document


def _problem_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {
                    "code": {"type": "string", "enum": list(STATUSES)},
                    "message": {"type": "string", "description": "For people; it may change."},
                },
                "additionalProperties": True,
                "description": "Beside code and message stand the facts of the case.",
            }
        },
    }
