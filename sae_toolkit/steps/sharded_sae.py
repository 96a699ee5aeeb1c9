"""Trains one SAE with its features spread over the ranks, if it and Adam's moments do not fit on one device.

Each rank holds a shard: the encoder columns and decoder rows of F / size features, with their gradients, moments and
counters. Each rank sees the whole batch. In a step the ranks exchange the batch's activations, the candidates of the
selection, and the shards' reconstructions, which are summed. On disk the SAE is whole: rank 0 gathers it in its host's
memory and writes what a run on one device would write. So a run can be continued with any number of ranks.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.steps.finetune_loss import PredictionLoss
from sae_toolkit.steps.sparse_topk import SPARSE_CLASSES, SparseTopKTrainingSAE
from sae_toolkit.steps.trainer import Trainer

_WITHOUT_FEATURE_AXIS = ("b_dec", "topk_threshold")  # the tensors without an axis of features
_COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NUMBERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "started_fine_tuning")


def shard_sae(sae: TrainingSAE[Any] | None, device: str, ranks: Ranks) -> SparseTopKTrainingSAE:
    """Returns this rank's shard of an SAE of one of SAELens's TopK and BatchTopK training classes.

    Args:
        sae: the whole SAE, on the CPU of rank 0; None on the others. Its width is a multiple of the number of ranks.
        device: where to put the shard.
        ranks: the ranks that share the features.
    """
    cfg = ranks.broadcast(sae.cfg if sae is not None else None)
    assert cfg is not None
    sae_class = SPARSE_CLASSES[get_sae_training_class(cfg.architecture())[0]]
    shard = sae_class(replace(cfg, d_sae=cfg.d_sae // ranks.size, device=device))
    shard.shards = ranks
    _load_part(shard, sae, ranks)
    return shard


def is_shard(sae: TrainingSAE[Any]) -> bool:
    """Returns whether an SAE is one of two or more shards."""
    return isinstance(sae, SparseTopKTrainingSAE) and not sae.shards.is_alone


@torch.no_grad()
def _load_part(shard: SparseTopKTrainingSAE, sae: TrainingSAE[Any] | None, ranks: Ranks) -> None:
    whole = sae.state_dict() if sae is not None else {}
    for name, tensor in shard.state_dict().items():
        tensor.copy_(_part(name, tensor, whole.get(name), ranks))


def _part(name: str, like: torch.Tensor, whole: torch.Tensor | None, ranks: Ranks) -> torch.Tensor:
    """Returns this rank's part of a tensor that is on rank 0; all of it if it has no axis of features.

    Args:
        name: the tensor's name in the SAE.
        like: a tensor of the part's shape and dtype.
        whole: the tensor on rank 0, None on the others.
        ranks: the ranks that share the features.
    """
    if name in _WITHOUT_FEATURE_AXIS:
        found = ranks.broadcast(whole)
        assert found is not None
        return found
    return _by_feature(
        name, ranks.scatter_from_main(None if whole is None else _by_feature(name, whole), _by_feature(name, like))
    )


def _gather(name: str, part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Returns the whole tensor on rank 0, and the part on the others."""
    part = part.detach().cpu()
    if name in _WITHOUT_FEATURE_AXIS:
        return part
    parts = ranks.gather_to_main(_by_feature(name, part))
    return _by_feature(name, torch.cat(parts)) if parts else part


