"""What `kan launch` can be asked, and the texts that teach it. Nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand
from kan_train.commands.launch_jobs_help import add_job_commands

SLURM_TEXT = """\
Submit a training run to Slurm: one job that saves before its time limit, comes back after every failure, and ends when the run has finished.

  kan launch slurm cluster=slurm cluster.nodes=2 cluster.devices_per_node=8 cluster.time=24:00:00 model=kan_1b
  kan launch slurm --dry-run cluster=slurm cluster.nodes=2 ...    print the script and check everything, submit nothing
  kan launch slurm --config-dir conf.d cluster=mine model=kan_1b  a cluster of your own: conf.d/cluster/mine.yaml
  kan launch slurm --multirun --max-at-once 2 cluster=slurm optimizer.learning_rate=1e-3,3e-4 model=kan_125m,dense_125m_total
                                                                  a sweep: four runs, named after their values, as one array job

Settings are those of `kan train`. The job's script, and what became of each start, are in runs/<run.name>/launch, its output in
runs/<run.name>/logs. docs/cluster.md goes from nothing to a run on two nodes, and says what happens at each failure.
"""


def add_launch_commands(commands: Any, add_command: AddCommand) -> None:
    """Add `launch` with all its commands to the subparsers `commands`."""
    description = "Run a training on the nodes of a cluster, and look after its jobs."
    launch = commands.add_parser("launch", help="train on many nodes", description=description)
    launch.set_defaults(parser=launch)
    group = launch.add_subparsers(title="commands", metavar="COMMAND")

    slurm = add_command(group, "slurm", "submit a run to Slurm", SLURM_TEXT, _slurm)
    slurm.add_argument("--dry-run", action="store_true", help="print the script, run every check, submit nothing")
    slurm.add_argument("--force", action="store_true", help="submit although memory, disk or Slurm's own test speak against it")
    slurm.add_argument("--multirun", action="store_true", help="a run for each combination of the values of settings that have several, as one array job")
    slurm.add_argument("--max-at-once", type=int, metavar="N", help="--multirun: runs at the same time, at most")
    _add_overrides(slurm)

    add_job_commands(group, add_command)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir", action="append", type=Path, default=[], metavar="DIR",
        help="folder with configuration groups of your own (DIR/cluster/mine.yaml gives cluster=mine); may be repeated",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="settings of `kan train`")


def _slurm(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch import run_slurm

    if arguments.multirun:
        from kan_train.commands.launch_jobs import run_sweep

        a = arguments
        return run_sweep(a.overrides, a.config_dir, at_once=a.max_at_once, dry_run=a.dry_run, force=a.force)
    if arguments.max_at_once is not None:
        arguments.parser.error("--max-at-once is of --multirun")
    return run_slurm(arguments.overrides, arguments.config_dir, dry_run=arguments.dry_run, force=arguments.force)
