"""`python -m kan_train.launch.node SPEC`: one process a node. It checks the node, starts the trainers, passes signals on to them, and says how they ended.

The trainers meet at a store that this process keeps on the first host; a port follows from the job's id and restart, so that jobs on one machine, and a
start and the one before it, do not meet. Why not torchrun: a signal makes its agent kill trainers that are saving, and hides their exit status.
Under Slurm everything but SPEC comes from the environment; `kan launch local` gives it in words.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from kan_train.config.errors import ConfigError
from kan_train.engine.exits import EXIT_STOPPED
from kan_train.engine.signals import STOP_SIGNALS
from kan_train.launch.place import EXIT_UNHEALTHY, Place, first_line, health_file, node_file, read_json, trainer_environment
from kan_train.launch.spec import JobSpec, log_dir, read_spec
from kan_train.launch.trainers import Trainers

MEETING_SECONDS = float(os.environ.get("KAN_LAUNCH_MEETING_SECONDS", "300"))
"""Time that nodes have to come to the meeting point: a container's image may have to be unpacked first."""

SURVIVAL_SECONDS = 20.0
"""Time that trainers have to leave by themselves after one has failed: to report a hang, to end what they write."""

FAREWELL_SECONDS = 600.0
"""Time that a node waits for the others to end: they may still be saving, and a scheduler kills all when one has left."""

POLL_SECONDS = 0.1


