"""What a refused layout could be instead: the nearest settings that work, found by trying them against all rules."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kan_train.config.errors import ConfigError
from kan_train.config.schema import yaml_value

if TYPE_CHECKING:
    from kan_train.config.run import Config

Settings = Mapping[str, Any]
"""Dotted name -> value."""
SUGGESTED = 2
"""Values named for one setting: the nearest that work."""
TRIED = 50_000
"""Combinations of settings tried before an error says the rule alone."""


@dataclass(frozen=True)
class Fault:
    """A broken rule."""

    law: str
    """The rule, with the settings and values that break it."""
    repairs: Sequence[Settings] = ()
    """What may mend it, each an alternative, the nearest first; those that break another rule are not shown."""
    besides: str = ""
    """What else a reader may do."""


Rules = Callable[["Config", int], Iterator[Fault]]
"""Every rule that a configuration breaks over so many processes; what follows the first may be nonsense."""


def refusal(fault: Fault, config: "Config", world_size: int, rules: Rules) -> ConfigError:
    """The error for `fault`, with the nearest settings that pass all `rules`."""
    shown = _alternatives(_working_repairs(fault, config, world_size, rules))
    hints = [hint for hint in (shown, fault.besides) if hint]
    return ConfigError(f"{fault.law}; use {', or '.join(hints)}" if hints else fault.law)


def other_sizes(setting: str, given: int, world_size: int) -> list[Settings]:
    """Other values of a size: the divisors of the number of processes, the nearest first."""
    return [{setting: size} for size in sorted(_divisors(world_size), key=lambda size: (abs(size - given), -size)) if size != given]


def multiples(setting: str, given: int, step: int) -> list[Settings]:
    """The multiples of `step` on both sides of a value, the nearest first; none where `step` is 0."""
    both = {given // step * step, -(-given // step) * step} - {0} if step else set()
    return [{setting: value} for value in sorted(both, key=lambda value: abs(value - given))]


def _working_repairs(fault: Fault, config: "Config", world_size: int, rules: Rules) -> list[Settings]:
    """The repairs of `fault` that pass every rule; where none does by itself, the first that does together with repairs of what it then breaks."""
    waiting: deque[tuple[Settings, Fault]] = deque([({}, fault)])
    tried = 0
    while waiting and tried < TRIED:
        before, broken = waiting.popleft()
        working: list[Settings] = []
        for repair in _few(broken.repairs) if before else broken.repairs:
            if before.keys() & repair.keys():  # a setting is changed once, so that the search ends
                continue
            settings, tried = {**before, **repair}, tried + 1
            changed = _changed(config, settings)
            left = next(rules(changed, world_size), None)
            if left is not None:
                waiting.append((settings, left))
            elif _is_model(changed):
                working.append(settings)
        if working:
            return working[:1] if before else working
    return []


def _few(repairs: Sequence[Settings]) -> Iterator[Settings]:
    """Of each setting the nearest values, and 1, which fits everything."""
    counts: dict[tuple[str, ...], int] = {}
    for repair in repairs:
        names = tuple(repair)
        counts[names] = counts.get(names, 0) + 1
        if counts[names] <= SUGGESTED or set(repair.values()) == {1}:
            yield repair


def _is_model(config: "Config") -> bool:
    try:
        config.model.validate()
    except ConfigError:
        return False
    return True


def _changed(config: "Config", settings: Settings) -> "Config":
    """A copy of `config` with `settings`; what they do not reach is shared."""
    changed = copy.copy(config)
    for path, value in settings.items():
        section: Any = changed
        *sections, name = path.split(".")
        for one in sections:
            setattr(section, one, copy.copy(getattr(section, one)))
            section = getattr(section, one)
        setattr(section, name, value)
    return changed


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _alternatives(working: Sequence[Settings]) -> str:
    """`a=1 or 2, or b=3 c=4`: settings that work, the values of one setting together."""
    named: dict[tuple[str, ...], list[Settings]] = {}
    for settings in working:
        named.setdefault(tuple(settings), []).append(settings)
    shown = []
    for names, (first, *others) in named.items():
        words = [" ".join(f"{name}={yaml_value(first[name])}" for name in names)]
        words += [" ".join(yaml_value(other[name]) for name in names) for other in others[: SUGGESTED - 1]]
        shown.append(" or ".join(words))
    return ", or ".join(shown)
