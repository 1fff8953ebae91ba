"""One request between the event loop and the engine's thread: its body is read within bounds, its pieces come in, its answer is built."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from kan_train.inference.requests import Request
from kan_train.serving.errors import CLIENT_GONE, ApiError
from kan_train.serving.protocol import CompletionBody
from kan_train.serving.worker import Piece, Ticket, Worker

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
BODY_SECONDS = 30
"""How long a client may take to send its body."""


async def body_of(request: HttpRequest, max_bytes: int) -> bytes:
    """The request's body. ApiError 415 where it is not said to be JSON, 413 where it is larger than `max_bytes`, 408 where it does not come."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON; send it with the header content-type: application/json")
    too_large = ApiError(413, f"the body is larger than this server takes; send at most {max_bytes} bytes", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s; send it again") from None
    except ClientDisconnect:
        raise ApiError(CLIENT_GONE, "the client has left") from None
    return bytes(content)


async def pieces_of(worker: Worker, requests: Sequence[Request], receive: Receive) -> AsyncIterator[Piece]:
    """What comes of `requests`, piece by piece, until all have ended; when the client leaves, they are cancelled at once.

    receive: of ASGI, from which the body has been read. Raises ApiError where the worker refuses them or fails.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Piece | ApiError]()

    def deliver(piece: Piece | ApiError) -> None:
        # The loop is closed where a server was stopped by force.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(arrived.put_nowait, piece)

    ticket = worker.submit(requests, deliver)
    watcher = asyncio.create_task(_cancel_when_gone(receive, worker, ticket))
    try:
        going = len(requests)
        while going:
            piece = await arrived.get()
            if isinstance(piece, ApiError):
                raise piece
            going -= piece.finish is not None
            yield piece
    finally:
        watcher.cancel()
        worker.cancel(ticket)


async def _cancel_when_gone(receive: Receive, worker: Worker, ticket: Ticket) -> None:
    # A task of its own: it also sees a client leave while the response waits for a full socket.
    while (await receive())["type"] != "http.disconnect":
        pass
    worker.cancel(ticket)


class Answer:
    """The objects of OpenAI's interface for one request."""

    def __init__(self, body: CompletionBody, model: str) -> None:
        self.body = body
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model}
        self.wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._last: dict[int, Piece] = {}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece of a stream. With `echo` the first of each choice begins with the prompt."""
        text = (self._echo(piece.index) if piece.index not in self._last else "") + piece.text
        self._last[piece.index] = piece
        usage = {"usage": None} if self.wants_usage else {}
        return self.head | {"choices": [_choice(piece.index, text, piece.finish)]} | usage

    def usage_chunk(self) -> dict[str, Any]:
        """What a stream ends with where the usage is asked for."""
        return self.head | {"choices": [], "usage": self._usage()}

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Everything at once; None where the client has left."""
        texts: dict[int, list[str]] = {}
        for piece in pieces:
            texts.setdefault(piece.index, [self._echo(piece.index)]).append(piece.text)
            self._last[piece.index] = piece
        if any(piece.finish == "cancelled" for piece in self._last.values()):
            return None
        choices = [_choice(index, "".join(texts[index]), self._last[index].finish) for index in sorted(texts)]
        return self.head | {"choices": choices, "usage": self._usage()}

    def _echo(self, index: int) -> str:
        return self.body.prompts[index // self.body.samples] if self.body.echo else ""

    def _usage(self) -> dict[str, int]:
        # A prompt is counted once, however many continuations it has.
        prompt = sum(piece.prompt_tokens for index, piece in self._last.items() if index % self.body.samples == 0)
        given = sum(piece.tokens for piece in self._last.values())
        return {"prompt_tokens": prompt, "completion_tokens": given, "total_tokens": prompt + given}


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
