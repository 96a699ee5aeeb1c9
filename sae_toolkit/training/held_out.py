"""Measures SAEs during their training on held-out text, with the metrics of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sae_toolkit.activations.cache import CachedActivations
from sae_toolkit.evaluation.measurement import Evaluation
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.run import measure_saes
from sae_toolkit.model.devices import random_states_restored
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.saes.checkpoints import finished_copy
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.steps.calibration import Calibration
from sae_toolkit.steps.memory import HELD_OUT_ROWS_AT_ONCE
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.text.rows import ContextFormat, special_tokens
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.text import rows_of_reading


class HeldOutText:
    """Measures the SAEs of a run on its held-out text. This changes neither the SAEs nor the random states.

    Args:
        run: the run, which must have rows of held-out text.
        source: source of its activations, with all layers of the language model.
    """

    def __init__(self, run: PreparedRun, source: LanguageModel | CachedActivations) -> None:
        assert run.held_out_NT is not None
        self.run = run
        self.source = source
        self.tokenizer = load_tokenizer(run.model)
        n_rows, assistant_NT = rows_of_reading(run.cfg.context_size), run.held_out_assistant_NT
        self.rows_NT = run.held_out_NT[:n_rows]
        self.assistant_NT = None if assistant_NT is None else assistant_NT[:n_rows]

    def measure(
        self,
        trainer: MultiTrainer,
        calibrations: Mapping[str, Calibration | None],
        max_norms: Mapping[str, float | None],
    ) -> dict[str, Evaluation]:
        """Returns the evaluation of each SAE, by its name.

        Args:
            trainer: trainer of the SAEs.
            calibrations: what its `calibrate` returned.
            max_norms: by the SAE's name, the norm above which activations are left out; None leaves none out.
        """
        model = self.source.model if isinstance(self.source, CachedActivations) else self.source
        measured = {}
        with random_states_restored(str(self.run.cfg.device), self.run.llm_device):
            for (name, each), cfg in zip(trainer.trainers.items(), self.run.cfgs, strict=True):
                evaluated = EvaluatedSAE(
                    SAEFile(name, self.run.directory, "SAELens", "in training"),
                    finished_copy(each, calibrations[name]),
                    replace(self.run.positions, max_activation_norm=max_norms[name]),
                )
                prepared, at_hook = self.prepare(cfg.hook_name, evaluated), LanguageModel(model.model, cfg.hook_name)
                (measured[name],) = measure_saes(prepared, at_hook, batch_size=HELD_OUT_ROWS_AT_ONCE)
        return measured

    def prepare(self, hook_name: str, *saes: EvaluatedSAE) -> PreparedEvaluation:
        """Returns the evaluation of SAEs at one hook on the text of the readings."""
        run, n_rows = self.run, len(self.rows_NT)
        return PreparedEvaluation(
            saes=saes,
            protocol="health",
            device=str(run.cfg.device),
            model=run.model,
            tokenizer=self.tokenizer,
            hook_name=hook_name,
            text=run.text,
            held_out=run.held_out,
            context=ContextFormat(run.cfg.context_size),
            rows_NT=self.rows_NT,
            assistant_NT=self.assistant_NT,
            unit_N=np.arange(n_rows),
            units="sequences",
            n_loss_rows=n_rows,
            n_sae_rows=n_rows,
            special_token_ids=special_tokens(True, self.tokenizer, is_chat=run.text.is_chat),
            unscored_token_ids=(),
            features=(),
            n_features=0,
            seed=run.cfg.seed,
        )
