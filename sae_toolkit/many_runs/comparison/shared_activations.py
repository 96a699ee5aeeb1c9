"""What all SAEs of a comparison are trained and measured on: the same activations, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.run import Training, open_activations
from sae_toolkit.training.setup import prepare_run


@dataclass(frozen=True)
class Shared:
    """What all SAEs of a comparison have in common.

    Args:
        words: of the command line of sae_lens_train.py.
        settings: parsed from these.
        run: the same, prepared; not to be started.
        directory: of the comparison.
        reference: an SAE, not trained, whose record says on what all are measured.
    """

    words: list[str]
    settings: TrainingSettings
    run: PreparedRun
    directory: Path
    reference: Path

    @property
    def n_steps(self) -> int:
        return -(-self.run.cfg.training_tokens // self.run.cfg.train_batch_size_tokens)

    def of_seed(self, seed: int) -> Training:
        """A training of ours at its first step, for its stream of batches."""
        words = [*self.words, "--seed", str(seed), "--held_out_seed", str(self.run.metadata()["held_out_seed"])]
        run = prepare_run(parse_training_flags(words))
        return Training(run, open_activations(run))


def share(words: Sequence[str], directory: Path, highest_l0: int) -> Shared:
    """Checks what all SAEs are trained on, and computes the activations that are not in the cache.

    Args:
        words: of the command line of sae_lens_train.py.
        directory: of the comparison.
        highest_l0: that an SAE is to have.

    Raises:
        UserError: there are fewer features than that, training would refuse the flags, or the cache is of other
            activations.
    """
    words = [*words, "--checkpoint_path", str(directory / "runs"), "--eval_every", "0"]
    settings = parse_training_flags(words)
    if settings.model.cache_activations is None:
        words += ["--cache_activations", str(directory / "activations")]
        settings = parse_training_flags(words)
    run = prepare_run(settings)
    if highest_l0 > run.cfg.sae.d_sae:
        raise UserError(f"--l0 {highest_l0}: more than the {run.cfg.sae.d_sae:,} features (--expansion_factor)")
    activations = open_activations(run)
    rows = torch.from_numpy(run.rows_NT.astype(np.int64))
    with Progress("activations", len(rows), unit="contexts", device=run.cfg.device) as progress:
        for batch_BT in rows.split(settings.model.store_batch_size_prompts):
            activations.activations(batch_BT)
            progress.advance(len(batch_BT))
    reference = directory / ".measured_like"
    sae = next(iter(Training(run, activations).saes.values()))
    sae.save_inference_model(reference)
    return Shared(words, settings, run, directory, reference)
