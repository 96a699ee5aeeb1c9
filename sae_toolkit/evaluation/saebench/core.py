"""SAEBench's `core` metrics, under SAEBench's names and with its way of averaging.

Formulas: SAEBench 0.6.0, evals/core/main.py (`get_sparsity_and_variance_metrics`, `calculate_misc_metrics`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sae_toolkit.model.devices import with_float64


class SAEBenchStatistics:
    """SAEBench's sums over batches of scored tokens, in float64.

    Some of its metrics depend on how tokens are divided into batches: `relative_reconstruction_bias` is a mean over
    batches, and `explained_variance_legacy` uses the variance within each batch.
    """

    def __init__(self, d_sae: int, device: str | torch.device) -> None:
        self.n_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._batch_means: dict[str, list[torch.Tensor]] = {}
        self._fired_F = torch.zeros(d_sae, dtype=torch.long, device=device)

    def add_features(self, features_NF: torch.Tensor) -> None:
        """Adds the feature activations of some of a batch's scored tokens."""
        self._fired_F += (features_NF > 0).sum(0)
        self._add("l1", with_float64(features_NF).sum(-1, dtype=torch.double))
        self._add("l0", (features_NF != 0).sum(-1))

    def add_batch(self, acts_ND: torch.Tensor, recons_ND: torch.Tensor) -> None:
        """Adds the activations and reconstructions of all scored tokens of a batch."""
        if len(acts_ND) == 0:
            return
        x, recons = with_float64(acts_ND).double(), with_float64(recons_ND).double()
        residual = (x - recons).pow(2).sum(-1)
        norm_in, norm_out = x.norm(dim=-1), recons.norm(dim=-1)
        self.n_tokens += len(x)
        self._add("l2_norm_in", norm_in)
        self._add("l2_norm_out", norm_out)
        self._add("l2_ratio", norm_out / norm_in.masked_fill(norm_in < 1e-4, 1))
        self._add("cossim", torch.cosine_similarity(x, recons, dim=-1))
        self._add("mse", residual / len(x))
        self._add("explained_variance_legacy", 1 - residual / (x - x.mean(0)).pow(2).sum(-1))
        for name, value in {
            "relative_reconstruction_bias": norm_out.pow(2).mean() / (x * recons).sum(-1).mean(),
            "sum_of_squares": x.pow(2).sum(-1).mean(),
            "square_of_a_dimension": x.pow(2).mean(),
            "residual": residual.mean(),
        }.items():
            self._batch_means.setdefault(name, []).append(value)

    def _add(self, name: str, values: torch.Tensor) -> None:
        total = with_float64(values).double().sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def results(
        self, losses: Mapping[str, float], encoder_cosine: float, decoder_cosine: float
    ) -> dict[str, dict[str, float]]:
        """Returns SAEBench's categories, each with its metrics by name.

        Args:
            losses: `LossStatistics.metrics` over the same positions.
            encoder_cosine: mean over the features of the largest cosine of their encoder vector to another one.
            decoder_cosine: the same for the decoder vectors.
        """
        means = {name: (total / self.n_tokens).item() for name, total in self._sums.items()}
        batches = {name: torch.stack(values).mean().item() for name, values in self._batch_means.items()}
        # As in SAEBench, the mean of x^2 over tokens and dimensions is squared. A variance would need the square of the
        # mean of x instead.
        variance = batches["sum_of_squares"] - batches["square_of_a_dimension"] ** 2
        density_F = with_float64(self._fired_F).double() / self.n_tokens
        total = density_F.sum()

        def above(rate: float) -> dict[str, float]:
            frequent_F = density_F > rate
            name = f"freq_over_{rate:.0%}".replace("%", "_percent")
            return {
                name: frequent_F.double().mean().item(),
                f"normalized_{name}": (density_F[frequent_F].sum() / total).item() if total > 0 else 0.0,
            }

        ablated, recovered = losses["kl_zero"], losses["kl_zero"] - losses["kl_sae"]
        return {
            "model_behavior_preservation": {
                "kl_div_score": recovered / ablated if ablated else math.nan,
                "kl_div_with_ablation": ablated,
                "kl_div_with_sae": losses["kl_sae"],
            },
            "model_performance_preservation": {
                "ce_loss_score": losses["loss_recovered"],
                "ce_loss_with_ablation": losses["ce_zero"],
                "ce_loss_with_sae": losses["ce_sae"],
                "ce_loss_without_sae": losses["ce_clean"],
            },
            "reconstruction_quality": {
                "explained_variance": 1 - batches["residual"] / variance,
                "explained_variance_legacy": means["explained_variance_legacy"],
                "mse": means["mse"],
                "cossim": means["cossim"],
            },
            "shrinkage": {
                "l2_norm_in": means["l2_norm_in"],
                "l2_norm_out": means["l2_norm_out"],
                "l2_ratio": means["l2_ratio"],
                "relative_reconstruction_bias": batches["relative_reconstruction_bias"],
            },
            "sparsity": {"l0": means["l0"], "l1": means["l1"]},
            "misc_metrics": {
                "average_max_encoder_cosine_sim": encoder_cosine,
                "average_max_decoder_cosine_sim": decoder_cosine,
                "frac_alive": (density_F > 0).double().mean().item(),
                **above(0.01),
                **above(0.1),
            },
        }


def token_stats(context_size: int, loss_sequences: int, sequences: int) -> dict[str, Any]:
    """Returns SAEBench's `token_stats`: how many tokens the model ran on, scored and unscored ones together."""
    return {
        "total_tokens_eval_reconstruction": context_size * loss_sequences,
        "total_tokens_eval_sparsity_variance": context_size * sequences,
    }
