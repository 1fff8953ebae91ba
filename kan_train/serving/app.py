"""The HTTP interface: what is asked goes to the worker, what comes back is written as OpenAI's clients read it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from kan_train.config import ServeConfig
from kan_train.serving.answer import Answer, body_of, pieces_of
from kan_train.serving.errors import CLIENT_GONE, ApiError
from kan_train.serving.metrics import CONTENT_TYPE
from kan_train.serving.protocol import parsed, requests_of
from kan_train.serving.worker import Piece, Worker

PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")
NO_CHAT = "this is a base model, which has no chat template: it continues texts; use POST /v1/completions with a prompt"


def make_app(worker: Worker, limits: ServeConfig, name: str) -> FastAPI:
    """The application. name: what requests call the model. The worker is started and stopped by the caller."""
    app = FastAPI(title="kan serve", docs_url=None, redoc_url=None, openapi_url=None)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "kan-train"}
    _add_errors(app, worker)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise ApiError(404, f"there is no model {wanted[:100]!r} here; use {name!r}", param="model", code="model_not_found")
        return model

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parsed(await body_of(request, limits.max_body_bytes), name)
        requests = await asyncio.to_thread(requests_of, body, limits, worker.tokenizer)
        pieces = pieces_of(worker, requests, request.receive)
        # What can be refused is refused before a status is sent: with the first piece nothing can be any more.
        first = await anext(pieces)
        answer = Answer(body, name)
        if body.stream:
            return StreamingResponse(_events(answer, first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = answer.whole([first, *[piece async for piece in pieces]])
        return JSONResponse(whole) if whole is not None else Response(status_code=CLIENT_GONE)

    @app.post("/v1/chat/completions")
    async def chat() -> None:
        raise ApiError(400, NO_CHAT, code="no_chat_template")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "model": name}) if worker.alive else JSONResponse({"status": "stopping", "model": name}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.text(worker), media_type=CONTENT_TYPE)

    return app


async def _events(answer: Answer, first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """Server-sent events: a chunk a piece, the usage where it is asked for, [DONE]. An error is an event of its own, after which nothing comes."""
    try:
        yield _event(answer.chunk(first))
        async for piece in rest:
            yield _event(answer.chunk(piece))
    except ApiError as error:
        yield _event(error.body())
        return
    if answer.wants_usage:
        yield _event(answer.usage_chunk())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _add_errors(app: FastAPI, worker: Worker) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, error.headers)

    async def not_served(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        reason = f"{request.method} {request.url.path[:100]}: {error.detail}; there are {', '.join(PATHS)}"
        return JSONResponse(ApiError(error.status_code, reason).body(), error.status_code, error.headers)

    async def failed(request: Request, error: Exception) -> Response:
        worker.metrics.responses[_known(request.url.path), 500] += 1  # made outside of every middleware
        return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(HTTPException, not_served)
    app.add_exception_handler(Exception, failed)
    app.add_middleware(CountResponses, worker=worker)


def _known(path: str) -> str:
    return path if path in PATHS else "other"


class CountResponses:
    """Counts every response by its path and status."""

    def __init__(self, app: Callable[..., Awaitable[None]], worker: Worker) -> None:
        self.app, self.worker = app, worker

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.worker.metrics.responses[_known(scope["path"]), message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)

