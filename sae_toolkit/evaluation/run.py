"""Streams real text through a language model and SAEs at its hook, and measures what becomes of both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates, FiringStatistics
from sae_toolkit.evaluation.decoder_cosines import DirectionCosines, measure_cosines
from sae_toolkit.evaluation.feature_browser import Feature, FeatureRecorder
from sae_toolkit.evaluation.metrics import (
    LossStatistics,
    ReconstructionStatistics,
    chunk_length,
    compare_predictions,
    histogram,
    point_and_interval,
)
from sae_toolkit.evaluation.saebench.core import SAEBenchStatistics, token_stats
from sae_toolkit.evaluation.setup import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.model.language_model import HookState, LanguageModel
from sae_toolkit.terminal.progress import Progress

# Where not one position counted in so many batches, none will.
_BATCHES_WITHOUT_A_POSITION = 4
# Hooks whose activations are added to the residual stream as they are, or are it: what the output head reads.
_WRITES_TO_RESIDUAL = re.compile(r"\.hook_(resid_(pre|mid|post)|attn_out|mlp_out)$")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one SAE, and on how much.

    Args:
        metrics: by name; shares as fractions, losses in nats. NaN where there is no number.
        intervals: 95% bootstrap intervals of those that are averages over the sample.
        tokens: on which L0 and reconstruction are measured, in `sequences`.
        loss_tokens: whose next-token losses were averaged, in `loss_sequences`.
        dead: what the sample says of silent features, over tokens of their own number.
        cosines: of the decoder.
        saebench_core: SAEBench's categories, under its protocol.
        plots: histograms, as edges and counts.
        features: for the feature browser.
        firing_rates_F: firings a token.
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


def evaluate_saes(prepared: PreparedEvaluation, model: LanguageModel, *, batch_size: int) -> list[Evaluation]:
    """Measures SAEs on the same rows of tokens.

    The model runs once for what the SAEs share: its own losses, those with zeros at the hook, and the layers
    up to the hook. Only the layers after it run again for each SAE.

    Args:
        prepared: the SAEs, the rows, and which positions count.
        model: hooked where the SAEs go.
        batch_size: rows in one forward pass.

    Returns:
        One evaluation for each SAE, in their order.

    Raises:
        UserError: not one position counts for one of the SAEs, or the GPU's memory does not suffice.
    """
    try:
        return _evaluate_saes(prepared, model, batch_size)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch_size {batch_size}: the memory of {prepared.device} does not suffice for {len(prepared.saes)} SAEs"
            f" and the model ({one_line(error)}); lower it, or name fewer SAEs"
        ) from error


@torch.no_grad()
def _evaluate_saes(prepared: PreparedEvaluation, model: LanguageModel, batch_size: int) -> list[Evaluation]:
    rows_NT = prepared.rows_NT
    measurements = []
    for evaluated in prepared.saes:
        evaluated.sae.to(prepared.device)
        measurements.append(_Measurement(evaluated, prepared))
    zero_ablation = _ZeroAblation(model)
    ends = sorted({prepared.n_loss_rows, prepared.n_sae_rows, len(rows_NT)})
    n_batches = start = 0
    with Progress("evaluating", rows_NT.size) as progress:
        while start < len(rows_NT):
            stop = min(start + batch_size, next(end for end in ends if end > start))
            batch = _Batch(start, rows_NT[start:stop].astype(np.int64))
            tokens_BT = torch.from_numpy(batch.tokens_BT)
            if start < prepared.n_loss_rows:
                clean_BTV, state = model.logits(tokens_BT)
                zero_logits = zero_ablation.logits(tokens_BT, state)
                tokens_BT = tokens_BT.to(clean_BTV.device)
                zero = None
                for measurement in measurements:
                    replaced_BTD, scored_BT = measurement.add(batch, state.acts_BTD, with_reconstruction=True)
                    sae_BTV = model.logits_from_hook(tokens_BT, state, replaced_BTD)
                    others: list[Sequence[torch.Tensor]] = [list(sae_BTV)] if zero else [list(sae_BTV), zero_logits]
                    ce_clean_BT, compared = compare_predictions(tokens_BT, clean_BTV, others)
                    zero = zero or compared[1]
                    measurement.losses.add(scored_BT, ce_clean_BT, compared[0], zero)
                    del sae_BTV
                del clean_BTV, zero_logits, state
            else:
                acts_BTD = model.activations(tokens_BT)
                for measurement in measurements:
                    measurement.add(batch, acts_BTD, with_reconstruction=start < prepared.n_sae_rows)
            n_batches += 1
            if n_batches == _BATCHES_WITHOUT_A_POSITION or stop == len(rows_NT):
                for measurement in measurements:
                    measurement.check()
            progress.advance(batch.tokens_BT.size)
            start = stop
    evaluations = [measurement.finish(model) for measurement in measurements]
    for evaluated in prepared.saes:
        evaluated.sae.to("cpu")
    return evaluations


class _ZeroAblation:
    """The model's predictions with zeros at the hook, at every position.

    Where nothing but the hook carries the text onwards (the residual stream), they are the same for every
    sequence, and computed for one.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._is_shared = model.ablation_is_shared
        self._shared_TV: torch.Tensor | None = None

    def logits(self, tokens_BT: torch.Tensor, state: HookState) -> Sequence[torch.Tensor]:
        """Logits [T, V] of each sequence."""
        if not self._is_shared:
            return list(self.model.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD)))
        if self._shared_TV is None:
            layer_input = state.layer_input_BTD
            one = replace(
                state,
                acts_BTD=state.acts_BTD[:1],
                layer_input_BTD=None if layer_input is None else layer_input[:1],
            )
            self._shared_TV = self.model.logits_from_hook(tokens_BT[:1], one, torch.zeros_like(one.acts_BTD))[0]
        return [self._shared_TV] * len(tokens_BT)


