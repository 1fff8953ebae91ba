"""`kan serve` as a process: it loads a run, serves it, and leaves in order."""

import signal
import socket
import threading
import time

import httpx
import openai
import pytest
from free_ports import free_port

from kan_train.cli import main
from kan_train.config import ConfigError, GenerateConfig, ServeConfig
from kan_train.inference.commands import samples
from kan_train.inference.engine import Engine
from kan_train.serving.commands import listen, served_name

LONG = 100_000


def test_a_run_is_served_and_what_is_under_way_ends_after_sigterm(program, run_root):
    """The text is that of `kan generate`; a stream goes on after the signal to its last token; the status is 0, and nothing is written but the greeting."""
    server = program("max_tokens=100000", "name=tiny")
    assert f"serving {run_root}/first/checkpoints/step-00000020 as 'tiny' on http://127.0.0.1:" in server.greeting
    settings = {"max_tokens": 10, "temperature": 0.8, "seed": 4}
    text = samples(GenerateConfig(run="first", root=str(run_root), prompt="def main", device="cpu", **settings))[0]
    assert "def main" + server.complete("def main", **settings).choices[0].text == text
    going = server.complete("the quick", max_tokens=400, temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = [next(going)]
    server.terminate()
    chunks += list(going)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 400
    assert server.process.wait(30) == 0
    assert server.process.stderr.read() == ""
    with pytest.raises(openai.APIConnectionError):
        server.complete("x")


def test_what_takes_longer_than_the_bound_ends_with_an_error(program):
    """A stream says so; a request that waits for its answer is refused; the process leaves."""
    server = program("max_tokens=100000", "name=tiny", "shutdown_seconds=0.5", "max_rows=1", "max_queue=1")
    going = server.complete("the quick", max_tokens=LONG, temperature=0, stream=True)
    next(going)
    started = time.monotonic()
    server.terminate()
    with pytest.raises(openai.APIError, match=r"the server is stopping, and gives requests no more than 0\.5 s"):
        list(going)
    assert time.monotonic() - started > 0.4
    assert server.process.wait(30) == 0


def test_ctrl_c_is_as_good(program):
    server = program()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.process.stderr.read()


def test_a_port_that_is_taken_is_refused_before_the_run_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "run=nowhere", f"port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kan: host=127.0.0.1 port={port} cannot be listened on (Address already in use); use another port, or port=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere", "port=0"], "kan: run=nowhere is neither a run nor a checkpoint"),
        (["run=x", "host=192.0.2.1"], "kan: host=192.0.2.1 port=8000 cannot be listened on (Cannot assign requested address); use host=127.0.0.1"),
        (["run=x", "host=a b"], "kan: host=a b is no address of this machine"),
        (["run=x", "host=a..b"], "kan: host=a..b is no address of this machine (no name of a host); use host=127.0.0.1"),
        (["run=x", "port=70000"], "kan: port=70000 must lie between 0 and 65535; use port=65535"),
        (["run=x", "max_rows=0"], "kan: max_rows=0 is too small; use max_rows=1 or more"),
        (["run=x", "max_queue=-1"], "kan: max_queue=-1 is too small; use max_queue=0 or more"),
        (["run=x", "max_body_bytes=5"], "kan: max_body_bytes=5 is too small"),
        (["run=x", "dtype=fp8"], "kan: dtype='fp8' is not known"),
        (["run=x", "max_row=1"], "kan: max_row is not a setting; did you mean max_rows=1?"),
        ([], "kan: run must be given; use run=NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_and_status_2(words, message, capsys):
    assert main(["serve", *words]) == 2
    written = capsys.readouterr()
    assert written.err.startswith(message)
    assert written.err.count("\n") == 1


def test_a_port_is_taken_before_anyone_serves_there():
    """Two servers that start together do not both load their model."""
    with listen("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="cannot be listened on"):
        listen("127.0.0.1", first.getsockname()[1])


def test_a_server_that_cannot_decode_any_more_ends_with_status_1(run_root, monkeypatch):
    """For whoever started it to start it again; the request that met it is told."""
    made, port, answers = [], free_port(), []

    class Broken(Engine):
        def __init__(self, *arguments, **settings):
            made.append(self)
            if len(made) > 1:
                raise RuntimeError("no memory for another")
            super().__init__(*arguments, **settings)

        def step(self):
            raise RuntimeError("out of memory")

    def ask():
        body = {"model": "first", "prompt": "x"}
        answers.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30))

    monkeypatch.setattr("kan_train.serving.worker.Engine", Broken)
    client = threading.Timer(1.0, ask)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        client.start()
        assert main(["serve", "run=first", f"root={run_root}", f"port={port}", "device=cpu", "shutdown_seconds=5"]) == 1
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    client.join(30)
    assert [answer.status_code for answer in answers] == [500]
    assert "decoding failed: out of memory" in answers[0].text


@pytest.mark.parametrize(("settings", "name"), [({"run": "first"}, "first"), ({"run": "a/b.safetensors"}, "b"), ({"run": "a", "name": "n"}, "n")])
def test_a_model_is_called_by_the_last_part_of_its_run(settings, name):
    assert served_name(ServeConfig(**settings)) == name


def test_a_run_in_the_working_folder_has_the_folders_name(tmp_path, monkeypatch):
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "checkpoints")
    assert [served_name(ServeConfig(run=run)) for run in (".", "..", "./")] == ["checkpoints", "mine", "checkpoints"]


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert "\n  kan serve run=kan_tiny " in text
    assert "curl http://127.0.0.1:8000/v1/completions" in text
    assert main(["serve", "--settings"]) == 0
    assert "  max_queue = 64    [a whole number]" in capsys.readouterr().out
