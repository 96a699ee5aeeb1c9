"""SAELens's multi-SAE trainer with our steps: an SAE at each hook, from one stream of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.steps.sharded_sae import ShardedTrainer, is_shard
from sae_toolkit.steps.trainer import Trainer


class MultiTrainer(MultiSAETrainer):
    """Trains one SAE or more in lockstep. What it reads of several has the hook's name before each entry, as SAELens's.

    Args:
        cfg: of every trainer.
        saes: by the name of their hook.
        ranks: who share a batch.
        target_l0: of each, where the sparsity weight is adjusted.
    """

    trainers: dict[str, Trainer]

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: Mapping[str, TrainingSAE[Any]],
        ranks: Ranks = ALONE,
        target_l0: float | None = None,
    ) -> None:
        super().__init__(cfg, dict(saes), {name: name for name in saes}, data_provider=iter(()))
        self.trainers = {
            name: (ShardedTrainer if is_shard(sae) else Trainer)(cfg, sae, iter(()), ranks, target_l0)
            for name, sae in saes.items()
        }

    def whole(self, *, finished: bool = False) -> MultiTrainer | None:
        """The trainers of whole SAEs, to be saved; None where they are another rank's."""
        whole = copy(self)
        found = {name: trainer.whole(finished=finished) for name, trainer in self.trainers.items()}
        whole.trainers = {name: trainer for name, trainer in found.items() if trainer is not None}
        whole.saes = {name: trainer.sae for name, trainer in whole.trainers.items()}
        return whole if whole.trainers else None

    @property
    def is_single(self) -> bool:
        return len(self.trainers) == 1

    @property
    def first(self) -> Trainer:
        """Has the counts that all of them have."""
        return next(iter(self.trainers.values()))

    @property
    def n_not_finite(self) -> int:
        """Steps that were not applied, of the SAE that had the most."""
        return max(int(trainer.n_not_finite) for trainer in self.trainers.values())

    @property
    def n_not_finite_in_a_row(self) -> int:
        return max(int(trainer.n_not_finite_in_a_row) for trainer in self.trainers.values())

    def step(self, acts_of_hooks: Sequence[torch.Tensor]) -> dict[str, TrainStepOutput]:
        """A step of each SAE on the raw activations [B, D] of its hook; `advance` follows."""
        outputs = {
            name: trainer.step(acts_BD)
            for (name, trainer), acts_BD in zip(self.trainers.items(), acts_of_hooks, strict=True)
        }
        self.n_training_samples = self.first.n_training_samples
        return outputs

    def advance(self) -> None:
        for trainer in self.trainers.values():
            trainer.n_training_steps += 1
        self.n_training_steps += 1

    def read(self, outputs: Mapping[str, TrainStepOutput]) -> dict[str, dict[str, Any]]:
        """SAELens's readings of a step, of each SAE."""
        return {
            name: trainer.build_train_step_log_dict(outputs[name], self.n_training_samples)
            for name, trainer in self.trainers.items()
        }

    def read_sparsity(self, *, final: bool = False) -> dict[str, dict[str, Any]]:
        """SAELens's record of firing rates at the end of a window of steps, which resets them, of each SAE; else
        nothing.

        Args:
            final: at the end of the run, after which they are saved and stay.
        """
        found = {
            name: trainer.full_sparsity_window_log() if final else trainer.maybe_reset_sparsity()
            for name, trainer in self.trainers.items()
        }
        return found if any(found.values()) else {}

    def flat(self, readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Readings as one record."""
        if self.is_single:
            return dict(next(iter(readings.values())))
        return {f"{name}/{key}": value for name, reading in readings.items() for key, value in reading.items()}
