"""Checks of the settings of a training run that need neither the model nor the data."""

from __future__ import annotations

import os
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.settings.training import ModelSettings, OptimizationSettings, SAESettings, TrainingSettings

SPARSITY_WEIGHTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}

# Fields of --set that say what random weights are.
OF_RANDOM_WEIGHTS = {"sae.decoder_init_norm", "sae.jumprelu_init_threshold"}

_LONGEST_NAME = 255  # bytes, on Linux and macOS

# A rank must have at least this many tokens of a batch on average. With 32, a rank has no token of one batch in 10^13.
LEAST_SHARE = 32


def check_paths(settings: TrainingSettings) -> None:
    """Checks the lengths of file names. Names that are too long for the file system would end in a traceback.

    Raises:
        UserError: a name is too long.
    """
    run, model, text = settings.run, settings.model, settings.text
    for name, value, longest in (
        ("model_name", model.model_name, _LONGEST_NAME),
        ("dataset_path", text.dataset_path, _LONGEST_NAME),
        ("fallback_dataset", text.fallback_dataset, _LONGEST_NAME),
        ("cache_activations", model.cache_activations, _LONGEST_NAME),
        ("checkpoint_path", run.checkpoint_path, _LONGEST_NAME),
        ("output_name", run.output_name, _LONGEST_NAME - len("_12345678")),
        ("resume", run.resume, _LONGEST_NAME),
        ("init_from", settings.sae.init_from, _LONGEST_NAME),
    ):
        if value is not None and any(len(os.fsencode(part)) > longest for part in value.split("/")):
            raise UserError(f"--{name} {value[:40]}...: a file's name can have at most {longest} bytes; shorten it")


def check_settings(settings: TrainingSettings) -> None:
    """Checks that the settings of a run fit together. What a recipe may choose is left to `check_chosen`.

    Raises:
        UserError: they do not.
    """
    name = settings.run.output_name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"--output_name {name!r}: must be a plain name; --checkpoint_path is for the path")
    _check_device_memory(settings)
    _check_hooks(settings.model)
    if "architecture" not in settings.chosen:
        _check_sae(settings.sae)
    _check_held_out(settings)
    skip_positions, context_size = settings.text.skip_positions, settings.text.context_size
    if skip_positions >= context_size:
        raise UserError(f"--skip_positions {skip_positions}: leaves nothing of a context of {context_size}; lower it")
    _check_seeds(settings)
    _check_finetuning(settings)
    if not settings.chosen:
        check_chosen(settings)


def _check_seeds(settings: TrainingSettings) -> None:
    if (n := settings.optimization.seeds) == 1:
        return
    if len(settings.model.all_hook_names) > 1:
        raise UserError(f"--seeds {n}: for SAEs at one hook, not at several; train at one hook at a time")
    if settings.sae.init_from is not None:
        raise UserError(
            f"--seeds {n}, --init_from {settings.sae.init_from}: SAEs with the same first weights would all be the"
            " same; leave one of the two out"
        )
    if settings.optimization.finetune_loss != "none":
        raise UserError(
            f"--seeds {n}, --finetune_loss {settings.optimization.finetune_loss}: one SAE at a time can be fine-tuned;"
            " leave one of the two out"
        )


def _check_finetuning(settings: TrainingSettings) -> None:
    optimization = settings.optimization
    loss, fraction = optimization.finetune_loss, optimization.finetune_fraction
    if loss == "none":
        if fraction != OptimizationSettings.finetune_fraction:
            usual = OptimizationSettings.finetune_fraction
            raise UserError(
                f"--finetune_fraction {fraction:g}: nothing to do without --finetune_loss; add --finetune_loss kl or"
                f" ce, or --finetune_fraction {usual:g}"
            )
        return
    flag = f"--finetune_loss {loss}"
    if len(settings.model.all_hook_names) > 1:
        raise UserError(f"{flag}: for an SAE at one hook, not at several; train one at a time")
    if settings.sae.shard_features:
        raise UserError(f"{flag}, --shard_features: fine-tuning needs all features in one process; leave one out")
    if settings.model.n_devices > 1:
        raise UserError(
            f"{flag}, --n_devices {settings.model.n_devices}: fine-tuning needs the language model on one device; leave"
            " one of them out"
        )


def _check_device_memory(settings: TrainingSettings) -> None:
    if (size := settings.run.device_memory) is None:
        return
    if not settings.run.dry_run:
        raise UserError(f"--device_memory {size}: shows what would fit, and trains nothing; add --dry_run to it")
    if not settings.model.is_on_one_gpu:
        raise UserError(
            f"--device_memory {size}: for one CUDA device that holds the language model and the SAE; leave out --device"
            " cpu, --llm_device and --n_devices"
        )


