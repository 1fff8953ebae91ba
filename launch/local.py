"""`kan launch local`: the same node process as under Slurm, on this machine or on given hosts, started again after failures.

What Slurm's script does is done here: `supervise.before`, a node process on every host, `supervise.after`, and what that decides.
"""

import fcntl
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from kan_train.config import Config, ConfigError
from kan_train.config.compose import compose_train
from kan_train.engine.exits import EXIT_STOPPED
from kan_train.engine.signals import STOP_SIGNALS
from kan_train.launch import supervise
from kan_train.launch.attempts import record_for
from kan_train.launch.hosts import HERE, Copier, NodeProcess, check_names
from kan_train.launch.node import SURVIVAL_SECONDS
from kan_train.launch.place import Place
from kan_train.launch.spec import JobSpec, launch_dir, output_file, spec_file, spec_for, write_spec

LOCK = "local.lock"
"""File in RUN/launch that the launcher of a run holds while it lives. Its text says which job, where."""

POLL_SECONDS = 0.1

RESTART_SECONDS = 1.0
"""Between an attempt and the next one."""


def local_spec(
    overrides: Sequence[str], config_dirs: Sequence[Path], *, hosts: Sequence[str], processes: int | None, max_restarts: int | None
) -> JobSpec:
    """The job of the training that `overrides` describe on `hosts` (none: this machine); ConfigError where they describe none.

    processes: trainers on each host; None: one a device of this machine. max_restarts: None: cluster.max_restarts.
    """
    nodes, size = len(hosts) or 1, processes or 0

    def world_size(config: Config) -> int:
        nonlocal size
        size = size or devices_here(config.run.device)
        return nodes * size

    config = compose_train(overrides, config_dirs, world_size)
    return replace(
        spec_for(config, overrides, config_dirs),
        scheduler="local",
        nodes=nodes,
        processes_per_node=size,
        max_restarts=config.cluster.max_restarts if max_restarts is None else max_restarts,
        exclude_after=0,  # the hosts are those that the user named: there are no others
    )


def run_locally(spec: JobSpec, hosts: Sequence[str]) -> int:
    """Train as `spec` says on `hosts`, one node each (none: this machine), until the run is finished, given up, or stopped by a signal.

    Returns the trainers' exit status. Called in the main thread: it takes the stop signals and passes them on. ConfigError where the run is going on already.
    """
    check_names(hosts)
    with _held(spec) as job_id:
        write_spec(spec)
        record_for(spec, "submitted", job_id, nodes=spec.nodes, processes_per_node=spec.processes_per_node)
        return _Launcher(spec, list(hosts) or [HERE], job_id).run()


class _Launcher:
    """All attempts of one job."""

    def __init__(self, spec: JobSpec, hosts: Sequence[str], job_id: str) -> None:
        self.spec, self.hosts, self.job_id = spec, hosts, job_id
        self.received = 0
        self.nodes: list[NodeProcess] = []

    def run(self) -> int:
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        try:
            restart = 0
            while (status := self._attempt(restart)) is None:
                restart += 1
            return status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempt(self, restart: int) -> int | None:
        """One attempt; the status to leave with, or None where another one comes."""
        spec = self.spec
        status = supervise.before(spec, self.job_id, restart, self.hosts)
        if status == supervise.EXIT_DONE:
            return 0
        if status:
            return status
        status = self._train(restart)
        self._cancelled_if_told(restart)
        decision = supervise.after(spec, self.job_id, restart, self.hosts, status, "none", "")
        if decision.action == "finished":
            return 0
        if decision.action in ("leave", "give_up"):
            return decision.status
        end = time.monotonic() + RESTART_SECONDS
        while time.monotonic() < end and not self.received:
            time.sleep(POLL_SECONDS)
        if self._cancelled_if_told(restart):  # between two attempts nothing is unsaved
            return EXIT_STOPPED
        print(f"kan: the run goes on from its newest checkpoint (restart {restart + 1})", file=sys.stderr, flush=True)
        return None

    def _cancelled_if_told(self, restart: int) -> bool:
        if self.received:
            record_for(self.spec, "cancelled", self.job_id, restart, reason=f"it was sent {signal.Signals(self.received).name}")
        return bool(self.received)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for node in self.nodes:
            node.send(number)

    def _train(self, restart: int) -> int:
        """Start a node process on every host and wait for all; returns the status of the first that failed, EXIT_STOPPED, or 0."""
        head = self.hosts[0]
        with output_file(self.spec.run_dir, self.job_id).open("ab", buffering=0) as output:
            copier = Copier(output)
            for number, host in enumerate(self.hosts):
                words = ["--node", number, "--nodes", len(self.hosts), "--head", head, "--job-id", self.job_id, "--restart", restart, "--host", host]
                file = str(spec_file(self.spec.run_dir, self.spec.job))
                command = [self.spec.python, "-m", "kan_train.launch.node", file, *map(str, words)]
                self.nodes.append(NodeProcess(self.spec, host, command, copier))
                if self.received:
                    self.nodes[-1].send(self.received)  # it came while this one was started
            status = self._wait()
            for node in self.nodes:
                node.close()
            self.nodes = []
        return status

    def _wait(self) -> int:
        failed: list[int] = []
        doomed: float | None = None
        while True:
            some_run = any(node.runs for node in self.nodes)
            failed += [code for node in self.nodes if node.first_look() and (code := node.status) not in (0, EXIT_STOPPED)]
            if not some_run:
                return failed[0] if failed else max(node.status for node in self.nodes)
            # The others know of a failure, and leave by themselves, unless the one that failed could not tell them.
            doomed = doomed or (time.monotonic() if failed else None)
            if doomed is not None and time.monotonic() - doomed > SURVIVAL_SECONDS + 10:
                for node in self.nodes:
                    node.kill()
            time.sleep(POLL_SECONDS)


def devices_here(device: str) -> int:
    """Devices of this machine that a run with run.device=`device` uses: its CUDA devices, or 1."""
    if device == "cpu":
        return 1
    import torch  # seconds, for this question alone

    return torch.cuda.device_count() or 1


def live_launcher(run_dir: str | Path) -> dict[str, Any] | None:
    """host, pid and job_id of the launcher that trains the run now, or None."""
    try:
        with (launch_dir(run_dir) / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return json.loads(file.read())
    except (OSError, ValueError):
        pass  # no such file, a launcher that is just beginning, or a file system without locks
    return None


def is_alive(run_dir: str | Path, job_id: str) -> bool:
    """Whether the launcher of the local job `job_id` lives."""
    return (live_launcher(run_dir) or {}).get("job_id") == job_id


@contextmanager
def _held(spec: JobSpec) -> Iterator[str]:
    """The run's launcher lock, which the kernel takes back however this process ends; gives the id of the new job."""
    path = launch_dir(spec.run_dir) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use run.root=PATH with a folder that you may write") from error
    with file:
        for _ in range(10):  # who asks whether it is held holds it for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # a file system without locks: the ledger's owner is then the only guard
        else:
            raise ConfigError(f"run {spec.run_name} is trained by another `kan launch local`: see `kan launch status {spec.run_dir}`, or use another run.name")
        job_id = _new_job_id()
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id}))
        file.flush()
        yield job_id


def _new_job_id() -> str:
    """An id whose port is free here: several runs on one machine must not meet each other."""
    for _ in range(100):
        job_id = f"local-{random.SystemRandom().randrange(10000, 30000)}"
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", Place(node=0, nodes=1, head=HERE, job_id=job_id, restart=0, host=HERE).port))
            return job_id
    return job_id
