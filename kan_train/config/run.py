"""A run: its name, its length, and the groups that say how it is optimised, sharded, saved, watched and placed."""

from dataclasses import dataclass, field

from kan_train.config.accounting import AccountingConfig
from kan_train.config.cluster import ClusterConfig
from kan_train.config.data import DataConfig
from kan_train.config.errors import ConfigError, require_at_least, require_between, require_choice
from kan_train.config.layout import layout_of
from kan_train.config.model import ModelConfig, largest_divisor
from kan_train.config.observing import ProfileConfig, StragglerConfig, validate_profile, validate_stragglers
from kan_train.config.soundness import check_layout
from kan_train.config.train import TrainConfig, validate_train

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")
DEVICES = ("auto", "cpu", "cuda")
WANDB_MODES = ("disabled", "offline", "online")

LARGEST_MICRO_BATCH = 8
"""Sequences of a micro-batch, at most, where the run does not say how many."""


@dataclass(kw_only=True)
class RunConfig:
    """Which run this is."""

    name: str = "${model.name}"
    """Stable name: the folder below `root`. Started again, a run of the same name resumes."""
    root: str = "runs"
    """Folder of run directories."""
    seed: int = 1234
    """Seeds weights and sample order; on CPU a run repeats bit for bit."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """CPU threads a process; 0: every core, shared among the processes of this machine."""
    dry_run: bool = False
    """Train nothing: print what one rank would hold and send, without the other processes and without memory for the model."""
    world_size: int = 0
    """dry_run: processes of the run that is described; 0: as many as were started."""
    rank: int = 0
    """dry_run: which of these processes is described."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    kind: str = "cosine"
    """cosine; wsd: warm-up, stable, decay (a decay branch starts from a checkpoint of the stable part); constant."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """wsd: share of the steps, at the end, that decay."""
    final_fraction: float = 0.1
    """Learning rate at the last step as a share of the peak."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """How gradients become weights."""

    kind: str = "adamw"
    """adamw, or muon: orthogonalised momentum for the matrices and adamw for the rest."""
    learning_rate: float = 6e-3
    """Peak learning rate of adamw."""
    grove_learning_rate: float = 0.5
    """The groves' learning rate as a multiple of the base rate."""
    beta1: float = 0.9
    """Decay of adamw's first moment."""
    beta2: float = 0.95
    """Decay of adamw's second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; never on spline coefficients, decay rates, convolutions, norms and biases."""
    clip_norm: float = 1.0
    """Clip the global gradient norm to this; 0: no clipping."""
    muon_learning_rate: float = 2e-2
    """Peak learning rate of muon's matrices."""
    muon_momentum: float = 0.95
    """Momentum of muon."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the steps."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model is spread over processes. What the sizes leave of them is data parallel: copies that read different sequences."""

    tensor_parallel: int = 1
    """Processes that share every layer: its heads, hidden units and vocabulary."""
    sequence_parallel: bool | None = None
    """Split the tokens between the layers over the tensor-parallel processes too. Unset: where tensor_parallel is above 1."""
    pipeline_parallel: int = 1
    """Stages: processes that hold some of the layers each, and pass micro-batches on (ZeRO 1 or 2)."""
    virtual_pipeline: int = 1
    """Chunks of layers a stage holds, run in turn (interleaved schedule): shorter idle times for more messages."""
    stage_layers: list[int] | None = None
    """Layers of each chunk, in the order of the layers: pipeline_parallel * virtual_pipeline numbers. Unset: balanced, embedding and head included."""
    context_parallel: int = 1
    """Processes that share every sequence, each a contiguous part of it."""
    expert_parallel: int = 1
    """Processes that share the groves of a layer; tokens travel to theirs. They are taken from all that see different tokens."""
    expert_tensor_parallel: int | None = None
    """Processes that split each grove's hidden units: 1, or tensor_parallel. Unset: 1."""
    zero_stage: int | None = None
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also parameters.
    Unset: plain PyTorch in one process, 1 beyond."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory (ZeRO 1 to 3)."""
    timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When and where a run is saved."""

    every: int = 100
    """Steps between saves, and one at the end; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept; 0: all."""
    keep_every: int = 0
    """Keep the checkpoints of every so many steps for good, besides the newest; 0: none."""
    keep_best: int = 0
    """Keep so many checkpoints of the lowest validation loss, besides the newest."""
    location: str = ""
    """Folder of the run's checkpoints, or the URL of one in an object store (s3://bucket/run); empty: checkpoints/ in the run directory."""
    asynchronous: bool = True
    """Write in the background: training waits for a copy in host memory alone."""
    retries: int = 3
    """Times that a save which failed in the background is tried again, before the run goes on without it."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run; off: refuse to start over an existing one."""


