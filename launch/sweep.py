"""Sweeps: overrides that give several values, in Hydra's grammar, become one run for each combination, with a name that says which it is."""

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString, Transformer
from hydra.errors import HydraException, OverrideParseException

from kan_train.config import Config, ConfigError
from kan_train.config.compose import choices, compose_train
from kan_train.launch import slurm
from kan_train.launch.attempts import record_for
from kan_train.launch.history import jobs_of_run
from kan_train.launch.jobs import Prepared, require_idle
from kan_train.launch.spec import script_file, spec_for, write_spec

LONGEST_NAME = 120
"""Characters of a run's name: file systems take 255 bytes, and checkpoints, logs and W&B add to it."""

MOST_RUNS = 1000
"""Runs of one sweep. Slurm's own bound on an array (MaxArraySize) is 1001 unless a site changed it."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    overrides: list[str]
    """All of its overrides, run.name included."""
    config: Config
    """What they say, validated."""


def prepare_sweep(overrides: Sequence[str], config_dirs: Sequence[Path], *, at_once: int | None = None) -> list[Prepared]:
    """The runs of a sweep as tasks of one array job, at most `at_once` at the same time; all have the same script. Writes nothing.

    ConfigError as in `combinations`, and where the runs would need different machines.
    """
    made = combinations(overrides, config_dirs)
    first = made[0].config
    for one in made:
        if one.config.cluster.scheduler != "slurm":
            raise ConfigError(f"cluster.scheduler={one.config.cluster.scheduler}, but a sweep is an array job of Slurm's; use cluster=slurm")
        if (one.config.cluster, one.config.run.device) != (first.cluster, first.run.device):
            raise ConfigError("a sweep is one array job, whose runs all have the same machines: sweep nothing of cluster, nor run.device")
    specs = [spec_for(one.config, one.overrides, config_dirs) for one in made]
    script = slurm.render(first, specs[0], tasks=specs, at_once=at_once)
    return [Prepared(one.config, spec, script) for one, spec in zip(made, specs, strict=True)]


def submit_sweep(jobs: Sequence[Prepared]) -> str:
    """Write every job into its run directory, and submit the array; returns its id. Task i is job i of `jobs`, as job <id>_<i>."""
    for job in jobs:
        if jobs_of_run(run_dir := Path(job.spec.run_dir)):
            require_idle(run_dir)
    for job in jobs:
        write_spec(job.spec)
    spec, script = jobs[0].spec, jobs[0].script
    path = script_file(spec.run_dir, spec.job)
    path.write_text(script, encoding="utf-8", errors="surrogateescape")
    job_id = slurm.submit(path, spec)
    for number, job in enumerate(jobs):
        record_for(job.spec, "submitted", f"{job_id}_{number}", nodes=job.spec.nodes, processes_per_node=job.spec.processes_per_node)
    return job_id


def combinations(overrides: Sequence[str], config_dirs: Sequence[Path]) -> list[Combination]:
    """The runs of a sweep, each validated for the processes of its cluster. The last swept override changes fastest, as with Hydra.

    Overrides that give one value are passed on as they were written. A run is named after run.name, and the values that make it what it is.
    Raises ConfigError where nothing is swept, where there are too many runs, and where a combination is not a valid run (saying which).
    """
    swept, axes = [], []
    for text in overrides:
        override = _parsed(text)
        if override is None or not override.is_sweep_override():
            axes.append([text])
        else:
            swept.append(override.key_or_group)
            axes.append(_values(override, config_dirs))
    if not swept:
        raise ConfigError("--multirun, but no setting has several values; use for example optimizer.learning_rate=1e-3,3e-4, or leave --multirun out")
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MOST_RUNS:
        raise ConfigError(f"--multirun: {' x '.join(swept)} make {count} runs, and one sweep has at most {MOST_RUNS}; sweep fewer values, or in several calls")
    made = [_combination(list(values), swept, config_dirs) for values in itertools.product(*axes)]
    names = [one.config.run.name for one in made]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two runs of the sweep would be called {name}; let each value occur once")
    return made


def _parsed(text: str) -> Override | None:
    # What Hydra's grammar does not read is either free text, which a composition quotes, or wrong, which it explains.
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except (OverrideParseException, HydraException):
        return None


def _values(override: Override, config_dirs: Sequence[Path]) -> list[str]:
    """The override once for each of its values."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, Glob):
        names = choices("train", config_dirs).get(override.key_or_group, [])
        found = [name for name in names if _matches(name, value)]
        if not found:
            raise ConfigError(f"{override.input_line!r} matches no choice of {override.key_or_group}; use one of: {', '.join(names)}")
        return [f"{key}={name}" for name in found]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line!r} is not a list of values; use {key}=range(0,10,2), or {key}=1,2,3")
    return [f"{key}={_written(element)}" for element in override.sweep_iterator(Transformer.identity)]


def _matches(name: str, pattern: Glob) -> bool:
    return any(fnmatch.fnmatch(name, one) for one in pattern.include) and not any(fnmatch.fnmatch(name, one) for one in pattern.exclude)


def _written(element: Any) -> str:
    # With its quotes, not with the backslashes that stand for them: the value of a text setting is quoted by the composition unless it is already.
    return element.with_quotes() if isinstance(element, QuotedString) else str(Transformer.encode(element))


def _combination(overrides: list[str], swept: Sequence[str], config_dirs: Sequence[Path]) -> Combination:
    picked = {key: value for key, _, value in (text.lstrip("+").partition("=") for text in overrides) if key in swept}
    base = next((_text(override) for override in reversed(overrides) if override.startswith("run.name=")), None)
    # Without a name of its own a run is called as its model is: to say so twice would make the name longer and no clearer.
    parts = [_part(key, value) for key, value in picked.items() if key != "run.name" and (base is not None or key != "model")]
    rest = [override for override in overrides if not override.startswith("run.name=")]
    try:
        named = f"run.name='{'-'.join([base or '${model.name}', *parts])}'"
        config = compose_train([*rest, named], config_dirs, lambda config: config.cluster.world_size)
    except ConfigError as error:
        values = ", ".join(f"{key}={value}" for key, value in picked.items())
        raise ConfigError(f"the sweep's run with {values} is not possible: {error}") from error
    config.run.name = _short(config.run.name)
    return Combination([*rest, f"run.name='{config.run.name}'"], config)


def _text(override: str) -> str:
    """The value of an override as text that may stand between single quotes."""
    text, parsed = override.partition("=")[2], _parsed(override)
    if parsed is not None and isinstance(value := parsed.value(), QuotedString):
        text = value.text
    return text.replace("'", "_").replace("\\", "_")


def _part(key: str, value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{key.rpartition('.')[2]}_{value.strip(chr(39) + chr(34))}")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
