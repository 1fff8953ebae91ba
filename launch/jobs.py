"""What is done to the jobs of a run: submitted, also several in a row, taken back, begun again."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from kan_train.config import Config, ConfigError
from kan_train.config.compose import compose_train
from kan_train.launch import slurm
from kan_train.launch.attempts import record, record_for
from kan_train.launch.history import Job, jobs_of_run, over
from kan_train.launch.hosts import is_this_machine
from kan_train.launch.local import live_launcher
from kan_train.launch.progress import newest_checkpoint_step
from kan_train.launch.spec import JobSpec, jobs_of, next_job, read_spec, script_file, spec_file, spec_for, write_spec
from kan_train.launch.status import queue_of, state_of

POLL_SECONDS = 0.5

LIVE = ("pending", "requeued", "running", "stopping", "suspended", "completing", "configuring")
"""States in which a job will still write to its run."""


@dataclass(frozen=True)
class Prepared:
    """A job of Slurm's that is not submitted yet."""

    config: Config
    """The run, validated for the job's processes."""
    spec: JobSpec
    """The job."""
    script: str
    """Its script."""


def prepare(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Prepared:
    """The Slurm job that `overrides` describe; writes nothing. ConfigError where they describe none."""
    config = compose_train(overrides, config_dirs, world_size=lambda config: config.cluster.world_size)
    if config.cluster.scheduler != "slurm":
        raise ConfigError(f"cluster.scheduler={config.cluster.scheduler}, but this submits to Slurm; use cluster=slurm, or a cluster of your own")
    spec = spec_for(config, overrides, config_dirs)
    return Prepared(config, spec, slurm.render(config, spec))


def submit(job: Prepared, options: Sequence[str] = ()) -> str:
    """Write the job into its run directory and submit it, with more options of sbatch; returns its id."""
    spec = job.spec
    write_spec(spec)
    path = script_file(spec.run_dir, spec.job)
    path.write_text(job.script, encoding="utf-8", errors="surrogateescape")
    job_id = slurm.submit(path, spec, options)
    record_for(spec, "submitted", job_id, nodes=spec.nodes, processes_per_node=spec.processes_per_node)
    return job_id


def submit_chain(job: Prepared, count: int) -> list[str]:
    """Submit the job `count` times, each after the one before has ended, however it did; returns the ids. A finished run ends those that are left at once."""
    ids: list[str] = []
    for _ in range(count):
        spec = replace(job.spec, job=next_job(job.spec.run_dir))
        # Said on the command line, a dependency replaces the script's own, which is therefore said again.
        options = [f"--dependency=afterany:{ids[-1]},singleton"] if ids else []
        ids.append(submit(Prepared(job.config, spec, slurm.render(job.config, spec)), options))
    return ids


# --- going on ---------------------------------------------------------------------------------------------------------------------------------------------


def live_jobs(run_dir: Path) -> list[tuple[Job, str]]:
    """The jobs of a run that will still write to it, each with its state."""
    jobs = jobs_of_run(run_dir)
    asked = [job.job_id for job in jobs if job.scheduler == "slurm" and not over(job)]
    queue = queue_of(asked)
    states = [(job, state_of(run_dir, job, queue)[0]) for job in jobs if not over(job)]
    return [(job, state) for job, state in states if state in LIVE]


def require_idle(run_dir: Path) -> None:
    """ConfigError while a job of the run waits or runs."""
    live = live_jobs(run_dir)
    if live:
        job, state = live[0]
        raise ConfigError(f"job {job.job_id} of {run_dir} is {state}; wait for its end, or end it with `kan launch cancel {run_dir}`")


def again(run_dir: Path, overrides: Sequence[str]) -> tuple[JobSpec, list[str]]:
    """The newest job of a run, and its overrides with further ones. ConfigError where it had none, or where they would make it another run."""
    jobs = jobs_of(run_dir)
    if not jobs:
        raise ConfigError(f"{run_dir} has had no job; begin with `kan launch slurm run.name={run_dir.name}`, or `kan launch local run.name={run_dir.name}`")
    for override in overrides:
        if _key(override) in ("run.name", "run.root"):
            raise ConfigError(f"{override} would make another run; leave it out, or use `kan launch slurm branch_from={run_dir} {override}`")
    spec = read_spec(spec_file(run_dir, jobs[-1]))
    return spec, merged(spec.overrides, overrides)


def merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """`old` overrides with `new` ones in the place of those that set the same."""
    keys = {_key(override) for override in new}
    return [override for override in old if _key(override) not in keys] + list(new)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


# --- cancelling -------------------------------------------------------------------------------------------------------------------------------------------


def cancel(run_dir: Path, *, now: bool, wait: bool) -> int:
    """End all jobs of a run: those that wait at once, one that runs when it is saved (`now`: without). Says at which step the run is saved.

    Returns 0; 1 where a job was still there when it had to stop waiting for it.
    """
    live = live_jobs(run_dir)
    if not live:
        print(f"no job of {run_dir} waits or runs{_saved(run_dir)}")
        return 0
    for job, state in sorted(live, key=lambda one: one[1] in ("running", "stopping")):  # those that wait first: they would start when the other ends
        # Before the job is told, which else could come back into the queue.
        record(run_dir, "cancelled", job=job.job, scheduler=job.scheduler, job_id=job.job_id, restart=_restart(job), reason="by `kan launch cancel`")
        (_cancel_local if job.scheduler == "local" else _cancel_slurm)(run_dir, job, state, now)
    if not wait:
        print(f"{_listed(live)}: told to {'end' if now else 'save and end'}; see `kan launch status {run_dir}`")
        return 0
    try:
        while left := [job for job, _ in live if any(job.job_id == other.job_id for other, _ in live_jobs(run_dir))]:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\njob {left[0].job_id} is still saving; it ends by itself (`kan launch status {run_dir}`), or with --now", file=sys.stderr)
        return 1
    for job, _ in live:
        _record_unseen_end(run_dir, job.job_id)
    print(f"{_listed(live)}: cancelled{_saved(run_dir)}")
    return 0


def _cancel_slurm(run_dir: Path, job: Job, state: str, now: bool) -> None:
    if now or state not in ("running", "stopping"):
        slurm.command(["scancel", job.job_id])
    else:
        # The script passes the signal on to the trainers, as ahead of the time limit. Sent to the steps it would reach each trainer twice.
        slurm.command(["scancel", "--batch", "--signal=USR1", job.job_id])


def _cancel_local(run_dir: Path, job: Job, state: str, now: bool) -> None:
    launcher = live_launcher(run_dir)
    if launcher is None or launcher["job_id"] != job.job_id:
        return  # it has ended meanwhile
    if not is_this_machine(launcher["host"]):
        raise ConfigError(f"run {run_dir.name} was launched on {launcher['host']}; call `kan launch cancel` there (its process is {launcher['pid']})")
    if not now:
        os.kill(launcher["pid"], signal.SIGTERM)
        return
    # The launcher first, which would start the trainers again; they are its children, and would save on its death.
    parent = psutil.Process(launcher["pid"])
    for process in (parent, *parent.children(recursive=True)):
        process.kill()


def _record_unseen_end(run_dir: Path, job_id: str) -> None:
    """Where the job was ended before it could say so itself."""
    job = next(job for job in jobs_of_run(run_dir) if job.job_id == job_id)
    attempt = job.attempt
    if attempt is None or attempt.ended is not None:
        return
    fields = {"exit_code": 128 + signal.SIGKILL, "cause": "cancelled", "reason": "it was cancelled by its user", "failed_host": None}
    step = newest_checkpoint_step(run_dir) or 0
    record(run_dir, "ended", job=job.job, scheduler=job.scheduler, job_id=job_id, restart=attempt.restart, hosts=attempt.hosts, step=step, **fields)


def _restart(job: Job) -> int:
    return job.attempt.restart if job.attempt else 0


def _listed(live: Sequence[tuple[Job, str]]) -> str:
    return f"job{'s' if len(live) > 1 else ''} {', '.join(job.job_id for job, _ in live)}"


def _saved(run_dir: Path) -> str:
    step = newest_checkpoint_step(run_dir)
    return "; nothing of the run is saved" if step is None else f"; the run is saved at step {step}, and `kan launch resume {run_dir}` goes on with it"
