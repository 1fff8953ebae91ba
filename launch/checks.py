"""What can be known about a job before it waits in a queue: whether it would fail when its turn comes. Nothing here needs the cluster but Slurm's own test.

The configuration and its layout are checked by composing it; here are memory, data, the checkpoint to go on from, disk, container and Slurm's own verdict.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kan_train.config import Config, ConfigError
from kan_train.config.layout import layout_of
from kan_train.launch import slurm
from kan_train.launch.spec import JobSpec

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    """What was checked."""
    text: str
    """What was found; where it is wrong, with the setting to change."""
    verdict: str = "ok"
    """ok, wrong, or unknown: it could not be checked here."""
    may_be_forced: bool = False
    """Whether `--force` submits in spite of it: an estimate is not the truth, and a disk may be emptied before the job starts."""

    @property
    def wrong(self) -> bool:
        """Whether the job would fail."""
        return self.verdict == "wrong"

    def line(self) -> str:
        """For the terminal."""
        return f"{self.verdict:7}  {self.check}: {self.text}"


class _Unknown(Exception):
    """It cannot be checked here; the message says why, and what would make it possible."""


def check_job(config: Config, spec: JobSpec, script: str) -> list[Finding]:
    """Every check, in order. A fault is a finding, so that all are seen at once; none raises."""
    checks: list[tuple[str, Callable[[], str], bool]] = [
        ("layout", lambda: _layout(config, spec), False),
        ("memory", lambda: _memory(config, spec), True),
        ("time and cost", lambda: _time(config, spec), True),
        ("data", lambda: _data(config), False),
        ("checkpoint", lambda: _checkpoint(config, spec), False),
        ("disk", lambda: _disk(config, spec), True),
        ("container", lambda: _container(config), True),
        ("other jobs", lambda: _other_jobs(spec), False),
        ("slurm", lambda: _slurm(spec, script), True),
    ]
    return [_finding(*check) for check in checks]


def _finding(name: str, check: Callable[[], str], may_be_forced: bool) -> Finding:
    try:
        return Finding(check=name, text=check())
    except _Unknown as unknown:
        return Finding(check=name, text=str(unknown), verdict="unknown")
    except ConfigError as error:
        return Finding(check=name, text=str(error), verdict="wrong", may_be_forced=may_be_forced)


def _layout(config: Config, spec: JobSpec) -> str:
    return f"{layout_of(config, spec.world_size)} on {spec.nodes} nodes with {spec.processes_per_node} processes each"


# --- memory and disk ------------------------------------------------------------------------------------------------------------------------------------


def _memory(config: Config, spec: JobSpec) -> str:
    """Of the rank that holds most, at the peak of a step, as far as the planner counts it."""
    from kan_train.planner.devices import ALLOWANCE, device_memory, usable_memory
    from kan_train.planner.footprint import footprint_of

    needed = footprint_of(config, layout_of(config, spec.world_size))
    stage = f"pipeline stage {needed.stage}" if config.parallel.pipeline_parallel > 1 else "a rank"
    held = f"{stage} holds {needed.total / GB:.2f} GB of tensors at the peak of a step ({needed.moment})"
    if config.run.device == "cpu":
        raise _Unknown(f"{held}; the nodes' own memory is not known here")
    there = device_memory(config.cluster.device_name)
    if there is None:
        raise _Unknown(f"{held}; cluster.device_name={config.cluster.device_name} is not in the table of devices (for example: NVIDIA H100 80GB HBM3)")
    if needed.total > usable_memory(there):
        smaller = "" if config.train.activation_checkpointing else "train.activation_checkpointing=true, "
        raise ConfigError(
            f"{held}, but a {config.cluster.device_name} has {there / GB:.0f} GB, of which {ALLOWANCE}; use {smaller}a smaller train.micro_batch_size, "
            f"more of parallel.tensor_parallel or parallel.pipeline_parallel, parallel.zero_stage=3, or more cluster.nodes={2 * spec.nodes}"
        )
    return f"{held}: {needed.total / there:.0%} of a {config.cluster.device_name} ({ALLOWANCE})"


def _time(config: Config, spec: JobSpec) -> str:
    """What the steps take and cost, as planned: no more than a word before the job, since `kan cost plan` says on what it rests."""
    from kan_train.planner.foretold import foretold

    try:
        return foretold(config, layout_of(config, spec.world_size))
    except ConfigError as unknown:
        raise _Unknown(str(unknown)) from unknown


def _disk(config: Config, spec: JobSpec) -> str:
    """Room for the checkpoints that are kept, and the one that is written before the oldest goes."""
    from kan_train.model.lm import parameter_table

    if "://" in spec.checkpoints:
        raise _Unknown(f"{spec.checkpoints} is an object store, whose room is not known here")
    elements = sum(math.prod(parameter.shape) for parameter in parameter_table(config.model).values())
    # A master copy or the weights themselves in fp32, and the optimizer's two moments; in bf16 the weights too.
    one = elements * (12 + (2 if config.train.precision == "bf16" else 0))
    checkpoint = config.checkpoint
    kept = (checkpoint.keep or 1) + checkpoint.keep_best + (config.train.steps // checkpoint.keep_every if checkpoint.keep_every else 0)
    if checkpoint.keep == 0:
        kept = config.train.steps // checkpoint.every if checkpoint.every else 1
    there = sum(1 for _ in Path(spec.checkpoints).glob("step-*/manifest.json"))
    needed = one * (kept + 1 - min(there, kept))
    free = shutil.disk_usage(_existing(Path(spec.checkpoints))).free
    told = f"{kept} checkpoints of {one / GB:.2f} GB ({there} are there) and one being written need {needed / GB:.2f} GB more; "
    told += f"{free / GB:.1f} GB are free for {spec.checkpoints}"
    if needed > free:
        raise ConfigError(f"{told}; use checkpoint.location=PATH on a larger disk, or checkpoint.keep=1")
    return told


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


# --- data and checkpoints -------------------------------------------------------------------------------------------------------------------------------


def _data(config: Config) -> str:
    """The corpora are whole and fit the model. Their hashes are compared when the run starts."""
    from kan_train.data import open_training_data

    model = config.model
    open_training_data(replace(config.data, verify=False), sequence_length=model.sequence_length, seed=config.run.seed, vocab_size=model.vocab_size)
    return f"{', '.join(config.data.blend)} in {config.data.root}, sequences of {model.sequence_length} tokens"


def _checkpoint(config: Config, spec: JobSpec) -> str:
    """What the run would go on from: its own newest checkpoint, or another run's, with the same model."""
    from kan_train.checkpoint import checkpoint_directory, find_checkpoint, newest, step_of
    from kan_train.engine.progress import FREE_SETTINGS, INITIAL_SETTINGS, progress_of, require_same_model

    own = newest(checkpoint_directory(Path(spec.run_dir), config.checkpoint.location))
    if own is not None:
        if not config.checkpoint.resume:
            raise ConfigError(f"{spec.run_dir} holds a run already and checkpoint.resume=false; use checkpoint.resume=true, or run.name={config.run.name}-2")
        require_same_model(own, config.model, FREE_SETTINGS)
        done = progress_of(own)
        if done.step >= config.train.steps and not done.validation_due:
            raise ConfigError(f"run {config.run.name} has finished its {done.step} steps already; for more, use train.steps={2 * done.step}")
        return f"goes on from step {step_of(own)} of {config.train.steps}"
    for setting, value, free in (("branch_from", config.branch_from, FREE_SETTINGS), ("init_from", config.init_from, FREE_SETTINGS + INITIAL_SETTINGS)):
        if value:
            found = find_checkpoint(setting, value, config.run.root)
            require_same_model(found, config.model, free)
            return f"a new run, {setting.replace('_', ' ')} {found}"
    return f"a new run of {config.train.steps} steps"


