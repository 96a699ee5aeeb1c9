"""An evaluation that is ready to start: SAEs, model, text, and which rows are used for what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from sae_toolkit.model.loading import ModelSource
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat
from sae_toolkit.text.sources import HeldOutSplit, TextSource


@dataclass(frozen=True)
class EvaluatedSAE:
    """An SAE, the file that it was loaded from, and the positions that it is measured at.

    Args:
        max_norm_multiple: the norm limit as a multiple of the median norm, as long as the median is not measured.
            `positions` then has no limit. None if there is nothing to measure.
        sources: where `hook_name`, `exclude_special_tokens`, `skip_positions` and `max_activation_norm` come from:
            `flag`, `record` (the SAE's files), `--like` (the files of that SAE) or `default`. Empty during training.
        is_text_seen: whether the SAE's own files say that it may have been trained on documents of the text; None if
            they do not say what it was trained on.
    """

    file: SAEFile
    sae: SAE[Any]
    positions: PositionFilter
    max_norm_multiple: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    is_text_seen: bool | None = False


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that is ready to start: SAEs at one hook of one model, and the rows to measure all of them on.

    Losses are measured on the first `n_loss_rows` rows, reconstruction on the first `n_sae_rows`, firings on all.
    `assistant_NT` is True where the assistant speaks, if only what it says is measured on; otherwise it is None.
    """

    saes: tuple[EvaluatedSAE, ...]
    protocol: str
    device: str
    model: ModelSource
    tokenizer: PreTrainedTokenizerBase
    hook_name: str
    text: TextSource
    held_out: HeldOutSplit | None
    context: ContextFormat
    rows_NT: np.ndarray
    assistant_NT: np.ndarray | None
    unit_N: np.ndarray  # number of the independent unit of text that each row belongs to
    units: str  # what the units are: documents or sequences
    n_loss_rows: int
    n_sae_rows: int
    special_token_ids: tuple[int, ...]
    unscored_token_ids: tuple[int, ...]  # SAEBench's protocol leaves them out of averages
    features: tuple[int, ...]
    n_features: int
    seed: int

    def assistant_at(self, rows: slice) -> np.ndarray | None:
        """Returns `assistant_NT` of some of the rows."""
        return None if self.assistant_NT is None else self.assistant_NT[rows]
