"""The machines a run is on, and how `kan launch` asks a scheduler for them."""

import re
from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least, require_choice

SCHEDULERS = ("local", "slurm")
RUNTIMES = ("none", "pyxis", "apptainer")

_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{1,2}){0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
OWN_OPTIONS = (
    "chdir", "dependency", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "error", "requeue", "no-requeue", "signal", "array",
)  # fmt: skip
"""Options of sbatch that the script sets itself, because the launcher relies on them."""


@dataclass(kw_only=True)
class ContainerConfig:
    """The image that trainers run in."""

    runtime: str = "none"
    """none; pyxis: Slurm starts the image (`srun --container-image`); apptainer: `apptainer exec`."""
    image: str = ""
    """pyxis: a .sqsh file or registry#name:tag; apptainer: a .sif file."""
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, each HOST:CONTAINER; the working directory, the run and the corpora must be among them, under the same names."""
    options: list[str] = field(default_factory=list)
    """More words for the container's command, such as --container-writable."""


@dataclass(kw_only=True)
class NetworkConfig:
    """How the trainers reach each other."""

    interface: str = ""
    """Interface of TCP connections (NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME), such as ib0; empty: the library chooses."""
    hca: str = ""
    """InfiniBand adapters (NCCL_IB_HCA), such as mlx5_0,mlx5_1; empty: NCCL chooses."""
    environment: dict[str, str] = field(default_factory=dict)
    """More variables, such as NCCL_DEBUG: WARN."""


@dataclass(kw_only=True)
class ClusterConfig:
    """The machines a run is on."""

    name: str = "local"
    """What the cluster is called in reports."""
    device_name: str | None = None
    """Device as named in the table of peaks; unset: as the driver reports it."""
    peak_tflops: float | None = None
    """Dense peak of one device in the run's precision, TFLOP/s; unset: from the table of peaks. MFU is not shown where neither is known."""
    scheduler: str = "local"
    """Who gives the machines: local (this one, or those of `kan launch local`) or slurm."""
    nodes: int = 1
    """Machines of the run."""
    devices_per_node: int = 1
    """Devices of each that the run is given, one trainer a device. Those that no trainer uses are paid for all the same."""
    device_type: str = ""
    """Type of the devices as Slurm names it, for --gpus-per-node=TYPE:N; empty: any."""
    partition: str = ""
    """Partition; empty: the cluster's default. So are all empty settings below."""
    account: str = ""
    """Account that the time is charged to."""
    qos: str = ""
    """Quality of service."""
    time: str = ""
    """Time limit of one start, as [days-]hours:minutes:seconds. A run that needs longer saves before it, and goes on in the next start."""
    constraint: str = ""
    """Features that nodes must have."""
    reservation: str = ""
    """Reservation to run in."""
    exclude: list[str] = field(default_factory=list)
    """Nodes never to use; those that fail repeatedly are added by themselves."""
    memory: str = ""
    """Host memory of each node, such as 500G; 0: all of it."""
    cpus_per_task: int = 0
    """CPUs of each node for its trainers; 0: the cluster's default."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """More options of sbatch by their long names, such as exclusive: '' or mail-type: FAIL."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load in the job."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job runs first, on the first node. The only setting that a shell reads as code."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, besides the environment of the submission, which goes along."""
    python: str = ""
    """Interpreter on the nodes; empty: the one that submits, or `python` in a container."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """The image that trainers run in."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """How the trainers reach each other."""
    scratch: str = ""
    """Fast folder on each node for temporary files (TMPDIR); shell variables are not expanded."""
    template: str = ""
    """A template of your own for the job's script; empty: the shipped one, kan_train/launch/templates/slurm.sbatch.j2."""
    signal_seconds: int = 180
    """Seconds before the time limit at which the run is told to save. Slurm may be up to 60 s early."""
    max_restarts: int = 3
    """Restarts without a newer checkpoint after which the job gives up; a preemption is not counted."""
    exclude_after: int = 2
    """Failures on a node after which the job goes on without it; 0: never."""
    health_check: bool = True
    """Check every node before the trainers start: devices, their memory, a short product, a sum over all nodes, disk and clock."""

    @property
    def world_size(self) -> int:
        """Trainers of the run."""
        return self.nodes * self.devices_per_node

    def validate(self) -> None:
        """Raise ConfigError on the first value that no cluster could mean."""
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ConfigError(f"cluster.peak_tflops={self.peak_tflops} must be positive; use cluster.peak_tflops=null if it is not known")
        require_choice("cluster.scheduler", self.scheduler, SCHEDULERS)
        require_at_least("cluster.nodes", self.nodes, 1)
        require_at_least("cluster.devices_per_node", self.devices_per_node, 1)
        for setting, least in (("cpus_per_task", 0), ("signal_seconds", 1), ("max_restarts", 0), ("exclude_after", 0)):
            require_at_least(f"cluster.{setting}", getattr(self, setting), least)
        if self.time and not _TIME.fullmatch(self.time):
            raise ConfigError(f"cluster.time={self.time!r} is no time limit of Slurm; use cluster.time=24:00:00 (hours:minutes:seconds), or 2-00:00:00")
        limit = time_limit_seconds(self.time)
        if limit is not None and self.signal_seconds >= limit:
            raise ConfigError(
                f"cluster.signal_seconds={self.signal_seconds} is not below cluster.time={self.time}, so that the run would be told to save before it began; "
                f"use cluster.signal_seconds={max(1, limit // 4)}, or a longer cluster.time"
            )
        self._validate_words()
        self._validate_names()
        self._validate_container()

    def _validate_words(self) -> None:
        # They stand in #SBATCH lines, which have an end and no escape for it.
        words = {name: getattr(self, name) for name in ("device_type", "partition", "account", "qos", "constraint", "reservation", "memory")}
        words |= {f"exclude[{number}]": value for number, value in enumerate(self.exclude)}
        words |= {f"modules[{number}]": value for number, value in enumerate(self.modules)}
        for name, value in words.items():
            if any(character.isspace() or character in "\"'\\#" or not character.isprintable() for character in value):
                raise ConfigError(f"cluster.{name}={value!r} has spaces or quotes, which no name of Slurm has; use cluster.{name}={_plain(value)}")
        for name, value in self.sbatch.items():
            if not _OPTION.fullmatch(name):
                raise ConfigError(f"cluster.sbatch.{name} is no long option of sbatch; write, for --mail-type=FAIL: +cluster.sbatch.mail-type=FAIL")
            if name in OWN_OPTIONS:
                raise ConfigError(f"cluster.sbatch.{name} is set by the launcher, which relies on it; remove it with ~cluster.sbatch.{name}")
            if "\n" in value:
                raise ConfigError(f"cluster.sbatch.{name}={value!r} has several lines; use +cluster.sbatch.{name}={_plain(value)}")

    def _validate_names(self) -> None:
        for setting, table in (("environment", self.environment), ("network.environment", self.network.environment)):
            for name in table:
                if not _NAME.fullmatch(name):
                    working = re.sub("[^A-Za-z0-9_]", "_", name)
                    raise ConfigError(f"cluster.{setting}.{name}: {name!r} is no name of a variable; use +cluster.{setting}.{working}=...")

    def _validate_container(self) -> None:
        container = self.container
        require_choice("cluster.container.runtime", container.runtime, RUNTIMES)
        if container.runtime != "none" and not container.image:
            example = "kan-train.sif" if container.runtime == "apptainer" else "kan-train.sqsh"
            raise ConfigError(f"cluster.container.runtime={container.runtime} needs an image; use cluster.container.image=/images/{example}")
        if container.runtime == "none" and container.image:
            raise ConfigError(f"cluster.container.image={container.image} is used by no runtime; use cluster.container.runtime=pyxis, or apptainer")
        for mount in container.mounts:
            if not mount.startswith("/") or "," in mount:
                raise ConfigError(f"cluster.container.mounts: {mount!r} must be HOST:CONTAINER, both absolute; use '/data:/data'")


def time_limit_seconds(text: str) -> int | None:
    """Seconds of a time limit as Slurm reads it (minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]); None for ""."""
    if not text:
        return None
    days, dash, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return 86400 * int(days) + 3600 * hours + 60 * minutes + seconds
    if len(numbers) == 1:
        return 60 * numbers[0]
    seconds = 0
    for number in numbers:
        seconds = 60 * seconds + number
    return seconds


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._/:=+,@&|*\[\]-]", "", value) or "NAME"
