"""Servers on free ports, in threads and in processes, with the small runs of tests/inference; and OpenAI's own client."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from kan_train.config import ServeConfig
from kan_train.data_tools.tokenizer import BOUNDARY
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.serving.commands import Server, address, listen
from kan_train.serving.metrics import Metrics
from kan_train.serving.worker import Worker

_spec = importlib.util.spec_from_file_location("inference_fixtures", Path(__file__).parents[1] / "inference" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)
tokenizer_path, tokenizer, run_root = _fixtures.tokenizer_path, _fixtures.tokenizer, _fixtures.run_root

SECONDS = 30
"""Longest wait for anything."""


class Running:
    """A server that answers."""

    def __init__(self, url: str, worker: Worker | None = None) -> None:
        self.url, self.worker = url, worker
        self.http = httpx.Client(base_url=url, timeout=SECONDS)
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        """OpenAI's client, which does not try again by itself."""

    def complete(self, prompt: Any, **settings: Any) -> Any:
        """A completion of the model "tiny"."""
        return self.client.completions.create(model="tiny", prompt=prompt, **settings)

    def metric(self, name: str) -> float:
        """The value of one line of /metrics, labels included in its name."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def wait_for(self, name: str, value: float) -> None:
        """Until the metric has this value."""
        wait_until(lambda: self.metric(name) == value, f"{name} == {value}")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"not within {SECONDS} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def running(model: Any, tokenizer: Any, **settings: Any) -> Iterator[Running]:
    """A server in a thread."""
    config = ServeConfig(run="tiny", **settings)
    config.validate()
    worker = Worker(model, tokenizer, Metrics(), max_rows=config.max_rows, max_queue=config.max_queue, prefix_bytes=config.prefix_megabytes * 2**20)
    listener = listen("127.0.0.1", 0)
    server = Server(worker, config, "tiny")
    worker.start()
    thread = threading.Thread(target=server.run, args=([listener],))
    url = address(listener)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server starts")
        yield Running(url, worker)
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        worker.stop()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def make_model():
    """As that of tests/inference, but the end of the document has the logit 0, of which another is always larger: the likeliest continuation never ends."""

    def make(dtype: torch.dtype = torch.float64) -> LanguageModel:
        model = materialise(LanguageModel(_fixtures.model_config()), seed=5, dtype=dtype)
        with torch.no_grad():
            model.head.weight *= 6
            model.head.weight[BOUNDARY] = 0
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """In float64: what is decoded beside others is what it is alone, to the token."""
    return make_model()


@pytest.fixture(scope="session")
def served(model, tokenizer) -> Iterator[Running]:
    """A server with room for everything; every test leaves it idle."""
    with running(model, tokenizer, max_rows=16, max_prompt_tokens=200, max_tokens=100_000, max_body_bytes=100_000) as server:
        yield server


@pytest.fixture
def serve(model, tokenizer):
    """A server with settings of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(model, tokenizer, **settings))


class Program(Running):
    """`kan serve` as a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process, self.greeting = process, process.stderr.readline()
        found = re.search(r"http://\S+(?=/v1)", self.greeting)
        assert found, self.greeting + process.stderr.read()
        super().__init__(found[0])
        wait_until(self._answers, "the program answers")

    def _answers(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.ConnectError:
            return False

    def terminate(self) -> None:
        """SIGTERM, which it must have noticed when this returns: it takes no connections."""
        self.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not self._answers_anew(), "it listens no more")

    def _answers_anew(self) -> bool:
        try:
            httpx.get(f"{self.url}/health", timeout=SECONDS)
            return True
        except httpx.TransportError:
            return False


@pytest.fixture
def program(run_root) -> Iterator[Callable[..., Program]]:
    """`kan serve` of the run "first" on a free port, with settings of its own."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str) -> Program:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "kan_train", "serve", "run=first", f"root={run_root}", "port=0", "device=cpu", *words]
        processes.append(subprocess.Popen(command, cwd=run_root.parent, env=environment, stderr=subprocess.PIPE, text=True))
        return Program(processes[-1])

    yield start
    for process in processes:
        process.kill()
        process.communicate()
