"""Dataclasses to argparse: a field of a settings group is a flag, and the sentence below the field is its help.

    @dataclass(frozen=True)
    class OptimizationSettings:
        \"\"\"Optimization.\"\"\"

        lr: PositiveFloat = 1e-4
        \"\"\"learning rate of Adam\"\"\"
        lr_warm_up_steps: NonNegative = 0
        \"\"\"steps of linear warm-up\"\"\"

The annotation says what the flag takes: `bool` makes a flag without a value, `Literal[...]` gives its choices,
`tuple[X, ...]` takes several values, `Annotated[X, parse]` (values.py) names the function that reads one, and
`X | None` may be left out. `flag(...)` in place of the default says more.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class Scope(Enum):
    """What a flag belongs to, and so where its value may differ."""

    SAE = "the trained weights depend on it; it is fixed when a run is resumed, and part of the run's hash"
    RUN = "the run, once started, keeps it; the weights do not depend on it"
    PROCESS = "it may differ when a run is resumed"
    COMMAND = "one command; neither --resume nor --like takes it from an earlier run"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, as a field of a settings group describes it.

    Args:
        name: without the dashes.
        default: where the flag is not given; `dataclasses.MISSING` where it must be.
        help: the sentence below the field.
        is_tuple: whether it takes several values.
        arguments: of argparse's `add_argument`, beside these.
        scope: what the flag belongs to.
        is_later: True for a flag that is newer than the runs on people's disks. While it has its default it does not
            count in the hash of a run, so that older runs are found.
        is_swept: whether a sweep may vary it; None: if the weights depend on it.
        exclusive: flags of one group with the same word here exclude one another.
    """

    name: str
    default: Any
    help: str
    is_tuple: bool
    arguments: Mapping[str, Any]
    scope: Scope = Scope.SAE
    is_later: bool = False
    is_swept: bool | None = None
    exclusive: str | None = None

    @property
    def may_be_swept(self) -> bool:
        return self.scope is Scope.SAE if self.is_swept is None else self.is_swept

    @property
    def shown_default(self) -> str | None:
        """The default as one would type it; None where there is none."""
        if self.default in (None, dataclasses.MISSING, ()):
            return None
        shown = " ".join(map(str, self.default)) if self.is_tuple else str(self.default)
        return shown.lower() if isinstance(self.default, bool) else shown

    @property
    def described(self) -> str:
        """Its help, with the default where there is one."""
        return f"{self.help} (default: {self.shown_default})" if self.shown_default else self.help


_OF_FLAG = {field.name for field in dataclasses.fields(Flag)}


def flag(default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """Describes a field: `scope`, `is_later`, `is_swept` and `exclusive` as in `Flag`, and arguments of argparse's
    `add_argument` such as `metavar`.
    """
    return dataclasses.field(default=default, metadata=more)


@cache
def flags_of(settings: type) -> dict[str, Flag]:
    """Returns the flags of a settings group, or of a dataclass of groups, by name."""
    if groups := groups_of(settings):
        return {name: each for group in groups.values() for name, each in flags_of(group).items()}
    hints, sentences = get_type_hints(settings, include_extras=True), _sentences(settings)
    found = {}
    for field in dataclasses.fields(settings):
        arguments, is_tuple = _from_annotation(hints[field.name])
        arguments |= {name: value for name, value in field.metadata.items() if name not in _OF_FLAG}
        if arguments.get("action") == "append":
            del arguments["nargs"]
        of_flag = {name: value for name, value in field.metadata.items() if name in _OF_FLAG}
        found[field.name] = Flag(field.name, field.default, sentences[field.name], is_tuple, arguments, **of_flag)
    return found


def groups_of(settings: type) -> dict[str, type]:
    """Returns the settings groups that a dataclass is made of, by the name of their field."""
    hints = get_type_hints(settings)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint) and isinstance(hint, type)}


def title_of(group: type) -> str:
    """Returns the heading of a settings group, which is the first sentence of its docstring."""
    return (group.__doc__ or "").split(".")[0]


def _sentences(settings: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            sentence = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
            found[statement.target.id] = " ".join(sentence.split())
    return found


def _from_annotation(hint: Any) -> tuple[dict[str, Any], bool]:
    """The arguments of `add_argument` for a type, and whether its value is a tuple."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if hint is bool:
        return {"action": "store_true"}, False
    if get_origin(hint) is tuple:
        return {"nargs": "+"} | _from_annotation(get_args(hint)[0])[0], True
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}, False
    return {"type": get_args(hint)[1] if get_origin(hint) is Annotated else hint}, False


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds the flags of a dataclass of groups to a parser, under a heading for each group.

    With `argument_default=argparse.SUPPRESS` the parser returns the flags that were given, and no defaults.
    """
    for group in groups_of(settings).values():
        heading, exclusive = parser.add_argument_group(title_of(group).lower()), dict[str, Any]()
        for each in flags_of(group).values():
            to = heading
            if each.exclusive:
                to = exclusive.setdefault(each.exclusive, None) or heading.add_mutually_exclusive_group()
                exclusive[each.exclusive] = to
            is_required = each.default is dataclasses.MISSING
            default = argparse.SUPPRESS if is_required else parser.argument_default or _as_list(each.default)
            more = dict(each.arguments) | ({"required": True} if is_required else {})
            to.add_argument(f"--{each.name}", default=default, help=each.described.replace("%", "%%"), **more)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_flags(settings: type[T], values: Mapping[str, Any], **others: Any) -> T:
    """Builds a dataclass of groups from the values of its flags, by name; a flag that is missing has its default.

    Args:
        others: fields of the dataclass that are no groups.
    """
    groups = {}
    for name, group in groups_of(settings).items():
        of_group = {flag_name: values[flag_name] for flag_name in flags_of(group) if flag_name in values}
        for flag_name, value in of_group.items():
            if flags_of(group)[flag_name].is_tuple and value is not None:
                of_group[flag_name] = tuple(value)
        groups[name] = group(**of_group)
    return settings(**groups, **others)


def as_flags(settings: Any) -> dict[str, Any]:
    """Returns the values of all flags by name: what `from_flags` takes, as JSON can hold it."""
    groups = (getattr(settings, name) for name in groups_of(type(settings)))
    return {name: _as_list(getattr(group, name)) for group in groups for name in flags_of(group.__class__)}


def as_words(settings: type, values: Mapping[str, Any], *, leave_out: Collection[str] = ()) -> list[str]:
    """Returns the words of a command line that give flags their values, where these are not the defaults."""
    return [
        word
        for name, each in flags_of(settings).items()
        if name not in leave_out and _as_list(values.get(name, each.default)) != _as_list(each.default)
        for word in _words(each, values[name])
    ]


def _words(each: Flag, value: Any) -> Iterator[str]:
    if each.arguments.get("action") == "store_true":
        yield f"--{each.name}"
    elif each.arguments.get("action") == "append":
        yield from (word for item in value for word in (f"--{each.name}", str(item)))
    elif each.is_tuple:
        yield from (f"--{each.name}", *map(str, value))
    else:
        shown = ",".join(map(str, value)) if isinstance(value, list) else value  # token ids
        yield from (f"--{each.name}", str(shown).lower() if isinstance(shown, bool) else str(shown))
