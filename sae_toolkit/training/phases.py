"""The two phases of a run: steps on mixed activations, then steps of --finetune_loss on whole contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sae_toolkit.activations.contexts import ContextBatches, split_rows
from sae_toolkit.errors import UserError
from sae_toolkit.settings.training import OptimizationSettings


def number_of_steps(optimization: OptimizationSettings) -> tuple[int, int]:
    """Returns the number of steps of a run, and how many of them come before the fine-tuning, if there is any."""
    n_steps = -(-optimization.training_tokens // optimization.train_batch_size_tokens)
    if optimization.finetune_loss == "none":
        return n_steps, n_steps
    return n_steps, n_steps - max(1, round(optimization.finetune_fraction * n_steps))


@dataclass(frozen=True)
class Phases:
    """The steps of each phase, and the rows of tokens that it reads.

    Args:
        n_steps: number of steps of the run.
        n_before: number of steps before fine-tuning begins; `n_steps` if there is none.
        stream_rows: ids of the rows that the stream of activations reads; None for all.
        batches: the contexts of each fine-tuning step; None if there is none.
    """

    n_steps: int
    n_before: int
    stream_rows: np.ndarray | None = None
    batches: ContextBatches | None = None

    @property
    def n_finetuning(self) -> int:
        """Number of fine-tuning steps."""
        return self.n_steps - self.n_before

    def passes(self, of_stream: float) -> float:
        """Returns how many passes over all rows the whole run makes.

        Args:
            of_stream: how many passes the stream has made over its rows.
        """
        if self.batches is None:
            return of_stream
        n_stream = 0 if self.n_before == 0 or self.stream_rows is None else len(self.stream_rows)
        of_batches = self.n_finetuning * self.batches.batch_size / int(self.batches.n_kept.sum())
        n_batches = len(self.batches.row_ids)
        return (of_stream * n_stream + of_batches * n_batches) / (n_stream + n_batches)

    @classmethod
    def of(
        cls,
        optimization: OptimizationSettings,
        rows_NT: np.ndarray,
        keeps_NT: Callable[[], np.ndarray],
        *,
        shuffled: bool,
    ) -> Phases:
        """Returns the phases of a run.

        Args:
            optimization: its settings.
            rows_NT: token ids to train on.
            keeps_NT: returns [N, T] booleans, True at the positions that are trained on. It is called if the run
                fine-tunes.
            shuffled: whether the rows are read in random order.

        Raises:
            UserError: the contexts for fine-tuning have no position to train on.
        """
        n_steps, n_before = number_of_steps(optimization)
        if n_before == n_steps:
            return cls(n_steps, n_before)
        stream_rows, batches = split_rows(
            rows_NT,
            keeps_NT(),
            share=1 - n_before / n_steps,
            batch_size=optimization.train_batch_size_tokens,
            seed=optimization.seed if shuffled else None,
        )
        if not batches.n_kept.any():
            raise UserError(
                f"--finetune_loss {optimization.finetune_loss}: none of the {len(batches.row_ids)} contexts for it has"
                " a position to train on; use more text"
            )
        # If there is no phase before, the stream only measures norms, on rows that are trained on later.
        return cls(n_steps, n_before, stream_rows if len(stream_rows) else None, batches)