@dataclass(kw_only=True)
class RecoveryConfig:
    """What a run does by itself when something goes wrong."""

    max_bad_steps: int = 10
    """Steps in a row that are not finite (each is skipped on all ranks) or a spike, after which the run goes back to its last good checkpoint."""
    spike: float = 20.0
    """A step is a spike where its loss lies so many times the usual deviation above the median of the last `window` steps; 0: no step is."""
    window: int = 100
    """Steps that a loss is compared with; nothing is a spike before so many were taken."""
    max_rewinds: int = 2
    """Times that a run may go back to a checkpoint, and leave out the samples of the bad steps, before it stops; 0: it stops at once."""
    hang_minutes: float = 8.0
    """A run without progress for so long is ended, with the stack of every rank and the collective that was not reached by all; 0: never.
    Below parallel.timeout_minutes, whose own error knows less."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What is written and shown while a run trains. metrics.jsonl is always written."""

    every: int = 1
    """Steps between rows of metrics.jsonl."""
    console_every: int = 10
    """Steps between lines where standard output is not a terminal."""
    progress: bool = True
    """Live progress on a terminal."""
    wandb: str = "disabled"
    """disabled, offline or online: W&B as a replay of the same rows."""
    wandb_project: str = "kan-train"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B entity; unset: the account's default."""


@dataclass(kw_only=True)
class Config:
    """Everything about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and in which portions."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How gradients become weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is spread over processes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When and where it is saved."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What it does by itself when something goes wrong."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is written and shown."""
    accounting: AccountingConfig = field(default_factory=AccountingConfig)
    """What its time costs."""
    stragglers: StragglerConfig = field(default_factory=StragglerConfig)
    """How slow ranks, nodes and links are found."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Which steps are traced."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The machines it is on."""
    run: RunConfig = field(default_factory=RunConfig)
    """Which run this is."""
    init_from: str | None = None
    """Start a new run from the weights alone of another run (its directory, or one of its checkpoints)."""
    branch_from: str | None = None
    """Start a new run from the whole state of another run's checkpoint (its directory, or one of its checkpoints): a WSD decay branch."""

    def validate(self, world_size: int | None = 1) -> None:
        """Raise ConfigError on the first impossible value or combination, with `world_size` processes (a dry run: with run.world_size).

        None: the processes are not known (a saved run that is read back), and what depends on their number is not checked. Settings that follow from
        others are filled in.
        """
        if world_size is not None:
            _fill_in_micro_batch(self, self.run.world_size or world_size)
        self.model.validate()
        self.data.validate()
        self.cluster.validate()
        self.accounting.validate()
        validate_train(self.train)
        _validate_optimizer(self.optimizer, self.train.steps)
        _validate_parallel(self.parallel)
        _validate_rest(self)
        validate_stragglers(self.stragglers)
        validate_profile(self.profile, self.train.steps, None if world_size is None else self.run.world_size or world_size)
        if world_size is not None:
            processes = self.run.world_size or world_size
            check_layout(self, processes)
            if self.run.rank >= processes:
                raise ConfigError(f"run.rank={self.run.rank} is not one of {processes} processes; use run.rank={processes - 1}")


