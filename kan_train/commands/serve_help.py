"""What `kan serve` can be asked, and the text that teaches it. Nothing heavy is imported before the command runs."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

SERVE_TEXT = """\
Serve a trained run over HTTP, as OpenAI's completions: many requests are decoded in one batch, and any OpenAI client can ask.

  kan serve run=kan_tiny                                     on http://127.0.0.1:8000/v1
  kan serve run=first.safetensors port=9000 name=mine        a file that `kan checkpoint export` wrote, under another name
  kan serve run=kan_tiny max_rows=32 max_queue=200           more at a time, and more that wait before others are told to come later (429)
  kan serve run=kan_tiny dtype=bf16 active_groves=1          half the bytes, fewer groves a token
  kan serve run=kan_tiny host=0.0.0.0                        for every machine that reaches this one; there are no keys

and then, from anywhere:

  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "kan_tiny", "prompt": "def main(", "max_tokens": 64, "stream": true}'
  curl http://127.0.0.1:8000/metrics                         what it has done, for Prometheus

SIGTERM or Ctrl-C stops it: nothing new is taken, and what is under way has shutdown_seconds to end. It needs the extra `serve`:
pip install 'kan-train[serve]'. docs/serving.md has the fields, limits and errors.
"""


def add_serve_command(commands: Any, add_command: AddCommand, add_overrides: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `serve` to the subparsers `commands`."""
    serve = add_command(commands, "serve", "serve a trained run over HTTP", SERVE_TEXT, _serve)
    serve.add_argument("--settings", action="store_true", help="print every setting with its type, default and meaning, and stop")
    add_overrides(serve)


def _serve(arguments: argparse.Namespace) -> int:
    from kan_train.config import ConfigError, ServeConfig, compose, describe

    if arguments.settings:
        print(describe.settings_text("serve"))
        return 0
    config = compose.compose_settings(ServeConfig, arguments.overrides, arguments.config_dir)
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")):
        raise ConfigError("kan serve needs FastAPI and uvicorn; install them with pip install 'kan-train[serve]'")
    from kan_train.serving.commands import run_serve

    return run_serve(config)
