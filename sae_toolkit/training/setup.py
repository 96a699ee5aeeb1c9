"""Prepares a run from its settings, before anything large is loaded and before anything is written."""

from __future__ import annotations

import json
import logging
import secrets
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import LanguageModelSAERunnerConfig

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import UserError
from sae_toolkit.model.devices import choose_device, choose_llm_device, choose_lm_dtype, out_of_memory_answered
from sae_toolkit.model.hook_width import full_hook_name, hook_width
from sae_toolkit.model.loading import ModelSource, find_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.training import ModelSettings, SAESettings, TrainingSettings
from sae_toolkit.training.configuration import build_runner_configs
from sae_toolkit.training.directory import RunDirectory, find_resumption
from sae_toolkit.training.initial_sae import InitialSAE, open_initial_saes
from sae_toolkit.training.needs import existing
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.recipe import with_recipe
from sae_toolkit.training.text import RunText, held_out_split, kept_positions, read_text, saved_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _FoundByRank0:
    """Results of rank 0, which the other ranks use too.

    Args:
        directory: directory of the run.
        resume_from: checkpoint to resume from; None to begin at the first step.
        initialized_from: `PreparedRun.initialized_from`.
        read: the text that is trained on.
    """

    directory: Path
    resume_from: Path | None
    initialized_from: Mapping[str, Mapping[str, Any]]
    read: RunText


def prepare_run(settings: TrainingSettings, ranks: Ranks = ALONE) -> PreparedRun:
    """Checks that settings, model, data and output directory fit together, and tokenizes the training text.

    Later stages do not read the settings. They take all values from the `PreparedRun`.

    Rank 0 prepares the run before the other ranks, which use its tokens. So a mistake is reported once, and the text is
    read once.

    Raises:
        UserError: settings, model, data and output directory do not fit together.
    """
    run = _prepare_run(settings, ranks) if ranks.is_main else None
    if not ranks.is_alone:
        found = _broadcast(run, ranks)
        run = run or _prepare_run(settings, ranks, found)
    assert run is not None
    return run


def _broadcast(run: PreparedRun | None, ranks: Ranks) -> _FoundByRank0:
    """Sends the results of rank 0 to all ranks, and returns them. `run` is the run on rank 0, and None elsewhere."""
    sent: Any = None
    if run:
        text = replace(run.text, read=tuple)  # the function that reads the documents cannot be sent
        sent = (
            run.directory,
            run.resume_from,
            run.initialized_from,
            text,
            run.rows_NT.shape,
            run.assistant_NT is not None,
            [None if rows is None else np.array(rows) for rows in (run.held_out_NT, run.held_out_assistant_NT)],
        )
    directory, resume_from, initialized_from, text, shape, has_assistant, held_out = ranks.broadcast(sent)
    rows_NT = torch.from_numpy(np.array(run.rows_NT).view(np.int32) if run else np.empty(shape, np.int32))
    ranks.broadcast_tensor(rows_NT)
    assistant_NT = None
    if has_assistant:
        assistant = np.empty(shape, np.uint8) if run is None else np.array(run.assistant_NT, np.uint8)
        ranks.broadcast_tensor(torch.from_numpy(assistant))
        assistant_NT = assistant.astype(bool)
    read = RunText(text, rows_NT.numpy().view(np.uint32), assistant_NT, *held_out)
    return _FoundByRank0(directory, resume_from, initialized_from, read)


