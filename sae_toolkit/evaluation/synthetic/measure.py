"""Scores SAEs by the true features of a synthetic model, through SAELens's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data, mean_correlation_coefficient
from sae_lens.util import cosine_similarities, temporary_seed

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.metrics import mean_and_interval
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.evaluation.shown import Measured
from sae_toolkit.model.devices import free_memory, out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.synthetic.language_model import SyntheticForCausalLM
from sae_toolkit.terminal.progress import Progress

_DRAWS = 5  # sets of samples, for intervals
_SAMPLES = 16_384  # in each
_BATCH = 256
_BATCHES_TO_RANK = 16  # true features by how often they are active
_FEATURES_AT_ONCE = 4096
_BYTES_TO_MATCH = 20  # for each pair of a feature and a true one: three matrices in float32, one in float64
_FIRST_SEED = 2**31  # the text's samples are drawn with other seeds

# SAELens's names, and those of the results.
_WITH_INTERVALS = {
    "classification/f1_score": "f1",
    "classification/precision": "precision",
    "classification/recall": "recall",
    "explained_variance": "explained_variance",
    "sae_l0": "l0",
    "true_l0": "true_l0",
    "shrinkage": "shrinkage",
}


def check_synthetic(groups: Sequence[PreparedEvaluation]) -> None:
    """Checks that the true features are known wherever the SAEs are.

    Raises:
        UserError: an SAE is not of a synthetic model, or has too many features to be matched in this memory.
    """
    free = free_memory("cpu")
    for group in groups:
        if not group.model.is_synthetic:
            raise UserError(
                f"--synthetic: {group.saes[0].file.name} is for {group.model.name}, whose true features nobody knows;"
                " name SAEs that were trained with @presets/synthetic.args"
            )
        n_true = group.model.config.num_features
        for evaluated in group.saes:
            if (takes := evaluated.sae.cfg.d_sae * n_true * _BYTES_TO_MATCH) > free:
                raise UserError(
                    f"--synthetic: {evaluated.file.name}: matching its {evaluated.sae.cfg.d_sae:,} features with"
                    f" {n_true:,} true ones takes about {takes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free;"
                    " leave that SAE out, or free memory"
                )


def measure_synthetic(prepared: PreparedEvaluation, model: LanguageModel, batch_size: int) -> list[Measured]:
    """Scores SAEs at the hook of a synthetic model.

    Args:
        prepared: the SAEs.
        model: the language model around the synthetic model.
        batch_size: not used: samples are drawn without text.

    Returns:
        The results of each SAE.

    Raises:
        UserError: the memory does not suffice.
    """
    synthetic = cast(SyntheticForCausalLM, model.model).synthetic
    measured = []
    with Progress("scoring by the true features", _DRAWS * len(prepared.saes), unit="draws") as progress:
        for evaluated in prepared.saes:
            with out_of_memory_answered(f"--synthetic: {evaluated.file.name}", "free memory"):
                results = score(evaluated.sae, synthetic, seed=prepared.seed, progress=progress)
                nearest_F = nearest_true_cosine(evaluated.sae, synthetic)
            measured.append(Measured(results, {"nearest true feature": nearest_F}))
    return measured


@torch.no_grad()
def score(sae: SAE[Any], synthetic: SyntheticModel, *, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """Returns SAELens's scores of an SAE on a synthetic model, with 95% intervals over sets of samples.

    Args:
        sae: an SAE on the CPU, for activations that are not scaled.
        synthetic: the synthetic model.
        seed: seed of the samples.
        progress: counts the sets of samples.

    Returns:
        `mcc`, `uniqueness` (both of the decoder alone, without intervals), `random_mcc` (that of random directions),
        the scores of `_WITH_INTERVALS`, and for each its interval under `intervals`; `dead_features` (that fire on no
        sample), `l0_of_frequent` (how many of the most frequent d_sae true features are active at a time), and the
        numbers of features, true features and samples.
    """
    evaluations, fired_F = [], torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for draw in range(_DRAWS):
        with temporary_seed(_FIRST_SEED + _DRAWS * seed + draw), _fired(sae, fired_F):
            evaluations.append(
                eval_sae_on_synthetic_data(
                    sae, synthetic.feature_dict, synthetic.activation_generator, _SAMPLES, batch_size=_BATCH
                )
            )
        if progress is not None:
            progress.advance(1)
    logged = [each.to_log_dict() for each in evaluations]
    scores, intervals = {}, {}
    for name, ours in _WITH_INTERVALS.items():
        scores[ours], intervals[ours] = mean_and_interval([each[name] for each in logged])
    features_FD = synthetic.feature_dict.feature_vectors
    # Not the seed alone: the true features are drawn with 42.
    random_FD = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(_FIRST_SEED + seed))
    return {
        "mcc": evaluations[0].mcc,
        "random_mcc": mean_correlation_coefficient(random_FD, features_FD),
        "uniqueness": evaluations[0].uniqueness,
        **scores,
        "intervals": intervals,
        "dead_features": int((~fired_F).sum()),
        "l0_of_frequent": l0_of_frequent(synthetic, sae.cfg.d_sae),
        "n_features": sae.cfg.d_sae,
        "n_true_features": len(features_FD),
        "samples": _DRAWS * _SAMPLES,
    }


@contextmanager
def _fired(sae: SAE[Any], fired_F: torch.Tensor) -> Iterator[None]:
    """Context manager that sets the booleans [F] of the features that fire in a call of the SAE's `encode`."""
    encode = sae.encode

    def recorded(acts_ND: torch.Tensor) -> torch.Tensor:
        features_NF = encode(acts_ND)
        fired_F.logical_or_((features_NF != 0).any(0))
        return features_NF

    sae.encode = recorded
    try:
        yield
    finally:
        del sae.encode


def l0_of_frequent(synthetic: SyntheticModel, n_features: int) -> float:
    """Returns how many of the most frequent n_features true features are active in a sample, on average."""
    # Found on some samples and counted on others: those that are frequent by chance would count too much.
    with temporary_seed(synthetic.cfg.seed or 0):
        rates_F, others_F = (
            sum(
                (synthetic.activation_generator.sample(_BATCH) > 0).float().mean(dim=0) for _ in range(_BATCHES_TO_RANK)
            )
            for _ in range(2)
        )
    most_frequent = rates_F.topk(min(n_features, len(rates_F))).indices
    return others_F[most_frequent].sum().item() / _BATCHES_TO_RANK


@torch.no_grad()
def nearest_true_cosine(sae: SAE[Any], synthetic: SyntheticModel) -> torch.Tensor:
    """Returns the |cosine| [F] of each decoder vector with the true feature that is nearest to it."""
    true_FD = synthetic.feature_dict.feature_vectors
    parts = sae.W_dec.float().split(_FEATURES_AT_ONCE)
    return torch.cat([cosine_similarities(part_FD, true_FD).abs().amax(dim=-1) for part_FD in parts])