class Node:
    """One node in one attempt."""

    def __init__(self, spec: JobSpec, place: Place) -> None:
        self.spec, self.place, self.trainers = spec, place, Trainers()
        self.logs = log_dir(spec.run_dir, place.job_id, place.restart)
        self.received = 0
        self.report: dict[str, Any] = {"node": place.node, "host": place.host, "state": "starting", "signal": None, "problems": {}, "failures": []}
        self._check: Any = None
        self._store: Any = None
        self._others: list[int] = []

    def run(self) -> int:
        """The node's whole life; returns its exit status."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        self._write()
        status = self._run()
        self.report |= {"state": "ended", "exit_code": status, "ended": time.time()}
        self._write()
        self._farewell(status)
        # Slurm would call a step cancelled that ends with 75 on one node a moment before the other. What it was stands in the node's file.
        return 0 if status == EXIT_STOPPED and self.spec.scheduler == "slurm" else status

    def _run(self) -> int:
        begin = self._prepare_check() if self.spec.health_check else None
        try:
            if not self._meet() or (begin is not None and not self._healthy(begin)):
                return self._status_without_training()
        finally:
            if begin is not None:
                begin.close()
        if self.received:
            return EXIT_STOPPED
        place, size = self.place, self.spec.processes_per_node
        ranks = range(place.node * size, (place.node + 1) * size)
        environments = [trainer_environment(self.spec, place, local) for local in range(size)]
        self.trainers.start(ranks, self.spec.train_command(), self.spec.working_directory, environments, self.logs)
        if self.received:
            self.trainers.send(self.received)  # it came between the question above and the start
        self._told("training")
        return self._watch()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.trainers.send(number)

    # --- before training --------------------------------------------------------------------------------------------------------------------------

    def _meet(self) -> bool:
        """Wait for all nodes at the store; whether they came. Those that did not are named."""
        import torch.distributed as dist

        place, start = self.place, time.monotonic()
        try:
            store = dist.TCPStore(
                place.head, place.port, None, place.node == 0, timedelta(seconds=MEETING_SECONDS), wait_for_workers=False, multi_tenant=False
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            what = "keep" if place.node == 0 else "reach"
            problem = f"node {place.node} ({place.host}) cannot {what} the meeting point {place.head}:{place.port}: {first_line(error)}"
            self._told("starting", {place.head: problem})
            return False
        self._store = dist.PrefixStore(f"launch/{place.attempt}", store)
        self._store.set(f"here/{place.node}", place.host)
        missing = self._others = list(range(place.nodes))
        while missing and not self.received and not self._failed_elsewhere():
            missing = [node for node in missing if not self._store.check([f"here/{node}"])]
            self._others = [node for node in range(place.nodes) if node not in missing]
            if missing and time.monotonic() - start > MEETING_SECONDS:
                self._told("starting", {f"node {node}": f"did not come to the meeting point within {MEETING_SECONDS:g} s" for node in missing})
                return False
            time.sleep(POLL_SECONDS if missing else 0)
        return not missing and not self.received

    def _prepare_check(self) -> Connection:
        """Start the process of the health check, which waits for a word from what is returned.

        In a process of its own, as whoever has touched a GPU keeps some of its memory; forked, as PyTorch is imported already; and before the store is there,
        whose threads may hold a lock of the C library when they are forked, the resolver's say, that nobody would ever open in the child.
        """
        import kan_train.launch.health  # noqa: F401  # brings PyTorch

        context = multiprocessing.get_context("fork")
        told, begin = context.Pipe(duplex=False)
        file = health_file(self.logs, self.place.node)
        self._check = context.Process(target=_check_when_told, args=(told, begin, self.spec, self.place, file), name="health check")
        self._check.start()
        told.close()
        return begin

    def _healthy(self, begin: Connection) -> bool:
        """Whether this node passed its checks; what is wrong is said, with the host that it is wrong on."""
        self._told("checking")
        assert self._check is not None
        file = health_file(self.logs, self.place.node)
        with suppress(BrokenPipeError):  # it is gone already; its exit status is judged below
            begin.send(None)
        while self._check.is_alive():
            if self.received or self._failed_elsewhere():
                self._check.terminate()
            self._check.join(POLL_SECONDS)
        if self.received:
            return False
        problems = read_json(file).get("problems", {})
        if self._check.exitcode != 0 and not problems and not self._failed_elsewhere():
            problems = {self.place.host: f"the health check itself ended with status {self._check.exitcode}"}
        self._told("checked", problems)
        return self._check.exitcode == 0

    def _status_without_training(self) -> int:
        if self.received:
            return EXIT_STOPPED
        self._fail()
        return EXIT_UNHEALTHY

    # --- while training ---------------------------------------------------------------------------------------------------------------------------

    def _watch(self) -> int:
        """Until every trainer of this node has ended. Trainers that save are never hurried: only where one has failed, none can."""
        doomed_since: float | None = None
        told = 0
        while self.trainers.running:
            if self.received and told != self.received:
                told = self.received
                self._told("stopping")
            failed = bool(self.trainers.failures(bool(self.received))) or self.trainers.stopped_early()
            if failed:
                self._fail()
            if doomed_since is None and (failed or self._failed_elsewhere()):
                doomed_since = time.monotonic()
            if doomed_since is not None and time.monotonic() - doomed_since > SURVIVAL_SECONDS:
                self.trainers.kill()
            time.sleep(POLL_SECONDS)
        self.trainers.close()
        failures = self.trainers.failures(bool(self.received))
        self.report["failures"] = [failure.as_dict() for failure in failures]
        for failure in failures:
            how = f"was ended by {failure.signal}" if failure.signal else f"ended with status {failure.exit_code}"
            print(f"kan: rank {failure.rank} on {self.place.host} {how}{': ' if failure.last_line else ''}{failure.last_line}", file=sys.stderr, flush=True)
        if failures:
            self._fail()
        return self.trainers.status(bool(self.received))

    def _fail(self) -> None:
        """Tell the other nodes that the attempt is lost."""
        self._ask(lambda store: store.set("failed", self.place.host))

    def _failed_elsewhere(self) -> bool:
        return bool(self._ask(lambda store: store.check(["failed"])))

    def _ask(self, question: Any) -> Any:
        if self._store is None:
            return None
        try:
            return question(self._store)
        except (RuntimeError, OSError):
            # The store is gone, and the head with it: no trainer can go on without it for long.
            self._store = None
            self.report["problems"].setdefault(self.place.head, f"{self.place.host} lost the connection to the first node, {self.place.head}")
            return True

    # --- the end ----------------------------------------------------------------------------------------------------------------------------------

    def _farewell(self, status: int) -> None:
        """Leave together: the scheduler kills the others' trainers, which may be saving, when one node leaves with a status that is not 0."""
        self._ask(lambda store: store.set(f"gone/{self.place.node}", str(status)))
        saved = status in (0, EXIT_STOPPED)
        end = time.monotonic() + (FAREWELL_SECONDS if saved else SURVIVAL_SECONDS + 5)
        waiting = self._others
        while waiting and self._store is not None and time.monotonic() < end:
            waiting = [node for node in waiting if not self._ask(lambda store, node=node: store.check([f"gone/{node}"]))]
            if saved and self._failed_elsewhere():
                end = min(end, time.monotonic() + SURVIVAL_SECONDS + 5)
                saved = False
            time.sleep(POLL_SECONDS if waiting else 0)
        if self.place.node == 0 and self._store is not None:
            time.sleep(3 * POLL_SECONDS)  # the others read the last word, then the store may go

    def _told(self, state: str, problems: Mapping[str, str] | None = None) -> None:
        self.report["state"] = state
        self.report["problems"] |= problems or {}
        for host, problem in (problems or {}).items():
            print(f"kan: {host}: {problem}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        """The node's own file: what is known of its end where nobody else lives to tell."""
        if self.received:
            self.report["signal"] = signal.Signals(self.received).name
        path = node_file(self.logs, self.place.node)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(json.dumps(self.report, indent=1))
            part.replace(path)
        except OSError as error:
            print(f"kan: {path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def _check_when_told(told: Connection, begin: Connection, spec: JobSpec, place: Place, file: Path) -> None:
    from kan_train.launch.health import check

    begin.close()  # the parent's end: with its copy open the child would not hear that the parent is gone
    try:
        told.recv()
    except EOFError:
        os._exit(1)
    check(spec, place, file)


def _place(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Place:
    def given(value: Any, *variables: str, default: str | None = None) -> str:
        found = value if value is not None else next((environment[name] for name in variables if name in environment), default)
        if found is None:
            raise ConfigError(f"{variables[0]} is not set: this is no Slurm job; start with `kan launch slurm` or `kan launch local`")
        return str(found)

    return Place(
        node=int(given(arguments.node, "SLURM_NODEID")),
        nodes=int(given(arguments.nodes, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")),
        head=given(arguments.head, "KAN_LAUNCH_HEAD"),
        job_id=given(arguments.job_id, "SLURM_JOB_ID"),
        restart=int(given(arguments.restart, "SLURM_RESTART_COUNT", default="0")),
        host=given(arguments.host, "SLURMD_NODENAME", default=socket.gethostname()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one node as the command line, or Slurm's environment, describes it."""
    parser = argparse.ArgumentParser(prog="python -m kan_train.launch.node", description="One node of a job: its trainers, and the process that watches them.")
    parser.add_argument("spec", help="RUN/launch/job-001.json")
    for name in ("node", "nodes", "restart"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("head", "job-id", "host"):
        parser.add_argument(f"--{name}")
    arguments = parser.parse_args(argv)
    try:
        return Node(read_spec(arguments.spec), _place(arguments)).run()
    except ConfigError as error:
        print(f"kan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
