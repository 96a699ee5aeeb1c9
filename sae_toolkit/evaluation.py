"""Streams real text through a language model and an SAE at its hook, and measures what becomes of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation_setup import PreparedEvaluation
from sae_toolkit.language_model import HookState, LanguageModel
from sae_toolkit.metrics import (
    LossStatistics,
    ReconstructionStatistics,
    chunk_length,
    log_probabilities,
    mean_max_cosine,
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on how much.

    `tokens` are those that the SAE stood in for, on which its features, L0 and reconstruction are measured;
    `loss_tokens` those whose next-token losses were averaged.
    """

    metrics: dict[str, float]
    tokens: int
    sequences: int
    loss_tokens: int
    loss_sequences: int


class _ZeroAblation:
    """The model's predictions with zeros at the hook, at every position.

    Where nothing but the hook carries the text onwards (the residual stream), they are the same for every
    sequence; once a batch has shown that, they are not computed again.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._shared_TV: torch.Tensor | None = None

    def log_probs(self, tokens_BT: torch.Tensor, state: HookState) -> Sequence[torch.Tensor]:
        """Log-probabilities [T, V] of each sequence."""
        if self._shared_TV is not None:
            return [self._shared_TV] * len(tokens_BT)
        logits_BTV = self.model.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD))
        if len(logits_BTV) > 1 and all(torch.equal(logits_TV, logits_BTV[0]) for logits_TV in logits_BTV[1:]):
            self._shared_TV = log_probabilities(logits_BTV[0])
            return [self._shared_TV] * len(tokens_BT)
        return [log_probabilities(logits_TV) for logits_TV in logits_BTV]


@torch.no_grad()
def evaluate_sae(prepared: PreparedEvaluation, model: LanguageModel, *, batch_size: int) -> Evaluation:
    """Measures an SAE on rows of tokens.

    At the positions that the SAE was trained for, its reconstruction stands in for the model's own activation,
    and these positions alone are averaged; at the others the model goes on with its own.

    Args:
        prepared: the SAE, the rows, and which positions count.
        model: hooked where the SAE goes.
        batch_size: rows in one forward pass.

    Raises:
        UserError: not one position counts.
    """
    sae, rows_NT, positions = prepared.sae, prepared.rows_NT, prepared.positions
    statistics = ReconstructionStatistics()
    losses = LossStatistics()
    zero_ablation = _ZeroAblation(model)
    n_not_special = n_replaced = 0
    with tqdm(total=rows_NT.size, desc="Evaluating", unit="tok", unit_scale=True, leave=False) as progress:
        start = 0
        while start < len(rows_NT):
            with_losses = start < prepared.n_loss_rows
            stop = min(start + batch_size, prepared.n_loss_rows if with_losses else len(rows_NT))
            tokens = rows_NT[start:stop].astype(np.int64)
            tokens_BT = torch.from_numpy(tokens)
            if with_losses:
                logits_BTV, state = model.logits(tokens_BT)
                acts_BTD = state.acts_BTD
            else:
                acts_BTD = model.activations(tokens_BT)
            kept_BT = torch.from_numpy(positions.keeps_tokens(tokens)).to(acts_BTD.device)
            kept_BT &= positions.keeps_norms(acts_BTD)
            not_special_BT = ~np.isin(tokens, prepared.special_token_ids)
            n_not_special += int(not_special_BT.sum())
            n_replaced += int((not_special_BT & kept_BT.cpu().numpy()).sum())
            replaced_BTD = _stand_in(sae, acts_BTD, kept_BT, statistics)
            if with_losses:
                sae_BTV = model.logits_from_hook(tokens_BT, state, replaced_BTD)
                zero_BTV = zero_ablation.log_probs(tokens_BT, state)
                tokens_BT = tokens_BT.to(logits_BTV.device)
                for b in range(len(tokens_BT)):
                    losses.add(tokens_BT[b], kept_BT[b], logits_BTV[b], sae_BTV[b], zero_BTV[b])
                del logits_BTV, sae_BTV, zero_BTV, state
            progress.update(tokens.size)
            start = stop
    if statistics.n_tokens == 0 or losses.n_losses == 0:
        raise UserError(
            f"--sae_path: not one of {rows_NT.size:,} tokens has an activation within the SAE's norm limit of"
            f" {positions.max_activation_norm}; is this the model and layer that it was trained on?"
        )
    metrics = losses.metrics() | statistics.metrics()
    metrics["decoder_absorption"] = mean_max_cosine(sae.W_dec)
    metrics["replaced_share"] = n_replaced / n_not_special
    return Evaluation(
        metrics,
        tokens=statistics.n_tokens,
        sequences=len(rows_NT),
        loss_tokens=losses.n_losses,
        loss_sequences=min(prepared.n_loss_rows, len(rows_NT)),
    )


def _stand_in(
    sae: SAE[Any], acts_BTD: torch.Tensor, kept_BT: torch.Tensor, statistics: ReconstructionStatistics
) -> torch.Tensor:
    """A copy of the activations with the SAE's reconstructions at the kept positions; adds to the statistics."""
    replaced_BTD = acts_BTD.clone()
    acts_ND = acts_BTD[kept_BT]
    recons_ND = torch.empty_like(acts_ND)
    n = chunk_length(sae.cfg.d_sae)
    for start in range(0, len(acts_ND), n):
        chunk = acts_ND[start : start + n].to(sae.device, torch.float32)
        features = sae.encode(chunk)
        recons = sae.decode(features)
        statistics.add(chunk, recons, features)
        recons_ND[start : start + n] = recons.to(recons_ND)
    replaced_BTD[kept_BT] = recons_ND
    return replaced_BTD
