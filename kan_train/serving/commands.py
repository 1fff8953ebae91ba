"""`kan serve`: listen, load the run, serve it until a signal, and end what is under way within a bound."""

import asyncio
import errno
import math
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from kan_train.config import ConfigError, ServeConfig
from kan_train.inference.layout import require_one_process
from kan_train.inference.load import load_run
from kan_train.parallel.runtime import launch_size
from kan_train.serving.app import make_app
from kan_train.serving.metrics import Metrics
from kan_train.serving.worker import Worker


class Server(uvicorn.Server):
    """uvicorn's, which ends requests under way with an error when their time is up, instead of cutting them off."""

    def __init__(self, worker: Worker, config: ServeConfig, name: str) -> None:
        # uvicorn's own bound is the last resort, for connections whose client does not read.
        last = math.ceil(config.shutdown_seconds) + 5
        super().__init__(uvicorn.Config(make_app(worker, config, name), log_level="warning", lifespan="off", timeout_graceful_shutdown=last))
        self.worker, self.seconds = worker, config.shutdown_seconds
        worker.on_failure = lambda: setattr(self, "should_exit", True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, wait for what is under way, end what takes longer than `seconds`."""
        self.worker.close()
        message = f"the server is stopping, and gives requests no more than {self.seconds:g} s to end"
        timer = asyncio.get_running_loop().call_later(self.seconds, self.worker.abort, message)
        await super().shutdown(sockets)
        timer.cancel()


def run_serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or Ctrl-C, exit status 0, or until nothing can be decoded any more, 1. Raises ConfigError where the port or the run cannot be had."""
    config.validate()
    require_one_process("kan serve", launch_size())
    # Before the model is loaded: a port that is taken is found at once.
    listener = listen(config.host, config.port)
    with listener:
        loaded = load_run(config.run, config.root, config.device, config.dtype, config.active_groves)
        worker = Worker(
            loaded.model, loaded.tokenizer, Metrics(), max_rows=config.max_rows, max_queue=config.max_queue, prefix_bytes=config.prefix_megabytes * 2**20
        )
        name = served_name(config)
        server = Server(worker, config, name)
        # uvicorn raises the signal again when it has stopped, for whoever handled it before: nobody else shall, this was its purpose.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)
        worker.start()
        print(f"serving {loaded.checkpoint} as {name!r} on {address(listener)}/v1", file=sys.stderr, flush=True)
        try:
            server.run(sockets=[listener])
        finally:
            worker.stop()
    return 1 if worker.failed else 0


def served_name(config: ServeConfig) -> str:
    """What requests call the model: the name that is set, else the last part of `run`, also where that is `.`; a link keeps its own."""
    return config.name or Path(os.path.abspath(config.run)).name.removesuffix(".safetensors")  # noqa: PTH100


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on it; who connects waits for a server to accept. ConfigError where that cannot be."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise ConfigError(f"host={host} is no address of this machine ({reason}); use host=127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # At once: until one listens, others can bind to the port too.
        listener.listen()
    except OSError as error:
        listener.close()
        works = {errno.EADDRINUSE: "another port, or port=0 for one that is free", errno.EACCES: "port=8000"}.get(error.errno or 0, "host=127.0.0.1")
        raise ConfigError(f"host={host} port={port} cannot be listened on ({error.strerror}); use {works}") from None
    return listener


def address(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