def _check_hooks(model: ModelSettings) -> None:
    given = [name for name in ("hook_name", "hook_names", "layers") if getattr(model, name) is not None]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: only one of them can choose the hooks; leave out the others")
    for name in ("hook_names", "layers"):
        if (values := getattr(model, name)) and len(set(values)) < len(values):
            raise UserError(f"--{name} {' '.join(map(str, values))}: one of them is given twice; name each once")


def _check_sae(sae: SAESettings) -> None:
    if sae.normalize_activations == "expected_average_only_out":
        raise UserError(
            "--normalize_activations expected_average_only_out: SAELens has no such mode; use"
            " expected_average_only_in, with which the saved SAE takes and returns activations that are not scaled"
        )
    if sae.b_dec_init_method == "mean":
        if sae.init_from is not None:
            raise UserError(
                f"--b_dec_init_method mean: for random weights, and --init_from {sae.init_from} gives others; leave one"
                " of them out"
            )
        if sae.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            raise UserError(
                f"--b_dec_init_method mean, --normalize_activations {sae.normalize_activations}: each activation is"
                " scaled by itself, and no mean is measured there; use expected_average_only_in"
            )
    if sae.shard_features and (
        sae.architecture not in ("topk", "batchtopk") or sae.dtype not in ("float32", "float64")
    ):
        raise UserError(
            f"--shard_features: for --architecture topk and batchtopk in float32 or float64, not {sae.architecture}"
            f" in {sae.dtype}; leave it out"
        )
    if sae.target_l0 is None:
        return
    if sae.architecture not in SPARSITY_WEIGHTS:
        instead = "; --k is its L0, so set that" if "topk" in sae.architecture else "; leave it out"
        raise UserError(f"--target_l0 {sae.target_l0:g}: {sae.architecture} has no sparsity weight{instead}")
    weight = SPARSITY_WEIGHTS[sae.architecture]
    if getattr(sae, weight) == 0:
        raise UserError(f"--{weight} 0: nothing to adjust for --target_l0; start above 0, such as with 1")


def _check_held_out(settings: TrainingSettings) -> None:
    eval_every = settings.recording.eval_every
    if eval_every and settings.text.held_out_fraction == 0:
        raise UserError(f"--eval_every {eval_every}: --held_out_fraction 0 leaves no text to measure on; use 0.1")
    if eval_every and settings.sae.shard_features:
        raise UserError(
            f"--eval_every {eval_every}, --shard_features: measuring needs all features, and no process holds all of"
            " them; leave one of the flags out"
        )


def check_chosen(settings: TrainingSettings) -> None:
    """Checks that the flags that a recipe can choose fit together, and fit the others.

    Raises:
        UserError: they do not.
    """
    _check_sae(settings.sae)
    optimization, context_size = settings.optimization, settings.text.context_size
    tokens, batch = optimization.training_tokens, optimization.train_batch_size_tokens
    if tokens < batch:
        raise UserError(f"--training_tokens {tokens}: less than one batch, --train_batch_size_tokens {batch}; raise it")
    n_steps = tokens // batch  # as SAELens counts them
    warm_up, decay = optimization.lr_warm_up_steps, optimization.lr_decay_steps
    if warm_up + decay > n_steps:
        raise UserError(
            f"--lr_warm_up_steps {warm_up} and --lr_decay_steps {decay}: together more than the {n_steps} steps of the"
            " run; lower them"
        )
    if optimization.finetune_loss != "none" and context_size > batch:
        raise UserError(
            f"--finetune_loss {optimization.finetune_loss}: takes whole contexts, and --context_size {context_size} is"
            f" more than --train_batch_size_tokens {batch}; use a batch of {context_size} or more"
        )


def check_world_size(settings: TrainingSettings, size: int) -> None:
    """Checks that the sizes that are given for all ranks together can be divided among the ranks.

    Args:
        size: number of ranks.

    Raises:
        UserError: they cannot be divided.
    """
    if settings.optimization.finetune_loss != "none" and size > 1:
        raise UserError(
            f"--finetune_loss {settings.optimization.finetune_loss}: for a single process, not for {size}; run"
            " sae_lens_train.py without run_simple.sh, or leave it out"
        )
    batch, contexts = settings.optimization.train_batch_size_tokens, settings.model.store_batch_size_prompts
    if batch < LEAST_SHARE * size and size > 1:
        raise UserError(
            f"--train_batch_size_tokens {batch}: less than {LEAST_SHARE} for each of {size} processes; use"
            f" {LEAST_SHARE * size} or more"
        )
    if batch % size:
        raise UserError(
            f"--train_batch_size_tokens {batch}: {size} processes do not divide it; use {batch // size * size}"
        )
    if contexts < size:
        raise UserError(
            f"--store_batch_size_prompts {contexts}: less than the {size} processes that share them; use {8 * size}"
        )
