"""Why a composition failed, as the one error that users see: the setting, what is wrong with it, and a value that would work.

Overrides are checked against the settings before Hydra sees them, because there the user's own words are still known; wrong
values, and everything in YAML files, are explained from the exceptions of Hydra and OmegaConf.
"""

import re

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from kan_train.config.errors import ConfigError
from kan_train.config.schema import Setting, members, nearest, nearest_setting, open_table, sections, settings

FAILURES = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, AssertionError)
EXAMPLES = {int: "1", float: "0.5", bool: "true", str: "NAME", list[int]: "[1,1]", list[str]: "[NAME]"}
INDIRECT = re.compile(r"\$\{|\?\?\?")


def parse_override(text: str) -> Override:
    """One override as Hydra reads it; ConfigError where its grammar is not met."""
    name, equals, value = text.partition("=")
    if not (name.strip("+~") and (equals or name.startswith("~"))):
        raise ConfigError(f"{text!r} sets nothing; write setting=value, for example train.steps=100")
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except OverrideParseException as error:
        reason = (error.message.splitlines() or ["not a setting=value"])[0]
        raise ConfigError(f"{text!r} cannot be read ({reason}); quote special characters twice: \"{name}='{value}'\"") from error


def check_override(override: Override, schema: type, groups: dict[str, list[str]], defaults: dict[str, str]) -> None:
    """Raise ConfigError unless `override` names a setting or a group.

    `groups`: group -> its choices; `defaults`: group -> the choice made without overrides.
    """
    name, value = override.key_or_group, _value(override)
    if override.is_sweep_override():
        first = value.split(",")[0].split("(")[-1]
        raise ConfigError(f"{override.input_line!r} gives several values, but this is one run; use {name}={first}")
    if override.package is not None:
        raise ConfigError(f"{override.input_line!r}: groups have fixed places here; use {name}={value}")
    if name in groups:
        _check_choice(override, groups[name], defaults.get(name))
    elif open_table(schema, name) is not None:
        return
    elif name in sections(schema):
        inside = members(schema, name)
        raise ConfigError(f"{name} is a group of settings, not a setting; set one of them: {', '.join(f'{name}.{one}' for one in inside)}")
    elif name not in settings(schema):
        raise unknown_setting(schema, name, value, groups)
    elif override.is_delete():
        raise ConfigError(f"~{name}: a setting cannot be removed; leave it out, or use {_working(settings(schema)[name])}")
    elif override.is_add():
        raise ConfigError(f"+{name}: this setting is there already, without +; use {name}={value}")


def _check_choice(override: Override, choices: list[str], default: str | None) -> None:
    name, value = override.key_or_group, _value(override)
    if default is not None and (override.is_delete() or override.is_add()):
        listed = ", ".join(choices)
        raise ConfigError(f"{override.input_line!r}: one {name} is always chosen; use {name}={value or default}, or one of: {listed}")
    if default is None and not override.is_add() and not override.is_delete():
        raise ConfigError(f"{override.input_line!r}: {name} is a group that is not chosen from by default; use +{name}={value}")
    if not override.is_delete() and value not in choices:
        raise unknown_choice(name, value, choices, default)


def unknown_choice(group: str, value: str, choices: list[str], default: str | None = None) -> ConfigError:
    """The error for a choice that a group does not have."""
    guess = nearest(value, choices) or default
    hint = f"did you mean {group}={guess}? Choices" if guess else "choices"
    return ConfigError(f"{group}={value} is not known; {hint} of {group}: {', '.join(choices)}")


def unknown_setting(schema: type, name: str, value: str, groups: dict[str, list[str]], where: str = "") -> ConfigError:
    """The error for a name that is no setting: with the nearest one, or with what there is."""
    for known in settings(schema):
        if name.startswith(f"{known}."):
            working = f"{known}={value}" if value else _working(settings(schema)[known])
            return ConfigError(f"{where}{name} is not a setting: {known} is one value; use {working}")
    group = nearest(name, groups)
    if group and value in groups[group]:
        return ConfigError(f"{where}{name} is not a setting; did you mean {group}={value}?")
    if guess := nearest_setting(schema, name):
        given = f"={value}" if value and guess in settings(schema) else ""
        return ConfigError(f"{where}{name} is not a setting; did you mean {guess}{given}?")
    parent = name.rpartition(".")[0]
    parent = parent if parent in sections(schema) else ""
    inside = ", ".join(f"{parent}.{one}" if parent else one for one in members(schema, parent))
    return ConfigError(f"{where}{name} is not a setting; there are: {inside} (`kan train --settings` explains all)")