def _prepare_run(settings: TrainingSettings, ranks: Ranks, found: _FoundByRank0 | None = None) -> PreparedRun:
    model, widths = find_model_at_hooks(settings)
    recipe = with_recipe(settings, max(widths.values()), ranks.size)
    settings = recipe.settings
    check_world_size(settings, ranks.size)
    device, llm_device = _choose_devices(settings.model, ranks)
    if found:
        directory, resume_from = RunDirectory(found.directory), found.resume_from
    else:
        directory, resume_from = _choose_directory(settings)
    try:
        cfgs = _build_configurations(settings, widths, device, directory.path, ranks)
        initial_saes, initialized_from = _initial_saes(settings, cfgs, directory, resume_from, found)
        tokenizer = load_tokenizer(model)
        what = f"--training_tokens {settings.optimization.training_tokens}: reading the text"
        with out_of_memory_answered(what, "lower it, or free memory"):
            if found:
                read = found.read
            elif directory.path.exists():
                read = saved_text(directory)
                if (every := settings.recording.eval_every) and read.held_out_NT is None:
                    raise UserError(
                        f"--eval_every {every}: the run in {directory.path} kept no held-out text; leave the flag out,"
                        " or start a new run"
                    )
            else:
                read = read_text(settings, cfgs[0], model, tokenizer)
        for cfg in cfgs:
            cfg.dataset_path, cfg.use_chat_formatting = read.text.name, read.text.is_chat
    except BaseException:
        directory.release()
        raise
    return PreparedRun(
        cfgs=cfgs,
        hook_flag=settings.model.hook_flag,
        model=model,
        llm_device=llm_device,
        lm_dtype=choose_lm_dtype(settings.model.lm_dtype, llm_device),
        n_devices=settings.model.n_devices,
        cache_directory=None if (cache := settings.model.cache_activations) is None else Path(cache),
        text=read.text,
        rows_NT=read.rows_NT,
        assistant_NT=read.assistant_NT,
        held_out=held_out_split(settings),
        held_out_NT=read.held_out_NT,
        held_out_assistant_NT=read.held_out_assistant_NT,
        epochs=settings.text.epochs,
        positions=kept_positions(settings.text, read.text, tokenizer),
        max_norm_multiple=settings.text.max_activation_norm_multiple or None,
        sae=settings.sae,
        optimization=settings.optimization,
        run_directory=directory,
        resume_from=resume_from,
        initial_saes=initial_saes,
        initialized_from=initialized_from,
        saving=settings.run,
        recording=settings.recording,
        flags=settings.as_flags(),
        recipe=recipe.reasons,
        ranks=ranks,
    )


def _build_configurations(
    settings: TrainingSettings, widths: dict[str, int], device: str, directory: Path, ranks: Ranks
) -> list[LanguageModelSAERunnerConfig[Any]]:
    """Builds SAELens's configuration of each SAE, and checks that device and ranks can train it."""
    if torch.device(device).type == "mps":
        _check_mps(settings.sae)
    cfgs = build_runner_configs(settings, widths, device=device, run_id=directory.name)
    if cfgs[0].activations_mixing_fraction == 0 and not ranks.is_alone:
        raise UserError(
            "--set activations_mixing_fraction=0: without mixing, each batch would be on a single process; leave it out"
        )
    if settings.sae.shard_features:
        _check_shards(settings.sae, cfgs, ranks)
    for cfg in cfgs:
        cfg.checkpoint_path = str(directory)  # a run that is resumed may have been moved
    return cfgs


def _check_mps(sae: SAESettings) -> None:
    """Refuses what needs float64, which mps does not have, or another dtype than float32."""
    if sae.dtype != "float32":
        raise UserError(f"--dtype {sae.dtype}: on mps only float32 is supported; leave it out")
    if sae.architecture in ("batchtopk", "matryoshka_batchtopk"):
        raise UserError(
            f"--architecture {sae.architecture}: SAELens keeps its threshold in float64, which mps does not have; use"
            " topk, or --device cpu --llm_device mps"
        )
    if sae.normalize_activations == "covariance_whitening":
        raise UserError(
            "--normalize_activations covariance_whitening: SAELens estimates it in float64, which mps does not have;"
            " use --device cpu --llm_device mps"
        )


def _initial_saes(
    settings: TrainingSettings,
    cfgs: Sequence[LanguageModelSAERunnerConfig[Any]],
    directory: RunDirectory,
    resume_from: Path | None,
    found: _FoundByRank0 | None,
) -> tuple[dict[str, InitialSAE], Mapping[str, Mapping[str, Any]]]:
    """Returns `PreparedRun.initial_saes` and `PreparedRun.initialized_from`."""
    name = settings.sae.init_from
    if found or name is None:
        return {}, found.initialized_from if found else {}
    before = directory.initialized_from()
    if resume_from is not None:
        return {}, before
    what = f"--init_from {name}: loading it"
    with out_of_memory_answered(what, "free memory"):
        initial_saes = open_initial_saes(name, {cfg.hook_name: cfg.sae for cfg in cfgs})
    initialized_from = {hook_name: each.lineage for hook_name, each in initial_saes.items()}
    if before and _weights(before) != _weights(initialized_from):
        raise UserError(f"--init_from {name}: not the weights that the run was started with; start a new run")
    return initial_saes, initialized_from


