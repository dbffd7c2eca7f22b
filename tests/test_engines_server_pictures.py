"""The engine for OpenAI-compatible servers, as it makes and changes pictures."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.router_rig import Rig
from tests.test_worker_with_router import worker
from tests.worker_stand_ins import RecordingSink, http_server
from worker.engines import Engine, open_engine
from worker.errors import JobError
from worker.protocol import FailureCode, ImageEditSpec, ImageSpec, ModelKind
from worker.settings import EngineName, WorkerSettings

RAW = b"\x89PNG\r\n\x1a\n" + bytes(40)
PIXEL = base64.b64encode(RAW).decode()
RABBIT = ImageSpec(model="painter", prompt="a brave rabbit", width=64, height=32, steps=9)
EDIT = ImageEditSpec(model="editor", prompt="night", image=f"data:image/png;base64,{PIXEL}")


class PaintingServer:
    """Answers `data` for every picture. Remembers what it was asked."""

    def __init__(self) -> None:
        self.data: Any = [{"b64_json": PIXEL, "revised_prompt": "a rabbit, brave"}]
        self.knows_response_format = True
        self.asked: list[dict[str, Any]] = []

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models),
            Route("/v1/images/generations", self.generate, methods=["POST"]),
            Route("/v1/images/edits", self.edit, methods=["POST"]),
        ]

    async def list_models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "tiny"}, {"id": "painter"}]})

    async def generate(self, request: Request) -> Response:
        return self._answer(await request.json())

    async def edit(self, request: Request) -> Response:
        if request.headers["content-type"].startswith("application/json"):
            return self._answer(await request.json())
        async with request.form() as form:
            fields: dict[str, Any] = dict(form)
            fields["image"] = await fields["image"].read()
            return self._answer(fields)

    def _answer(self, fields: dict[str, Any]) -> Response:
        self.asked.append(fields)
        if "response_format" in fields and not self.knows_response_format:
            return JSONResponse({"error": {"message": "unknown parameter"}}, 400)
        return JSONResponse({"created": 1, "data": self.data})


@asynccontextmanager
async def painting(server: PaintingServer) -> AsyncIterator[Engine]:
    async with http_server(*server.routes()) as url:
        settings = WorkerSettings(
            _env_file=None,  # pyright: ignore[reportCallIssue]
            engine=EngineName.OPENAI,
            engine_url=url,
            image_models="painter",
            image_edit_models="painter, editor",
        )
        engine = open_engine(settings)
        try:
            await engine.start(lambda fraction, words: None)
            yield engine
        finally:
            await engine.aclose()


async def test_a_setting_says_which_models_make_pictures():
    async with painting(PaintingServer()) as engine:
        served = {(model.id, model.kind) for model in engine.models}
    assert served == {
        ("tiny", ModelKind.TEXT),
        ("painter", ModelKind.IMAGE),
        ("painter", ModelKind.IMAGE_EDIT),
        ("editor", ModelKind.IMAGE_EDIT),
    }


@pytest.mark.parametrize("knows", [True, False])
async def test_a_picture_comes_as_data_whatever_the_server_knows(knows: bool):
    server = PaintingServer()
    server.knows_response_format = knows
    async with painting(server) as engine:
        done = await engine.generate(RABBIT, RecordingSink())
    assert done.images is not None and done.images[0].b64_json == PIXEL
    assert done.images[0].revised_prompt == "a rabbit, brave"
    last = server.asked[-1]
    assert (last["size"], last["n"], last["steps"]) == ("64x32", 1, 9)
    assert ("response_format" in last) is knows


async def test_a_picture_to_edit_is_passed_on_as_it_came():
    """DG-4: a URL as JSON; what came as data goes on as OpenAI's form."""
    server = PaintingServer()
    by_url = EDIT.model_copy(update={"image": "https://pictures.example/1.png"})
    async with painting(server) as engine:
        await engine.generate(EDIT, RecordingSink())
        await engine.generate(by_url, RecordingSink())
    assert server.asked[0]["image"] == RAW and server.asked[0]["prompt"] == "night"
    assert server.asked[1]["image"] == "https://pictures.example/1.png"


@pytest.mark.parametrize("data", [None, [], [{}], [{"b64_json": "!"}], [{"url": "file:///x"}]])
async def test_an_answer_without_a_picture_fails_the_job(data: Any):
    server = PaintingServer()
    server.data = data
    async with painting(server) as engine:
        with pytest.raises(JobError) as caught:
            await engine.generate(RABBIT, RecordingSink())
    assert caught.value.code is FailureCode.ENGINE_ERROR


async def test_a_router_sells_the_pictures_of_a_worker_in_front_of_a_server(
    router: Rig, tmp_path: Path
):
    """Both halves of the protocol together: bought by invoice, drawn, delivered, settled."""
    body = {"model": "painter", "prompt": "a brave rabbit", "size": "64x32"}
    async with http_server(*PaintingServer().routes()) as url:
        fields = {"engine": EngineName.OPENAI, "engine_url": url, "image_models": "painter"}
        async with worker(router, tmp_path / "worker", **fields):
            credential, due = await router.buy("/v1/images/generations", body)
            reply = await router.http.post("/v1/images/generations", json=body, headers=credential)
    assert reply.status_code == 200, reply.text
    assert reply.json()["data"][0]["b64_json"] == PIXEL
    assert reply.headers["x-satherd-fee-msat"] == str(due.json()["quote"]["base_fee_msat"])
    books = await router.books()
    assert books.in_order and books.lines["liabilities:worker"] < 0
