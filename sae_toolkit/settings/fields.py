"""Turns the fields of dataclasses into flags of argparse.

A group of settings is a frozen dataclass. Each field is a flag, and the sentence below the field is its help:

    @dataclass(frozen=True)
    class OptimizationSettings:
        \"\"\"Optimization.\"\"\"

        lr: PositiveFloat = 1e-4
        \"\"\"learning rate of Adam\"\"\"
        lr_warm_up_steps: NonNegative = 0
        \"\"\"steps of linear warm-up\"\"\"

The annotation says what the flag takes:

- `bool`: the flag takes no value;
- `Literal["a", "b"]`: one of these choices;
- `Annotated[int, parse]`: what the function `parse` returns for the text (values.py);
- `tuple[X, ...]`: one or more values, of type X each;
- `X | None`: what X takes; the value is None if the flag is not given.

Write `flag(...)` instead of the default to say more about a flag. The settings of a script are a dataclass of groups.
Settings hold tuples where a flag takes several values; records of flags, which are JSON, hold lists.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
from collections.abc import Collection, Mapping
from enum import Enum
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sae_toolkit.terminal.console import Parser

T = TypeVar("T")


class Scope(Enum):
    """What a flag belongs to. It decides whether a resumed run may change the flag, and whether --like takes it."""

    SAE = "the trained weights depend on the flag; it is fixed when a run is resumed, and part of the run's hash"
    RUN = "the weights do not depend on the flag, but a run keeps the value that it was started with"
    PROCESS = "the flag may differ when a run is resumed"
    COMMAND = "the flag is for one command; neither --resume nor --like takes it from an earlier run"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, described by a field of a settings group.

    Args:
        name: name of the flag, without the dashes.
        default: the value where the flag is not given; `dataclasses.MISSING` if the flag is required.
        help: the sentence below the field.
        arguments: further arguments for argparse's `add_argument`.
        scope: what the flag belongs to.
        is_later: True for a flag that was added after people had made runs. It is part of the hash of a run only if its
            value is not the default, so that the directories of older runs are still found.
        is_swept: whether a sweep may vary the flag; None means that it may if the trained weights depend on it.
        is_exclusive: only one of the exclusive flags of a group may be given.
    """

    name: str
    default: Any
    help: str
    arguments: Mapping[str, Any]
    scope: Scope = Scope.SAE
    is_later: bool = False
    is_swept: bool | None = None
    is_exclusive: bool = False

    @property
    def takes_several(self) -> bool:
        """Whether the value is a tuple."""
        return self.arguments.get("nargs") == "+" or self.arguments.get("action") == "append"

    @property
    def may_be_swept(self) -> bool:
        return self.scope is Scope.SAE if self.is_swept is None else self.is_swept

    @property
    def shown_default(self) -> str:
        """The default as a person would type it; empty if there is none."""
        return "" if self.default in (None, dataclasses.MISSING) else as_text(self.default)


_OF_FLAG = ("scope", "is_later", "is_swept", "is_exclusive")