def _weights(initialized_from: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {hook_name: each["weights_sha256"] for hook_name, each in initialized_from.items()}


def _choose_devices(settings: ModelSettings, ranks: Ranks) -> tuple[str, str]:
    """Returns the devices of the SAE and of the language model."""
    device = choose_device(settings.device, ranks.local_rank)
    llm_device = choose_llm_device(settings.llm_device, settings.n_devices, device)
    if not ranks.is_alone:
        if settings.llm_device is not None or settings.n_devices > 1:
            raise UserError(
                "--llm_device, --n_devices: each of several processes has one GPU for the language model and the SAE;"
                " leave them out"
            )
        if ":" in settings.device or device == "mps":
            raise UserError(f"--device {settings.device}: each of several processes has a GPU of its own; use cuda")
    return device, llm_device


def find_model_at_hooks(settings: TrainingSettings) -> tuple[ModelSource, dict[str, int]]:
    """Returns the language model, and the width of the activations at each hook, by the hook's full name.

    Raises:
        UserError: there is no such model or hook, a hook is named twice, or the contexts are too long for the model.
    """
    chosen, context_size = settings.model, settings.text.context_size
    model = find_model(
        chosen.model_name, _model_kwargs(settings.optimization.set), trust_remote_code=chosen.trust_remote_code
    )
    widths: dict[str, int] = {}
    for name in chosen.all_hook_names:
        width = hook_width(model.config, name, model.trust_remote_code, chosen.hook_flag)
        full_name = full_hook_name(model.config, name, model.trust_remote_code)
        if full_name in widths:
            raise UserError(f"{chosen.hook_flag} {name}: names {full_name} a second time; leave it out")
        widths[full_name] = width
    if model.max_context is not None and context_size > model.max_context:
        raise UserError(
            f"--context_size {context_size}: {model.name} was made for at most {model.max_context}; lower it"
        )
    return model, widths


def _choose_directory(settings: TrainingSettings) -> tuple[RunDirectory, Path | None]:
    """Returns the directory of the run, and the checkpoint to resume from; None to begin at the first step."""
    _check_writable(Path(settings.run.checkpoint_path))
    new = RunDirectory(settings.output_directory / _new_run_id())
    return find_resumption(settings.run.resume, settings.output_directory) or (new, None)


def _check_shards(sae: SAESettings, cfgs: Sequence[LanguageModelSAERunnerConfig[Any]], ranks: Ranks) -> None:
    if ranks.is_alone:
        log.warning("--shard_features: the only process holds all features; ./run_simple.sh NUM_GPUS starts several")
    for cfg in cfgs:
        if cfg.compile_sae:
            raise UserError("--shard_features, --set compile_sae=true: shards are not compiled; leave one of them out")
        if cfg.sae.d_sae % ranks.size:
            raise UserError(
                f"--shard_features: {ranks.size} processes do not divide {cfg.sae.d_sae:,} features evenly; use another"
                f" number of processes, or another value than {' '.join(sae.width_words)}"
            )


def _model_kwargs(assignments: Sequence[str]) -> dict[str, Any]:
    """Returns the value of `--set model_from_pretrained_kwargs=...`, which finding the model needs."""
    for assignment in reversed(assignments):
        key, _, value = assignment.partition("=")
        if key == "model_from_pretrained_kwargs":
            try:
                kwargs = json.loads(value)
            except json.JSONDecodeError:
                kwargs = None
            if not isinstance(kwargs, dict):
                raise UserError(f'--set {assignment}: must be a JSON object, such as {{"revision": "main"}}')
            return kwargs
    return {}


def _new_run_id() -> str:
    """Returns eight random lower-case letters and digits, which is the form of wandb's run ids."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _check_writable(directory: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=existing(directory)):
            pass
    except OSError as error:
        raise UserError(f"--checkpoint_path {directory}: cannot be written to ({error.strerror})") from None
