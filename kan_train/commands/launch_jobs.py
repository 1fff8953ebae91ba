"""`kan launch local | status | logs | cancel | resume | chain`, and sweeps: thin commands over kan_train.launch."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kan_train.commands.output import columns
from kan_train.config import ConfigError
from kan_train.config.errors import require_at_least
from kan_train.launch.history import find_run, runs_below


def run_local(
    overrides: Sequence[str], config_dirs: Sequence[Path], *, processes: int | None, hosts: str | None, hosts_file: Path | None, max_restarts: int | None
) -> int:
    """Train on this machine, or on the given hosts; returns the trainers' exit status."""
    from kan_train.launch.local import local_spec, run_locally

    if processes is not None:
        require_at_least("--processes", processes, 1)
    if max_restarts is not None:
        require_at_least("--max-restarts", max_restarts, 0)
    names = _hosts(hosts, hosts_file)
    return run_locally(local_spec(overrides, config_dirs, hosts=names, processes=processes, max_restarts=max_restarts), names)


def run_status(runs: Sequence[str], root: Path, *, every_job: bool, as_json: bool) -> int:
    """Print the jobs of `runs`, or of all runs below `root`, as a table or as JSON."""
    from kan_train.launch.status import RIGHT, status_of, table

    chosen = [find_run(run, root) for run in runs] or runs_below(root)
    rows = status_of(chosen, every_job=every_job or bool(runs))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif rows:
        print(columns(table(rows), right=RIGHT))
    else:
        print(f"{root} holds no run yet; `kan launch local` makes one, or look elsewhere with --root DIR")
    return 0


def run_logs(run: str, root: Path, *, rank: int | None, by_rank: bool, job: str | None, restart: int | None, follow: bool, lines: int) -> int:
    """Print, and with `follow` go on printing, the output of a run's jobs."""
    from kan_train.launch import logs

    require_at_least("--lines", lines, 0)
    selection = logs.Selection(rank=rank, by_rank=by_rank, job=job, restart=restart)
    try:
        (logs.follow if follow else logs.show)(find_run(run, root), selection, lines=lines, print_line=lambda line: print(line, flush=follow))
    except KeyboardInterrupt:
        print(file=sys.stderr)  # how one stops following
    return 0


def run_cancel(run: str, root: Path, *, now: bool, wait: bool) -> int:
    """End the jobs of a run, saved unless `now`, and say at which step it is saved."""
    from kan_train.launch.jobs import cancel

    return cancel(find_run(run, root), now=now, wait=wait)


def run_resume(run: str, root: Path, overrides: Sequence[str], *, force: bool) -> int:
    """Begin again what the run's newest job was, with further overrides: submitted to Slurm, or trained here."""
    from kan_train.launch.history import jobs_of_run
    from kan_train.launch.jobs import again, require_idle
    from kan_train.launch.local import local_spec, run_locally

    run_dir = find_run(run, root).absolute()
    require_idle(run_dir)
    spec, words = again(run_dir, overrides)
    config_dirs = [Path(folder) for folder in spec.config_dirs]
    os.chdir(spec.working_directory)  # what is relative in the settings is relative to it
    if spec.scheduler == "local":
        hosts: list[str] = next((job.attempt.hosts for job in reversed(jobs_of_run(run_dir)) if job.attempt), [])
        new = local_spec(words, config_dirs, hosts=hosts, processes=spec.processes_per_node, max_restarts=spec.max_restarts)
        return run_locally(new, hosts)
    from kan_train.commands.launch import run_slurm

    return run_slurm(words, config_dirs, dry_run=False, force=force)


def run_chain(words: Sequence[str], root: Path, config_dirs: Sequence[Path], *, count: int, force: bool) -> int:
    """Submit `count` jobs of a run one after another: of a run that there is, by its name or path, or of the one that overrides describe."""
    from kan_train.commands.launch import passes_checks
    from kan_train.launch.jobs import again, prepare, require_idle, submit_chain

    require_at_least("--jobs", count, 1)
    if words and "=" not in words[0]:
        run_dir = find_run(words[0], root).absolute()
        spec, words = again(run_dir, words[1:])
        config_dirs = [*map(Path, spec.config_dirs), *(folder.absolute() for folder in config_dirs)]
        if spec.scheduler != "slurm":
            raise ConfigError(f"the newest job of {run_dir} was local, and a chain is of Slurm's jobs; use `kan launch resume {run_dir}`")
        os.chdir(spec.working_directory)
    job = prepare(words, config_dirs)
    require_idle(Path(job.spec.run_dir))
    if not passes_checks(job, force=force):
        return 2
    ids = submit_chain(job, count)
    print(f"jobs {', '.join(ids)}: run {job.spec.run_name}, each after the one before; see `kan launch status {job.spec.run_dir}`")
    return 0


def run_sweep(overrides: Sequence[str], config_dirs: Sequence[Path], *, at_once: int | None, dry_run: bool, force: bool) -> int:
    """Submit one array job with a run for each combination of the swept values; with `dry_run` print its script and the runs."""
    from kan_train.commands.launch import passes_checks
    from kan_train.launch.sweep import prepare_sweep, submit_sweep

    if at_once is not None:
        require_at_least("--max-at-once", at_once, 1)
    jobs = prepare_sweep(overrides, config_dirs, at_once=at_once)
    if dry_run:
        print(jobs[0].script, end="")
    # A combination that cannot run is said before any is submitted; what concerns the queue is the same for all.
    passed = [passes_checks(job, force=force) for job in jobs]
    if not all(passed) and not dry_run:
        return 2
    if not dry_run:
        job_id = submit_sweep(jobs)
        print(f"job {job_id}: {len(jobs)} runs" + (f", at most {at_once} at once" if at_once else ""))
    for number, job in enumerate(jobs):
        print(f"  {number}: {job.spec.run_dir}", file=sys.stderr if dry_run else sys.stdout)  # not amid the script
    return 0 if all(passed) else 2


def _hosts(hosts: str | None, file: Path | None) -> list[str]:
    if file is None:
        return [host.strip() for host in hosts.split(",")] if hosts else []
    if hosts:
        raise ConfigError("--hosts and --hosts-file both name hosts; use one of them")
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--hosts-file {file} cannot be read ({error}); use a file with the name of a host on each line") from error
    if not any(lines):
        raise ConfigError(f"--hosts-file {file} names no host; write one on each line")
    return [line for line in lines if line]
