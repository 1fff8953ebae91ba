"""`kan launch slurm`: check what can be checked, write the job into the run directory, submit it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kan_train.launch.checks import Finding, check_job
from kan_train.launch.jobs import Prepared, prepare, submit
from kan_train.launch.spec import output_file, script_file


def run_slurm(overrides: Sequence[str], config_dirs: Sequence[Path], *, dry_run: bool, force: bool = False) -> int:
    """Submit the training that `overrides` describe; with `dry_run` print its script and what the checks find, and write nothing.

    force: submit although a check that concerns resources found a fault. Returns 0; 2 where a check found a fault.
    """
    job = prepare(overrides, config_dirs)
    spec = job.spec
    if dry_run:
        print(job.script, end="")
        findings = check_job(job.config, spec, job.script)
        _print(findings)
        return 2 if any(finding.wrong for finding in findings) else 0
    if not passes_checks(job, force=force):
        return 2
    job_id = submit(job)
    print(f"job {job_id}: run {spec.run_name} on {spec.nodes} nodes with {spec.processes_per_node} processes each")
    print(f"script {script_file(spec.run_dir, spec.job)}\noutput {output_file(spec.run_dir, job_id)}")
    return 0


def passes_checks(job: Prepared, *, force: bool) -> bool:
    """Whether a job may be submitted; where it may not, what the checks found is printed."""
    findings = check_job(job.config, job.spec, job.script)
    if not any(finding.wrong and not (force and finding.may_be_forced) for finding in findings):
        return True
    _print(findings)
    print("kan: nothing was submitted", file=sys.stderr)
    return False


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(finding.line(), file=sys.stderr)
