"""The activations that all SAEs of a comparison are trained and measured on, computed once."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import TRAINING_FLAGS, TrainingSettings
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.run import Training, open_activations
from sae_toolkit.training.setup import prepare_run

_SETTINGS_FILENAME = "settings.json"
_SPARSIFY_ON = "sparsify_trains_on"  # beside the flags in the settings; older ones lack it
_LEAST_CONTEXTS = 10  # of each half, where learning rates are chosen on one half of the held-out documents
_preparing = threading.Lock()
# Flags that older comparisons do not record.
_DEFAULTS_OF_LATER = {name: each.default for name, each in TRAINING_FLAGS.items() if each.is_later}


@dataclass(frozen=True)
class Shared:
    """The data and settings that all SAEs of a comparison share.

    Args:
        words: the command line of sae_lens_train.py.
        settings: the same words, parsed.
        run: the same settings, prepared. The run itself is never started.
        directory: the directory of the comparison.
        reference: an untrained SAE, whose metadata names the text and the positions that all SAEs are measured on.
        at_a_time: how many trainings run at a time.
        threads: threads of each training; None if the libraries choose.
    """

    words: list[str]
    settings: TrainingSettings
    run: PreparedRun
    directory: Path
    reference: Path
    at_a_time: int = 1
    threads: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that give each training its share of the cores."""
        return {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}

    @property
    def n_steps(self) -> int:
        return -(-self.run.cfg.training_tokens // self.run.cfg.train_batch_size_tokens)

    def training(self, seed: int) -> Training:
        """Returns a training of sae_lens_train.py at its first step, to take batches from its stream."""
        words = [*self.words, "--seed", str(seed), "--held_out_seed", str(self.run.metadata()["held_out_seed"])]
        with _preparing:  # trainings that run at a time call it from threads
            run = _prepared(tuple(words))
            return Training(run, open_activations(run))


@lru_cache(maxsize=1)
def _prepared(words: tuple[str, ...]) -> PreparedRun:
    """Returns a run that is ready, and reads its text once for all trainings of the same seed."""
    return prepare_run(parse_training_flags(words))


def share(words: Sequence[str], directory: Path, highest_l0: int, *, halves: bool = False) -> Shared:
    """Prepares the data that all SAEs share, and computes the activations that the cache does not hold.

    Args:
        words: the command line of sae_lens_train.py.
        directory: the directory of the comparison.
        highest_l0: the highest target L0.
        halves: whether each half of the held-out documents is needed.

    Raises:
        UserError: the comparison in the directory has other flags, the SAEs have fewer features than `highest_l0`,
            training would refuse the flags, the cache holds other activations, or a half is too small.
    """
    in_common = _flags_in_common(words)
    _check_same_flags(directory, in_common)
    words = [*words, "--checkpoint_path", str(directory / "runs"), "--eval_every", "0"]
    settings = parse_training_flags(words)
    if settings.sae.init_from is not None:
        raise UserError(
            f"--init_from {settings.sae.init_from}: the SAEs of other libraries begin with random weights; leave it out"
        )
    if (loss := settings.optimization.finetune_loss) != "none":
        raise UserError(f"--finetune_loss {loss}: the other libraries have no such steps here; leave it out")
    if settings.model.cache_activations is None:
        words += ["--cache_activations", str(directory / "activations")]
        settings = parse_training_flags(words)
    run = prepare_run(settings)
    if run.held_out_NT is None and settings.text.held_out_fraction:  # kinds whose threshold is set on it will need it
        run = prepare_run(parse_training_flags([*words, "--architecture", "batchtopk", "--k", "1"]))
    if highest_l0 > run.cfg.sae.d_sae:
        width = " ".join(run.sae.width_words)
        raise UserError(f"--l0 {highest_l0}: more than the {run.cfg.sae.d_sae:,} features ({width}); give a lower one")
    if halves:
        _check_halves(run)
    activations = open_activations(run)
    rows = torch.from_numpy(run.all_rows_NT.astype(np.int64))
    with Progress("activations", len(rows), unit="contexts", device=run.cfg.device) as progress:
        for batch_BT in rows.split(settings.model.store_batch_size_prompts):
            activations.activations(batch_BT)
            progress.advance(len(batch_BT))
    reference = directory / ".measured_like"
    sae = next(iter(Training(run, activations).saes.values()))
    sae.save_inference_model(reference)
    (directory / _SETTINGS_FILENAME).write_text(
        json.dumps(in_common | {_SPARSIFY_ON: "the batches of all"}, indent=1) + "\n"
    )
    return Shared(words, settings, run, directory, reference)


def _check_halves(run: PreparedRun) -> None:
    """Raises a UserError if a half of the held-out documents is too small to measure on."""
    cfg, tokenizer = run.cfg, load_tokenizer(run.model)
    context = ContextFormat(
        cfg.context_size, cfg.prepend_bos, cfg.sequence_separator_token, cfg.disable_concat_sequences
    )
    for part in ("validation", "test"):
        half = replace(run.held_out, part=part)
        rows, _ = collect_evaluation_rows(
            run.text, tokenizer, context, half, n_rows=_LEAST_CONTEXTS, seed=0, flag="--dataset_path"
        )
        if len(rows) < _LEAST_CONTEXTS:
            raise UserError(
                f"--held_out_fraction {run.held_out.fraction:g}: too small to choose learning rates on one half of the"
                f" held-out documents and to measure on the other: the {part} half has {len(rows)} contexts of"
                f" {cfg.context_size} tokens, and needs {_LEAST_CONTEXTS}; raise it, use more text, or try one rate"
            )


def _flags_in_common(words: Sequence[str]) -> dict[str, Any]:
    """Returns the flags that must be the same for all SAEs of a comparison, by name."""
    settings = parse_training_flags(words)
    flags = settings.as_flags()
    return {
        name: "chosen by the recipe" if name in flags["chosen"] else value
        for name, value in flags.items()
        if name not in ("verbose", "quiet", "seed", "device", "preset", "chosen")
        and not name.startswith(("wandb", "logger"))
    } | {"held_out_seed": settings.held_out_seed}


def _held_out_seed(directory: Path) -> int:
    """Returns the seed that chose the held-out documents, from the metadata of the SAEs in a comparison's directory.

    Raises:
        UserError: none of them records it, or they have several.
    """
    files = [*directory.glob(".measured_like/cfg.json"), *directory.glob("saes/saelens-*/*/*/final_*/cfg.json")]
    seeds = {json.loads(file.read_text()).get("metadata", {}).get("held_out_seed") for file in files} - {None}
    if len(seeds) != 1:
        found = f"the held-out seeds {' and '.join(map(str, sorted(seeds)))}" if seeds else "no held-out seed"
        raise UserError(
            f"--comparison_dir {directory}: of an older version, and its SAEs have {found}; name another directory"
        )
    return seeds.pop()


def _check_same_flags(directory: Path, flags: dict[str, Any]) -> None:
    """Raises a UserError if the SAEs that are already in the comparison were trained with other flags or otherwise."""
    file = directory / _SETTINGS_FILENAME
    try:
        before = json.loads(file.read_text()) if file.exists() else flags
        if before.get("held_out_seed") is None:  # an older comparison recorded this flag only if it was given
            before["held_out_seed"] = _held_out_seed(directory)
        changed = sorted(name for name in flags if flags[name] != before.get(name, _DEFAULTS_OF_LATER.get(name)))
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"--comparison_dir {directory}: {_SETTINGS_FILENAME} is damaged; name another directory"
        ) from None
    if _SPARSIFY_ON not in before and any((directory / "saes").glob("sparsify-*")):
        raise UserError(
            f"--comparison_dir {directory}: of an older version, whose SAEs of sparsify trained on other positions than"
            " the others; name another directory"
        )
    if changed:
        name = changed[0]
        if name == "held_out_seed":  # which may follow from --seed
            raise UserError(
                f"--held_out_seed {flags[name]}: the comparison in {directory} has {before[name]}; add --held_out_seed"
                f" {before[name]}, or name another --comparison_dir"
            )
        raise UserError(
            f"--{name} {flags[name]}: the comparison in {directory} has {before.get(name)}; name another"
            " --comparison_dir"
        )