# --- the cluster ----------------------------------------------------------------------------------------------------------------------------------------


def _container(config: Config) -> str:
    container = config.cluster.container
    if container.runtime == "none":
        return "none"
    is_file = container.image.startswith(("/", "./", "../")) or (container.runtime == "apptainer" and "://" not in container.image)
    if is_file and not Path(container.image).is_file():
        raise ConfigError(f"cluster.container.image={container.image} is not there; use the path of an image that all nodes see")
    for mount in container.mounts:
        source = mount.split(":")[0]
        if not Path(source).exists():
            raise _Unknown(f"cluster.container.mounts: {source} is not on this machine; is it on the nodes?")
    return f"{container.runtime} with {container.image}"


def _other_jobs(spec: JobSpec) -> str:
    if shutil.which("squeue") is None:
        raise _Unknown("squeue is not on this machine")
    jobs = slurm.alive(slurm.queue(name=slurm.job_name(spec)))
    if jobs:
        named = ", ".join(f"{job['JobID']} ({job['State'].lower()})" for job in jobs)
        raise ConfigError(f"run {spec.run_name} has a job already: {named}; use another run.name, cancel that job, or let it go on: it resubmits itself")
    return "none of this run"


def _slurm(spec: JobSpec, script: str) -> str:
    """Slurm's own opinion of the script: partition, account, limits, and nodes that there are."""
    if shutil.which("sbatch") is None:
        raise _Unknown("sbatch is not on this machine, so that partition, account and limits were not checked")
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", errors="surrogateescape") as file:
        file.write(script)
        file.flush()
        try:
            return slurm.verdict(Path(file.name), spec)
        except slurm.SlurmError as error:
            settings = "cluster.partition, cluster.account, cluster.qos, cluster.time, cluster.constraint, cluster.nodes or cluster.devices_per_node"
            raise ConfigError(f"Slurm refuses the job ({error}); change {settings}: `sinfo` shows what there is") from error
