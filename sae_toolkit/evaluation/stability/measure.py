"""Compares SAEs of one hook: the directions of their features, and when they fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.activation_pass import activations_at_hook
from sae_toolkit.evaluation.metrics import chunk_length, mean_and_interval
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.shown import Measured
from sae_toolkit.evaluation.stability.firing import FiringCorrelation, mean_with_interval
from sae_toolkit.evaluation.stability.partners import (
    SHARED,
    Partners,
    find_partners,
    of_directions_with_covariance,
    of_random_directions,
    shared_features,
    shares_above,
)
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.terminal.progress import Progress


@dataclass(frozen=True)
class _Comparison:
    """An SAE and another one, with what their features have in common.

    Args:
        partners: by their decoder vectors.
        shared_A: as `shared_features` returns them.
    """

    evaluated: EvaluatedSAE
    other: EvaluatedSAE
    partners: Partners
    shared_A: torch.Tensor
    correlation: FiringCorrelation


class Stability:
    """Looks for the features of SAEs in other SAEs of the same hook.

    Args:
        others: the other SAEs. An SAE is not compared with itself.
    """

    def __init__(self, others: Sequence[EvaluatedSAE]) -> None:
        self.others = others

    @torch.no_grad()
    def measure(self, group: PreparedEvaluation, model: LanguageModel, batch_size: int) -> list[Measured]:
        """Returns what each SAE of a group has in common with each of the other SAEs.

        Firing is compared at the positions that all of the SAEs were trained for.

        Args:
            group: the SAEs, and the text.
            model: language model, hooked where the SAEs are.
            batch_size: rows in one forward pass.

        Raises:
            UserError: no token is at a position that all of the SAEs were trained for, or the memory does not suffice.
        """
        saes = {id(each.sae): each for each in (*self.others, *group.saes)}  # those of the group have norm limits
        with out_of_memory_answered(
            f"--stability: comparing {len(saes)} SAEs on {group.device}", "name fewer SAEs, or give --device cpu"
        ):
            for each in saes.values():
                each.sae.to(group.device)
            comparisons = self._compare_directions(group)
            alive = self._compare_firing(group, model, batch_size, comparisons, list(saes.values()))
            if comparisons[0].correlation.n_tokens == 0:
                raise UserError(
                    "--stability: no token of the text is at a position that all of the SAEs were trained for (norm"
                    " limits, skipped positions); name SAEs of the same model"
                )
            for each in saes.values():
                each.sae.to("cpu")
            return [self._results(each, comparisons, alive[id(each.sae)], group.seed) for each in group.saes]

    def _compare_directions(self, group: PreparedEvaluation) -> list[_Comparison]:
        pairs = [
            (evaluated, other)
            for evaluated in group.saes
            for other in self.others
            if not is_same(evaluated.file, other.file)
        ]
        comparisons = []
        with Progress("matching", len(pairs), unit="pairs of SAEs") as progress:
            for evaluated, other in pairs:
                partners = find_partners(evaluated.sae.W_dec, other.sae.W_dec)
                shared_A = shared_features(partners, find_partners(evaluated.sae.W_enc.T, other.sae.W_enc.T))
                n_pairs = int((partners.matched_A >= 0).sum())
                comparisons.append(_Comparison(evaluated, other, partners, shared_A, FiringCorrelation(n_pairs)))
                progress.advance(1)
        return comparisons

    def _compare_firing(
        self,
        group: PreparedEvaluation,
        model: LanguageModel,
        batch_size: int,
        comparisons: Sequence[_Comparison],
        saes: Sequence[EvaluatedSAE],
    ) -> dict[int, torch.Tensor]:
        """Adds the text to the correlations, and returns which features of each SAE fired: booleans [F], by its id."""
        alive = {id(each.sae): torch.zeros(each.sae.cfg.d_sae, dtype=torch.bool, device=group.device) for each in saes}
        pairs = [_pairs(comparison.partners, group.device) for comparison in comparisons]
        n = chunk_length(4 * sum(each.sae.cfg.d_sae for each in saes))
        positions = [each.positions for each in saes]
        for acts_ND, unit_N in activations_at_hook(group, model, positions, batch_size=batch_size, doing="comparing"):
            for start in range(0, len(acts_ND), n):
                chunk_ND = acts_ND[start : start + n].to(group.device, torch.float32)
                features = {id(each.sae): each.sae.encode(chunk_ND) for each in saes}
                for key, features_NF in features.items():
                    alive[key] |= (features_NF != 0).any(0)
                for comparison, (of_a, of_b) in zip(comparisons, pairs, strict=True):
                    a_NP = features[id(comparison.evaluated.sae)][:, of_a]
                    b_NP = features[id(comparison.other.sae)][:, of_b]
                    comparison.correlation.add(a_NP, b_NP, unit_N[start : start + n])
        return {key: alive_F.cpu() for key, alive_F in alive.items()}

    def _results(
        self, evaluated: EvaluatedSAE, all_comparisons: Sequence[_Comparison], alive_F: torch.Tensor, seed: int
    ) -> Measured:
        comparisons = [each for each in all_comparisons if each.evaluated is evaluated]
        partners = [_with_partner(each, alive_F, seed) for each in comparisons]
        largest_CF = torch.stack([each.partners.largest_A for each in comparisons])
        results = {
            "features": evaluated.sae.cfg.d_sae,
            "features_that_fire": int(alive_F.sum()),
            "tokens": comparisons[0].correlation.n_tokens,
            "partners": partners,
            "over_partners": {
                name: _mean_over(values)
                for name, values in {
                    "mean_max_cosine": [each["mean_max_cosine"] for each in partners],
                    "above_0.7": [each["above_0.7"] for each in partners],
                    "matched_above_0.7": [each["matched"]["above_0.7"] for each in partners],
                    "shared": [each["shared"] for each in partners],
                }.items()
            },
            "in_every_partner": (largest_CF > SHARED).all(0).double().mean().item(),
            "in_no_partner": (largest_CF <= SHARED).all(0).double().mean().item(),
        }
        return Measured(results, {"found again": largest_CF.mean(0)})


def _pairs(partners: Partners, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the indices [P] of the matched features, in one SAE and in the other."""
    of_a = (partners.matched_A >= 0).nonzero().squeeze(1)
    return of_a.to(device), partners.matched_A[of_a].to(device)


