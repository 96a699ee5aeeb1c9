"""The loss of a language model's predictions with an SAE in place, and its gradient at the SAE's reconstructions.

The model is frozen: only the reconstructions get gradients. So contexts need not go through the model together, and its
memory is that of a few contexts, whatever the size of a training step.

Shapes: R contexts of T tokens, V vocabulary, D the width at the hook, N positions at which the SAE replaces activations
and predictions are scored, C of them that are computed at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_toolkit.errors import is_out_of_memory
from sae_toolkit.model.devices import release_memory, with_float64
from sae_toolkit.model.language_model import HookState, LanguageModel
from sae_toolkit.text.positions import PositionFilter

log = logging.getLogger(__name__)

Kind = Literal["kl", "ce"]

# Predictions are compared in chunks of at most so many float32 values: 4 MiB, which stay in the cache of a CPU, and 512
# MiB on a CUDA device.
_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**27}


@dataclass(frozen=True)
class _Piece:
    """Contexts that went through the model together.

    Args:
        tokens_RT: their tokens.
        kept_RT: booleans, True where the SAE replaces the activations.
        state: the model's state at the hook.
        clean_RTV: the model's own logits; None if the loss does not need them.
    """

    tokens_RT: Tensor
    kept_RT: Tensor
    state: HookState
    clean_RTV: Tensor | None

    def part(self, rows: slice) -> _Piece:
        state, clean_RTV = self.state, self.clean_RTV
        start, end, _ = rows.indices(len(self.tokens_RT))
        layer_input = state.layer_input_BTD
        if layer_input is not None:  # in some models it has an axis more, before or behind
            axes = range(layer_input.ndim - 1)
            axis = next(i for i in axes if layer_input.shape[i : i + 2] == self.tokens_RT.shape)
            layer_input = layer_input.narrow(axis, start, end - start)
        return _Piece(
            self.tokens_RT[rows],
            self.kept_RT[rows],
            replace(state, acts_BTD=state.acts_BTD[rows], layer_input_BTD=layer_input),
            None if clean_RTV is None else clean_RTV[rows],
        )


class PredictionLoss:
    """The loss of a model's predictions with reconstructions at its hook, on one batch of contexts after the other.

    `kl` is the KL divergence of the predictions from those of the model alone, KL(alone || with the SAE), its mean over
    the positions that the SAE replaces (Karvonen 2025, arXiv 2503.17272; Braun et al. 2024, arXiv 2405.12241). `ce` is
    the cross-entropy of the next token there, at positions that have one. Both are in nats. The other positions keep
    the model's own activations.

    Args:
        model: the model, with all layers.
        kind: the loss.
        positions: says which activations are massive and keep their place.
        rows_at_once: how many contexts go through the model at a time. It is halved if memory runs out.
    """

    def __init__(self, model: LanguageModel, kind: Kind, positions: PositionFilter, rows_at_once: int) -> None:
        self.model = model
        self.kind = kind
        self.positions = positions
        self.rows_at_once = rows_at_once
        self.n_massive = 0
        self._pieces: list[_Piece] = []
        self._precision = torch.get_float32_matmul_precision()

    def read(self, rows_RT: np.ndarray, keeps_RT: np.ndarray) -> Tensor:
        """Runs contexts through the model, and returns the activations [N, D] that the SAE is to reconstruct.

        `n_massive` is then the number of positions that are left out because their activations are massive.

        Args:
            rows_RT: token ids.
            keeps_RT: booleans, True at the positions that the SAE is trained on.
        """
        self.clear()
        self.n_massive = start = 0
        while start < len(rows_RT):
            piece_RT = rows_RT[start : start + self.rows_at_once]
            try:
                self._pieces.append(self._run(piece_RT, keeps_RT[start : start + self.rows_at_once]))
            except (RuntimeError, MemoryError) as error:
                self._lower_rows_at_once(error, len(piece_RT))
            else:
                start += len(piece_RT)
                continue
            release_memory()  # here, because the traceback in the handler keeps tensors alive
        return torch.cat([piece.state.acts_BTD[piece.kept_RT] for piece in self._pieces])

    def clear(self) -> None:
        """Frees what `read` keeps for `gradient`, above all the model's own logits."""
        self._pieces = []

    def _run(self, rows_RT: np.ndarray, keeps_RT: np.ndarray) -> _Piece:
        tokens_RT = torch.from_numpy(rows_RT.astype(np.int64))
        clean_RTV, state = self.model.logits(tokens_RT)
        kept_RT = torch.from_numpy(keeps_RT).to(state.acts_BTD.device)
        small_RT = self.positions.keeps_norms(state.acts_BTD)
        self.n_massive += int((kept_RT & ~small_RT).sum())
        return _Piece(tokens_RT, kept_RT & small_RT, state, clean_RTV if self.kind == "kl" else None)

    def gradient(self, recons_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss [] and its gradient [N, D] with respect to the reconstructions, in their dtype and device.

        Logarithms and sums over the vocabulary are in float32, sums over positions in float64.

        Args:
            recons_ND: reconstructions of the activations that `read` returned, in the model's units.
        """
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._precision)  # a step lowers it for the SAE's products
        try:
            return self._gradient(recons_ND)
        finally:
            torch.set_float32_matmul_precision(before)

    def _gradient(self, recons_ND: Tensor) -> tuple[Tensor, Tensor]:
        total, n_scored, n_done = 0.0, 0, 0
        gradients: list[Tensor] = []
        for piece in self._pieces:
            start, n_rows = 0, len(piece.tokens_RT)
            while start < n_rows:
                part = piece.part(slice(start, start + self.rows_at_once))
                n_kept = int(part.kept_RT.sum())
                try:
                    loss, n, grad_ND = self._gradient_of(part, recons_ND[n_done : n_done + n_kept])
                except (RuntimeError, MemoryError) as error:
                    self._lower_rows_at_once(error, len(part.tokens_RT))
                else:
                    gradients.append(grad_ND)
                    total, n_scored = total + loss, n_scored + n
                    n_done, start = n_done + n_kept, start + len(part.tokens_RT)
                    continue
                release_memory()
        # The sum over positions is differentiated and divided here, as the gradient of the mean underflows in float16.
        n_scored = max(n_scored, 1)
        return recons_ND.new_tensor(total / n_scored), torch.cat(gradients) / n_scored

    def _gradient_of(self, part: _Piece, recons_ND: Tensor) -> tuple[float, int, Tensor]:
        """Returns the sum of the loss over positions, their number, and the gradient [N, D] of the sum."""
        state = part.state
        leaf_ND = recons_ND.detach().to(state.acts_BTD.device).requires_grad_()
        with torch.enable_grad():
            acts_RTD = state.acts_BTD.to(leaf_ND.dtype).masked_scatter(part.kept_RT[..., None], leaf_ND)
            logits_RTV = self.model.logits_from_hook(part.tokens_RT, state, acts_RTD)
        scored_RT = part.kept_RT.to(logits_RTV.device)
        if self.kind == "ce":
            scored_RT = scored_RT.clone()
            scored_RT[:, -1] = False
        at_N = scored_RT.flatten().nonzero().squeeze(1)
        flat = logits_RTV.detach().flatten(0, 1)
        if part.clean_RTV is not None:
            loss, grad = kl_divergence(part.clean_RTV.flatten(0, 1), flat, at_N)
        else:
            loss, grad = cross_entropy(part.tokens_RT.flatten().to(flat.device), flat, at_N)
        (grad_ND,) = torch.autograd.grad(logits_RTV, leaf_ND, grad.view_as(logits_RTV))
        return loss.item(), len(at_N), grad_ND.to(recons_ND)

    def _lower_rows_at_once(self, error: BaseException, n_tried: int) -> None:
        """Halves the number of contexts in a forward pass after an error about memory. Raises any other error, and that
        of a single context.
        """
        if n_tried == 1 or not is_out_of_memory(error):
            raise error
        self.rows_at_once = n_tried // 2
        log.warning("out of memory: going on with %d contexts in a forward pass", self.rows_at_once)


def backward_with(
    prediction_loss: PredictionLoss, output: TrainStepOutput, scaler: ActivationScaler
) -> tuple[TrainStepOutput, Tensor]:
    """Computes the gradients of an SAE's own loss and of the weighted loss of the predictions, together.

    The weight makes the gradient of the loss of the predictions at the reconstructions as large, in its L2 norm, as
    that of the mean squared error. So it needs no tuning for a model or a layer, and a learning rate that suits the
    SAE's own loss suits the sum.

    Args:
        prediction_loss: the loss, with the contexts of this step read.
        output: the forward pass of the SAE, on the activations that `prediction_loss.read` returned.
        scaler: the normalization of these activations.

    Returns:
        The output with both losses in it, and the weight [].
    """
    sae_out = output.sae_out
    recons = scaler.unscale(sae_out)
    loss, grad_ND = prediction_loss.gradient(recons.detach().flatten(1))
    (grad_out,) = torch.autograd.grad(recons, sae_out, grad_ND.view_as(recons))
    (mse_grad_out,) = torch.autograd.grad(output.losses["mse_loss"], sae_out, retain_graph=True)
    norm = grad_out.float().norm()
    weight = torch.where(norm > 0, mse_grad_out.float().norm() / norm, 0.0)
    torch.autograd.backward((output.loss, sae_out), (None, weight.to(grad_out) * grad_out))
    whole = replace(
        output,
        loss=output.loss.detach() + weight * loss,
        losses=output.losses | {f"{prediction_loss.kind}_loss": loss},
        metrics=output.metrics | {"finetune_weight": weight},
    )
    return whole, weight


def kl_divergence(clean_MV: Tensor, logits_MV: Tensor, at_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum over positions of KL(clean || other) in nats [], and its gradient at the other logits [M, V].

    Args:
        clean_MV: logits of the model alone at M positions.
        logits_MV: the other logits.
        at_N: the positions to sum over. The gradient is 0 at the others.
    """
    total, grad_MV = with_float64(logits_MV.new_zeros(())).double(), torch.zeros_like(logits_MV)
    for at_C in _chunks(at_N, logits_MV):
        log_p_CV = clean_MV[at_C].log_softmax(-1, dtype=torch.float32)
        log_q_CV = logits_MV[at_C].log_softmax(-1, dtype=torch.float32)
        p_CV = log_p_CV.exp()
        total += with_float64(torch.linalg.vecdot(p_CV, log_p_CV.sub_(log_q_CV))).double().sum()
        grad_MV[at_C] = log_q_CV.exp_().sub_(p_CV).to(grad_MV.dtype)
    return total, grad_MV


def cross_entropy(tokens_M: Tensor, logits_MV: Tensor, at_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum over positions of the next token's cross-entropy in nats [], and its gradient [M, V].

    Args:
        tokens_M: the tokens of M positions, one context after the other.
        logits_MV: logits.
        at_N: the positions to sum over, which must have a next token. The gradient is 0 at the others.
    """
    total, grad_MV = with_float64(logits_MV.new_zeros(())).double(), torch.zeros_like(logits_MV)
    for at_C in _chunks(at_N, logits_MV):
        next_C1 = tokens_M[at_C + 1, None]
        log_q_CV = logits_MV[at_C].log_softmax(-1, dtype=torch.float32)
        total -= with_float64(log_q_CV.gather(1, next_C1)).double().sum()
        q_CV = log_q_CV.exp_()
        q_CV.scatter_add_(1, next_C1, -torch.ones_like(next_C1, dtype=q_CV.dtype))
        grad_MV[at_C] = q_CV.to(grad_MV.dtype)
    return total, grad_MV


def _chunks(at_N: Tensor, logits_MV: Tensor) -> tuple[Tensor, ...]:
    values = _CHUNK_VALUES["cpu" if logits_MV.device.type == "cpu" else "cuda"]
    return at_N.split(max(1, values // logits_MV.shape[-1]))
