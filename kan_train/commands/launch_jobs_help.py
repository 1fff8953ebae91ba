"""What can be asked about the jobs of a run, and the texts that teach it. Nothing heavy is imported before a command runs."""

import argparse
from pathlib import Path
from typing import Any

from kan_train.commands.checkpoint_help import AddCommand

LOCAL_TEXT = """\
Train on this machine, one process a device, and start again after a failure from the newest checkpoint.

  kan launch local model=kan_tiny                            all devices of this machine; one process where there is none
  kan launch local --processes 2 run.device=cpu              two processes on the CPU
  kan launch local --hosts node1,node2 parallel=tensor       on both, by ssh; all must see this folder, and the first one's network
  kan launch local --max-restarts 0 model=kan_tiny           no second try

Ctrl-C and SIGTERM reach the trainers: they end their step, save and leave; the same command, or `kan launch resume`, goes on. A run is
given up after --max-restarts starts in a row that brought no newer checkpoint. The exit status is the trainers': 0 finished; 2 a setting
is wrong; 3 too many bad steps; 75 stopped and saved; 76 hung. Output: runs/<run.name>/logs; see `kan launch logs`.
"""

STATUS_TEXT = """\
Show the jobs of runs: state, restarts, hosts, step, tokens, loss, throughput, newest checkpoint, and why a job waits or ended.

  kan launch status                all runs in runs/, each with its newest job and those that are going on
  kan launch status first other    these runs, with all of their jobs
  kan launch status --json         the same for a program

A run that has given no sign for two minutes and 20 of its steps is marked: it stands still. "lost" is a job that has left the queue and
nobody saw its end.
"""

LOGS_TEXT = """\
Show the output of a run's jobs.

  kan launch logs first                         the last lines of all ranks, merged
  kan launch logs first --follow                and what comes, over restarts and requeues, until the run's jobs have ended
  kan launch logs first --rank 3                what rank 3 wrote, in its last start
  kan launch logs first --all --lines 20        the last 20 lines of each rank
  kan launch logs first --job 1 --restart 0     the first start of the first job

--job takes the scheduler's id or the job's number in the run (1 is the first).
"""

CANCEL_TEXT = """\
End the jobs of a run. One that runs ends its step and saves first; the command waits for it, and says at which step the run is saved.

  kan launch cancel first             save and end; those that wait in the queue are taken out of it
  kan launch cancel first --no-wait   the same, without waiting for the save
  kan launch cancel first --now       end at once: what was done since the newest checkpoint is lost

A cancelled job does not come back. `kan launch resume first` goes on with the run.
"""

RESUME_TEXT = """\
Go on with a run: begin again what its newest job was, in the same folder with the same settings, and with further ones if given.

  kan launch resume first                         the same again
  kan launch resume first train.steps=2000        for longer
  kan launch resume first cluster.nodes=4         on more nodes; the checkpoint fits any layout

Refused while a job of the run waits or runs.
"""

CHAIN_TEXT = """\
Submit several jobs of one run to Slurm, each to start when the one before has ended, however it did: for clusters that do not requeue, or
to keep a place in the queue. A job that finds the run finished ends at once.

  kan launch chain --jobs 4 first                              four more jobs of the run runs/first
  kan launch chain --jobs 4 cluster=slurm cluster.nodes=2 ...  a run from its beginning
"""


def add_job_commands(group: Any, add_command: AddCommand) -> None:
    """Add local, status, logs, cancel, resume and chain to the subparsers `group`."""
    local = add_command(group, "local", "train on this machine or given hosts, with restarts", LOCAL_TEXT, _local)
    local.add_argument("--processes", type=int, metavar="N", help="trainers on each host (default: one a device of this machine)")
    local.add_argument("--hosts", metavar="A,B", help="hosts to train on, reached by ssh (default: this machine)")
    local.add_argument("--hosts-file", type=Path, metavar="FILE", help="the same, one on each line")
    local.add_argument("--max-restarts", type=int, metavar="N", help="restarts without a newer checkpoint (default: cluster.max_restarts)")
    _add_overrides(local)

    status = add_command(group, "status", "where jobs and runs are", STATUS_TEXT, _status)
    status.add_argument("runs", nargs="*", metavar="RUN", help="runs, by name or path (default: every run)")
    _add_root(status)
    status.add_argument("--every-job", action="store_true", help="also jobs that have ended")
    status.add_argument("--json", action="store_true", help="as JSON: a list with an object for each job")

    logs = add_command(group, "logs", "output of all ranks or of one", LOGS_TEXT, _logs)
    _add_run(logs)
    which = logs.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="this rank's own output")
    which.add_argument("--all", action="store_true", help="every rank's own output, each line with its rank")
    logs.add_argument("--job", metavar="ID", help="job, by the scheduler's id or its number in the run (default: the newest)")
    logs.add_argument("--restart", type=int, metavar="N", help="start of the job, from 0 (default: the last)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the run's jobs have ended")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="last lines of each file; 0: all (default: %(default)s)")

    cancel = add_command(group, "cancel", "save and end a run's jobs", CANCEL_TEXT, _cancel)
    _add_run(cancel)
    cancel.add_argument("--now", action="store_true", help="end at once, without saving")
    cancel.add_argument("--no-wait", action="store_true", help="do not wait for the end")

    resume = add_command(group, "resume", "go on with a run", RESUME_TEXT, _resume)
    _add_run(resume)
    resume.add_argument("--force", action="store_true", help="submit although memory, disk or Slurm's own test speak against it")
    resume.add_argument("overrides", nargs="*", metavar="setting=value", help="further settings of `kan train`")

    chain = add_command(group, "chain", "several jobs of one run, one after another", CHAIN_TEXT, _chain)
    chain.add_argument("--jobs", type=int, required=True, metavar="N", help="how many")
    chain.add_argument("--force", action="store_true", help="submit although memory, disk or Slurm's own test speak against it")
    _add_root(chain)
    _add_overrides(chain, "RUN, then further settings; or the settings of a run")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run, by its name or path")
    _add_root(parser)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of run directories (default: %(default)s)")


def _add_overrides(parser: argparse.ArgumentParser, text: str = "settings of `kan train`") -> None:
    where = "folder with configuration groups of your own; may be repeated"
    parser.add_argument("--config-dir", action="append", type=Path, default=[], metavar="DIR", help=where)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help=text)


def _local(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_local

    a = arguments
    return run_local(a.overrides, a.config_dir, processes=a.processes, hosts=a.hosts, hosts_file=a.hosts_file, max_restarts=a.max_restarts)


def _status(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_status

    return run_status(arguments.runs, arguments.root, every_job=arguments.every_job, as_json=arguments.json)


def _logs(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_logs

    a = arguments
    return run_logs(a.run_name, a.root, rank=a.rank, by_rank=a.all, job=a.job, restart=a.restart, follow=a.follow, lines=a.lines)


def _cancel(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_cancel

    return run_cancel(arguments.run_name, arguments.root, now=arguments.now, wait=not arguments.no_wait)


def _resume(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_resume

    return run_resume(arguments.run_name, arguments.root, arguments.overrides, force=arguments.force)


def _chain(arguments: argparse.Namespace) -> int:
    from kan_train.commands.launch_jobs import run_chain

    a = arguments
    return run_chain(a.overrides, a.root, a.config_dir, count=a.jobs, force=a.force)
