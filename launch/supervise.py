"""`python -m kan_train.launch.supervise before|after|resubmitted SPEC ...`: what the job's script asks on the first node around every start.

before: may the job start, and where is the run? Status 0: start; EXIT_DONE: there is nothing to do; else the job ends with that status.
after: why did this start end, and what comes now? One line on standard output, which the script acts on:
    finished | requeue | resubmit HOST,HOST | leave STATUS | give_up STATUS
Nothing here calls Slurm: in a container there is none. The only writer of an attempt's events, so that none are mixed up.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kan_train.config.errors import ConfigError
from kan_train.engine.exits import EXIT_BAD_STEPS, EXIT_BUDGET, EXIT_HANG, EXIT_SETTINGS, EXIT_STOPPED
from kan_train.launch.attempts import Attempt, attempts_of, bad_hosts, read_events, record_for, without_progress
from kan_train.launch.place import EXIT_UNHEALTHY, read_node
from kan_train.launch.spec import JobSpec, log_dir, read_spec

EXIT_DONE = 10
"""Status of `before` where there is nothing left to do."""

GIVE_UP = {
    "settings": "the next start would end the same way",
    "bad_steps": "going back to a checkpoint did not help",
    "budget": "only a larger one lets it go on",
}
"""Causes that another start would meet again, and why."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended."""

    cause: str
    """One of attempts.CAUSES."""
    exit_code: int
    reason: str
    failed_host: str | None = None
    unhealthy: tuple[tuple[str, str], ...] = ()
    """(host, problem)."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What comes after an attempt."""

    action: str
    """finished, requeue, resubmit, leave or give_up."""
    reason: str
    exclude: tuple[str, ...] = ()
    status: int = 0

    def line(self) -> str:
        """What the script reads."""
        argument = ",".join(self.exclude) if self.action == "resubmit" else str(self.status) if self.action in ("leave", "give_up") else ""
        return f"{self.action} {argument}".strip()


# --- judging --------------------------------------------------------------------------------------------------------------------------------------------


def judge(nodes: Sequence[dict[str, Any]], hosts: Sequence[str], status: int, told: str, state: str, hang: dict[str, Any] | None = None) -> Ending:
    """Why an attempt ended, from what its nodes said last (empty where one said nothing), the status of srun and the report of its hang, if there is one.

    told: USR1 where the time limit was announced, TERM, or none. state: the job's state as Slurm has it; empty where there is no such thing.
    """
    codes = [node["exit_code"] for node in nodes if "exit_code" in node]
    signals = {node["signal"] for node in nodes if node.get("signal")}
    problems = {host: problem for node in nodes for host, problem in node.get("problems", {}).items()}
    failures = sorted((failure | {"host": node["host"]} for node in nodes for failure in node.get("failures", [])), key=_blame)
    # A node that srun killed was sent SIGTERM first, and said so. One that began, and has neither that nor an end, is gone.
    silent = [host for host, node in zip(hosts, nodes, strict=True) if node and "exit_code" not in node and not node.get("signal")]
    if status == 128 + signal.SIGTERM and not codes:
        signals.add("SIGTERM")  # it came before Python could hear it
    if len(codes) == len(hosts) and set(codes) == {0}:
        return Ending(cause="finished", exit_code=0, reason="all steps are done")
    if not failures and not problems and not silent and (told != "none" or signals):
        return _stopped(told, signals, state)
    if silent and not (failures and failures[0]["signal"]) and (codes or state not in ("", "RUNNING")):
        return Ending(cause="lost", exit_code=status, reason=f"no word of the end came from {', '.join(silent)}", failed_host=_only(silent))
    if failures:
        return _failed(failures[0], hosts, hang or {})
    if problems:
        host, problem = next(iter(problems.items()))
        known = tuple((name, text) for name, text in problems.items() if name in hosts)
        return Ending(cause="unhealthy", exit_code=EXIT_UNHEALTHY, reason=f"{host}: {problem}", unhealthy=known)
    if state not in ("", "RUNNING"):
        return Ending(cause="taken_away", exit_code=status, reason=f"it was ended from outside (its state was {state})")
    return Ending(cause="lost", exit_code=status, reason=f"no word of the end came from any node (srun's status is {status})")


