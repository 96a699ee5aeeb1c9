"""Types of the values of flags: numbers within bounds, booleans, token ids, lengths of time, sizes of memory."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

_LARGEST = 10**15  # far above any sensible count, far below what overflows in a tensor's size


@dataclass(frozen=True)
class Interval:
    """A length of time or a number of tokens. An interval without both never ends."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Parses `90s`, `30min`, `2h`, a number of tokens, or 0.

        Raises:
            ValueError: the text is none of these.
        """
        found = re.fullmatch(r"(\d{1,15})(s|min|h)?", text, re.ASCII)
        if found is None:
            raise ValueError(text)
        number, unit = int(found[1]), found[2]
        if number == 0:
            return cls()
        return cls(tokens=number) if unit is None else cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[unit])

    @classmethod
    def checked(cls, text: str) -> str:
        """Returns the text, if `parse` accepts it."""
        try:
            cls.parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text}: must be a time or a number of tokens, such as 90s, 30min, 2h, 1000000 or 0"
            ) from None
        return text

    def is_over(self, seconds: float, tokens: int) -> bool:
        """Returns whether the interval is over after this many seconds and tokens."""
        return (self.seconds is not None and seconds >= self.seconds) or (
            self.tokens is not None and tokens >= self.tokens
        )


def _number(kind: type, wanted: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Returns a function that parses a number and checks it.

    Args:
        kind: int or float.
        wanted: what the number must be, in words, for the error message and docs/flags.md.
        holds: returns whether a number is what `wanted` says.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value > _LARGEST:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {_LARGEST:,}")
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")
        return value

    parse.__doc__ = wanted
    return parse


positive = _number(int, "a whole number of 1 or more", lambda v: v >= 1)
non_negative = _number(int, "a whole number of 0 or more", lambda v: v >= 0)
positive_float = _number(float, "a number above 0", lambda v: v > 0)
non_negative_float = _number(float, "a number of 0 or more", lambda v: v >= 0)
norm_multiple = _number(float, "0 or more than 1", lambda v: v == 0 or v > 1)
fraction = _number(float, "a number of 0 or more and below 1", lambda v: 0 <= v < 1)
share = _number(float, "a number above 0 and at most 1", lambda v: 0 < v <= 1)


def boolean(text: str) -> bool:
    """true or false"""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


def boolean_or_ids(text: str) -> bool | list[int]:
    """true, false, or token ids joined by commas"""
    if text.lower() in ("true", "false"):
        return boolean(text)
    try:
        return [non_negative(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text}: must be true, false, or token ids joined by commas") from None


def path_or_none(text: str) -> str | None:
    """a name, or none"""
    return None if text == "none" else text


_UNITS = {"mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}


def memory_bytes(text: str) -> int:
    """Returns the bytes of a size such as `24GB` or `79.1GiB`. Capital letters do not matter.

    Raises:
        ValueError: the text is no such size, or the size is 0.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([GM]i?B)", text, re.ASCII | re.IGNORECASE)
    n_bytes = round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if n_bytes == 0:
        raise ValueError(text)
    return n_bytes


def memory_size(text: str) -> str:
    """a size with its unit, in MB, MiB, GB or GiB"""
    try:
        memory_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be {memory_size.__doc__}, such as 24GB") from None
    return text


Positive = Annotated[int, positive]
NonNegative = Annotated[int, non_negative]
PositiveFloat = Annotated[float, positive_float]
NonNegativeFloat = Annotated[float, non_negative_float]
NormMultiple = Annotated[float, norm_multiple]
Fraction = Annotated[float, fraction]
Share = Annotated[float, share]
TrueOrFalse = Annotated[bool, boolean]
TrueFalseOrIds = Annotated[bool | list[int], boolean_or_ids]
IntervalText = Annotated[str, Interval.checked]
PathOrNone = Annotated[str | None, path_or_none]
MemorySize = Annotated[str, memory_size]
