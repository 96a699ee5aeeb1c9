"""Measures one SAE: adds up sums over batches of rows, and computes the evaluation from the sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.util import dtype_to_str

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates, FiringStatistics
from sae_toolkit.evaluation.decoder_cosines import DirectionCosines, measure_cosines
from sae_toolkit.evaluation.feature_browser import Feature, FeatureRecorder
from sae_toolkit.evaluation.massive_activations import MassiveFirstPosition
from sae_toolkit.evaluation.metrics import (
    LossStatistics,
    ReconstructionStatistics,
    chunk_length,
    histogram,
    point_and_interval,
)
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.saebench.core import SAEBenchStatistics, token_stats
from sae_toolkit.model.devices import with_float64
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.saes.weights import written_directions


@dataclass(frozen=True)
class Evaluation:
    """The results for one SAE, and the numbers of tokens that they were measured on.

    Args:
        metrics: values by name: shares in [0, 1], losses in nats, NaN where a metric is undefined.
        intervals: 95% intervals [low, high] by name, of the metrics that are estimated from a sample.
        tokens: number of tokens that L0 and reconstruction are measured on.
        sequences: number of sequences with these tokens.
        loss_tokens: number of tokens that the next-token losses are averaged over.
        loss_sequences: number of sequences with these tokens.
        dead: estimates about silent features, and the number of tokens that they come from.
        cosines: cosines of the decoder vectors.
        saebench_core: SAEBench's categories; None except under SAEBench's protocol.
        plots: histograms for the report, as edges and counts, and `never_fired`, a number of features.
        features: features for the feature browser.
        firing_rates_F: firings per token.
        massive_first_position: what the first position does to the metrics, where it is massive and the SAE's record
            does not say whether the SAE was trained on it; otherwise None.
    """

    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    tokens: int
    sequences: int
    loss_tokens: int
    loss_sequences: int
    dead: DeadFeatureEstimates
    cosines: DirectionCosines
    saebench_core: dict[str, dict[str, float]] | None
    plots: dict[str, Any]
    features: list[Feature]
    firing_rates_F: torch.Tensor
    massive_first_position: MassiveFirstPosition | None = None


class Measurement:
    """The sums over batches of rows for one SAE. `add` adds a batch, and `finish` computes the results."""

    def __init__(self, evaluated: EvaluatedSAE, prepared: PreparedEvaluation) -> None:
        sae = evaluated.sae
        self.evaluated = evaluated
        self.prepared = prepared
        self.losses = LossStatistics()
        self.reconstruction = ReconstructionStatistics(prepared.n_sae_rows)
        self.firings = FiringStatistics(sae.cfg.d_sae, sae.device)
        self.saebench = SAEBenchStatistics(sae.cfg.d_sae, sae.device) if prepared.protocol == "saebench" else None
        self.recorder = FeatureRecorder(
            sae.cfg.d_sae, asked_for=prepared.features, n_sampled=prepared.n_features, seed=prepared.seed
        )
        self.n_not_special = self.n_replaced = 0

    def add(
        self, first_row: int, tokens_BT: np.ndarray, acts_BTD: torch.Tensor, *, with_reconstruction: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a batch to the sums.

        Args:
            first_row: row number of the batch's first sequence.
            tokens_BT: token ids.
            acts_BTD: activations at the hook.
            with_reconstruction: whether to decode the features; if not, only firings are counted.

        Returns:
            The activations [B, T, D], with reconstructions in place of those that the SAE replaces; and booleans
            [B, T], True at the positions that are scored.
        """
        assistant_BT = self.prepared.assistant_at(slice(first_row, first_row + len(tokens_BT)))
        replaced_BT, scored_BT = self._positions(tokens_BT, assistant_BT, acts_BTD)
        if not with_reconstruction:
            replaced_BT = scored_BT
        else:
            not_special_BT = torch.from_numpy(~np.isin(tokens_BT, self.prepared.special_token_ids))
            not_special_BT &= torch.from_numpy(self.evaluated.positions.keeps_speaker(tokens_BT, assistant_BT))
            self.n_not_special += int(not_special_BT.sum())
            self.n_replaced += int((not_special_BT & replaced_BT.cpu()).sum())
        sae = self.evaluated.sae
        at_N2 = replaced_BT.nonzero()
        acts_ND = acts_BTD[replaced_BT]
        recons_ND = torch.empty_like(acts_ND, dtype=torch.float32, device=sae.device)
        n = chunk_length(4 * sae.cfg.d_sae)  # a few tensors of tokens x features exist at a time
        for at in range(0, len(acts_ND), n):
            chunk_ND = acts_ND[at : at + n].to(sae.device, torch.float32)
            features_NF = sae.encode(chunk_ND)
            recons = sae.decode(features_NF) if with_reconstruction else None
            if recons is not None:
                recons_ND[at : at + n] = recons
            self._score(first_row, scored_BT, at_N2[at : at + n], chunk_ND, features_NF, recons)
        if not with_reconstruction:
            return acts_BTD, scored_BT
        if self.saebench is not None:
            scored_N = scored_BT[replaced_BT]
            self.saebench.add_batch(acts_ND[scored_N].to(sae.device), recons_ND[scored_N.to(sae.device)])
        replaced_BTD = acts_BTD.clone()
        replaced_BTD[replaced_BT] = recons_ND.to(acts_BTD)
        return replaced_BTD, scored_BT

    def _positions(
        self, tokens_BT: np.ndarray, assistant_BT: np.ndarray | None, acts_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns two [B, T] of booleans: where the SAE replaces the activations, and which positions are scored."""
        if self.prepared.protocol == "saebench":
            scored_BT = torch.from_numpy(~np.isin(tokens_BT, self.prepared.unscored_token_ids)).to(acts_BTD.device)
            return torch.ones_like(scored_BT), scored_BT
        positions = self.evaluated.positions
        kept_BT = torch.from_numpy(positions.keeps_tokens(tokens_BT, assistant_BT)).to(acts_BTD.device)
        kept_BT &= positions.keeps_norms(acts_BTD)
        return kept_BT, kept_BT

    def _score(
        self,
        first_row: int,
        scored_BT: torch.Tensor,
        at_N2: torch.Tensor,
        acts_ND: torch.Tensor,
        features_NF: torch.Tensor,
        recons_ND: torch.Tensor | None,
    ) -> None:
        """Adds the scored tokens among N tokens of a batch to the sums.

        Args:
            first_row: row number of the batch's first sequence.
            scored_BT: booleans, True at the positions that are scored.
            at_N2: the sequence in the batch and the position of each token.
            acts_ND: activations.
            features_NF: feature activations.
            recons_ND: reconstructions; None to count firings only.
        """
        scored_N = scored_BT[at_N2[:, 0], at_N2[:, 1]].to(acts_ND.device)
        at_N2 = at_N2.to(acts_ND.device)
        if not scored_N.all():
            at_N2, acts_ND, features_NF = at_N2[scored_N], acts_ND[scored_N], features_NF[scored_N]
            recons_ND = None if recons_ND is None else recons_ND[scored_N]
        sequence_N = at_N2[:, 0] + first_row
        active_NF = features_NF != 0
        self.firings.add(sequence_N, active_NF)
        if recons_ND is not None:
            self.recorder.add(sequence_N, at_N2[:, 1], features_NF)
            self.reconstruction.add(sequence_N, acts_ND, recons_ND, active_NF.sum(1))
            if self.saebench is not None:
                self.saebench.add_features(features_NF)

    def check(self, share_not_finite: float, dtype: torch.dtype) -> None:
        """Raises a UserError if nothing was scored so far, or if losses or reconstructions are not finite.

        Args:
            share_not_finite: share of the activations so far that hold NaN or infinity.
            dtype: dtype of the language model.
        """
        nothing_scored = self.firings.n_tokens == 0 or self.losses.sums_SK()[:, 0].sum() == 0
        losses = LossStatistics.metrics(self.losses.sums_SK().sum(0))
        if share_not_finite and (nothing_scored or not (losses["ce_clean"] + losses["ce_sae"]).isfinite()):
            raise UserError(
                f"--lm_dtype {dtype_to_str(dtype)}: {share_not_finite:.2%} of the activations at"
                f" {self.prepared.hook_name} are not finite; give another --lm_dtype, such as float32, or check"
                f" that the weights of {self.prepared.model.name} are whole"
            )
        if nothing_scored:
            limit = self.evaluated.positions.max_activation_norm
            raise UserError(
                f"--sae_path {self.evaluated.file.name}: no token can be scored: all are special tokens or at positions"
                " that the SAE was not trained for"
                + (f", or their norm is above its limit of {limit:.4g}" if limit else "")
                + "; check that this is the model and layer that it was trained on"
            )
        if not losses["ce_clean"].isfinite():
            raise UserError(
                f"--model_name {self.prepared.model.name}: its own losses are not finite; check that its weights are"
                " whole, or give another --lm_dtype"
            )
        if not self.reconstruction.sums_SK().sum(0).isfinite().all():
            raise UserError(
                f"--sae_path {self.evaluated.file.name}: its reconstructions are not finite, so its weights may be"
                " damaged; use another copy"
            )

    def averages(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Returns the metrics of losses and reconstructions, and their intervals."""
        losses, loss_intervals = self._point_and_interval(LossStatistics, self.losses.sums_SK())
        reconstruction, intervals = self._point_and_interval(ReconstructionStatistics, self.reconstruction.sums_SK())
        del losses["kl_zero"]
        loss_intervals.pop("kl_zero", None)
        return losses | reconstruction, loss_intervals | intervals

    def finish(self, model: LanguageModel) -> Evaluation:
        """Computes the metrics, intervals, plots and features from the sums."""
        prepared, sae = self.prepared, self.evaluated.sae
        loss_sums_SK, reconstruction_sums_SK = self.losses.sums_SK(), self.reconstruction.sums_SK()
        losses, loss_intervals = self._point_and_interval(LossStatistics, loss_sums_SK)
        reconstruction, intervals = self._point_and_interval(ReconstructionStatistics, reconstruction_sums_SK)
        alive_F = self.firings.firings_F > 0
        cosines = measure_cosines(sae.W_dec, alive_F, seed=prepared.seed)
        saebench_core = None
        if self.saebench is not None:
            encoder_cosine = measure_cosines(sae.W_enc.T, torch.ones_like(alive_F), seed=prepared.seed).mean
            saebench_core = self.saebench.results(losses, encoder_cosine, cosines.mean)
            saebench_core["token_stats"] = token_stats(
                prepared.context.context_size, len(loss_sums_SK), len(reconstruction_sums_SK)
            )
        losses.pop("kl_zero")
        loss_intervals.pop("kl_zero", None)
        metrics = losses | reconstruction
        metrics["dead_features"] = self.firings.dead
        metrics["decoder_absorption"] = cosines.mean
        metrics["replaced_share"] = self.n_replaced / self.n_not_special
        intervals = loss_intervals | intervals
        if cosines.interval is not None:
            intervals["decoder_absorption"] = cosines.interval
        rates_F = with_float64(self.firings.firings_F).double() / self.firings.n_tokens
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            tokens=int(reconstruction_sums_SK[:, 0].sum()),
            sequences=len(reconstruction_sums_SK),
            loss_tokens=int(loss_sums_SK[:, 0].sum()),
            loss_sequences=len(loss_sums_SK),
            dead=self.firings.estimates(),
            cosines=cosines,
            saebench_core=saebench_core,
            plots=self._plots(rates_F, cosines),
            features=self.recorder.features(
                prepared.rows_NT,
                prepared.tokenizer,
                written_directions(sae),
                model.unembedding(sae.cfg.d_in),
            ),
            firing_rates_F=rates_F.cpu(),
        )

    def _point_and_interval(
        self, statistics: type[LossStatistics] | type[ReconstructionStatistics], sums_SK: torch.Tensor
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        units = torch.from_numpy(self.prepared.unit_N)[: len(sums_SK)]
        return point_and_interval(statistics, sums_SK, units, seed=self.prepared.seed)

    def _plots(self, rates_F: torch.Tensor, cosines: DirectionCosines) -> dict[str, Any]:
        alive_F = rates_F > 0
        return {
            "log10_firing_rate": histogram(rates_F[alive_F].log10(), -6.0, 0.0, 60),
            "never_fired": int((~alive_F).sum()),
            "l0": _l0_histogram(self.reconstruction.l0_counts),
            "decoder_cosine": cosines.histogram,
        }


def _l0_histogram(counts: torch.Tensor) -> tuple[list[float], list[int]]:
    """Returns the edges and counts of at most 60 bins, from the numbers of tokens with 0, 1, 2, ... active features."""
    width = -(-len(counts) // 60)
    padded = torch.nn.functional.pad(counts, (0, -len(counts) % width))
    binned = padded.view(-1, width).sum(1)
    return [width * i - 0.5 for i in range(len(binned) + 1)], binned.tolist()
