"""The definitions of what is measured. Shapes: N tokens, D dimensions, F features, B x T tokens, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Nothing is held for all tokens at once: chunks of at most this many float32 values (512 MiB).
_CHUNK_VALUES = 2**27


def chunk_length(values_per_row: int) -> int:
    """How many rows of so many values make a chunk of bounded size; at least 1."""
    return max(1, _CHUNK_VALUES // values_per_row)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of the softmax over the last axis, in float32 whatever the dtype of the logits."""
    return logits.float().log_softmax(-1)


def loss_recovered(ce_clean: float, ce_sae: float, ce_zero: float) -> float:
    """(CE zero-ablated - CE with SAE) / (CE zero-ablated - CE clean): 1 is all, 0 no better than zeros.

    SAELens and SAEBench call it `ce_loss_score`.
    """
    return (ce_zero - ce_sae) / (ce_zero - ce_clean)


@torch.no_grad()
def mean_max_cosine(W_FD: torch.Tensor) -> float:
    """Mean over rows of the largest cosine between a row and any other row, in [-1, 1].

    On decoder weights this is SAEBench's `average_max_decoder_cosine_sim`. The F x F matrix is made in chunks.
    """
    unit_FD = F.normalize(W_FD.float(), dim=-1)
    n = chunk_length(len(unit_FD))
    total = 0.0
    for start in range(0, len(unit_FD), n):
        cosines = unit_FD[start : start + n] @ unit_FD.T
        rows = torch.arange(len(cosines), device=cosines.device)
        cosines[rows, start + rows] = -torch.inf
        total += cosines.max(dim=-1).values.double().sum().item()
    return total / len(unit_FD)


@dataclass
class LossStatistics:
    """Sums over positions of what the SAE does to the model's predictions, in nats.

    Cross-entropies are of the token after a position, given the text up to it; KL is KL(p || q), with p the
    model's own prediction and q the one with the SAE. Logarithms are float32, sums float64.
    """

    n_losses: int = 0
    n_positions: int = 0
    ce_clean: float = 0.0
    ce_sae: float = 0.0
    ce_zero: float = 0.0
    kl_sae: float = 0.0

    def add(
        self,
        tokens_T: torch.Tensor,
        kept_T: torch.Tensor,
        clean_TV: torch.Tensor,
        sae_TV: torch.Tensor,
        zero_log_probs_TV: torch.Tensor,
    ) -> None:
        """Adds the positions of one sequence that are kept.

        Args:
            tokens_T: the sequence; its last position has no next token and counts for KL alone.
            kept_T: which positions count.
            clean_TV: logits of the model.
            sae_TV: logits with the SAE.
            zero_log_probs_TV: `log_probabilities` with zeros at the hook.
        """
        kept_N = kept_T.nonzero().squeeze(1)
        for at in kept_N.split(chunk_length(4 * clean_TV.shape[-1])):
            log_p, log_q = log_probabilities(clean_TV[at]), log_probabilities(sae_TV[at])
            self.kl_sae += F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).double().sum().item()
            self.n_positions += len(at)
            at = at[at < len(tokens_T) - 1]
            targets = tokens_T[at + 1, None]
            for name, log_probs in (("clean", log_p), ("sae", log_q), ("zero", zero_log_probs_TV[at])):
                losses = -log_probs[: len(at)].gather(1, targets).double().sum().item()
                setattr(self, f"ce_{name}", getattr(self, f"ce_{name}") + losses)
            self.n_losses += len(at)

    def metrics(self) -> dict[str, float]:
        """`loss_recovered`, `ce_clean`, `ce_sae`, `ce_zero` and `kl_sae`."""
        ce_clean, ce_sae, ce_zero = (total / self.n_losses for total in (self.ce_clean, self.ce_sae, self.ce_zero))
        return {
            "loss_recovered": loss_recovered(ce_clean, ce_sae, ce_zero),
            "ce_clean": ce_clean,
            "ce_sae": ce_sae,
            "ce_zero": ce_zero,
            "kl_sae": self.kl_sae / self.n_positions,
        }


@dataclass
class ReconstructionStatistics:
    """Sums over tokens of what the SAE alone determines, added chunk by chunk in float64."""

    n_tokens: int = 0
    n_active: float = 0.0
    cosine: float = 0.0
    l2_ratio: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    offset_D: torch.Tensor | None = None  # near the mean, so that the variance is no difference of large numbers
    sum_D: torch.Tensor | None = None
    firings_F: torch.Tensor | None = None

    def add(self, acts_ND: torch.Tensor, recons_ND: torch.Tensor, features_NF: torch.Tensor) -> None:
        """Adds N >= 0 tokens: activations, their reconstructions and feature activations."""
        if len(acts_ND) == 0:
            return
        x, recons = acts_ND.double(), recons_ND.double()
        active_NF = features_NF != 0
        firings_F = active_NF.sum(0)
        if self.offset_D is None:
            self.offset_D = x.mean(0)
            self.sum_D, self.firings_F = torch.zeros_like(self.offset_D), torch.zeros_like(firings_F)
        assert self.sum_D is not None and self.firings_F is not None
        centred = x - self.offset_D
        self.n_tokens += len(x)
        self.n_active += firings_F.sum().item()
        self.firings_F += firings_F
        self.cosine += F.cosine_similarity(x, recons, dim=-1).sum().item()
        self.l2_ratio += (recons.norm(dim=-1) / x.norm(dim=-1)).sum().item()
        self.squared_error += (x - recons).pow(2).sum().item()
        self.squared_norm += centred.pow(2).sum().item()
        self.sum_D += centred.sum(0)

    def metrics(self) -> dict[str, float]:
        """`explained_variance`, `cosine_similarity`, `l2_ratio`, `l0` and `dead_features`.

        Explained variance is 1 - sum |x - x_hat|^2 / sum |x - mean x|^2, both sums over all tokens and
        dimensions. Dead features are the share without one activation over these tokens.
        """
        assert self.sum_D is not None and self.firings_F is not None
        variance = self.squared_norm - self.sum_D.pow(2).sum().item() / self.n_tokens
        return {
            "explained_variance": 1 - self.squared_error / variance,
            "cosine_similarity": self.cosine / self.n_tokens,
            "l2_ratio": self.l2_ratio / self.n_tokens,
            "l0": self.n_active / self.n_tokens,
            "dead_features": (self.firings_F == 0).double().mean().item(),
        }
