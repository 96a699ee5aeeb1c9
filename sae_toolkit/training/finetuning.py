"""The steps of --finetune_loss: whole contexts go through the language model with the SAE in place."""

from __future__ import annotations

import logging
from dataclasses import replace

from sae_lens.saes.sae import TrainStepOutput

from sae_toolkit.activations.cache import CachedActivations
from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.steps.finetune_loss import PredictionLoss
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.training.prepared_run import PreparedRun

log = logging.getLogger(__name__)


def prediction_loss(
    run: PreparedRun, source: LanguageModel | CachedActivations, max_norm: float | None
) -> PredictionLoss:
    """Returns the loss of --finetune_loss at the hook of a run.

    Args:
        run: the run, which has a single hook.
        source: source of its activations, with all layers of the language model.
        max_norm: the norm above which activations are left out; None leaves none out.
    """
    kind = run.optimization.finetune_loss
    assert kind != "none"
    model = source.model if isinstance(source, CachedActivations) else source
    positions = replace(run.positions, max_activation_norm=max_norm)
    return PredictionLoss(model, kind, positions, run.cfg.store_batch_size_prompts)


class Finetuning:
    """Takes the fine-tuning steps of a run. What a step does depends on the run and the number of the step only.

    Args:
        run: the run, which has fine-tuning steps.
        source: source of its activations.
        trainer: trainer of the SAE.
        stream: the stream of activations of the steps before. It keeps the counts of activations and the number of
            contexts in a forward pass.
    """

    def __init__(
        self,
        run: PreparedRun,
        source: LanguageModel | CachedActivations,
        trainer: MultiTrainer,
        stream: ActivationStream,
    ) -> None:
        self.run = run
        self.source = source
        self.trainer = trainer
        self.stream = stream
        self._loss: PredictionLoss | None = None

    @property
    def is_due(self) -> bool:
        """Whether the next step of the run is a fine-tuning step."""
        return self.run.phases.n_before <= self.trainer.n_training_steps < self.run.phases.n_steps

    def step(self) -> dict[str, TrainStepOutput]:
        """Takes the next step of the run, and returns its output by the name of the hook."""
        phases, stream = self.run.phases, self.stream
        assert phases.batches is not None
        if self._loss is None:
            self._loss = self._begin()
        self._loss.rows_at_once = stream.rows_at_once
        acts_ND = self._loss.read(*phases.batches.batch(self.trainer.n_training_steps - phases.n_before))
        outputs = self.trainer.step([acts_ND.to(stream.device, stream.dtype)], self._loss)
        self._loss.clear()
        stream.rows_at_once = self._loss.rows_at_once
        stream.n_kept += len(acts_ND)
        stream.n_massive += self._loss.n_massive
        return outputs

    def _begin(self) -> PredictionLoss:
        phases, optimization = self.run.phases, self.run.optimization
        assert phases.batches is not None
        log.info(
            "the last %d of %d steps are fine-tuning: --finetune_loss %s, on whole contexts",
            phases.n_finetuning,
            phases.n_steps,
            optimization.finetune_loss,
        )
        needed, there = phases.n_finetuning * phases.batches.batch_size, int(phases.batches.n_kept.sum())
        if needed > self.run.epochs * there:
            text = f"{there:,} tokens, and {needed:,} are needed"
            log.warning("the contexts kept for it have %s: some are read again", text)
        self.stream.clear()
        if self.trainer.n_training_steps == 0:  # those that the norms were measured on are read again
            self.stream.n_massive = 0
        max_norms = self.stream.max_activation_norms
        return prediction_loss(self.run, self.source, max_norms[0] if max_norms else None)
