"""The settings as data: every leaf of a configuration dataclass with its type, its default and the docstring below its field."""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

TYPE_TEXT = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "whole numbers in brackets",
    list[str]: "texts in brackets",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One documented setting."""

    path: str
    """Dotted name, as written on the command line."""
    type: Any
    """The annotation's type, without None."""
    optional: bool
    """Whether null is a value."""
    default: Any
    """The dataclass's default; None also where `default_text` describes it."""
    default_text: str | None
    """How the default is described where it depends on the machine."""
    text: str
    """What it means: the docstring below the field."""

    @property
    def type_text(self) -> str:
        """The type in words."""
        return f"{type_text(self.type)} or null" if self.optional else type_text(self.type)

    @property
    def default_yaml(self) -> str:
        """The default as it is written in YAML and on the command line."""
        return self.default_text or yaml_value(self.default)


def type_text(kind: Any) -> str:
    """A type in words that a user of YAML understands."""
    if typing.get_origin(kind) is dict:
        return f"names, with {type_text(typing.get_args(kind)[1])} each"
    return TYPE_TEXT.get(kind, getattr(kind, "__name__", str(kind)))


def yaml_value(value: Any) -> str:
    """A plain value as YAML writes it: true, null, 6e-3 as 0.006."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {yaml_value(item)}" for name, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(yaml_value, value)) + "]"  # without spaces: a shell passes it on as one word
    return (str(value) or "''") if isinstance(value, str) else repr(value)


@cache
def settings(schema: type, prefix: str = "") -> dict[str, Setting]:
    """Dotted name -> setting, for every leaf below `schema`, in the order of the source."""
    return {setting.path: setting for setting in _walk(schema, prefix)}


@cache
def sections(schema: type, prefix: str = "") -> dict[str, type]:
    """Dotted name -> dataclass, for `schema` itself (under "") and every dataclass nested in it."""
    found = {prefix.rstrip("."): schema}
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found.update(sections(typing.cast(type, kind), f"{prefix}{name}."))
    return found


@cache
def field_texts(schema: type) -> dict[str, str]:
    """Field -> the string below it in the class's source: Python keeps no docstring of a field, so the source is read."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        text = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(text, str):
            texts[statement.target.id] = " ".join(text.split())
    return texts


def members(schema: type, section: str) -> list[str]:
    """Names directly below a section: settings and sections."""
    return [field.name for field in dataclasses.fields(sections(schema)[section])]


def open_table(schema: type, path: str) -> Setting | None:
    """The setting whose keys the user chooses (data.blend) and that `path` is a key of; None if there is none."""
    parent, _, key = path.rpartition(".")
    setting = settings(schema).get(parent)
    return setting if setting is not None and key and typing.get_origin(setting.type) is dict else None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, if one is similar enough to have been meant."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest_setting(schema: type, path: str) -> str | None:
    """The setting or section that `path` was probably meant to be: misspelt in place, or right in another place."""
    names = [*settings(schema), *(section for section in sections(schema) if section)]
    parent, _, leaf = path.rpartition(".")
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    if same_leaf:
        return nearest(path, same_leaf) or same_leaf[0]
    if parent in sections(schema) and (sibling := nearest(leaf, members(schema, parent))):
        return f"{parent}.{sibling}" if parent else sibling
    # `heads` for num_heads, `batch_size` for global_batch_size: whole words count for more than letters.
    same_words = [name for name in names if f"_{leaf}_" in f"_{name.rpartition('.')[2]}_"]
    if same_words:
        return nearest(path, same_words) or same_words[0]
    # Below a known section a likeness of whole paths says nothing: they share the section's name.
    if parent not in sections(schema) and (found := nearest(path, names)):
        return found
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = nearest(leaf, leaves)
    return leaves[close] if close else None


def _walk(schema: type, prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(schema)
    texts = field_texts(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        alternatives = [one for one in typing.get_args(kind) if one is not types.NoneType] if _is_union(kind) else [kind]
        described = field.metadata.get("default")
        default = None if described else _default(field)
        yield Setting(
            path=f"{prefix}{field.name}",
            type=alternatives[0],
            optional=_is_union(kind),
            default=default,
            default_text=described,
            text=texts[field.name],
        )


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
