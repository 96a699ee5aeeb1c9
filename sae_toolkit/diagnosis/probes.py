"""Measurements on about 8,000 tokens, from which the diagnosis tells why an SAE is unhealthy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.decoder_cosines import NEAR_DUPLICATE, largest_cosines
from sae_toolkit.evaluation.metrics import chunk_length
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.model.language_model import LanguageModel

MASSIVE = 10  # an activation is massive above this many times the median norm: --max_activation_norm_multiple's default
STRONGEST = 64  # features per token, in the middle of the healthy range of L0
_TOKENS = 8192
_LAYERS_AROUND = 2
_FEATURES_COMPARED = 4096


@dataclass(frozen=True)
class Probes:
    """The results of `probe`. Shares are in [0, 1]; an activation is massive above 10 times the median norm.

    Args:
        tokens: number of tokens measured, without special tokens and skipped positions.
        median_norm: median L2 norm of the activations, massive ones included.
        massive_share: share of massive activations in the variance of the activations that the SAE is applied to.
        explained: explained variance of the same activations.
        explained_of_others: explained variance of the activations that are not massive.
        explained_by_strongest: the same, if the SAE decodes only the 64 strongest features of each token.
        explained_at: explained variance by hook, without massive activations: at the hook of the evaluation, at the
            same place in nearby layers, and at the hook of the training.
        twins: share of features with a twin: another feature whose decoder vector has a cosine above 0.9 to its own.
        twins_together: of the tokens on which a feature or its twin fires, the share on which both fire; None if there
            are no twins, or none of them fires.
    """

    tokens: int
    median_norm: float
    massive_share: float
    explained: float
    explained_of_others: float
    explained_by_strongest: float
    explained_at: dict[str, float]
    twins: float
    twins_together: float | None


@torch.no_grad()
def probe(prepared: PreparedEvaluation, evaluated: EvaluatedSAE, model: LanguageModel, batch_size: int) -> Probes:
    """Measures one SAE on the first rows of its evaluation.

    Args:
        prepared: the evaluation.
        evaluated: one of its SAEs.
        model: language model of the evaluation.
        batch_size: rows in one forward pass.
    """
    sae = evaluated.sae.to(prepared.device)
    around = hooks_around(prepared.hook_name, len(model.layers))
    names = list(dict.fromkeys([*around, sae.cfg.metadata.hook_name or prepared.hook_name]))
    acts_by_hook = dict(_activations(prepared, evaluated, model, names, batch_size, sae.cfg.d_in))
    acts_ND = acts_by_hook[prepared.hook_name]
    norms_N = acts_ND.norm(dim=-1)
    median = norms_N.median().item()
    limit = evaluated.positions.max_activation_norm
    stands_in_N = torch.ones_like(norms_N, dtype=torch.bool) if limit is None else norms_N <= limit
    massive_N = norms_N > MASSIVE * median
    where_ND = acts_ND[stands_in_N]
    from_mean_N = (where_ND - where_ND.mean(0)).square().sum(-1)
    others_ND = acts_ND[~massive_N]
    twins, together = _twins(sae, others_ND)
    found = Probes(
        tokens=len(acts_ND),
        median_norm=median,
        massive_share=(from_mean_N[massive_N[stands_in_N]].sum() / from_mean_N.sum()).nan_to_num().item(),
        explained=_explained(sae, where_ND),
        explained_of_others=_explained(sae, others_ND),
        explained_by_strongest=_explained(sae, others_ND, strongest=STRONGEST),
        explained_at={name: _explained(sae, _without_massive(acts)) for name, acts in acts_by_hook.items()},
        twins=twins,
        twins_together=together,
    )
    evaluated.sae.to("cpu")
    return found


def hooks_around(hook_name: str, n_layers: int) -> list[str]:
    """Returns the names of a hook and of the same place in up to two layers before it and two layers after it."""
    layer = re.search(r"\.(\d+)(?=\.|$)", hook_name)
    if layer is None:
        return [hook_name]
    here = int(layer[1])
    others = [here + i for i in range(-_LAYERS_AROUND, _LAYERS_AROUND + 1) if 0 <= here + i < n_layers]
    return [f"{hook_name[: layer.start(1)]}{other}{hook_name[layer.end(1) :]}" for other in others]


def _activations(
    prepared: PreparedEvaluation,
    evaluated: EvaluatedSAE,
    model: LanguageModel,
    names: list[str],
    batch_size: int,
    d_in: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (hook, activations [N, D] in float64 on the CPU) for each hook that has the SAE's width."""
    n_rows = min(len(prepared.rows_NT), max(_TOKENS // prepared.rows_NT.shape[1], 1))
    rows_NT = prepared.rows_NT[:n_rows].astype(np.int64)
    keep_N = torch.from_numpy(evaluated.positions.keeps_tokens(rows_NT, prepared.assistant_at(slice(n_rows))).ravel())
    for name in names:
        try:
            at_hook = LanguageModel(model.model, name)
            acts = torch.cat([at_hook.activations(rows).cpu() for rows in torch.from_numpy(rows_NT).split(batch_size)])
        except UserError:  # the model has no such hook, or its values there are not activations
            continue
        if acts.shape[-1] == d_in:
            yield name, acts.flatten(0, 1)[keep_N].double()


def _without_massive(acts_ND: torch.Tensor) -> torch.Tensor:
    norms_N = acts_ND.norm(dim=-1)
    return acts_ND[norms_N <= MASSIVE * norms_N.median()]


def _encoded(sae: SAE, acts_ND: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the activations [N, D] and their features [N, F] in chunks of tokens."""
    for chunk_ND in acts_ND.split(chunk_length(4 * sae.cfg.d_sae)):
        yield chunk_ND, sae.encode(chunk_ND.to(sae.device, torch.float32))


def _explained(sae: SAE, acts_ND: torch.Tensor, strongest: int | None = None) -> float:
    """Returns the explained variance, of all features or of only the `strongest` of each token."""
    if len(acts_ND) == 0:
        return float("nan")
    error = 0.0
    for chunk_ND, features_NF in _encoded(sae, acts_ND):
        if strongest is not None and strongest < features_NF.shape[1]:
            strength_NF = features_NF.abs() * sae.W_dec.norm(dim=-1)
            weakest_NF = strength_NF.topk(features_NF.shape[1] - strongest, dim=-1, largest=False).indices
            features_NF = features_NF.scatter(1, weakest_NF, 0.0)
        error += (sae.decode(features_NF).cpu().double() - chunk_ND).square().sum().item()
    return 1 - error / (acts_ND - acts_ND.mean(0)).square().sum().item()


def _twins(sae: SAE, acts_ND: torch.Tensor) -> tuple[float, float | None]:
    """Returns `twins` and `twins_together` of `Probes`, from a random sample of the features if there are many."""
    generator = torch.Generator().manual_seed(0)
    sample_R = torch.randperm(len(sae.W_dec), generator=generator)[:_FEATURES_COMPARED].to(sae.device)
    largest_R, nearest_R, _ = largest_cosines(sae.W_dec, sample_R)
    has_twin_R = largest_R > NEAR_DUPLICATE
    features, twins = sample_R[has_twin_R], nearest_R[has_twin_R]
    if len(features) == 0:
        return 0.0, None
    both = either = 0
    for _, features_NF in _encoded(sae, acts_ND):
        fires, twin_fires = features_NF[:, features] != 0, features_NF[:, twins] != 0
        both += int((fires & twin_fires).sum())
        either += int((fires | twin_fires).sum())
    return len(features) / len(sample_R), both / either if either else None
