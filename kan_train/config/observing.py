"""How a run looks at itself while it trains: which ranks and links are slow, and a trace of chosen steps."""

from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least


@dataclass(kw_only=True)
class StragglerConfig:
    """How slow ranks, nodes and links are found."""

    every: int = 50
    """Steps between reports of every rank's seconds of computing, of waiting for the others and for data; 0: none."""
    factor: float = 1.3
    """A rank is slow where its own time (computing and data, waiting left out) is so many times the median of the ranks that hold the same layers."""
    reports: int = 3
    """Reports in a row in which a rank must be slow before it is named."""
    links: bool = False
    """Measure after the first step of every start how fast neighbouring nodes send to each other. While a run trains, a file named measure-links
    in its run directory asks for it."""
    link_megabytes: int = 64
    """What a rank sends to its neighbour to measure a link."""
    link_factor: float = 2.0
    """A link is slow where the fastest one is so many times as fast."""


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of chosen steps, for Perfetto or chrome://tracing."""

    enabled: bool = False
    """Whether steps are traced; profile=on sets it."""
    wait: int = 10
    """Steps of every start before anything is done: the first ones are not like the others."""
    warmup: int = 2
    """Steps after these that are traced and thrown away: a tracer that has just begun slows what it looks at."""
    active: int = 3
    """Steps after these whose trace is written."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one, each a file of its own; []: all."""
    shapes: bool = False
    """Also the shapes of what operators are given; the table then has a line for each."""
    stacks: bool = False
    """Also the Python stack of every operator: large, and slow to write."""
    memory: bool = False
    """Also every allocation and release."""
    operators: int = 20
    """Lines of the table of operators."""


def validate_stragglers(config: StragglerConfig) -> None:
    """Raise ConfigError on the first impossible value."""
    require_at_least("stragglers.every", config.every, 0)
    require_at_least("stragglers.reports", config.reports, 1)
    require_at_least("stragglers.link_megabytes", config.link_megabytes, 1)
    for setting, working in (("factor", 1.3), ("link_factor", 2.0)):
        if (value := getattr(config, setting)) <= 1:
            raise ConfigError(f"stragglers.{setting}={value:g} would call every second rank or link slow; use stragglers.{setting}={working}")


def validate_profile(config: ProfileConfig, steps: int, world_size: int | None) -> None:
    """Raise ConfigError where the steps or ranks to trace are none of the run's; without profile.enabled nothing is asked."""
    if not config.enabled:
        return
    for setting, least in (("wait", 0), ("warmup", 0), ("active", 1), ("operators", 1)):
        require_at_least(f"profile.{setting}", getattr(config, setting), least)
    if (last := config.wait + config.warmup + config.active) > steps:
        raise ConfigError(
            f"profile.wait={config.wait} + profile.warmup={config.warmup} + profile.active={config.active} is beyond train.steps={steps}: "
            f"nothing would be written; use train.steps={last}, or profile.wait=0 profile.warmup={min(1, steps - 1)} profile.active=1"
        )
    for rank in config.ranks:
        if rank < 0 or (world_size is not None and rank >= world_size):
            of = "a rank" if world_size is None else f"one of {world_size} process{'' if world_size == 1 else 'es'}"
            raise ConfigError(f"profile.ranks={config.ranks} has {rank}, which is not {of}; use profile.ranks=[0], or [] for all")