def flag(default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """Returns a dataclass field with a default and with more information about its flag.

    Args:
        more: `scope`, `is_later`, `is_swept` and `is_exclusive` as in `Flag`, and arguments for argparse's
            `add_argument`, such as `metavar`.
    """
    return dataclasses.field(default=default, metadata=more)


@cache
def flags_of(settings: type) -> dict[str, Flag]:
    """Returns the flags of a settings group, or of a dataclass of groups, by name."""
    if groups := groups_of(settings):
        return {name: each for group in groups.values() for name, each in flags_of(group).items()}
    hints, sentences = get_type_hints(settings, include_extras=True), _sentences(settings)
    flags = {}
    for field in dataclasses.fields(settings):
        more = _arguments(hints[field.name]) | field.metadata
        of_flag = {name: more.pop(name) for name in _OF_FLAG if name in more}
        flags[field.name] = Flag(field.name, field.default, sentences[field.name], more, **of_flag)
    return flags


def groups_of(settings: type) -> dict[str, type]:
    """Returns the settings groups that a dataclass is made of, by the name of their field."""
    hints = get_type_hints(settings)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def title_of(group: type) -> str:
    """Returns the heading of a settings group: its docstring, without the full stop."""
    return str(group.__doc__).removesuffix(".")


def _sentences(group: type) -> dict[str, str]:
    """Returns the string below each field of a dataclass and of the dataclasses it extends, by the field's name."""
    (tree,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(tree, ast.ClassDef)
    inherited = (_sentences(base) for base in group.__bases__ if dataclasses.is_dataclass(base))
    return {name: text for each in inherited for name, text in each.items()} | {
        statement.target.id: " ".join(ast.literal_eval(below.value).split())
        for statement, below in pairwise(tree.body)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if isinstance(below, ast.Expr)
    }


def _arguments(hint: Any) -> dict[str, Any]:
    """Returns the arguments of argparse's `add_argument` for a type."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is tuple:
        return {"nargs": "+"} | _arguments(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": get_args(hint)[1] if get_origin(hint) is Annotated else hint}


def build_parser(settings: type, **kwargs: Any) -> Parser:
    """Builds a parser for the flags of a dataclass of groups, with a heading for each group.

    Args:
        kwargs: for `argparse.ArgumentParser`. With `argument_default=argparse.SUPPRESS` the parser returns only the
            flags that were given, without defaults.
    """
    parser = Parser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
    for group in groups_of(settings).values():
        flags = flags_of(group).values()
        heading = parser.add_argument_group(title_of(group).lower())
        exclusive = heading.add_mutually_exclusive_group() if any(each.is_exclusive for each in flags) else heading
        for each in flags:
            default = f" (default: {each.shown_default})" if each.shown_default else ""
            (exclusive if each.is_exclusive else heading).add_argument(
                f"--{each.name}",
                default=parser.argument_default or _as_json(each.default),
                required=each.default is dataclasses.MISSING,
                help=(each.help + default).replace("%", "%%"),
                **each.arguments,
            )
    return parser


def from_flags(settings: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Builds a dataclass of groups from the values of its flags, by name. A flag that is missing has its default.

    Args:
        others: fields of the dataclass that are not groups.
    """
    groups = {}
    for name, group in groups_of(settings).items():
        flags = [each for each in flags_of(group).values() if each.name in values]
        groups[name] = group(**{each.name: _from_json(each, values[each.name]) for each in flags})
    return settings(**groups, **others)


def as_flags(settings: Any) -> dict[str, Any]:
    """Returns the values of all flags by name, as JSON can hold them. `from_flags` is the inverse."""
    groups = (getattr(settings, name) for name in groups_of(type(settings)))
    return {name: _as_json(getattr(group, name)) for group in groups for name in flags_of(group.__class__)}


def _from_json(each: Flag, value: Any) -> Any:
    return tuple(value) if each.takes_several and value is not None else value


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_words(
    settings: type, values: Mapping[str, Any], *, leave_out: Collection[str] = (), keep: Collection[str] = ()
) -> list[str]:
    """Returns the words of a command line that sets the flags to these values.

    Args:
        leave_out: names of flags that are left out. Flags at their defaults are left out too.
        keep: names of flags that are not left out at their defaults, unless the default is None.
    """
    return [
        word
        for name, each in flags_of(settings).items()
        if name not in leave_out
        if _as_json(values.get(name, each.default)) != _as_json(each.default)
        or (name in keep and values.get(name) is not None)
        for word in _words(each, values[name])
    ]


def _words(each: Flag, value: Any) -> list[str]:
    name, action = f"--{each.name}", each.arguments.get("action")
    if action == "store_true":
        return [name]
    if action == "append":
        return [word for item in value for word in (name, str(item))]
    if each.takes_several:
        return [name, *map(str, value)]
    return [name, as_text(value)]


def as_text(value: Any) -> str:
    """Returns a value as a person would type it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    if isinstance(value, list):  # token ids
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
