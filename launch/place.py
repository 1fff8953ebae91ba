"""Which node of which attempt a process is, what its trainers are told of it, and the files in which it says how it fared."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kan_train.launch.spec import JobSpec

EXIT_UNHEALTHY = 77
"""Exit status of a node whose health check failed, or that waited in vain for another one."""

FIRST_PORT, PORTS = 10000, 20000
"""Below the ports that Linux gives to outgoing connections (from 32768)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which node of which attempt this is."""

    node: int
    """This node, from 0."""
    nodes: int
    """Nodes of the job."""
    head: str
    """Host of node 0."""
    job_id: str
    restart: int
    host: str
    """This host, as the scheduler names it."""

    @property
    def attempt(self) -> str:
        """Tells this start of the job from all others."""
        return f"{self.job_id}.{self.restart}"

    @property
    def port(self) -> int:
        """Where the store is, on the head."""
        digits = "".join(filter(str.isdigit, self.job_id)) or "0"
        return FIRST_PORT + (int(digits) + 101 * self.restart) % PORTS


def trainer_environment(spec: JobSpec, place: Place, local_rank: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of trainer `local_rank` of a node: what torchrun would set, so that the trainer needs to know one launcher only."""
    size = spec.processes_per_node
    return dict(environment) | {
        "RANK": str(place.node * size + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(place.nodes * size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": str(place.node),
        "GROUP_WORLD_SIZE": str(place.nodes),
        "MASTER_ADDR": place.head,
        "MASTER_PORT": str(place.port),
        # The trainers use the store of the node process instead of a second one, which would need a second port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": place.attempt,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
    }


def health_file(logs: Path, node: int) -> Path:
    """What the health check of node number `node` found."""
    return logs / f"health-{node:05d}.json"


def node_file(logs: Path, node: int) -> Path:
    """What node number `node` says of itself, below the attempt's log_dir."""
    return logs / f"node-{node:05d}.json"


def read_node(logs: Path, node: int) -> dict[str, Any]:
    """What a node said last; empty where it said nothing."""
    return read_json(node_file(logs, node))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or not yet a whole one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def first_line(error: BaseException) -> str:
    """What an error says, without its details."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
