"""Hydra fills the typed settings: YAML leaves below conf/, then overrides, then validation. The only module that knows Hydra's compose API.

Every failure is a ConfigError that names the setting and a value that would work, before any device time is spent.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_module, version
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from kan_train.config.data import DataConfig, PrepareConfig
from kan_train.config.errors import ConfigError
from kan_train.config.evaluate import EvaluateConfig
from kan_train.config.explain import FAILURES, check_override, explain, parse_override
from kan_train.config.generate import GenerateConfig
from kan_train.config.run import Config
from kan_train.config.schema import open_table, settings
from kan_train.config.serve import ServeConfig

S = TypeVar("S", PrepareConfig, GenerateConfig, ServeConfig, EvaluateConfig)
T = TypeVar("T", Config, PrepareConfig, GenerateConfig, ServeConfig, EvaluateConfig)

CONFIG_MODULE = "kan_train.conf"
MAX_GROUP_DEPTH = 3
# Name of the YAML file below conf/ -> the settings it fills. The blend starts empty: a corpus there would be mixed into every data=CHOICE.
SCHEMAS: dict[str, Config | PrepareConfig | GenerateConfig | ServeConfig | EvaluateConfig] = {
    "train": Config(data=DataConfig(blend={})),
    "prepare": PrepareConfig(),
    "generate": GenerateConfig(),
    "serve": ServeConfig(),
    "evaluate": EvaluateConfig(),
}


def compose_train(
    overrides: Sequence[str], config_dirs: Sequence[Path] = (), world_size: int | Callable[[Config], int] | None = None
) -> Config:
    """The configuration of `kan train`, validated for `world_size` processes (default: the environment's WORLD_SIZE, or 1).

    world_size: a function where the configuration itself says for how many; its cluster is validated before.
    """
    config = _composed("train", Config, overrides, config_dirs)
    if callable(world_size):
        config.cluster.validate()
        world_size = world_size(config)
    config.validate(_world_size() if world_size is None else world_size)
    return config


def compose_settings(schema: type[S], overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> S:
    """The configuration of the command that has `schema` for its settings (`kan generate` has GenerateConfig), validated."""
    command = next(name for name, defaults in SCHEMAS.items() if type(defaults) is schema)
    config = _composed(command, schema, overrides, config_dirs)
    config.validate()
    return config


def composed_defaults(command: str) -> dict[str, Any]:
    """What `command` ("train", "prepare", "generate", "serve" or "evaluate") has without overrides, interpolations as they are written."""
    tree = OmegaConf.to_container(_tree(command, [], []), resolve=False)
    assert isinstance(tree, dict)
    return {str(name): value for name, value in tree.items()}


def choices(command: str, config_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The groups of `command` and the YAML files in each: the shipped ones and those of the user's folders."""
    _search_path(config_dirs)
    return _groups(command, config_dirs)


def default_choices(command: str) -> dict[str, str]:
    """Group -> the choice that `command` makes without overrides, from its defaults list."""
    listed = yaml.safe_load(resources.files(CONFIG_MODULE).joinpath(f"{command}.yaml").read_text())["defaults"]
    return {group: choice for entry in listed if isinstance(entry, dict) for group, choice in entry.items()}


def to_yaml(config: Any) -> str:
    """A configuration with every value filled in, as YAML; `from_yaml` gives it back."""
    # ASCII with escapes: as plain Unicode, PyYAML would write line separators that it then reads as spaces.
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=140)


def from_yaml(text: str) -> Config:
    """The configuration of a saved run, validated. A saved file is data: nothing in it is interpolated, no environment variable is read."""
    try:
        tree = yaml.safe_load(text)
        if not isinstance(tree, dict):
            raise ConfigError("a saved configuration must be a YAML mapping with the sections model, data, train, ...")
        config = _typed(Config, OmegaConf.merge(_structured(SCHEMAS["train"]), _escaped(tree)))
    except ConfigError:
        raise
    except FAILURES as error:
        raise explain(error, Config, {}) from error
    config.validate(world_size=None)
    return config


def _composed(command: str, schema: type[T], overrides: Sequence[str], config_dirs: Sequence[Path]) -> T:
    tree = _tree(command, overrides, config_dirs)
    try:
        return _typed(schema, tree)
    except FAILURES as error:
        raise error if isinstance(error, ConfigError) else explain(error, schema, {}) from error


def _typed(schema: type[T], tree: Any) -> T:
    config = OmegaConf.to_object(tree)
    assert isinstance(config, schema), type(config)
    _refuse_non_finite(config, schema)
    return config


