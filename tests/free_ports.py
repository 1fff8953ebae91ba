"""Ports for the processes of a test to meet at.

A port that the kernel gives for port 0 is one of those that it gives to every outgoing connection: between the test that chose it and the process that
listens, seconds of imports later, somebody else may have it.
"""

import fcntl
import itertools
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

FIRST_PORT, LAST_PORT = 14_000, 19_999
"""Below the ports of outgoing connections (from 32768), and not those of the clusters of tests/slurm."""


def free_port() -> int:
    """A port that nobody listens on, and that no other test of this machine gets before thousands of others were given."""
    counter = Path(tempfile.gettempdir()) / f"kan-train-test-port-{os.getuid()}"
    with counter.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        last = int(file.read() or LAST_PORT)
        ports = itertools.chain(range(last + 1, LAST_PORT + 1), range(FIRST_PORT, last + 1))
        port = next(filter(_is_free, ports))
        file.truncate(0)
        file.write(str(port))
    return port


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.socket() as probe:
        probe.bind(("", port))
        return True
    return False
