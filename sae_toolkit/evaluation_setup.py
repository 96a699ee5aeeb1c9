"""What to evaluate an SAE on: its own record of its training, unless the person says otherwise."""

from __future__ import annotations

import argparse
import logging
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from sae_toolkit.checkpoints import load_sae
from sae_toolkit.errors import UserError
from sae_toolkit.language_model import hook_width
from sae_toolkit.models import ModelSource, choose_device, find_model, load_tokenizer
from sae_toolkit.position_filter import PositionFilter
from sae_toolkit.text import HeldOutSplit, TextSource, open_text
from sae_toolkit.token_rows import ContextFormat, collect_evaluation_rows, special_tokens

# Dead features need tokens; losses need the model's upper layers and its logits, and settle with fewer.
TOKENS = 50_000
LOSS_TOKENS = 20_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that is ready to start."""

    sae: SAE[Any]
    device: str
    model: ModelSource
    hook_name: str
    text: TextSource
    held_out: HeldOutSplit | None
    context: ContextFormat
    rows_NT: np.ndarray
    n_loss_rows: int
    positions: PositionFilter
    special_token_ids: tuple[int, ...]


def prepare_evaluation(flags: argparse.Namespace) -> PreparedEvaluation:
    """Loads the SAE, checks that it fits the model and hook, and tokenizes the text.

    Raises:
        UserError: the evaluation could not succeed.
    """
    device = choose_device(flags.device)
    sae = load_sae(flags.sae_path, device)
    metadata = sae.cfg.metadata
    model_name = flags.model_name or metadata.model_name
    if model_name is None:
        raise UserError("--model_name: the SAE's cfg.json does not say which model it is for; name it")
    model = find_model(model_name)
    hook_name = _hook_name(sae, flags.layer)
    d_in = hook_width(model.config, hook_name)
    if sae.cfg.d_in != d_in:
        raise UserError(
            f"--sae_path {flags.sae_path}: an SAE of width {sae.cfg.d_in}, and {model.name} has {d_in} at {hook_name};"
            " give the model that it was trained on"
        )
    context = ContextFormat(
        context_size=flags.context_length or metadata.get("context_size", 128),
        prepend_bos=metadata.get("prepend_bos", True),
        sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        disable_concat_sequences=metadata.get("disable_concat_sequences", False),
    )
    if model.max_context is not None and context.context_size > model.max_context:
        raise UserError(
            f"--context_length {context.context_size}: {model.name} was made for contexts of at most"
            f" {model.max_context}"
        )
    text, held_out = _open_text(sae, flags)
    tokenizer = load_tokenizer(model)
    positions = _trained_positions(sae, tokenizer)
    usable = context.context_size - positions.skip_positions
    if usable < 1:
        raise UserError(f"--context_length {context.context_size}: the SAE skips {positions.skip_positions} positions")
    rows_NT = collect_evaluation_rows(
        text,
        tokenizer,
        context,
        held_out,
        n_rows=flags.num_samples or math.ceil(1.05 * TOKENS / usable),
        seed=flags.seed,
    )
    log.debug("%d contexts of %d tokens; %s", *rows_NT.shape, positions)
    return PreparedEvaluation(
        sae,
        device,
        model,
        hook_name,
        text,
        held_out,
        context,
        rows_NT,
        flags.num_samples or math.ceil(LOSS_TOKENS / usable),
        positions,
        special_tokens(True, tokenizer),
    )


def _hook_name(sae: SAE[Any], layer: int | None) -> str:
    """The SAE's own hook, at the layer that was asked for."""
    hook_name = sae.cfg.metadata.hook_name
    if hook_name is None:
        if layer is None:
            raise UserError("--layer: the SAE's cfg.json does not say which hook it is for; name the layer")
        return f"blocks.{layer}.hook_resid_post"
    if layer is None:
        return hook_name
    at_layer = re.sub(r"\.\d+(?=\.|$)", f".{layer}", hook_name, count=1)
    if at_layer != hook_name:
        log.warning("--layer %d: the SAE was trained at %s; evaluating it at %s", layer, hook_name, at_layer)
    return at_layer


def _open_text(sae: SAE[Any], flags: argparse.Namespace) -> tuple[TextSource, HeldOutSplit | None]:
    """Opens the text, and says which of its documents the SAE did not train on.

    The data set of the training is read as the training read it, and only its held-out documents are used.
    Of another one, the split made for testing is taken.
    """
    metadata = sae.cfg.metadata
    name = flags.dataset or metadata.dataset_path
    if not name:
        raise UserError("--dataset: the SAE's cfg.json does not say what it was trained on; name a data set")
    is_own = name == metadata.dataset_path
    source = open_text(
        name,
        flag="--dataset",
        config=flags.dataset_config or (metadata.dataset_config if is_own else None),
        split=flags.dataset_split or (metadata.dataset_split if is_own else None),
        column=flags.text_column or (metadata.text_column if is_own else None),
        preferred_splits=("train",) if is_own else ("test", "validation", "train"),
        fallback=flags.fallback_dataset,
    )
    if is_own and metadata.fallback_from:
        source = replace(source, fallback_from=metadata.fallback_from)
    if is_own and metadata.dataset_split is None:
        log.warning("the SAE's cfg.json does not say which documents it trained on: these may be among them")
        return source, None
    trained_on = (metadata.dataset_path, metadata.dataset_config, metadata.dataset_split)
    if (source.name, source.config, source.split) != trained_on:
        return source, None
    if not metadata.held_out_fraction:
        raise UserError(f"--dataset {name}: nothing of it was held out of the SAE's training; name another data set")
    return source, HeldOutSplit(metadata.held_out_fraction, metadata.held_out_seed)


def _trained_positions(sae: SAE[Any], tokenizer: PreTrainedTokenizerBase) -> PositionFilter:
    metadata = sae.cfg.metadata
    return PositionFilter(
        special_tokens(metadata.get("exclude_special_tokens", False), tokenizer),
        (metadata.seqpos_slice or (None,))[0] or 0,
        metadata.max_activation_norm,
    )
