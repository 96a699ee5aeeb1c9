"""What a further evaluation returns, and what it shows of that in the terminal and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Measured:
    """The results of a further evaluation for one SAE.

    Args:
        results: values that JSON stores.
        of_features: a number for each feature [F], by the title of its column in the feature browser.
    """

    results: Mapping[str, Any]
    of_features: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """One table of results, and how to read it.

    Args:
        title: what was measured.
        columns: titles of the columns.
        rows: cells, as many in each row as there are columns.
        how_to_read: one or a few sentences that say what the numbers mean, and what they do not.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    how_to_read: str
