"""The far end of ssh: `python -m kan_train.launch.remote` runs one command there, as its standard input says.

The first line of the input is JSON: command (words), working_directory, environment (added to the host's own). So no shell ever reads an override, and no
secret stands on a command line. Each further line is the name of a signal for the command: ssh itself passes none on. Where the input ends, the launcher or the
connection is gone: the command is asked to stop as by a scheduler, since nobody else is left to do it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

PASSED_ON = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL")
"""Signals that may be asked for."""

CARRIED = ("CUDA_VISIBLE_DEVICES", "GLOO_", "HF_", "KAN_", "NCCL_", "OMP_", "PYTHONPATH", "TORCH_", "TRITON_", "WANDB_")
"""Beginnings of the names in the environment that a run takes along to other hosts."""


def request(command: Sequence[str], working_directory: str | Path, environment: Mapping[str, str]) -> bytes:
    """The first line for `main`: what to run, and where. Of `environment` goes along what the trainers read (CARRIED)."""
    carried = {name: value for name, value in environment.items() if name.startswith(CARRIED)}
    return json.dumps({"command": list(command), "working_directory": str(working_directory), "environment": carried}).encode() + b"\n"


def main(lines: TextIO | None = None) -> int:
    """Run what the first line of `lines` (default: standard input) says; returns its exit status, 128 and the signal's number where one ended it."""
    source = lines or sys.stdin
    wanted = json.loads(source.readline())
    process = subprocess.Popen(
        wanted["command"], cwd=wanted["working_directory"], env=os.environ | wanted["environment"], stdin=subprocess.DEVNULL, start_new_session=True
    )
    threading.Thread(target=_pass_on, args=(source, process), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # those of a terminal or a connection that goes away
        signal.signal(number, lambda *_: process.send_signal(signal.SIGTERM))
    status = process.wait()
    return status if status >= 0 else 128 - status


def _pass_on(lines: TextIO, process: subprocess.Popen) -> None:
    with suppress(ValueError, OSError):
        for name in map(str.strip, lines):
            if name == "SIGKILL":
                os.killpg(process.pid, signal.SIGKILL)  # the trainers too, which would save on its death
            elif name in PASSED_ON:
                process.send_signal(getattr(signal, name))
        process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    # Not sys.exit: a thread may wait for input that never comes.
    code = main()
    sys.stdout.flush()
    os._exit(code)
