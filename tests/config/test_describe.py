"""The documentation is made from the types, and says all of them."""

import dataclasses
import typing
from pathlib import Path

import pytest

from kan_train.config.compose import choices, compose_train
from kan_train.config.describe import COMMANDS, configuration_page, settings_text
from kan_train.config.schema import field_texts, nearest_setting, sections, settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
SCHEMAS = {command: schema for command, (_, schema) in COMMANDS.items()}


def test_the_committed_page_is_current():
    message = "run: python -m kan_train.config.describe > docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), message


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_field_has_its_text(schema: type):
    for section in sections(schema).values():
        assert list(field_texts(section)) == [field.name for field in dataclasses.fields(section)]
        assert all(text.endswith((".", ")")) for text in field_texts(section).values()), section
        assert section.__doc__
        assert not section.__doc__.startswith(f"{section.__name__}("), "the docstring that dataclass makes is not one"


@pytest.mark.parametrize("command", SCHEMAS)
def test_the_terminal_text_names_every_setting_with_its_meaning(command: str):
    text = settings_text(command)
    for name, setting in settings(SCHEMAS[command]).items():
        assert f"  {name} = " in text
        assert setting.text.split()[0] in text
    for group, listed in choices(command).items():
        for choice in listed:
            assert f"  {group}={choice}\n" in text
    assert max(map(len, text.splitlines())) < 160


def test_the_defaults_are_those_of_a_run_without_settings():
    text, config = settings_text(), compose_train([])
    assert f"  model.grove.num_groves = {config.model.grove.num_groves}    [a whole number]" in text
    assert "  data.blend = {stdlib: 1.0}    [names, with a number each]" in text
    assert "  run.name = ${model.name}    [text]" in text
    assert "  parallel.zero_stage = null    [a whole number or null]" in text
    assert "  run = must be given    [text]" in settings_text("generate")
    assert "  workers = one a core    [a whole number]" in settings_text("prepare"), "a page must not depend on the machine"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_settings_are_exactly_the_leaves_of_the_types(schema: type):
    def leaves(kind: type, prefix: str) -> list[str]:
        found = []
        for name, hint in typing.get_type_hints(kind).items():
            found += leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
        return found

    assert list(settings(schema)) == leaves(schema, "")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("train.stpes", "train.steps"),
        ("grove.num_groves", "model.grove.num_groves"),
        ("seed", "run.seed"),
        ("model.heads", "model.ada.num_heads"),
        ("train.batch_size", "train.micro_batch_size"),
        ("model.xyzzy", None),
        ("modell.width", "model.width"),
        ("optimiser.beta1", "optimizer.beta1"),
        ("clip_nrom", "optimizer.clip_norm"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_setting(written: str, meant: str | None):
    assert nearest_setting(SCHEMAS["train"], written) == meant