def _by_feature(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Moves the features to the first axis, or back."""
    return tensor.t() if name == "W_enc" else tensor


class ShardedTrainer(Trainer):
    """Trains a shard. A step is given this rank's part of a batch, and uses the whole batch.

    Args:
        cfg, data_provider, ranks, target_l0: as for `Trainer`.
        sae: returned by `shard_sae`.
    """

    sae: SparseTopKTrainingSAE

    def _replicated_tensors(self) -> list[torch.Tensor]:
        return [tensor for name, tensor in self._tensors().items() if name in _WITHOUT_FEATURE_AXIS]

    def _sample_ranks(self) -> Ranks:
        return ALONE  # each rank steps on the whole batch

    def _tensors(self) -> dict[str, torch.Tensor]:
        return dict([*self.sae.named_parameters(), *self.sae.named_buffers()])

    def step(self, batch: torch.Tensor, prediction_loss: PredictionLoss | None = None) -> TrainStepOutput:
        """Takes one step on the raw activations [B_r, D] of each rank, which are B tokens together.

        The output is for all B tokens. Its `feature_acts` [B, F / size] are those of this rank's features.
        """
        assert prediction_loss is None  # --finetune_loss is for a single rank
        return super().step(torch.cat(self.ranks.gather(batch.to(self.sae.device))))

    def _grad_norm(self) -> torch.Tensor:
        grads = {name: parameter.grad for name, parameter in self.sae.named_parameters() if parameter.grad is not None}
        of_all = grads.pop("b_dec").square().sum()
        of_shards = torch.nn.utils.get_total_norm(list(grads.values())).square()
        return (self.ranks.sum(of_shards) + of_all).sqrt()

    def _over_whole_batch(
        self, firings_F: torch.Tensor, loss: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return firings_F, loss

    def _dead_bound(self) -> tuple[int, int]:
        bound = super()._dead_bound()
        if bound is None:
            total, most = self._count(self.dead_neurons).tolist()
            return total, most
        return bound

    def _count(self, features_F: torch.Tensor) -> torch.Tensor:
        return torch.stack((self.ranks.sum(features_F.sum()), self.ranks.maximum(features_F.sum())))

    def firing_counts(self) -> torch.Tensor:
        return torch.cat(self.ranks.gather(super().firing_counts()))

    @property
    def feature_sparsity(self) -> torch.Tensor:
        """The firing rates of all features, [F]."""
        return torch.cat(self.ranks.gather(super().feature_sparsity))

    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        reading = SAETrainer.build_train_step_log_dict(self, output, n_training_samples)
        sums = ("metrics/l0", "sparsity/dead_features", "sparsity/mean_passes_since_fired")
        totals = self.ranks.sum(torch.tensor([reading[name] for name in sums], device=self.sae.device)).tolist()
        reading |= dict(zip(sums, totals, strict=True))
        reading["sparsity/mean_passes_since_fired"] /= self.ranks.size
        reading["sparsity/dead_features"] = int(reading["sparsity/dead_features"])
        return reading

    def whole(self, *, finished: bool) -> Trainer | None:
        """Returns a trainer of the whole SAE on the CPU of rank 0; None on the others."""
        calibration = self.calibrate()
        tensors = {name: _gather(name, tensor, self.ranks) for name, tensor in self._tensors().items()}
        counters = {name: _gather(name, getattr(self, name), self.ranks) for name in _COUNTERS}
        moments = {
            name: {key: _gather(name, self.optimizer.state[parameter][key], self.ranks) for key in _MOMENTS}
            for name, parameter in self.sae.named_parameters()
            if not finished
        }
        if not self.ranks.is_main:
            return None
        whole = self._new_whole(tensors)
        _set_state(whole, _state(self), moments, counters)
        whole.calibration = calibration
        return whole

    def load_checkpoint(self, checkpoint_path: Path) -> None:
        """Loads this rank's part of the checkpoint of a whole SAE. Rank 0 reads the files."""
        whole = None
        if self.ranks.is_main:
            whole = self._new_whole()
            whole.load_checkpoint(checkpoint_path)
        _load_part(self.sae, whole and whole.sae, self.ranks)
        parameters = dict(self.sae.named_parameters())
        of_whole = {name: whole.optimizer.state[p] for name, p in whole.sae.named_parameters()} if whole else {}
        moments = {
            name: {key: _part(name, like, of_whole.get(name, {}).get(key), self.ranks) for key in _MOMENTS}
            for name, like in parameters.items()
        }
        counters = {
            name: _part(name, getattr(self, name), whole and getattr(whole, name), self.ranks) for name in _COUNTERS
        }
        state = self.ranks.broadcast(_state(whole) if whole else None)
        assert state is not None
        _set_state(self, state, moments, counters)

    def _new_whole(self, tensors: dict[str, torch.Tensor] | None = None) -> Trainer:
        """Returns a trainer of the whole SAE on the CPU, with these weights, or uninitialized if there are none."""
        cfg = replace(self.sae.cfg, d_sae=self.sae.cfg.d_sae * self.ranks.size, device="cpu")
        with torch.device("meta"):
            sae = type(self.sae)(replace(cfg, device="meta"))
        if tensors is None:
            sae.to_empty(device="cpu")
        else:
            sae.load_state_dict(tensors, assign=True)
        sae.cfg, sae.device = cfg, torch.device("cpu")
        return Trainer(replace(self.cfg, device="cpu"), sae, iter(()))


def _state(trainer: Trainer) -> dict[str, Any]:
    """Returns a trainer's state without the tensors that have an axis of features."""
    first = next(trainer.sae.parameters())
    return {
        "numbers": {name: getattr(trainer, name) for name in _NUMBERS},
        "activation_scaler": copy(trainer.activation_scaler),
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: each.state_dict() for name, each in trainer.coefficient_schedulers.items()},
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "n_adam_steps": float(trainer.optimizer.state[first]["step"]),
        "beside_saelens": trainer.state_beside_saelens(),
    }


def _set_state(
    trainer: Trainer,
    state: dict[str, Any],
    moments: dict[str, dict[str, torch.Tensor]],
    counters: dict[str, torch.Tensor],
) -> None:
    for name, number in state["numbers"].items():
        setattr(trainer, name, number)
    trainer.activation_scaler = state["activation_scaler"]
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, each in trainer.coefficient_schedulers.items():
        each.load_state_dict(state["coefficients"][name])
    trainer.optimizer.param_groups[0]["lr"] = state["lr"]
    for name, parameter in trainer.sae.named_parameters():
        if name in moments:
            step = torch.tensor(state["n_adam_steps"], dtype=torch.float32, device=parameter.device)
            trainer.optimizer.state[parameter] = {"step": step} | moments.pop(name)
    for name, counter in counters.items():
        setattr(trainer, name, counter.to(trainer.cfg.device))
    trainer.load_state_beside_saelens(state["beside_saelens"])
    trainer.after_loading()