def _tree(command: str, overrides: Sequence[str], config_dirs: Sequence[Path]) -> DictConfig:
    """What Hydra makes of the YAML files and the overrides, typed but not yet resolved."""
    schema = type(SCHEMAS[command])
    search_path = _search_path(config_dirs)
    quoted = [_quoted_text(override, schema) for override in overrides]
    groups, defaults = _groups(command, config_dirs), default_choices(command)
    for override in quoted:
        check_override(parse_override(override), schema, groups, defaults)
    with _hydra():
        try:
            return compose(command, overrides=[*quoted, *search_path])
        except UnicodeError as error:
            raise ConfigError(f"{_not_utf8(config_dirs)} is not UTF-8 text; save it as UTF-8") from error
        except FAILURES as error:
            raise explain(error, schema, groups) from error


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra on our search path, for one composition: what the process has of Hydra's global state is as before afterwards."""
    store = ConfigStore.instance()
    for command, node in SCHEMAS.items():
        store.store(name=f"kan_{command}_config", node=node, provider="kan_train")
    # Not GlobalHydra's own backup, which is a deep copy: a Hydra application that trains with us keeps its very object.
    outer, outer_version = GlobalHydra.instance().hydra, version.VersionBase.instance().version_base
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, job_name="kan", version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
        version.VersionBase.instance().version_base = outer_version


def _search_path(config_dirs: Sequence[Path]) -> list[str]:
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is not a folder; use the one that holds, for example, model/mine.yaml for model=mine")
    locations = ",".join(_quoted(f"file://{Path(folder).resolve()}") for folder in config_dirs)
    return [f"hydra.searchpath=[{locations}]"] if locations else []


def _groups(command: str, config_dirs: Sequence[Path]) -> dict[str, list[str]]:
    # Read from the folders, not through Hydra's loader, which would parse every override again for every group.
    shipped = resources.files(CONFIG_MODULE)
    # Two commands may have a section of one name: a group is for those that choose from it by default.
    leaves = {leaf for leaf in _leaves(shipped) if leaf[0] in default_choices(command)}
    for folder in config_dirs:
        leaves.update(_leaves(Path(folder)))
    return {group: sorted(choice for other, choice in leaves if other == group) for group in sorted({group for group, _ in leaves})}


def _leaves(folder: Traversable, group: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(group, choice) of every YAML file in the groups below a folder."""
    for entry in folder.iterdir():
        name = entry.name
        if depth < MAX_GROUP_DEPTH and not name.startswith((".", "_")) and entry.is_dir():
            yield from _leaves(entry, f"{group}/{name}" if group else name, depth + 1)
        elif group and name.endswith(".yaml"):
            yield group, name.removesuffix(".yaml")


def _not_utf8(config_dirs: Sequence[Path]) -> str:
    for path in (path for folder in config_dirs for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeError:
            return str(path)
    return "a configuration file"


def _quoted_text(override: str, schema: type) -> str:
    """Quote the value of a text setting: Hydra's grammar would refuse `prompt=def main():`, and read `run.name=1e3` as a number."""
    name, equals, value = override.partition("=")
    setting = settings(schema).get(name.lstrip("+"))
    table = open_table(schema, name.lstrip("+"))
    is_text = (setting is not None and setting.type is str) or (table is not None and table.type == dict[str, str])
    if not is_text or not equals:
        return override
    already_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if already_quoted or value == MISSING or (setting is not None and setting.optional and value == "null"):
        return override
    # A prompt is often code, where ${...} is its own; elsewhere it takes another setting's value.
    return f"{name}={_quoted(_escaped(value) if schema is GenerateConfig else value)}"


def _quoted(text: str) -> str:
    # Hydra's rule: inside quotes a backslash is itself, except before a quote, where backslashes are doubled.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    # OmegaConf would read ${...}; a backslash in front makes it text, and backslashes already there are doubled.
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value) if isinstance(value, str) else value


def _structured(node: Any) -> DictConfig:
    tree = OmegaConf.structured(node)
    assert isinstance(tree, DictConfig)
    return tree


def _refuse_non_finite(config: Any, schema: type) -> None:
    # NaN passes every comparison that a validation makes.
    for name, setting in settings(schema).items():
        value = config
        for attribute in name.split("."):
            value = getattr(value, attribute)
        for key, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, float) and not math.isfinite(number):
                where = f"{name}.{key}" if key else name
                raise ConfigError(f"{where}={number} is not a finite number; use {where}={1.0 if key else setting.default or 1.0}")


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"the environment's WORLD_SIZE={text!r} must be a number of processes; start with torchrun, or unset WORLD_SIZE")
    return int(text)