def _fill_in_micro_batch(config: Config, world_size: int) -> None:
    train = config.train
    if train.micro_batch_size:
        return
    # Of sizes that do not fit the others the rules complain, which come next: here they only must not fail.
    readers = max(1, layout_of(config, world_size).data_parallel) if _positive(config) else 1
    train.micro_batch_size = largest_divisor(max(1, train.global_batch_size // readers), LARGEST_MICRO_BATCH)


def _positive(config: Config) -> bool:
    parallel = config.parallel
    return min(parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel) >= 1


def _validate_optimizer(optimizer: OptimizerConfig, steps: int) -> None:
    require_choice("optimizer.kind", optimizer.kind, OPTIMIZERS)
    require_choice("optimizer.schedule.kind", optimizer.schedule.kind, SCHEDULES)
    for setting in ("learning_rate", "grove_learning_rate", "muon_learning_rate", "eps"):
        if getattr(optimizer, setting) <= 0:
            raise _optimizer_error(optimizer, setting, "must be positive")
    for setting in ("beta1", "beta2", "muon_momentum"):
        if not 0 <= getattr(optimizer, setting) < 1:
            raise _optimizer_error(optimizer, setting, "must lie in [0, 1)")
    require_at_least("optimizer.weight_decay", optimizer.weight_decay, 0.0)
    require_at_least("optimizer.clip_norm", optimizer.clip_norm, 0.0)
    schedule = optimizer.schedule
    require_at_least("optimizer.schedule.warmup_steps", schedule.warmup_steps, 0)
    require_between("optimizer.schedule.decay_fraction", schedule.decay_fraction, 0.0, 1.0)
    require_between("optimizer.schedule.final_fraction", schedule.final_fraction, 0.0, 1.0)
    if schedule.warmup_steps >= steps and schedule.warmup_steps > 0:
        raise ConfigError(
            f"optimizer.schedule.warmup_steps={schedule.warmup_steps} leaves nothing of train.steps={steps}; "
            f"use optimizer.schedule.warmup_steps={steps // 10}"
        )


def _optimizer_error(optimizer: OptimizerConfig, setting: str, law: str) -> ConfigError:
    value, working = getattr(optimizer, setting), getattr(OptimizerConfig(), setting)
    return ConfigError(f"optimizer.{setting}={value} {law}; use optimizer.{setting}={working}")


def _validate_parallel(parallel: ParallelConfig) -> None:
    for setting in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "context_parallel", "expert_parallel"):
        require_at_least(f"parallel.{setting}", getattr(parallel, setting), 1)
    if parallel.expert_tensor_parallel is not None:
        require_at_least("parallel.expert_tensor_parallel", parallel.expert_tensor_parallel, 1)
    stage = parallel.zero_stage
    if stage is not None and stage not in (0, 1, 2, 3):
        working = min(max(stage, 0), 3)
        raise ConfigError(f"parallel.zero_stage={stage} is not known; use parallel.zero_stage={working}, or another of 0, 1, 2, 3")
    if parallel.timeout_minutes <= 0:
        raise ConfigError(f"parallel.timeout_minutes={parallel.timeout_minutes} must be positive; use parallel.timeout_minutes=10")


def _validate_rest(config: Config) -> None:
    require_at_least("checkpoint.every", config.checkpoint.every, 0)
    for setting in ("keep", "keep_every", "keep_best", "retries"):
        require_at_least(f"checkpoint.{setting}", getattr(config.checkpoint, setting), 0)
    require_at_least("recovery.max_bad_steps", config.recovery.max_bad_steps, 1)
    require_at_least("recovery.window", config.recovery.window, 10)
    require_at_least("recovery.max_rewinds", config.recovery.max_rewinds, 0)
    require_at_least("recovery.spike", config.recovery.spike, 0.0)
    require_at_least("recovery.hang_minutes", config.recovery.hang_minutes, 0.0)
    if config.recovery.hang_minutes >= config.parallel.timeout_minutes:
        raise ConfigError(
            f"recovery.hang_minutes={config.recovery.hang_minutes:g} is not below parallel.timeout_minutes={config.parallel.timeout_minutes:g}, after which "
            f"a collective fails without saying who did not come; use recovery.hang_minutes={0.8 * config.parallel.timeout_minutes:g}"
        )
    require_at_least("logging.every", config.logging.every, 1)
    require_at_least("logging.console_every", config.logging.console_every, 1)
    require_choice("logging.wandb", config.logging.wandb, WANDB_MODES)
    require_choice("run.device", config.run.device, DEVICES)
    require_at_least("run.threads", config.run.threads, 0)
    require_at_least("run.seed", config.run.seed, 0)
    require_at_least("run.world_size", config.run.world_size, 0)
    if config.run.world_size and not config.run.dry_run:
        raise ConfigError(
            f"run.world_size={config.run.world_size} describes a run that is not started, but the launcher decides how many processes train; "
            "use run.dry_run=true, or run.world_size=0"
        )
    require_at_least("run.rank", config.run.rank, 0)
    if config.run.rank and not config.run.dry_run:
        raise ConfigError(
            f"run.rank={config.run.rank} asks what one process would hold, but the launcher decides which process this is; "
            f"use run.rank=0, or run.dry_run=true with run.world_size={config.run.rank + 1} or more"
        )
    if config.init_from is not None and config.branch_from is not None:
        raise ConfigError(
            f"init_from={config.init_from} takes weights alone and branch_from={config.branch_from} the whole state, "
            "but a run has one beginning; use branch_from=null, or init_from=null"
        )
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        raise ConfigError(f"run.name={config.run.name!r} must be a plain folder name; use run.name=first")