@dataclass(frozen=True)
class _Batch:
    first_row: int
    tokens_BT: np.ndarray


class _Measurement:
    """All that is summed up for one SAE while the rows go by."""

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
        self, batch: _Batch, acts_BTD: torch.Tensor, *, with_reconstruction: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a batch to the sums.

        Returns:
            The activations [B, T, D], with the SAE's reconstructions where it stands in for them, and which
            positions are averaged [B, T].
        """
        replaced_BT, scored_BT = self._positions(batch.tokens_BT, acts_BTD)
        if not with_reconstruction:
            replaced_BT = scored_BT
        else:
            not_special_BT = torch.from_numpy(~np.isin(batch.tokens_BT, self.prepared.special_token_ids))
            self.n_not_special += int(not_special_BT.sum())
            self.n_replaced += int((not_special_BT & replaced_BT.cpu()).sum())
        sae = self.evaluated.sae
        at_N2 = replaced_BT.nonzero()
        acts_ND = acts_BTD[replaced_BT]
        recons_ND = torch.empty_like(acts_ND, dtype=torch.float32, device=sae.device)
        n = chunk_length(4 * sae.cfg.d_sae)  # a few tensors of tokens x features at a time
        for at in range(0, len(acts_ND), n):
            chunk_ND = acts_ND[at : at + n].to(sae.device, torch.float32)
            features_NF = sae.encode(chunk_ND)
            recons = sae.decode(features_NF) if with_reconstruction else None
            if recons is not None:
                recons_ND[at : at + n] = recons
            self._score(batch, scored_BT, at_N2[at : at + n], chunk_ND, features_NF, recons)
        if not with_reconstruction:
            return acts_BTD, scored_BT
        if self.saebench is not None:
            scored_N = scored_BT[replaced_BT]
            self.saebench.add_batch(acts_ND[scored_N].to(sae.device), recons_ND[scored_N.to(sae.device)])
        replaced_BTD = acts_BTD.clone()
        replaced_BTD[replaced_BT] = recons_ND.to(acts_BTD)
        return replaced_BTD, scored_BT

    def _positions(self, tokens_BT: np.ndarray, acts_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the SAE stands in, and which of these positions are averaged: two [B, T] of booleans."""
        if self.prepared.protocol == "saebench":
            scored_BT = torch.from_numpy(~np.isin(tokens_BT, self.prepared.unscored_token_ids)).to(acts_BTD.device)
            return torch.ones_like(scored_BT), scored_BT
        positions = self.evaluated.positions
        kept_BT = torch.from_numpy(positions.keeps_tokens(tokens_BT)).to(acts_BTD.device)
        kept_BT &= positions.keeps_norms(acts_BTD)
        return kept_BT, kept_BT

    def _score(
        self,
        batch: _Batch,
        scored_BT: torch.Tensor,
        at_N2: torch.Tensor,
        acts_ND: torch.Tensor,
        features_NF: torch.Tensor,
        recons_ND: torch.Tensor | None,
    ) -> None:
        """Adds a part of a batch's tokens, at (sequence, position), to the sums, but for those not scored."""
        scored_N = scored_BT[at_N2[:, 0], at_N2[:, 1]].to(acts_ND.device)
        at_N2 = at_N2.to(acts_ND.device)
        if not scored_N.all():
            at_N2, acts_ND, features_NF = at_N2[scored_N], acts_ND[scored_N], features_NF[scored_N]
            recons_ND = None if recons_ND is None else recons_ND[scored_N]
        sequence_N = at_N2[:, 0] + batch.first_row
        active_NF = features_NF != 0
        self.firings.add(sequence_N, active_NF)
        if recons_ND is not None:
            self.recorder.add(sequence_N, at_N2[:, 1], features_NF)
            self.reconstruction.add(sequence_N, acts_ND, recons_ND, active_NF.sum(1))
            if self.saebench is not None:
                self.saebench.add_features(features_NF)

    def check(self) -> None:
        if self.firings.n_tokens == 0 or self.losses.sums_SK()[:, 0].sum() == 0:
            limit = self.evaluated.positions.max_activation_norm
            raise UserError(
                f"--sae_path {self.evaluated.file.name}: not one of the tokens counts: all are special, at positions"
                " that the SAE was not trained for"
                + (f", or of a norm above its limit of {limit:.4g}" if limit else "")
                + "; is this the model and layer that it was trained on?"
            )
        statistics = LossStatistics.metrics(self.losses.sums_SK().sum(0))
        if not statistics["ce_clean"].isfinite():
            raise UserError(
                f"--model_name {self.prepared.model.name}: its own losses are not finite; are its weights whole, and"
                " does it compute in --lm_dtype?"
            )
        if not self.reconstruction.sums_SK().sum(0).isfinite().all():
            raise UserError(
                f"--sae_path {self.evaluated.file.name}: its reconstructions are not finite; are its weights damaged?"
            )

    def finish(self, model: LanguageModel) -> Evaluation:
        prepared, sae = self.prepared, self.evaluated.sae
        loss_sums_SK, reconstruction_sums_SK = self.losses.sums_SK(), self.reconstruction.sums_SK()
        units = torch.from_numpy(prepared.unit_N)
        losses, loss_intervals = point_and_interval(
            LossStatistics, loss_sums_SK, units[: len(loss_sums_SK)], seed=prepared.seed
        )
        reconstruction, intervals = point_and_interval(
            ReconstructionStatistics, reconstruction_sums_SK, units[: len(reconstruction_sums_SK)], seed=prepared.seed
        )
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
        rates_F = self.firings.firings_F.double() / self.firings.n_tokens
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
            plots={
                "log10_firing_rate": histogram(rates_F[alive_F].log10(), -6.0, 0.0, 60),
                "never_fired": int((~alive_F).sum()),
                "l0": _l0_histogram(self.reconstruction.l0_counts),
                "decoder_cosine": cosines.histogram,
            },
            features=self.recorder.features(
                prepared.rows_NT,
                prepared.tokenizer,
                sae.W_dec,
                *(model.unembedding() if _WRITES_TO_RESIDUAL.search(prepared.hook_name) else ()),
            ),
            firing_rates_F=rates_F.cpu(),
        )


def _l0_histogram(counts: torch.Tensor) -> tuple[list[float], list[int]]:
    """Edges and counts of at most 60 bins, from how many tokens have 0, 1, 2, ... active features."""
    width = -(-len(counts) // 60)
    padded = torch.nn.functional.pad(counts, (0, -len(counts) % width))
    binned = padded.view(-1, width).sum(1)
    return [width * i - 0.5 for i in range(len(binned) + 1)], binned.tolist()
