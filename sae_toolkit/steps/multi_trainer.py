"""Trains one SAE at each of several hooks, on one stream of activations."""

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
from sae_toolkit.steps.calibration import Calibration
from sae_toolkit.steps.finetune_loss import PredictionLoss
from sae_toolkit.steps.sharded_sae import ShardedTrainer, is_shard
from sae_toolkit.steps.trainer import Trainer


class MultiTrainer(MultiSAETrainer):
    """SAELens's multi-SAE trainer with the steps of `Trainer`. It trains one SAE or more in lockstep.

    Args:
        cfg: the configuration of every trainer.
        saes: the SAEs by the names of their hooks.
        ranks: the ranks that share a batch.
        target_l0: the L0 that each SAE's sparsity weight is adjusted for; None for weights that are not adjusted.
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
        """Returns a trainer of whole SAEs with their calibrations, to be saved. Collective.

        It returns None on ranks other than 0 if the SAEs are sharded.

        Args:
            finished: whether Adam's moments may be left out.
        """
        whole = copy(self)
        found = {name: trainer.whole(finished=finished) for name, trainer in self.trainers.items()}
        whole.trainers = {name: trainer for name, trainer in found.items() if trainer is not None}
        whole.saes = {name: trainer.sae for name, trainer in whole.trainers.items()}
        return whole if whole.trainers else None

    def calibrate(self, n_tokens: int | None = None) -> dict[str, Calibration | None]:
        """Returns the calibration of each SAE as it is now, by the name of its hook. Collective.

        Args:
            n_tokens: how many tokens of held-out text to calibrate on; None for all.
        """
        return {name: trainer.calibrate(n_tokens) for name, trainer in self.trainers.items()}

    @property
    def is_single(self) -> bool:
        return len(self.trainers) == 1

    @property
    def first(self) -> Trainer:
        """The first trainer. All trainers have the same counts of steps and tokens."""
        return next(iter(self.trainers.values()))

    @property
    def n_not_finite(self) -> int:
        """The number of steps that were not applied, for the SAE that has the most."""
        return max(int(trainer.n_not_finite) for trainer in self.trainers.values())

    @property
    def n_not_finite_in_a_row(self) -> int:
        """The number of steps since the last one that was applied, for the SAE that has the most."""
        return max(int(trainer.n_not_finite_in_a_row) for trainer in self.trainers.values())

    def step(
        self, acts_of_hooks: Sequence[torch.Tensor], prediction_loss: PredictionLoss | None = None
    ) -> dict[str, TrainStepOutput]:
        """Takes one step of each SAE on the raw activations [B, D] of its hook. Call `advance` after it.

        Args:
            acts_of_hooks: the activations at each hook.
            prediction_loss: as for `Trainer.step`; for a single SAE.
        """
        outputs = {
            name: trainer.step(acts_BD, prediction_loss)
            for (name, trainer), acts_BD in zip(self.trainers.items(), acts_of_hooks, strict=True)
        }
        self.n_training_samples = self.first.n_training_samples
        return outputs

    def advance(self) -> None:
        """Adds 1 to the counts of steps."""
        for trainer in self.trainers.values():
            trainer.n_training_steps += 1
        self.n_training_steps += 1

    def read(self, outputs: Mapping[str, TrainStepOutput]) -> dict[str, dict[str, Any]]:
        """Returns SAELens's metrics of a step, for each SAE."""
        return {
            name: trainer.build_train_step_log_dict(outputs[name], self.n_training_samples)
            for name, trainer in self.trainers.items()
        }

    def read_sparsity(self, *, final: bool = False) -> dict[str, dict[str, Any]]:
        """Returns SAELens's record of firing rates for each SAE, and resets the rates; empty if no window ends here.

        Args:
            final: whether the run ends here. The rates are then saved with the SAEs, and not reset.
        """
        found = {
            name: trainer.full_sparsity_window_log() if final else trainer.maybe_reset_sparsity()
            for name, trainer in self.trainers.items()
        }
        return found if any(found.values()) else {}

    def flat(self, readings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Returns metrics as one record. With several SAEs each name starts with the hook's name, as in SAELens."""
        if self.is_single:
            return dict(next(iter(readings.values())))
        return {f"{name}/{key}": value for name, reading in readings.items() for key, value in reading.items()}