def _with_partner(comparison: _Comparison, alive_F: torch.Tensor, seed: int) -> dict[str, Any]:
    """Returns what an SAE has in common with one other SAE, as evaluation.json holds it."""
    partners, other = comparison.partners, comparison.other
    cosine_A = partners.matched_cosine_A
    pair_cosine_P = cosine_A[partners.matched_A >= 0].numpy()
    correlation_P, left_out_GP = comparison.correlation.correlations()
    near_P = pair_cosine_P > SHARED
    correlations = {}
    for name, of in (("all", np.ones_like(near_P)), ("above_0.7", near_P), ("others", ~near_P)):
        mean, interval = mean_with_interval(correlation_P[of], left_out_GP[:, of])
        n_pairs = int(np.isfinite(correlation_P[of]).sum())
        correlations[name] = {"mean": mean, "interval": interval, "pairs": n_pairs}
    among_alive_A = partners.largest_A[alive_F]
    return {
        "name": other.file.name,
        "path": str(other.file.path),
        "features": other.sae.cfg.d_sae,
        "mean_max_cosine": partners.largest_A.double().mean().item(),
        "mean_max_cosine_back": partners.largest_B.double().mean().item(),
        **shares_above(partners.largest_A),
        "above_0.7_among_those_that_fire": shares_above(among_alive_A)["above_0.7"] if len(among_alive_A) else None,
        "matched": {"mean_cosine": cosine_A.double().mean().item(), **shares_above(cosine_A), "exact": partners.exact},
        "shared": comparison.shared_A.double().mean().item(),
        "random_directions": of_random_directions(other.sae.cfg.d_sae, other.sae.cfg.d_in),
        "random_with_the_same_covariance": of_directions_with_covariance(other.sae.W_dec, seed=seed),
        "firing_correlation": correlations,
    }


def _mean_over(values: Sequence[float]) -> dict[str, Any]:
    """Returns the mean over the other SAEs, with its 95% interval (t distribution) if there are at least two."""
    if len(values) < 2:
        return {"mean": float(np.mean(values)), "interval": None}
    mean, interval = mean_and_interval(values)
    return {"mean": mean, "interval": interval}


def is_same(one: SAEFile, other: SAEFile) -> bool:
    """Returns whether two files hold the same SAE."""
    return one.path.resolve() == other.path.resolve() and one.release == other.release
