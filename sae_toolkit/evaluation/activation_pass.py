"""A pass of the language model over the text of an evaluation, for what needs only the activations at the hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.positions import PositionFilter


@torch.no_grad()
def activations_at_hook(
    prepared: PreparedEvaluation,
    model: LanguageModel,
    positions: Sequence[PositionFilter],
    *,
    batch_size: int,
    doing: str,
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yields the activations at the hook that L0 and reconstruction are measured on, in the order of the text.

    Args:
        prepared: SAEs at one hook, and the rows of text. The first `n_sae_rows` are read.
        model: language model, hooked there.
        positions: only activations that all of these keep are yielded. Not used with SAEBench's protocol, which leaves
            out the tokens that it does not score and nothing else.
        batch_size: rows in one forward pass.
        doing: what the work is, in one word, for the progress.

    Yields:
        Activations [N, d_in] in the dtype of the model and on its device, and the number [N] of the unit of text
        (`PreparedEvaluation.unit_N`) that each belongs to.
    """
    rows_NT = prepared.rows_NT[: prepared.n_sae_rows]
    if prepared.protocol == "saebench":
        positions = [PositionFilter(prepared.unscored_token_ids)]
    elif prepared.assistant_NT is None:  # the text holds no conversations
        positions = [replace(each, chat_tokens=None) for each in positions]
    with Progress(doing, rows_NT.size) as progress:
        for start in range(0, len(rows_NT), batch_size):
            batch_BT = rows_NT[start : start + batch_size].astype(np.int64)
            acts_BTD = model.activations(torch.from_numpy(batch_BT))
            kept_BT = torch.ones(batch_BT.shape, dtype=torch.bool, device=acts_BTD.device)
            assistant_BT = prepared.assistant_at(slice(start, start + len(batch_BT)))
            for each in positions:
                kept_BT &= torch.from_numpy(each.keeps_tokens(batch_BT, assistant_BT)).to(kept_BT.device)
                kept_BT &= each.keeps_norms(acts_BTD)
            unit_B = prepared.unit_N[start : start + len(batch_BT)]
            unit_N = np.broadcast_to(unit_B[:, None], batch_BT.shape)[kept_BT.cpu().numpy()]
            yield acts_BTD[kept_BT], unit_N
            progress.advance(batch_BT.size)
