"""What a program does that was written for AI Horde with its own package, `horde_sdk`: it runs in an
environment of its own, and `tests.test_horde_sdk` reads the facts that it prints."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any

from horde_sdk.ai_horde_api.ai_horde_clients import (
    AIHordeAPIManualClient,
    AIHordeAPISimpleClient,
)
from horde_sdk.ai_horde_api.apimodels import (
    DeleteTextGenerateRequest,
    FindUserRequest,
    TextGenerateAsyncRequest,
    TextGenerateJobPopRequest,
    TextGenerationJobSubmitRequest,
)
from horde_sdk.ai_horde_api.apimodels.generate.text._async import ModelGenerationInputKobold


def request(key: str, model: str, **more: Any) -> TextGenerateAsyncRequest:
    params = ModelGenerationInputKobold(max_length=64, max_context_length=1024, temperature=0.7)
    return TextGenerateAsyncRequest(
        apikey=key, prompt="Once upon a time", params=params, models=[model], **more
    )


def client(key: str, model: str) -> dict[str, Any]:
    """Price, buy and read one answer; then what it can see of itself and of the workers."""
    simple, manual = AIHordeAPISimpleClient(), AIHordeAPIManualClient()
    dry = simple.text_generate_request_dry_run(request(key, model, dry_run=True))
    seen: list[bool] = []
    status, _ = simple.text_generate_request(
        request(key, model), timeout=60, check_callback=lambda s: seen.append(s.is_possible)
    )
    user = manual.submit_request(
        FindUserRequest(apikey=key), FindUserRequest.get_default_success_response_type()
    )
    workers = list(simple.workers_all_details())
    return {
        "dry_kudos": dry.kudos,
        "texts": [generation.text for generation in status.generations],
        "kudos": status.kudos,
        "possible": all(seen) and bool(seen),
        "user_kudos": user.kudos,
        "workers": [worker.name for worker in workers],
    }


def cancel(key: str, model: str) -> dict[str, Any]:
    """Queue a request and take it back."""
    manual = AIHordeAPIManualClient()
    asked = request(key, model)
    taken = manual.submit_request(asked, asked.get_default_success_response_type())
    gone = manual.submit_request(
        DeleteTextGenerateRequest(id=taken.id_),
        DeleteTextGenerateRequest.get_default_success_response_type(),
    )
    return {"waiting": gone.waiting, "done": gone.done}


def worker(key: str, model: str) -> dict[str, Any]:
    """Pop one job and answer it."""
    manual = AIHordeAPIManualClient()
    asked = TextGenerateJobPopRequest(
        apikey=key, name="sdk", models=[model], bridge_agent="test:1:none", threads=1
    )
    pop = manual.submit_request(asked, asked.get_default_success_response_type())
    answer = TextGenerationJobSubmitRequest(
        apikey=key, id=pop.id_, generation=", a rabbit.", state="ok"
    )
    done = manual.submit_request(answer, answer.get_default_success_response_type())
    return {
        "prompt": pop.payload.prompt,
        "max_length": pop.payload.max_length,
        "reward": done.reward,
    }


if __name__ == "__main__":
    do = {"client": client, "cancel": cancel, "worker": worker}[sys.argv[1]]
    key, model = sys.stdin.read().split()
    print(json.dumps(do(key, model)))
