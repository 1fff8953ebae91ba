"""More than there is room for, clients that leave, an engine that fails: others do not notice."""

import threading
import time

import openai
import pytest

from kan_train.inference.decode import generate
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling
from kan_train.serving.commands import Server
from kan_train.serving.errors import ApiError
from kan_train.serving.metrics import Metrics
from kan_train.serving.worker import Worker

PROMPT = "for i in range"
LONG = 100_000
"""Tokens that nobody waits for: minutes of decoding, and its likeliest continuation never ends."""


def stream(server, prompt: str, **settings):
    return server.complete(prompt, **({"max_tokens": LONG, "temperature": 0} | settings), stream=True)


def test_a_client_that_leaves_its_stream_frees_its_rows(served):
    before = served.metric('kan_continuations_total{finish="cancelled"}')
    going = stream(served, PROMPT, n=3)
    next(going)
    served.wait_for("kan_rows", 3)
    going.close()
    served.wait_for("kan_rows", 0)
    served.wait_for('kan_continuations_total{finish="cancelled"}', before + 3)
    assert served.metric("kan_queue") == 0


def test_a_client_that_leaves_before_its_answer_frees_its_row(served):
    """Without a stream nothing is ever written to it, so that no failed write tells."""
    tokens = served.metric("kan_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.5).completions.create(model="tiny", prompt=PROMPT, max_tokens=LONG, temperature=0)
    served.wait_for("kan_rows", 0)
    done = served.metric("kan_tokens_total")
    assert done > tokens
    time.sleep(0.2)
    assert served.metric("kan_tokens_total") == done, "the engine rests"
    served.wait_for('kan_http_responses_total{path="/v1/completions",status="499"}', 1)


def test_a_client_that_does_not_read_and_leaves(served):
    """Of its stream nothing has been read when it goes, and much has been written."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body):
        served.wait_for("kan_rows", 1)
        time.sleep(0.5)
    served.wait_for("kan_rows", 0)


def test_a_queue_that_is_full_tells_when_to_come_again(serve, model, tokenizer):
    server = serve(max_rows=1, max_queue=2, max_tokens=LONG)
    first = stream(server, PROMPT)
    next(first)
    waiting: list[str] = []
    threads = [threading.Thread(target=lambda: waiting.append(server.complete(PROMPT, max_tokens=5, temperature=0).choices[0].text)) for _ in range(2)]
    for thread in threads:
        thread.start()
    server.wait_for("kan_queue", 2)
    for _ in range(2):
        with pytest.raises(openai.RateLimitError) as refused:
            server.complete("x", max_tokens=1)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert refused.value.body["type"] == "rate_limit_error"
        assert refused.value.code == "queue_full"
    with pytest.raises(openai.BadRequestError, match="ask for at most 1 at a time"):
        server.complete("x", n=2)
    assert server.http.get("/health").status_code == 200
    first.close()
    for thread in threads:
        thread.join(30)
    text = generate(model, tokenizer, PROMPT, max_tokens=5, sampling=Sampling(temperature=0))[0]
    assert waiting == [text, text]
    assert server.complete("x", max_tokens=1).choices
    assert server.metric('kan_http_responses_total{path="/v1/completions",status="429"}') == 2


def test_a_client_that_leaves_the_queue(serve):
    server = serve(max_rows=1, max_queue=1, max_tokens=LONG)
    first = stream(server, PROMPT)
    next(first)
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.5).completions.create(model="tiny", prompt="x", max_tokens=5)
    server.wait_for("kan_queue", 0)
    assert server.metric("kan_rows") == 1
    assert not server.worker._engine.waiting, "nothing of it is kept"
    first.close()
    server.wait_for("kan_rows", 0)
    assert server.complete("x", max_tokens=1, temperature=0).choices


def test_an_engine_that_fails_is_made_anew(serve, monkeypatch):
    """Those under way are told, the next is answered."""
    server = serve(max_rows=4, max_tokens=LONG)
    good = server.complete("x", max_tokens=5, temperature=0).choices[0]
    going = stream(server, PROMPT)
    next(going)

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.worker._engine, "step", fail)
    with pytest.raises(openai.APIError, match="decoding failed: out of memory"):
        list(going)
    assert server.complete("x", max_tokens=5, temperature=0).choices[0] == good
    assert server.metric("kan_engine_failures_total") == 1
    assert server.metric('kan_continuations_total{finish="error"}') == 1
    monkeypatch.setattr(server.worker._engine, "add", lambda request: fail())
    with pytest.raises(openai.InternalServerError, match="decoding failed: out of memory"):
        server.complete("x")
    assert server.complete("x", max_tokens=5, temperature=0).choices[0] == good
    assert (server.metric("kan_rows"), server.metric("kan_queue")) == (0, 0)


def test_an_engine_that_cannot_be_made_anew_ends_the_server(serve, monkeypatch):
    """What is under way, what has come in between and what comes later is told; nobody waits for ever."""
    server = serve(max_rows=1, max_tokens=LONG)
    worker, late = server.worker, []
    going = stream(server, PROMPT)
    next(going)

    def fail():
        raise RuntimeError("out of memory")

    def cannot():
        worker.submit([Request(prompt="x")], late.append)
        raise RuntimeError("no memory for another")

    monkeypatch.setattr(worker, "_make_engine", cannot)
    monkeypatch.setattr(worker._engine, "step", fail)
    with pytest.raises(openai.APIError, match="decoding failed: out of memory"):
        list(going)
    worker._thread.join(30)
    assert worker.failed
    assert [error.status for error in late] == [500]
    with pytest.raises(ApiError, match="the server is stopping") as refused:
        worker.submit([Request(prompt="x")], late.append)
    assert refused.value.status == 503
    assert (worker.rows, worker.queue) == (0, 0)


def test_without_a_thread_that_decodes_nothing_is_taken(model, tokenizer):
    """However it ended: what nobody reads would wait for ever."""
    worker = Worker(model, tokenizer, Metrics(), max_rows=1, max_queue=1)
    with pytest.raises(ApiError, match="try again") as refused:
        worker.submit([Request(prompt="x")], lambda piece: None)
    assert refused.value.status == 503


def test_a_server_that_fails_says_so_without_its_insides(serve, monkeypatch):
    server = serve()
    monkeypatch.setattr(server.worker, "submit", lambda *_: {}["secret"])
    with pytest.raises(openai.InternalServerError, match="the server failed; its log says why"):
        server.complete("x")
    assert server.metric('kan_http_responses_total{path="/v1/completions",status="500"}') == 1


def test_nothing_new_is_taken_while_it_stops(serve):
    server = serve()
    server.worker.close()
    with pytest.raises(openai.InternalServerError, match="the server is stopping") as refused:
        server.complete("x")
    assert refused.value.status_code == 503
    assert server.http.get("/health").status_code == 503


def test_the_last_resort_is_later_than_the_bound(model, tokenizer, serve):
    from kan_train.config import ServeConfig

    server = Server(serve().worker, ServeConfig(run="tiny", shutdown_seconds=2.5), "tiny")
    assert server.config.timeout_graceful_shutdown > 2.5
