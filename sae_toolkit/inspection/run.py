"""Runs text through a language model and SAEs, and keeps what their features do. A pass that was killed goes on."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.massive_activations import measure_norm_limits
from sae_toolkit.evaluation.metrics import chunk_length
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.files.whole_directory import (
    NotSaved,
    check_manifest,
    is_about,
    remove_partial_directories,
    whole_directory,
)
from sae_toolkit.inspection.statistics import FeatureStatistics
from sae_toolkit.model.devices import free_memory, out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.inspection import FeatureSettings
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.terminal.stop_signals import Stopped, StopSignals

log = logging.getLogger(__name__)

_UNFINISHED = "unfinished"
_STATE = "state.safetensors"
_CHUNK_VALUES = 2**27  # activations of a chunk of rows: 512 MiB


@dataclass
class InspectedSAE:
    """An SAE whose features are inspected.

    Args:
        evaluated: the SAE and the positions that it is inspected at.
        prepared: the SAEs at its hook, and the rows of text.
        statistics: what was kept so far.
        directory: directory of its results.
        next_row: the first row of text that it has not seen.
    """

    evaluated: EvaluatedSAE
    prepared: PreparedEvaluation
    statistics: FeatureStatistics
    directory: Path
    next_row: int = 0


def inspect_features(
    groups: Sequence[PreparedEvaluation],
    model: LanguageModel,
    directories: Sequence[Sequence[Path]],
    settings: FeatureSettings,
    signals: StopSignals,
    *,
    batch_size: int,
    save_every: float,
) -> list[InspectedSAE]:
    """Runs all rows once through the model up to the last hook, and through the SAEs of each hook.

    Args:
        groups: SAEs at one hook or several, all with the same rows of text.
        model: the language model.
        directories: for each group the directory of each SAE's results, where the pass is also saved while it runs.
        settings: what is kept of each feature.
        signals: signals that stop the pass, after it is saved.
        batch_size: rows in one forward pass.
        save_every: seconds between saves.

    Raises:
        UserError: the memory does not suffice, activations are not finite, or no position is measured.
        Stopped: a signal came.
    """
    inspected, abouts = [], []
    for group, of_group in zip(groups, directories, strict=True):
        at_hook = LanguageModel(model.model, group.hook_name)
        prepared = measure_norm_limits(group, at_hook, batch_size=batch_size)
        for evaluated, directory in zip(prepared.saes, of_group, strict=True):
            statistics = FeatureStatistics(
                evaluated.sae.cfg.d_sae,
                n_strongest=settings.examples,
                n_drawn=settings.drawn_examples,
                seed=prepared.seed,
                device=prepared.device,
            )
            evaluated.sae.to(prepared.device)
            inspected.append(InspectedSAE(evaluated, prepared, statistics, directory))
            abouts.append(_about(prepared, evaluated, settings, batch_size, model.dtype))
            _load(inspected[-1], abouts[-1])
    rows_NT, start = groups[0].rows_NT, min(each.next_row for each in inspected)
    if start:
        log.info("going on after %s of %s contexts", f"{start:,}", f"{len(rows_NT):,}")
    where = f"--batch_size {batch_size}: {len(inspected)} SAEs on {groups[0].device}"
    lower = "lower --batch_size, --examples or --drawn_examples, or name fewer SAEs"
    with out_of_memory_answered(where, lower), signals.deferred():
        _run(model, inspected, abouts, signals, start, batch_size=batch_size, save_every=save_every)
    for each in inspected:
        if each.statistics.n_tokens == 0:
            raise UserError(
                f"--dataset {each.prepared.text.name}: no token of it is at a position that"
                f" {each.evaluated.file.name} is applied to; choose the positions by --skip_positions and"
                " --max_activation_norm_multiple"
            )
        each.evaluated.sae.to("cpu")
    return inspected


@torch.no_grad()
def _run(
    model: LanguageModel,
    inspected: Sequence[InspectedSAE],
    abouts: Sequence[dict[str, Any]],
    signals: StopSignals,
    start: int,
    *,
    batch_size: int,
    save_every: float,
) -> None:
    rows_NT = inspected[0].prepared.rows_NT
    widths = {each.prepared.hook_name: each.evaluated.sae.cfg.d_in for each in inspected}
    at_hooks = LanguageModel(model.model, *widths)
    saved_at = time.monotonic()
    with Progress("inspecting", rows_NT.size, done=start * rows_NT.shape[1]) as progress:
        while start < len(rows_NT):
            stop = min(start + batch_size, len(rows_NT))
            batch_BT = rows_NT[start:stop].astype(np.int64)
            acts = at_hooks.activations(torch.from_numpy(batch_BT)).split(list(widths.values()), dim=-1)
            acts_BTD = dict(zip(widths, acts, strict=True))
            for each in inspected:
                if each.next_row <= start:  # after a kill between two saves, one SAE can be ahead of another
                    assistant_BT = each.prepared.assistant_at(slice(start, stop))
                    add_batch(each, start, batch_BT, acts_BTD[each.prepared.hook_name], assistant_BT)
                    each.next_row = stop
            progress.advance(batch_BT.size)
            start = stop
            # At the end too, since what is made from the features may take hours and be stopped.
            if signals.received or time.monotonic() - saved_at >= save_every or start == len(rows_NT):
                for each, about in zip(inspected, abouts, strict=True):
                    _save(each, about)
                saved_at = time.monotonic()
            if signals.received:
                raise Stopped(signals.received)


def add_batch(
    each: InspectedSAE,
    first_row: int,
    batch_BT: np.ndarray,
    acts_BTD: torch.Tensor,
    assistant_BT: np.ndarray | None,
) -> None:
    """Adds a batch of activations to the statistics of an SAE.

    Raises:
        UserError: activations are not finite.
    """
    for first, features_BTF, measured_BT in encoded_rows(each, batch_BT, acts_BTD, assistant_BT):
        each.statistics.add(first_row + first, features_BTF, measured_BT)


def encoded_rows(
    each: InspectedSAE, batch_BT: np.ndarray, acts_BTD: torch.Tensor, assistant_BT: np.ndarray | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Encodes a batch of activations, as many rows at a time as fit into a chunk.

    Yields:
        The first row of a chunk, counted within the batch; the activations [B, T, F] of all features in it, 0 where
        they are not measured; and where they are [B, T].

    Raises:
        UserError: activations are not finite.
    """
    sae, positions = each.evaluated.sae, each.evaluated.positions
    kept_BT = torch.from_numpy(positions.keeps_tokens(batch_BT, assistant_BT)).to(acts_BTD.device)
    if not acts_BTD[kept_BT].isfinite().all():
        raise UserError(
            f"--lm_dtype: activations at {sae.cfg.metadata.hook_name or 'the hook'} are not finite in {acts_BTD.dtype};"
            " use another dtype"
        )
    kept_BT = kept_BT & positions.keeps_norms(acts_BTD)
    n_rows = max(1, chunk_length(sae.cfg.d_sae, _CHUNK_VALUES) // batch_BT.shape[1])
    for i in range(0, len(batch_BT), n_rows):
        measured_BT = kept_BT[i : i + n_rows].to(sae.device)
        acts = acts_BTD[i : i + n_rows].to(sae.device, torch.float32)
        features_BTF = sae.encode(acts.flatten(0, 1)).unflatten(0, measured_BT.shape)
        features_BTF = features_BTF.masked_fill(~measured_BT[..., None], 0)  # they may be NaN, which no product is
        yield i, features_BTF, measured_BT


def check_memory(groups: Sequence[PreparedEvaluation], settings: FeatureSettings) -> None:
    """Says how much memory the statistics of one pass take. Raises a UserError if there is less."""
    n_of_saes = [each.sae.cfg.d_sae for group in groups for each in group.saes]
    takes = sum(FeatureStatistics.memory(n, settings.examples, settings.drawn_examples) for n in n_of_saes)
    device = groups[0].device
    free = free_memory(device)
    what = f"{sum(n_of_saes):,} features with {settings.examples} + {settings.drawn_examples} examples each"
    if takes > free:
        raise UserError(
            f"--examples {settings.examples} --drawn_examples {settings.drawn_examples}: {what} take"
            f" {takes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}; lower them"
        )
    log.info("%s take %.2f GiB, whatever the text", what, takes / 2**30)


def _about(
    prepared: PreparedEvaluation,
    evaluated: EvaluatedSAE,
    settings: FeatureSettings,
    batch_size: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns what the statistics depend on. A pass that was saved goes on only if all of it is the same."""
    digest = xxhash.xxh3_128()
    for _, tensor in sorted(evaluated.sae.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(np.ascontiguousarray(prepared.rows_NT).tobytes())
    about = {
        "weights and text": digest.hexdigest(),
        "model": [prepared.model.name, prepared.model.files(), prepared.hook_name, str(dtype), prepared.device],
        "sae": {name: value for name, value in evaluated.sae.cfg.to_dict().items() if name != "device"},
        "positions": repr(evaluated.positions),
        "examples": [settings.examples, settings.drawn_examples, prepared.seed],
        "batch_size": batch_size,
    }
    return json.loads(json.dumps(about, default=repr))


def _load(each: InspectedSAE, about: dict[str, Any]) -> None:
    """Loads what a pass that was stopped has saved, if it was the same pass."""
    saved = sorted((each.directory / _UNFINISHED).glob("[0-9]*"), key=lambda path: int(path.name))
    for directory in reversed(saved):
        try:
            manifest = check_manifest(directory, str(directory))
        except UserError as error:
            log.warning("%s; not used", error)
            continue
        if manifest.get("about") != about:
            log.warning("%s: of another text, SAE or number of examples; beginning anew", directory)
            continue
        each.statistics.load_state(load_file(directory / _STATE))
        each.next_row = int(directory.name)
        return


def _save(each: InspectedSAE, about: dict[str, Any]) -> None:
    unfinished = each.directory / _UNFINISHED
    target = unfinished / str(each.next_row)
    if target.exists() and not is_about(target, about):  # of another pass, which is as long
        shutil.rmtree(target)
    try:
        with whole_directory(target, about=about) as partial:
            state = {name: tensor.cpu().contiguous() for name, tensor in each.statistics.state().items()}
            save_file(state, partial / _STATE)
    except NotSaved as error:
        log.warning("%s: could not be saved (%s); going on", target, error)
        return
    for earlier in unfinished.glob("[0-9]*"):
        if earlier != target:
            shutil.rmtree(earlier, ignore_errors=True)


def remove_saves(each: InspectedSAE) -> None:
    """Removes what was saved of a pass, once its results are written."""
    unfinished = each.directory / _UNFINISHED
    for save in unfinished.glob("[0-9]*"):
        shutil.rmtree(save, ignore_errors=True)
    remove_partial_directories(unfinished)
    with suppress(OSError):  # there is none, or somebody has put something else there
        unfinished.rmdir()
