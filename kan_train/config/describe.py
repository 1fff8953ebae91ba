"""Documentation of every setting, from the dataclasses themselves: `kan train --settings` and docs/configuration.md.

    python -m kan_train.config.describe > docs/configuration.md
"""

import textwrap
from collections.abc import Iterator
from importlib import resources
from typing import Any

from kan_train.config.data import PrepareConfig
from kan_train.config.evaluate import EvaluateConfig
from kan_train.config.generate import GenerateConfig
from kan_train.config.run import Config
from kan_train.config.schema import Setting, field_texts, sections, settings, yaml_value
from kan_train.config.serve import ServeConfig

COMMANDS: dict[str, tuple[str, type]] = {
    "train": ("kan train", Config),
    "prepare": ("kan data prepare", PrepareConfig),
    "generate": ("kan generate", GenerateConfig),
    "serve": ("kan serve", ServeConfig),
    "evaluate": ("kan evaluate", EvaluateConfig),
}

INTRODUCTION = """\
# Configuration

Every value has one typed, documented home in `kan_train/config`, and this page is made from it:

    python -m kan_train.config.describe > docs/configuration.md

- `group=choice` picks a file of YAML leaves: `kan train model=kan_125m parallel=zero2`.
- `--config-dir DIR` adds choices and groups of your own: `DIR/model/mine.yaml` makes `model=mine` known; `DIR/experiment/fast.yaml`, with
  `# @package _global_` as its first line and settings of any group in it, makes `+experiment=fast` known.
- `group.setting=value` sets one value. `+data.blend.NAME=weight` adds a corpus to the blend, `~data.blend.NAME` takes one out.
- Text is taken as it is typed, special characters too: `kan generate run=first prompt='def main():'`.
- `run.name='${model.name}-2'` takes the value of another setting; in `kan generate`, where prompts may be code, `${...}` is text.
- What a run has after all this: `kan train ... --cfg job`. It is saved as `config.yaml` in the run directory.

Unknown names, wrong types and impossible combinations are refused before any work is done; the error names the setting and a value that
would work.
The defaults below are those of a command without settings.
"""


def settings_text(command: str = "train", width: int = 110) -> str:
    """Every setting of a command for the terminal: name, type, default, meaning, and the choices of its groups."""
    _, schema = COMMANDS[command]
    lines: list[str] = []
    for title, text, rows in _sections(command, schema):
        lines += [f"{title}: {text}" if title else text, ""]
        for setting, default in rows:
            lines.append(f"  {setting.path} = {default}    [{setting.type_text}]")
            lines += textwrap.wrap(setting.text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    for group, described in _choices(command).items():
        lines += [f"{group}=", ""]
        for choice, text in described.items():
            lines.append(f"  {group}={choice}")
            lines += textwrap.wrap(text, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines).rstrip()


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [INTRODUCTION]
    for command, (words, schema) in COMMANDS.items():
        parts.append(f"## `{words}`\n")
        for title, text, rows in _sections(command, schema):
            parts.append(f"### {title}\n\n{text}\n" if title else f"{text}\n")
            table = ["| setting | type | default | meaning |", "|---|---|---|---|"]
            table += [f"| `{setting.path}` | {setting.type_text} | `{default}` | {_cell(setting.text)} |" for setting, default in rows]
            parts.append("\n".join(table) + "\n")
        for group, described in _choices(command).items():
            chosen = "\n".join(f"- `{group}={choice}`: {text}" for choice, text in described.items())
            parts.append(f"### Choices of `{group}`\n\n{chosen}\n")
    return "\n".join(parts)


def _sections(command: str, schema: type) -> Iterator[tuple[str, str, list[tuple[Setting, str]]]]:
    """(name, meaning, [(setting, its default)]) for every section with settings of its own, in the order of the source."""
    from kan_train.config.compose import composed_defaults  # Hydra is loaded only when it is needed

    defaults = composed_defaults(command)
    for path, section in sections(schema).items():
        own = [setting for name, setting in settings(schema).items() if name.rpartition(".")[0] == path]
        if own:
            yield path, _meaning(schema, path, section), [(setting, _default(setting, defaults)) for setting in own]


def _default(setting: Setting, defaults: dict[str, Any]) -> str:
    """What a command without settings has, in YAML."""
    if setting.default_text:
        return setting.default_text
    value: Any = defaults
    for name in setting.path.split("."):
        value = value[name]
    return "must be given" if value == "???" else yaml_value(value)


def _meaning(schema: type, path: str, section: type) -> str:
    # The field's text says what the section is for in its parent; the class's own docstring stands for the root.
    parent, _, name = path.rpartition(".")
    return field_texts(sections(schema)[parent])[name] if path else " ".join((section.__doc__ or "").split())


def _choices(command: str) -> dict[str, dict[str, str]]:
    """Group -> choice -> the comment at the top of its file."""
    from kan_train.config.compose import CONFIG_MODULE, choices

    folder = resources.files(CONFIG_MODULE)
    return {
        group: {choice: _comment(folder.joinpath(group, f"{choice}.yaml").read_text(encoding="utf-8")) for choice in names}
        for group, names in choices(command).items()
    }


def _comment(text: str) -> str:
    lines = text.splitlines()
    top = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:top])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(configuration_page(), end="")
