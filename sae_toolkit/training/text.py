"""The text of a run: reading it at the start, or from the run's directory."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sae_lens import LanguageModelSAERunnerConfig
from transformers import PreTrainedTokenizerBase

from sae_toolkit.evaluation.text import rows_of_evaluation
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.model.text_checks import check_fits_text, check_token_ids
from sae_toolkit.settings.evaluation import EvaluationTextSettings
from sae_toolkit.settings.training import TextSettings, TrainingSettings
from sae_toolkit.steps.activation_sample import held_out_tokens
from sae_toolkit.steps.calibration import has_calibration
from sae_toolkit.text.chat import by_chat_template
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import (
    ContextFormat,
    collect_evaluation_rows,
    collect_training_rows,
    special_tokens,
    split_marks,
)
from sae_toolkit.text.sources import HeldOutSplit, TextSource, open_text
from sae_toolkit.training.directory import ASSISTANT, HELD_OUT, HELD_OUT_ASSISTANT, TOKENS, RunDirectory

log = logging.getLogger(__name__)

_TOKENS_OF_READING, _LEAST_ROWS_OF_READING = 4096, 4
_LEAST_SPOKEN = 1 / 16  # share of the assistant's tokens, so that held-out text does not take most of a run


@dataclass(frozen=True)
class RunText:
    """A text, and its tokens as in `PreparedRun`."""

    text: TextSource
    rows_NT: np.ndarray
    assistant_NT: np.ndarray | None
    held_out_NT: np.ndarray | None = None
    held_out_assistant_NT: np.ndarray | None = None


def held_out_split(settings: TrainingSettings) -> HeldOutSplit:
    """Returns the split that decides which documents are held out of a training."""
    return HeldOutSplit(settings.text.held_out_fraction, settings.held_out_seed)


def kept_positions(settings: TextSettings, text: TextSource, tokenizer: PreTrainedTokenizerBase) -> PositionFilter:
    """Returns the positions of a text that are trained on, massive activations included."""
    return PositionFilter(
        special_tokens(settings.exclude_special_tokens, tokenizer, is_chat=text.is_chat),
        settings.skip_positions,
        chat_tokens=settings.chat_tokens if text.is_chat else None,
    )


def read_text(
    settings: TrainingSettings,
    cfg: LanguageModelSAERunnerConfig[Any],
    model: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
) -> RunText:
    """Reads the text to train on, and held-out text if the run measures or calibrates on any.

    Raises:
        UserError: the text cannot be read, is too small, or has tokens that the model does not have.
    """
    chosen = settings.text
    text = open_text(
        chosen.dataset_path,
        flag="--dataset_path",
        config=chosen.dataset_config,
        split=chosen.dataset_split,
        column=chosen.text_column,
        streaming=chosen.streaming,
        fallback=chosen.fallback_dataset,
    )
    check_fits_text(model, text.name, cfg.context_size, "--dataset_path", "--context_size")
    context = ContextFormat(
        cfg.context_size, cfg.prepend_bos, cfg.sequence_separator_token, cfg.disable_concat_sequences
    )
    text = by_chat_template(text, tokenizer, chosen.chat_tokens, flag="--dataset_path", model_name=model.name)
    if text.sample:
        log.info("%s: %s", text.name, text.described(with_sample=True))
    held_out, positions = held_out_split(settings), kept_positions(chosen, text, tokenizer)
    marked_NT = collect_training_rows(
        text, tokenizer, context, positions, held_out, training_tokens=cfg.training_tokens, epochs=chosen.epochs
    )
    read = RunText(text, *split_marks(marked_NT, positions))
    check_token_ids(read.rows_NT, model, f"--dataset_path {text.name}")
    usable = cfg.context_size - positions.skip_positions
    spoken = 1.0 if read.assistant_NT is None else max(float(read.assistant_NT.mean()), _LEAST_SPOKEN)
    if n_rows := _held_out_rows(settings, cfg, usable * spoken):
        # The rows that the evaluation measures on where nobody chooses others, so that L0 is k there. Which they are
        # does not depend on the seed of the run.
        eval_every = settings.recording.eval_every
        marked_NT, _ = collect_evaluation_rows(
            text,
            tokenizer,
            context,
            held_out,
            n_rows=max(n_rows, rows_of_evaluation(usable)),
            seed=EvaluationTextSettings.seed,
            flag=f"--eval_every {eval_every}, --dataset_path",
            required=eval_every > 0,
        )
        if not len(marked_NT):
            log.warning(
                "%s: no held-out document fills a context of %d tokens: nothing of it is left to evaluate on; use more"
                " text, or raise --held_out_fraction",
                *(text.name, cfg.context_size),
            )
        else:
            held_out_NT, held_out_assistant_NT = split_marks(marked_NT[:n_rows], positions)
            read = replace(read, held_out_NT=held_out_NT, held_out_assistant_NT=held_out_assistant_NT)
    return read


def rows_of_reading(context_size: int) -> int:
    """Returns how many rows of held-out text are measured on each time during a training."""
    return max(_TOKENS_OF_READING // context_size, _LEAST_ROWS_OF_READING)


def _held_out_rows(settings: TrainingSettings, cfg: LanguageModelSAERunnerConfig[Any], usable: float) -> int:
    """Returns how many rows of held-out text a run needs, for its readings and for the calibration of its L0.

    Args:
        usable: how many positions of a row are kept, in the mean.
    """
    compares_seeds = settings.optimization.seeds > 1 and settings.text.held_out_fraction > 0
    n_rows = rows_of_reading(cfg.context_size) if settings.recording.eval_every or compares_seeds else 0
    if settings.text.held_out_fraction and has_calibration(cfg.sae, settings.sae.target_l0):
        n_rows = max(n_rows, math.ceil(held_out_tokens(cfg.training_tokens) / usable))
    return n_rows


def saved_text(directory: RunDirectory) -> RunText:
    """Returns the text that the directory of a run has kept."""
    rows_NT = directory.array(TOKENS)
    assert rows_NT is not None  # claiming the directory has checked its files
    others = (directory.array(name) for name in (ASSISTANT, HELD_OUT, HELD_OUT_ASSISTANT))
    return RunText(directory.text(), rows_NT, *others)
