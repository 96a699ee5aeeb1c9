"""Measures the decoder statistics of SAEs at one hook, and compares them."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.activation_pass import activations_at_hook
from sae_toolkit.evaluation.l0_check.comparison import Comparison, compare
from sae_toolkit.evaluation.l0_check.statistics import DecoderProjections, pairwise_cosines, random_pairwise_cosine
from sae_toolkit.evaluation.metrics import chunk_length
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.shown import Measured
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.saes.formats import SAEFile

log = logging.getLogger(__name__)

_CHUNK_VALUES = 2**24  # features and projections of a chunk of tokens: 64 MiB each
_DIFFERENCES = ("d_sae", "library", "architecture", "normalize_activations", "tokens in a step", "settings of the SAE")
# Of the training's settings of the SAE, those that an SAE of another L0 has otherwise.
_OF_L0 = {"k", "l0_coefficient", "l1_coefficient", "l0_warm_up_steps", "l1_warm_up_steps", "target_l0"}
_MOST_LR_RATIO = 2  # --recipe auto chooses a rate for each k
_MOST_TOKENS_RATIO = 1.05  # batches of other sizes end at other numbers
_LEAST_DIRECTIONS = 3  # for pairs, and so that 3/8 of them is one


def check_decoders(groups: Sequence[PreparedEvaluation]) -> None:
    """Checks that each decoder has directions, and that SAEs at one hook differ in L0 and seed alone.

    Raises:
        UserError: they do not.
    """
    for group in groups:
        for evaluated in group.saes:
            n_directions = int((evaluated.sae.W_dec.norm(dim=-1) > 0).sum())
            if n_directions < _LEAST_DIRECTIONS:
                raise UserError(
                    f"--l0_check: {n_directions} of the {evaluated.sae.cfg.d_sae} decoder vectors of"
                    f" {evaluated.file.name} are not zero, and it needs {_LEAST_DIRECTIONS}; leave that SAE out"
                )
        for one, other in combinations(group.saes, 2):
            _check_comparable(one, other)
        _warn_of_trainings(group.saes)
    for one_group, other_group in combinations(groups, 2):
        if (one_group.model.name, one_group.hook_name) == (other_group.model.name, other_group.hook_name):
            one, other = one_group.saes[0], other_group.saes[0]
            raise UserError(
                f"--l0_check: {one.file.name} and {other.file.name} are at one hook, and are evaluated on different"
                f" texts; give --like {one.file.name}, so that all are measured on one text"
            )


def _check_comparable(one: EvaluatedSAE, other: EvaluatedSAE) -> None:
    pair = f"{one.file.name} and {other.file.name}"
    for name, a, b in zip(_DIFFERENCES, _traits(one), _traits(other), strict=True):
        if a != b and None not in (a, b):
            if isinstance(a, dict):
                name = min(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
                a, b = a.get(name), b.get(name)
            raise UserError(
                f"--l0_check: {pair} differ in {name}: {a} and {b}; name SAEs that differ in L0 and seed alone, as the"
                " statistics also depend on the rest"
            )
    run, checkpoint = _run_or_trainer_of(one.file), one.file.path.absolute().parent
    are_seeds = checkpoint == other.file.path.absolute().parent != run  # of one run with --seeds
    if run is not None and run == _run_or_trainer_of(other.file) and not are_seeds:
        raise UserError(
            f"--l0_check: {pair} are checkpoints of one run, and the statistics also depend on the number of steps;"
            " name the finished SAEs of several runs"
        )
    tokens = [n for each in (one, other) if (n := _tokens_of(each.file.path)) is not None]
    if len(tokens) == 2 and max(tokens) > _MOST_TOKENS_RATIO * min(tokens):
        raise UserError(
            f"--l0_check: {pair} were trained on {tokens[0]:,} and {tokens[1]:,} tokens, and the statistics also depend"
            " on that; name SAEs of as many"
        )


def _traits(evaluated: EvaluatedSAE) -> tuple[Any, ...]:
    """Returns the values of `_DIFFERENCES`."""
    cfg = evaluated.sae.cfg
    architecture = cfg.metadata.get("training_architecture") or cfg.architecture()
    details = cfg.metadata.get("training_architecture_details") or {}
    settings = {name: value for name, value in details.items() if name not in _OF_L0} or None
    return (
        *(cfg.d_sae, evaluated.file.library, architecture, cfg.normalize_activations),
        *(_runner_settings(evaluated.file.path).get("train_batch_size_tokens"), settings),
    )


def _runner_settings(sae_path: Path) -> Mapping[str, Any]:
    """Returns the settings of the training, by SAELens's runner_cfg.json; none if the file is not there."""
    try:
        settings = json.loads((sae_path / "runner_cfg.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _warn_of_trainings(saes: Sequence[EvaluatedSAE]) -> None:
    """Warns if SAEs at one hook were trained on other texts, or with learning rates that are far apart."""
    settings = [_runner_settings(each.file.path) for each in saes]
    for name in ("dataset_path", "lr"):
        known = [(each.file.name, of[name]) for each, of in zip(saes, settings, strict=True) if of.get(name)]
        for (one, a), (other, b) in combinations(known, 2):
            near = isinstance(a, float) and isinstance(b, float) and max(a, b) <= _MOST_LR_RATIO * min(a, b)
            if a != b and not near:
                log.warning(
                    "--l0_check: %s and %s were trained with --%s %s and %s, and the statistics also depend on that",
                    *(one, other, name, a, b),
                )
                break


def _run_of(sae_path: Path) -> Path | None:
    """Returns the directory of the run that wrote an SAE; None if no run of this project wrote it."""
    return next((above for above in sae_path.absolute().parents[:2] if (above / FLAGS_FILENAME).is_file()), None)


def _run_or_trainer_of(file: SAEFile) -> Path | None:
    """Returns `_run_of`, or the directory where dictionary_learning's trainer put its checkpoints; None if neither."""
    above = file.path.absolute().parent
    is_checkpoint = file.library == "dictionary_learning" and above.name == "checkpoints"
    return above if is_checkpoint else _run_of(file.path)


def _tokens_of(sae_path: Path) -> int | None:
    """Returns the tokens that an SAE was trained on, by the name of its checkpoint; None if no run of ours wrote it."""
    if (run := _run_of(sae_path)) is None:
        return None
    found = re.fullmatch(r"(?:final_)?(\d+)", sae_path.absolute().relative_to(run).parts[0])
    return int(found[1]) if found else None


def measure_l0_check(prepared: PreparedEvaluation, model: LanguageModel, batch_size: int) -> list[Measured]:
    """Measures SAEs at one hook, and says which L0 they point to.

    Args:
        prepared: the SAEs, and the rows of text.
        model: language model, hooked where the SAEs are.
        batch_size: rows in one forward pass.

    Returns:
        The results of each SAE.

    Raises:
        UserError: no position is scored for all of the SAEs, or the memory does not suffice.
    """
    saes = [evaluated.sae for evaluated in prepared.saes]
    batches = activations_at_hook(
        prepared,
        model,
        [evaluated.positions for evaluated in prepared.saes],
        batch_size=batch_size,
        doing="projecting",
    )
    with out_of_memory_answered(
        f"--l0_check: {len(saes)} SAEs on {prepared.device}", "lower --batch_size, or name fewer SAEs"
    ):
        for sae in saes:
            sae.to(prepared.device)
        measured = measure_decoders(saes, batches, seed=prepared.seed)
        for sae in saes:
            sae.to("cpu")
    comparison = compare(*([each[name] for each in measured] for name in ("l0", "c_dec", "s_n_dec")))
    rows = [{"sae": evaluated.file.name, **each} for evaluated, each in zip(prepared.saes, measured, strict=True)]
    wanted_l0 = _wanted_l0(comparison, saes[0].cfg.d_sae)
    compared = {
        "saes": sorted(rows, key=lambda row: row["l0"]),
        "comparison": comparison.as_record(),
        "wanted_l0": wanted_l0,
        "command": _command(prepared.saes[0], wanted_l0),
    }
    return [Measured({**each, **compared}) for each in measured]


@torch.no_grad()
def measure_decoders(
    saes: Sequence[SAE[Any]], batches: Iterable[tuple[torch.Tensor, np.ndarray]], *, seed: int
) -> list[dict[str, Any]]:
    """Measures the decoder statistics of SAEs on the same activations.

    Args:
        saes: SAEs on one device.
        batches: activations [N, d_in], and the number [N] of the unit of text that each belongs to.
        seed: seed of the draws for intervals.

    Returns:
        For each SAE: `l0`; `c_dec`, and its interval if it is estimated from a sample of features; `c_dec_firing`, of
        the features that fire on these tokens; `s_n_dec`, its 95% interval over units of text, and its n;
        `random_c_dec`, what random directions would have; and the number of tokens.

    Raises:
        UserError: there are no activations, or their distribution changes in the course of the text.
    """
    sums = [_Sums(sae) for sae in saes]
    for acts_ND, unit_N in batches:
        for each in sums:
            each.add(acts_ND, torch.from_numpy(np.ascontiguousarray(unit_N)))
    if sums[0].n_tokens == 0:
        raise UserError(
            "--l0_check: no token is at a position that all of the SAEs are measured at; name fewer SAEs, or choose"
            " the positions by --skip_positions and --max_activation_norm_multiple"
        )
    return [each.results(seed) for each in sums]


class _Sums:
    """Sums over the activations for one SAE."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        norm_F = sae.W_dec.float().norm(dim=-1)
        self.has_direction_F = norm_F > 0
        self.norm_F = norm_F[self.has_direction_F]
        all_have = len(self.norm_F) == len(norm_F)
        self.W_dec_FD = (sae.W_dec if all_have else sae.W_dec[self.has_direction_F]).float()
        self.firings_F = torch.zeros_like(norm_F, dtype=torch.long)
        self.projections: DecoderProjections | None = None
        self.n_tokens = 0

    def add(self, acts_ND: torch.Tensor, unit_N: torch.Tensor) -> None:
        """Adds activations [N, d_in], and the number [N] of the unit of text of each."""
        sae = self.sae
        n = chunk_length(sae.cfg.d_sae, _CHUNK_VALUES)
        for chunk_ND, of_chunk_N in zip(acts_ND.split(n), unit_N.split(n), strict=True):
            if len(chunk_ND) == 0:
                continue
            chunk_ND = chunk_ND.to(sae.device, torch.float32)
            self.firings_F += (sae.encode(chunk_ND) != 0).sum(0)
            inputs_ND = sae.run_time_activation_norm_fn_in(chunk_ND) - sae.b_dec
            z_NF = (inputs_ND.float() @ self.W_dec_FD.T).div_(self.norm_F)
            if self.projections is None:
                self.projections = DecoderProjections(len(self.norm_F))
            self.projections.add(z_NF, of_chunk_N)
            self.n_tokens += len(chunk_ND)

    def results(self, seed: int) -> dict[str, Any]:
        """Returns the statistics, as `measure_decoders` does."""
        assert self.projections is not None
        firing_F = self.firings_F > 0
        c_dec, c_dec_firing, c_dec_interval = pairwise_cosines(self.sae.W_dec, firing_F, seed=seed)
        s_n_dec, s_n_dec_interval = self.projections.s_n_dec(seed=seed)
        if math.isnan(s_n_dec):
            raise UserError(
                "--l0_check: the first activations are unlike the others, so that their projections are in other"
                " ranges; give other text by --dataset"
            )
        return {
            "l0": self.firings_F.sum().item() / self.n_tokens,
            "c_dec": c_dec,
            "c_dec_interval": c_dec_interval,
            "c_dec_firing": c_dec_firing,
            "s_n_dec": s_n_dec,
            "s_n_dec_interval": s_n_dec_interval,
            "n": self.projections.n,
            "random_c_dec": random_pairwise_cosine(self.sae.cfg.d_in),
            "tokens": self.n_tokens,
        }


def _wanted_l0(comparison: Comparison, d_sae: int) -> list[float]:
    """Returns the L0s of SAEs that the comparison lacks, up to half of the features; none if it points to an L0."""
    low, high = comparison.l0_G[0], comparison.l0_G[-1]
    below, above = (low / 4, low / 2), (2 * high, 4 * high)
    wanted = {
        None: (),
        "one L0": below + above,
        "flat": below + above,
        "too low": (1.5 * high, *above),
        "too high": (*below, low / 1.5),
    }[comparison.why_not]
    return [l0 for l0 in dict.fromkeys(max(1.0, float(f"{l0:.2g}")) for l0 in wanted) if l0 <= d_sae / 2]


def _command(evaluated: EvaluatedSAE, wanted_l0: Sequence[float]) -> str | None:
    """Returns the command that trains SAEs like this one with other L0s; None if no run of this project wrote it."""
    run = _run_of(evaluated.file.path)
    if run is None or not wanted_l0:
        return None
    if run.is_relative_to(Path.cwd()):
        run = run.relative_to(Path.cwd())
    has_k = "k" in (evaluated.sae.cfg.metadata.get("training_architecture_details") or {})
    values = ",".join(f"{l0:.0f}" for l0 in wanted_l0)
    grid = f"{'k' if has_k else 'target_l0'}={values}"
    held_out_seed = evaluated.sae.cfg.metadata.get("held_out_seed", 42)  # so that all hold out the same documents
    words = ["--like", str(run), "--held_out_seed", str(held_out_seed), "--grid", grid, "seed=42,43,44"]
    return shlex.join(["python", "sweep_saes.py", *words])
