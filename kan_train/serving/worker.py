"""The engine in a thread of its own: requests come by a queue, pieces of text go to whoever asked.

The engine's thread alone touches the engine. Other threads count what is under way, under a lock, so that a request is refused before it waits.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kan_train.inference.engine import Engine
from kan_train.inference.requests import Continuation, Request
from kan_train.inference.text import TextTokenizer
from kan_train.model.lm import LanguageModel
from kan_train.serving.errors import ApiError
from kan_train.serving.metrics import Metrics


@dataclass(frozen=True)
class Piece:
    """What came of one continuation of a request."""

    index: int
    """Number of the continuation in its request."""
    text: str
    """Text that is certain now."""
    finish: str | None
    """Why it has ended: "stop", "length" or "cancelled"; None: it goes on."""
    prompt_tokens: int
    """Tokens of its prompt, the boundary in front included."""
    tokens: int
    """Tokens given so far."""


class Ticket:
    """A request under way."""

    def __init__(self, requests: Sequence[Request], deliver: Callable[[Piece | ApiError], None]) -> None:
        self.requests, self.deliver, self.submitted = list(requests), deliver, time.perf_counter()
        self.rows: list[Continuation] = []
        self.going = len(self.requests)  # continuations that have not ended
        self.begun = False


class Worker:
    """Decodes what is submitted, until it is stopped."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, metrics: Metrics, *, max_rows: int, max_queue: int, prefix_bytes: int = 0
    ) -> None:
        """max_rows: continuations at a time. max_queue: continuations that wait. Raises ConfigError where the tokenizer is not the model's."""
        self.tokenizer, self.metrics, self.max_rows, self.max_queue = tokenizer, metrics, max_rows, max_queue
        self._make_engine = lambda: Engine(model, tokenizer, max_rows=max_rows, prefix_bytes=prefix_bytes)
        self._engine = self._make_engine()
        self.speed = self._engine.speed
        self._lock, self._open, self._under_way = threading.Lock(), True, 0
        self._running = True
        self.failed = False
        """Whether the engine failed and could not be made anew: nothing is taken any more, and another process must serve."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called in the engine's thread, its last act, when `failed` is set."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: list[Ticket] = []
        self._live: dict[int, tuple[Ticket, int]] = {}  # number of a continuation that goes on -> its request, and its number in it
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are taken, and there is a thread that decodes them."""
        return self._open and self._thread.is_alive()

    @property
    def rows(self) -> int:
        """Continuations that are decoded now."""
        return sum(1 for row in list(self._engine.rows) if row.finish is None)

    @property
    def queue(self) -> int:
        """Continuations that wait for a row."""
        return max(0, self._under_way - self.rows)

    def submit(self, requests: Sequence[Request], deliver: Callable[[Piece | ApiError], None]) -> Ticket:
        """Take the continuations of one request. `deliver` is called in the engine's thread: with pieces until each has a finish, or once with an error.

        Raises ApiError: 429 where too many wait, 503 where the server is stopping, or nothing decodes any more.
        """
        with self._lock:
            if not self.alive:
                raise ApiError(503, "the server is stopping; try again in a moment", code="stopping", headers={"Retry-After": "5"})
            if self._under_way + len(requests) > self.max_rows + self.max_queue:
                wait = self.metrics.retry_after()
                message = f"{self._under_way} continuations are under way, and this asks for {len(requests)} more; try again in {wait} s"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(wait)})
            self._under_way += len(requests)
            ticket = Ticket(requests, deliver)
            # Under the lock: once closed, nothing comes behind what is here.
            self._commands.put(lambda: self._add(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its rows are free at the next step."""
        self._commands.put(lambda: self._cancel(ticket))

    def close(self) -> None:
        """Take no new requests."""
        with self._lock:
            self._open = False

    def abort(self, message: str) -> None:
        """End every request under way with status 503."""
        self._commands.put(lambda: self._fail(ApiError(503, message, code="stopping")))

    def stop(self) -> None:
        """End the thread; what was under way ends as in `abort`."""
        self.close()
        self.abort("the server is stopping")
        self._commands.put(lambda: setattr(self, "_running", False))
        self._thread.join()

    def _work(self) -> None:
        while self._running:
            try:
                self._obey(wait=self._engine.idle)
                self._hand_out(self._engine.step())
            except Exception as error:
                # The batch is lost, the server is not: what comes next gets a new engine.
                logging.getLogger(__name__).exception("decoding failed; the engine is made anew")
                self.metrics.engine_failures += 1
                self._fail(ApiError(500, f"decoding failed: {error}", code="engine_failed"))
                try:
                    self._engine = self._make_engine()
                except Exception:
                    self._give_up()
                    return
                self._engine.speed = self.speed

    def _give_up(self) -> None:
        logging.getLogger(__name__).exception("the engine cannot be made anew; the server ends")
        self.close()
        self.failed, obeyed = True, False
        while not obeyed:  # what came in between is known afterwards, even where it cannot be added
            with contextlib.suppress(Exception):
                self._obey(wait=False)
                obeyed = True
        self._fail(ApiError(500, "decoding failed, and the server ends; ask again when it has been restarted", code="engine_failed"))
        self.on_failure()

    def _obey(self, wait: bool) -> None:
        """Do what others asked for; `wait`: until there is something."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except queue.Empty:
            pass

    def _add(self, ticket: Ticket) -> None:
        self._tickets.append(ticket)
        for index, request in enumerate(ticket.requests):
            row = self._engine.add(request)
            ticket.rows.append(row)
            self._live[row.number] = ticket, index

    def _hand_out(self, given: list[tuple[Continuation, str]]) -> None:
        for row, text in given:
            if row.number not in self._live:
                continue
            ticket, index = self._live[row.number]
            if not ticket.begun:
                ticket.begun = True
                self.metrics.first_token.add(time.perf_counter() - ticket.submitted)
            # Counted as ended before it is told: a client that has its answer finds room for its next request.
            if row.finish is not None:
                self._end(ticket, row, row.finish)
            if text or row.finish is not None:
                ticket.deliver(Piece(index, text, row.finish, len(row.prompt), len(row.tokens)))

    def _cancel(self, ticket: Ticket) -> None:
        for index, row in enumerate(ticket.rows):
            if row.number in self._live:
                row.cancel()
                # The engine drops it when its turn comes: many that leave a long queue would be kept until then.
                with contextlib.suppress(ValueError):
                    self._engine.waiting.remove(row)
                self._end(ticket, row, "cancelled")
                ticket.deliver(Piece(index, "", "cancelled", len(row.prompt), len(row.tokens)))

    def _fail(self, error: ApiError) -> None:
        for ticket in list(self._tickets):
            for row in ticket.rows:
                if row.number in self._live:
                    row.cancel()
                    self._end(ticket, row, "error")
            # What could not even be added.
            for _ in range(ticket.going):
                self._end(ticket, None, "error")
            ticket.deliver(error)

    def _end(self, ticket: Ticket, row: Continuation | None, finish: str) -> None:
        if row is not None:
            del self._live[row.number]
        self.metrics.continuations[finish] += 1
        ticket.going -= 1
        with self._lock:
            self._under_way -= 1
        if not ticket.going:
            self._tickets.remove(ticket)
            self.metrics.seconds.add(time.perf_counter() - ticket.submitted)
