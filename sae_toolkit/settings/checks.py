"""The flags of a training run held against one another, as far as that goes without the model and the data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sae_toolkit.errors import UserError

_SPARSITY_WEIGHTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}

# Tokens of a batch that a process has on average: so many that it has none once in 10^13 batches.
_LEAST_SHARE = 32


def check_paths(flags: argparse.Namespace) -> None:
    """Refuses names that no file system takes, and that raise where one is asked.

    Raises:
        UserError: there is one.
    """
    for name in "model_name dataset_path fallback_dataset cache_activations checkpoint_path output_name resume".split():
        value = getattr(flags, name)
        longest = 255 - len("_12345678") if name == "output_name" else 255
        if value is not None and any(len(os.fsencode(part)) > longest for part in value.split("/")):
            raise UserError(f"--{name} {value[:40]}...: a file's name can have at most {longest} bytes")


def check_flags(flags: argparse.Namespace) -> None:
    """Holds the flags of one run against one another.

    Raises:
        UserError: two of them cannot both be meant.
    """
    if flags.normalize_activations == "expected_average_only_out":
        raise UserError(
            "--normalize_activations expected_average_only_out: SAELens has no such mode;"
            " use expected_average_only_in, whose scale is folded into the saved weights on both sides"
        )
    if Path(flags.output_name).name != flags.output_name or flags.output_name in ("", ".", ".."):
        raise UserError(f"--output_name {flags.output_name!r}: must be a plain name, without a path")
    hooks = [name for name in ("hook_name", "hook_names", "layers") if getattr(flags, name) is not None]
    if len(hooks) > 1:
        raise UserError(f"--{hooks[0]} and --{hooks[1]}: only one of them can say where SAEs are trained")
    for name in ("hook_names", "layers"):
        if (given := getattr(flags, name)) and len(set(given)) < len(given):
            raise UserError(f"--{name} {' '.join(map(str, given))}: one stands there twice")
    if flags.shard_features and (
        flags.architecture not in ("topk", "batchtopk") or flags.dtype not in ("float32", "float64")
    ):
        raise UserError(
            f"--shard_features: for --architecture topk and batchtopk in float32 or float64, not {flags.architecture}"
            f" in {flags.dtype}; leave it out"
        )
    if flags.eval_every and flags.held_out_fraction == 0:
        raise UserError(f"--eval_every {flags.eval_every}: --held_out_fraction 0 leaves no text to measure on; use 0.1")
    if flags.eval_every and flags.shard_features:
        raise UserError(
            f"--eval_every {flags.eval_every}, --shard_features: no process holds all features; leave one of them out"
        )
    if flags.target_l0 is not None:
        _check_target_l0(flags)
    if flags.skip_positions >= flags.context_size:
        raise UserError(
            f"--skip_positions {flags.skip_positions}: leaves nothing of a context of {flags.context_size} tokens"
        )
    n_steps = flags.training_tokens // flags.train_batch_size_tokens  # as SAELens counts them
    if flags.training_tokens < flags.train_batch_size_tokens:
        raise UserError(
            f"--training_tokens {flags.training_tokens}: less than one batch of"
            f" --train_batch_size_tokens {flags.train_batch_size_tokens}"
        )
    if flags.lr_warm_up_steps + flags.lr_decay_steps > n_steps:
        raise UserError(
            f"--lr_warm_up_steps {flags.lr_warm_up_steps} and --lr_decay_steps {flags.lr_decay_steps}:"
            f" together more than the run's {n_steps} steps"
        )


def _check_target_l0(flags: argparse.Namespace) -> None:
    if flags.architecture not in _SPARSITY_WEIGHTS:
        instead = "; --k is its L0" if "topk" in flags.architecture else ""
        raise UserError(f"--target_l0 {flags.target_l0:g}: {flags.architecture} has no sparsity weight{instead}")
    weight = _SPARSITY_WEIGHTS[flags.architecture]
    if getattr(flags, weight) == 0:
        raise UserError(f"--{weight} 0: nothing to adjust for --target_l0; start with another, such as 1")


def check_world_size(flags: argparse.Namespace, size: int) -> None:
    """Holds the sizes that are of all processes together against how many there are.

    Raises:
        UserError: they do not share them evenly.
    """
    batch, contexts = flags.train_batch_size_tokens, flags.store_batch_size_prompts
    if batch < _LEAST_SHARE * size and size > 1:
        raise UserError(
            f"--train_batch_size_tokens {batch}: less than {_LEAST_SHARE} for each of {size} processes; use"
            f" {_LEAST_SHARE * size} or more"
        )
    if batch % size:
        raise UserError(
            f"--train_batch_size_tokens {batch}: {size} processes do not divide it; use {batch // size * size}"
        )
    if contexts < size:
        raise UserError(
            f"--store_batch_size_prompts {contexts}: less than the {size} processes that share them; use {8 * size}"
        )
