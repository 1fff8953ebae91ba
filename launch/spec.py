"""What a job runs, as JSON in the run directory. Lists stay lists from the command line to the trainer: no shell ever splits them again."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kan_train.config import Config, ConfigError

LAUNCH = "launch"
"""Folder of a run directory with the jobs of the run: job-001.json, job-001.sbatch, attempts.jsonl."""

LOGS = "logs"
"""Folder of a run directory with the output of its jobs: <job id>.out, and <job id>.<restart>/rank-00000.log."""

_SPEC_FILE = re.compile(r"job-(\d{3,})\.json")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job of a run. All paths are absolute, so that it means the same on every node."""

    job: int
    """Number of the job in its run, from 1."""
    scheduler: str
    """slurm or local."""
    run_name: str
    """run.name."""
    run_dir: str
    """The run directory."""
    checkpoints: str
    """Folder, or URL, of the run's checkpoints."""
    steps: int
    """train.steps."""
    overrides: list[str] = field(default_factory=list)
    """What `kan train` is given, word by word."""
    config_dirs: list[str] = field(default_factory=list)
    """Folders of `--config-dir`."""
    working_directory: str
    """Where the trainers start: relative paths in the settings are relative to it."""
    python: str
    """The interpreter on the nodes."""
    nodes: int
    """Machines."""
    processes_per_node: int
    """Trainers on each, one a device."""
    device: str
    """run.device."""
    data: list[str] = field(default_factory=list)
    """Folders of the corpora: every node must see them."""
    network_interface: str = ""
    """Interface of the trainers' connections; empty: theirs to choose."""
    health_check: bool = True
    """Whether every node is checked before the trainers start."""
    max_restarts: int = 3
    """Restarts without progress after which the run is given up."""
    exclude_after: int = 2
    """Failures after which a node is not used again; 0: never."""
    exclude: list[str] = field(default_factory=list)
    """Nodes that the user excludes."""

    @property
    def world_size(self) -> int:
        """Trainers of the job."""
        return self.nodes * self.processes_per_node

    def train_command(self) -> list[str]:
        """The words that start one trainer."""
        folders = [word for folder in self.config_dirs for word in ("--config-dir", folder)]
        # After "--" a word is an override whatever it begins with.
        return [self.python, "-m", "kan_train", "train", *folders, "--", *self.overrides]


def spec_for(config: Config, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> JobSpec:
    """The next job of the run that `config` describes, which was composed of `overrides` and `config_dirs`."""
    cluster, run_dir = config.cluster, Path(config.run.root).absolute() / config.run.name
    location = config.checkpoint.location
    return JobSpec(
        job=next_job(run_dir),
        scheduler=cluster.scheduler,
        run_name=config.run.name,
        run_dir=str(run_dir),
        checkpoints=location if "://" in location else str(Path(location).absolute() if location else run_dir / "checkpoints"),
        steps=config.train.steps,
        overrides=list(overrides),
        config_dirs=[str(Path(folder).absolute()) for folder in config_dirs],
        working_directory=str(Path.cwd()),
        python=cluster.python or (sys.executable if cluster.container.runtime == "none" else "python"),
        nodes=cluster.nodes,
        processes_per_node=cluster.devices_per_node,
        device=config.run.device,
        data=[str(Path(config.data.root).absolute() / name) for name in config.data.blend],
        network_interface=cluster.network.interface,
        health_check=cluster.health_check,
        max_restarts=cluster.max_restarts,
        exclude_after=cluster.exclude_after,
        exclude=list(cluster.exclude),
    )


def launch_dir(run_dir: str | Path) -> Path:
    """The folder of a run directory with its jobs."""
    return Path(run_dir) / LAUNCH


def log_dir(run_dir: str | Path, job_id: str, restart: int) -> Path:
    """The folder with each rank's own output in one attempt: rank-00000.log, and what each node says about its end: node-00000.json."""
    return Path(run_dir) / LOGS / f"{job_id}.{restart}"


def output_file(run_dir: str | Path, job_id: str) -> Path:
    """The merged output of all ranks, in all attempts of a job."""
    return Path(run_dir) / LOGS / f"{job_id}.out"


def spec_file(run_dir: str | Path, job: int) -> Path:
    """Where the description of job number `job` is."""
    return launch_dir(run_dir) / f"job-{job:03d}.json"


def script_file(run_dir: str | Path, job: int) -> Path:
    """Where the rendered script of job number `job` is."""
    return spec_file(run_dir, job).with_suffix(".sbatch")


def jobs_of(run_dir: str | Path) -> list[int]:
    """Numbers of the jobs that a run has had, ascending."""
    folder = launch_dir(run_dir)
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(found[1]) for name in names if (found := _SPEC_FILE.fullmatch(name)))


def next_job(run_dir: str | Path) -> int:
    """The number of the run's next job."""
    return max(jobs_of(run_dir), default=0) + 1


def write_spec(spec: JobSpec) -> Path:
    """Write `spec` into its run directory; returns the file. ConfigError where that cannot be written, or another submission took the number."""
    path = spec_file(spec.run_dir, spec.job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (Path(spec.run_dir) / LOGS).mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(spec), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(f"{path} is there already: another submission of this run is under way; look at it, then submit again") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); use run.root=PATH with a folder that you may write") from error
    return path


def read_spec(path: str | Path) -> JobSpec:
    """The job described in `path`; ConfigError where that is no such file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return JobSpec(**values)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} does not describe a job ({error}); use a job-001.json of RUN/{LAUNCH}") from error
