"""Ports of a cluster on this machine, which other clusters here leave alone."""

import os
import socket
from contextlib import suppress

FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Below the ports that Linux gives out by itself."""

PORTS_EACH = 16
"""A cluster's share of them: its controller's, its accounts' and one a node."""


def reserve_ports(count: int) -> tuple[int, socket.socket]:
    """The first of `count` free ports in a row, and what keeps other clusters of this machine from them until it is closed."""
    places = range(FIRST_PORT, LAST_PORT, PORTS_EACH)
    begin = os.getpid() % len(places)
    for port in [*places[begin:], *places[:begin]]:
        # An abstract socket: no file, and the kernel takes it back from a process that dies.
        mark = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            mark.bind(f"\0kan-train-slurm-{port}")
            _bind_all(port, count)
            return port, mark
        mark.close()
    raise OSError(f"no {count} free ports in a row between {FIRST_PORT} and {LAST_PORT}")


def _bind_all(first: int, count: int) -> None:
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.bind(("", port))
