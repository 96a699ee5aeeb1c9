"""The activations that stand for whole texts: those at their last tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

_MOST_TOKENS = 1024


def tokenized(prepared: PreparedEvaluation, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts. Of a long text the last 1,024 remain, or as many as the model was made for.

    As in the contexts of the training, each begins with a BOS token if those do.
    """
    most = min(_MOST_TOKENS, prepared.model.max_context or _MOST_TOKENS)
    bos_token_id = prepared.tokenizer.bos_token_id
    bos = [bos_token_id] if prepared.context.prepend_bos and bos_token_id is not None else []
    encoded: Any = prepared.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    n = most - len(bos)
    if n_cut := sum(len(ids) > n for ids in encoded["input_ids"]):
        log.warning("--probing: of %d of %d texts the last %d tokens are read", n_cut, len(texts), n)
    return [[*bos, *ids[-n:]] for ids in encoded["input_ids"]]


@torch.no_grad()
def last_activations(
    prepared: PreparedEvaluation, model: LanguageModel, texts: Sequence[str], *, batch_size: int, progress: Progress
) -> tuple[torch.Tensor, np.ndarray]:
    """Returns the activation of each text at its last position that all SAEs are measured at.

    That is the last token, as in sae-probes, unless an SAE leaves that token out: special tokens, the first positions
    of a context, or massive activations.

    Args:
        prepared: SAEs at one hook.
        model: language model, hooked there.
        texts: N texts.
        batch_size: number of contexts of the evaluation that one forward pass has as many tokens as.
        progress: advances by one for each text.

    Returns:
        Activations [N, d_in] in float32 on the CPU, and booleans [N] that are False for texts without such a position.
    """
    ids = tokenized(prepared, texts)
    positions = [evaluated.positions for evaluated in prepared.saes] if prepared.protocol == "health" else []
    acts_ND = torch.zeros(len(texts), prepared.saes[0].sae.cfg.d_in)
    is_found_N = np.zeros(len(texts), dtype=bool)
    by_length = sorted((n for n in range(len(ids)) if ids[n]), key=lambda n: len(ids[n]), reverse=True)
    most_tokens = batch_size * prepared.context.context_size
    start = 0
    while start < len(by_length):
        length = len(ids[by_length[start]])  # the longest of the batch
        batch = by_length[start : start + max(1, most_tokens // length)]
        tokens_BT = np.zeros((len(batch), length), dtype=np.int64)
        kept_BT = np.zeros(tokens_BT.shape, dtype=bool)
        for row, n in enumerate(batch):  # a causal model does not see what stands to the right
            tokens_BT[row, : len(ids[n])] = ids[n]
            kept_BT[row, : len(ids[n])] = True
        acts_BTD = model.activations(torch.from_numpy(tokens_BT))
        everyone_BT = np.ones_like(kept_BT)  # texts are no conversations, in which an SAE may leave out who speaks
        for each in positions:
            kept_BT &= each.keeps_tokens(tokens_BT, everyone_BT) & each.keeps_norms(acts_BTD).cpu().numpy()
        last_B = length - 1 - kept_BT[:, ::-1].argmax(1)
        acts_ND[batch] = acts_BTD[torch.arange(len(batch)), torch.from_numpy(last_B)].float().cpu()
        is_found_N[batch] = kept_BT.any(1)
        start += len(batch)
        progress.advance(len(batch))
    progress.advance(len(ids) - len(by_length))
    return acts_ND, is_found_N
