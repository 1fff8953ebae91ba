"""The node processes of a local job, one a host: a child of ours on this machine, behind ssh elsewhere, and what they write."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kan_train.config import ConfigError
from kan_train.engine.exits import EXIT_STOPPED
from kan_train.launch import remote
from kan_train.launch.spec import JobSpec
from kan_train.launch.trainers import die_with_parent

HERE = "127.0.0.1"
"""This machine, where the run has no other: needs no name that resolves."""

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8")
"""How another host is reached: without questions, and a connection that is lost is noticed within two minutes."""

_HOST = re.compile(r"[A-Za-z0-9_\[:][A-Za-z0-9_.:%@\[\]-]*")
_RANK_0 = b"[rank 0] "


class NodeProcess:
    """The node process of one host: a child of ours on this machine, behind ssh elsewhere."""

    def __init__(self, spec: JobSpec, host: str, command: Sequence[str], copier: "Copier") -> None:
        self.remote = not is_this_machine(host)
        self._sent: set[int] = set()
        self._looked = False
        # Groups of their own: a terminal's Ctrl-C would reach the trainers twice, and the second one ends them unsaved.
        common: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        if self.remote:
            self.process = subprocess.Popen(ssh_command(host, spec.python), stdin=subprocess.PIPE, **common)
            self._write(remote.request(command, spec.working_directory, os.environ))
        else:
            self.process = subprocess.Popen(command, cwd=spec.working_directory, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, **common)
        self._thread = threading.Thread(target=copier.copy, args=(self.process.stdout,), name=f"output-{host}", daemon=True)
        self._thread.start()

    @property
    def status(self) -> int:
        """Exit status, as a shell says it, once it has ended. A stop signal that came before Python could catch it left nothing to save."""
        code = self.process.returncode
        code = code if code >= 0 else 128 - code
        return EXIT_STOPPED if code - 128 in self._sent else code

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def first_look(self) -> bool:
        """Whether it has ended, and that was not seen before."""
        if self._looked or self.runs:
            return False
        self._looked = True
        return True

    def send(self, number: int) -> None:
        """Pass a signal on to the node process, here or there. May be called by a signal's handler."""
        self._sent.add(number)
        if self.remote:
            self._write(signal.Signals(number).name.encode() + b"\n")
        elif self.runs:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the node and its trainers at once."""
        if self.remote:
            self._write(b"SIGKILL\n")
        elif self.runs:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the rest of the output."""
        self._thread.join(10)
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def _write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        # Past Python's buffer, which a handler must not enter a second time.
        with suppress(OSError):  # ssh has ended; its status says so
            while line:
                line = line[os.write(self.process.stdin.fileno(), line) :]


class Copier:
    """Output of the nodes, into the job's file and to whoever watches."""

    def __init__(self, file: Any) -> None:
        self._file, self._lock, self._watched = file, threading.Lock(), True

    def copy(self, lines: Any) -> None:
        """Copy all of `lines`. Rank 0 is what `kan train` shows: only the others are marked."""
        for line in lines:
            with self._lock:
                with suppress(OSError):  # a full disk must not stop a run that can still save elsewhere
                    self._file.write(line)
                self._show(line.removeprefix(_RANK_0))

    def _show(self, line: bytes) -> None:
        if not self._watched:
            return
        try:
            sys.stdout.write(line.decode("utf-8", "replace"))
            sys.stdout.flush()
        except (OSError, ValueError):
            self._watched = False  # a reader that goes away does not end the run


def check_names(hosts: Sequence[str]) -> None:
    """ConfigError where one of `hosts` is no name or address: ssh would take -oProxyCommand=... for an option."""
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--hosts: {host!r} is no name of a host; use names or addresses, such as --hosts node1,node2")


def ssh_command(host: str, python: str) -> list[str]:
    """Words that run the far end on `host`. A shell reads them there, so that they hold nothing but the interpreter; what to run goes through its input."""
    return [*SSH, host, shlex.join(["exec", python, "-m", "kan_train.launch.remote"])]


def is_this_machine(host: str) -> bool:
    """Whether `host` names the machine that this runs on."""
    return host in (HERE, "localhost", "::1", socket.gethostname(), socket.getfqdn())