def _only(hosts: Sequence[str]) -> str | None:
    return hosts[0] if len(hosts) == 1 else None


def _stopped(told: str, signals: set[str], state: str) -> Ending:
    if state not in ("", "RUNNING"):
        reason = f"it was cancelled, preempted, or put back into the queue from outside (its state was {state})"
        return Ending(cause="taken_away", exit_code=EXIT_STOPPED, reason=reason)
    if told == "USR1":
        return Ending(cause="time_limit", exit_code=EXIT_STOPPED, reason="its time limit was near")
    if "SIGTERM" in signals:
        return Ending(cause="preempted", exit_code=EXIT_STOPPED, reason="its nodes were needed for another job (SIGTERM)")
    return Ending(cause="stopped", exit_code=EXIT_STOPPED, reason=f"it was sent {', '.join(sorted(signals)) or told}")


def _blame(failure: dict[str, Any]) -> tuple[bool, bool, float]:
    # A trainer that was killed made the others fail, by their lost connections: it goes before them. Of a budget only the first one speaks.
    return failure["signal"] is None, failure["exit_code"] == EXIT_BUDGET and failure["rank"] > 0, failure["time"]


def _failed(failure: dict[str, Any], hosts: Sequence[str], hang: dict[str, Any]) -> Ending:
    code, host = failure["exit_code"], failure["host"]
    how = f"was ended by {failure['signal']}" if failure["signal"] else f"ended with status {code}"
    reason = f"rank {failure['rank']} on {host} {how}" + (f": {failure['last_line']}" if failure["last_line"] else "")
    if code == EXIT_BUDGET:
        said = failure["last_line"].removeprefix("kan: ")
        named = said if "accounting.budget" in said else f"accounting.budget_usd or accounting.budget_hours is used up ({said or 'see the log of rank 0'})"
        return Ending(cause="budget", exit_code=code, reason=named)
    if code in (EXIT_SETTINGS, EXIT_BAD_STEPS):
        return Ending(cause="settings" if code == EXIT_SETTINGS else "bad_steps", exit_code=code, reason=reason)
    if code == EXIT_HANG:
        # Who left first is not who hung: that stands in the report.
        ranks = [entry["rank"] for entry in hang.get("did_not_arrive", [])] or hang.get("silent", [])
        blamed = {hosts[rank * len(hosts) // hang["world_size"]]: rank for rank in ranks}
        if blamed:
            reason = f"the run hung: rank {', '.join(map(str, blamed.values()))} on {', '.join(blamed)} did not arrive (RUN/hangs/{hang.get('hang')})"
        return Ending(cause="hung", exit_code=code, reason=reason, failed_host=_only(list(blamed)))
    return Ending(cause="failed", exit_code=code, reason=reason, failed_host=host)


def decide(spec: JobSpec, attempts: Sequence[Attempt], *, running: bool = True) -> Decision:
    """What comes after the last of the job's attempts, which has ended. running: the scheduler has not begun to end the job, or to requeue it, itself."""
    last = attempts[-1]
    cause, status = last.cause or "lost", last.exit_code or 1
    if cause == "finished":
        return Decision(action="finished", reason=last.reason)
    if cause == "cancelled":
        return Decision(action="leave", reason=last.reason, status=status)
    if not running:  # cancelled, it must not come back; preempted, or with a node lost, it comes back without our doing
        return Decision(action="leave", reason=last.reason, status=status)
    if cause in GIVE_UP:
        return Decision(action="give_up", reason=f"{last.reason} ({GIVE_UP[cause]})", status=status)
    idle = without_progress(list(attempts))
    if idle > spec.max_restarts:
        return Decision(action="give_up", reason=_too_many(spec, idle, last), status=status)
    bad = bad_hosts(list(attempts), spec.exclude_after)
    if set(bad) & set(last.hosts):
        return Decision(action="resubmit", reason=last.reason, exclude=tuple(dict.fromkeys([*spec.exclude, *bad])))
    return Decision(action="requeue", reason=last.reason)


def _too_many(spec: JobSpec, idle: int, last: Attempt) -> str:
    return (
        f"{idle} starts in a row brought no newer checkpoint than step {last.first_step} (cluster.max_restarts={spec.max_restarts}); the last one: "
        f"{last.reason}. Save more often (checkpoint.every), or ask for a longer cluster.time"
    )


# --- what the script asks -------------------------------------------------------------------------------------------------------------------------------


def before(
    spec: JobSpec, job_id: str, restart: int, hosts: Sequence[str], *, allocated: float | None = None, queued: float | None = None
) -> int:
    """Record the start, and first the end of the one before, if nobody could; returns 0, EXIT_DONE or the status to end with.

    allocated: when the scheduler gave this start its nodes, and queued: when it put the job into the queue for it; seconds since 1970, None: not known.
    """
    step = newest_step(spec)
    for attempt in _attempts(spec):
        if attempt.ended is None:
            until = queued if (attempt.job_id, attempt.restart) == (job_id, restart - 1) else None
            _record_end(spec, attempt, _unseen_end(spec, attempt), step, seen=False, until=until)
    if was_cancelled(spec, job_id):
        print(f"kan: job {job_id} was cancelled; `kan launch resume {spec.run_dir}` goes on with the run", file=sys.stderr)
        return EXIT_DONE
    if any(event["event"] == "finished" and event["steps"] >= spec.steps for event in read_events(spec.run_dir)):
        print(f"kan: run {spec.run_name} has finished its {spec.steps} steps already; for more, use a larger train.steps", file=sys.stderr)
        record_for(spec, "finished", job_id, restart, steps=spec.steps, reason="the run had finished already")
        return EXIT_DONE
    attempts = _attempts(spec)
    idle = without_progress(attempts)
    if idle > spec.max_restarts:
        reason = _too_many(spec, idle, attempts[-1])
        record_for(spec, "gave_up", job_id, restart, reason=reason)
        print(f"kan: {reason}", file=sys.stderr)
        return 1
    record_for(spec, "started", job_id, restart, hosts=list(hosts), step=step, **({} if allocated is None else {"allocated": allocated}))
    return 0


def after(spec: JobSpec, job_id: str, restart: int, hosts: Sequence[str], status: int, told: str, state: str) -> Decision:
    """Record how the attempt ended and what comes now."""
    logs = log_dir(spec.run_dir, job_id, restart)
    nodes = [read_node(logs, number) for number in range(len(hosts))]
    attempt = next(attempt for attempt in reversed(_attempts(spec)) if (attempt.job_id, attempt.restart) == (job_id, restart))
    ending = judge(nodes, hosts, status, told, state, _hang(spec, attempt.started))
    if ending.cause != "finished" and was_cancelled(spec, job_id):
        ending = replace(ending, cause="cancelled", reason="it was cancelled by its user")
    _record_end(spec, attempt, ending, newest_step(spec))
    decision = decide(spec, _attempts(spec), running=state in ("", "RUNNING"))
    if decision.action == "finished":
        record_for(spec, "finished", job_id, restart, steps=spec.steps)
    elif decision.action == "requeue":
        record_for(spec, "requeued", job_id, restart, reason=decision.reason, exclude=[])
    elif decision.action == "give_up":
        record_for(spec, "gave_up", job_id, restart, reason=decision.reason)
    print(f"kan: {ending.cause}: {ending.reason}; {decision.line()}", file=sys.stderr)
    return decision


def was_cancelled(spec: JobSpec, job_id: str) -> bool:
    """Whether its user has taken the job back, by `kan launch cancel` or a signal to `kan launch local`: it does not start again."""
    return any(event["event"] == "cancelled" and event["job_id"] == job_id for event in read_events(spec.run_dir))


def newest_step(spec: JobSpec) -> int:
    """Step of the run's newest checkpoint that was saved whole, 0 where there is none."""
    if "://" in spec.checkpoints:
        from kan_train.checkpoint import newest, step_of
        from kan_train.checkpoint.places import place

        found = newest(place(spec.checkpoints))
        return step_of(found) if found is not None else 0
    # Not by kan_train.checkpoint, which brings PyTorch: seconds, before and after every start. A manifest is what makes a checkpoint whole.
    folders = (path.parent.name.removeprefix("step-") for path in Path(spec.checkpoints).glob("step-*/manifest.json"))
    return max((int(digits) for digits in folders if digits.isdigit()), default=0)


def _hang(spec: JobSpec, since: float) -> dict[str, Any] | None:
    """The report of a hang that was written after a time, if there is one."""
    for path in sorted(Path(spec.run_dir).glob("hangs/hang-*/report.json"), reverse=True):
        if path.stat().st_mtime >= since:
            return json.loads(path.read_text())
    return None


def _attempts(spec: JobSpec) -> list[Attempt]:
    """Of this job alone: a new job has a new budget, and its user's word that the nodes are good."""
    return [attempt for attempt in attempts_of(read_events(spec.run_dir)) if attempt.job == spec.job]


def _record_end(spec: JobSpec, attempt: Attempt, ending: Ending, step: int, *, seen: bool = True, until: float | None = None) -> None:
    for host, problem in ending.unhealthy:
        record_for(spec, "unhealthy", attempt.job_id, attempt.restart, host=host, problem=problem)
    fields: dict[str, Any] = {"exit_code": ending.exit_code, "cause": ending.cause, "reason": ending.reason, "failed_host": ending.failed_host, "seen": seen}
    if until is not None:
        fields["until"] = until
    record_for(spec, "ended", attempt.job_id, attempt.restart, hosts=attempt.hosts, step=step, **fields)


def _unseen_end(spec: JobSpec, attempt: Attempt) -> Ending:
    """The end of an attempt whose script did not live to see it."""
    logs = log_dir(spec.run_dir, attempt.job_id, attempt.restart)
    nodes = [read_node(logs, number) for number in range(len(attempt.hosts))]
    return judge(nodes, attempt.hosts, 1, "none", "UNKNOWN")


def _seconds(text: str) -> float | None:
    return float(text) if text else None


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question of the script."""
    parser = argparse.ArgumentParser(prog="python -m kan_train.launch.supervise", description="Before and after every start of a job.")
    parser.add_argument("question", choices=["before", "after", "resubmitted"])
    parser.add_argument("spec", help="RUN/launch/job-001.json")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--restart", type=int, default=0)
    parser.add_argument("--hosts", nargs="+", required=True)
    parser.add_argument("--allocated", type=_seconds, help="before: when the nodes were given to this start, seconds since 1970; empty: not known")
    parser.add_argument("--queued", type=_seconds, help="before: when the job was put into the queue for this start; empty: not known")
    parser.add_argument("--status", type=int, default=0, help="after: exit status of srun")
    parser.add_argument("--told", default="none", help="after: signal that the script was sent")
    parser.add_argument("--state", default="", help="after: the job's state")
    parser.add_argument("--new-job-id", default="")
    parser.add_argument("--exclude", default="")
    a = parser.parse_args(argv)
    try:
        spec = read_spec(a.spec)
        if a.question == "before":
            return before(spec, a.job_id, a.restart, a.hosts, allocated=a.allocated, queued=a.queued)
        if a.question == "after":
            print(after(spec, a.job_id, a.restart, a.hosts, a.status, a.told, a.state).line())
            return 0
        reason = next((attempt.reason for attempt in reversed(_attempts(spec)) if attempt.job_id == a.job_id), "")
        record_for(spec, "resubmitted", a.job_id, a.restart, reason=reason, exclude=a.exclude.split(","), new_job_id=a.new_job_id)
        return 0
    except ConfigError as error:
        print(f"kan: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