def explain(error: BaseException, schema: type, groups: dict[str, list[str]]) -> ConfigError:
    """Any failure of Hydra, OmegaConf or a YAML file as a ConfigError that names the setting, or the file."""
    where = _where(error)
    cause = _omegaconf_cause(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return unknown_choice(group, choice, sorted(error.options or groups.get(group, [])))
    if cause is not None:
        return _explain_setting(cause, schema, groups, where)
    if isinstance(error, yaml.YAMLError):
        return ConfigError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}")
    return ConfigError(f"{where}{' '.join(str(error).split()) or type(error).__name__}")


def _explain_setting(cause: OmegaConfBaseException, schema: type, groups: dict[str, list[str]], where: str) -> ConfigError:
    message = str(cause.msg or cause).splitlines()[0]
    name = str(cause.full_key or cause.key or "")
    if not name and (merged := re.search(r"is not a subclass of (\w+)", message)):
        # OmegaConf names the type here, not the key.
        name = next((path for path, section in sections(schema).items() if section.__name__ == merged[1]), "")
    setting, table = settings(schema).get(name), open_table(schema, name)
    if isinstance(cause, InterpolationResolutionError):
        unknown = re.search(r"Interpolation key '(.+)' not found", message)
        guess = nearest_setting(schema, unknown[1]) if unknown else None
        hint = f"did you mean {name}=${{{guess}}}?" if guess else f"use {_working(setting, name)}"
        return ConfigError(f"{where}{name}: {message}; {hint}")
    if isinstance(cause, MissingMandatoryValue):
        return ConfigError(f"{name} must be given; use {_working(setting, name)}")
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        if table is not None:
            return ConfigError(f"{where}{name} is new in {table.path}; add it with a plus: +{name}=1.0")
        return unknown_setting(schema, name, "", groups, where)
    if setting is not None or table is not None:
        value = re.match(r"Value '(.*?)'(?: of type| is not| could)", message)
        shown, wanted = f"={value[1]}" if value else "", setting.type_text if setting else "a number"
        return ConfigError(f"{where}{name}{shown} must be {wanted}; use {_working(setting, name, value[1] if value else None)}")
    if name in sections(schema):
        return ConfigError(f"{where}{name} is a group of settings, not one value; it has: {', '.join(members(schema, name))}")
    return ConfigError(f"{where}{name}: {message}")


def _omegaconf_cause(error: BaseException | None) -> OmegaConfBaseException | None:
    # Hydra re-raises some failures `from` OmegaConf's and others while handling it.
    while error is not None:
        if isinstance(error, OmegaConfBaseException):
            return error
        error = error.__cause__ or error.__context__
    return None


def _where(error: BaseException) -> str:
    found = re.match(r"In '([^']+)': ", str(error)) if isinstance(error, ConfigCompositionException) else None
    return f"in {found[1]}.yaml: " if found and "/" in found[1] else ""


def _working(setting: Setting | None, name: str = "", given: str | None = None) -> str:
    """An override that would work: with the given value if that is of the setting's type in essence, else the default, else an example."""
    if setting is None:
        return f"{name}=1.0"
    if isinstance(setting.default, dict):
        return f"+{setting.path}.NAME=1.0"
    if setting.type is int and given is not None:
        try:
            return f"{setting.path}={round(float(given))}"
        except (ValueError, OverflowError):
            pass
    direct = setting.default is not None and not INDIRECT.search(str(setting.default))
    return f"{setting.path}={setting.default_yaml if direct else EXAMPLES[setting.type]}"


def _value(override: Override) -> str:
    """The override's value as the user wrote it; without quotes where it is only text."""
    value = None if override.is_sweep_override() else override.value()
    return str(value) if isinstance(value, str) else str(override.input_line).partition("=")[2]
