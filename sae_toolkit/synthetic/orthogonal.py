"""Makes the features of a synthetic model nearly orthogonal, as SAELens does, in a fraction of the time."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from sae_toolkit.terminal.progress import Progress


@torch.no_grad()
def orthogonalize(features_FD: torch.Tensor, n_steps: int, lr: float) -> torch.Tensor:
    """Returns F directions of unit length [F, D] that are closer to orthogonal than the ones given.

    It is the descent of SAELens's `orthogonalize_embeddings`: Adam on the sum of the squared products of all pairs,
    plus F times the squared distance of each squared length from 1. SAELens takes the gradient of F x F products by
    autograd. For directions w, the rows of W [F, D], it has a closed form,

        4 [ W (W^T W) + (F (|w|^2 - 1) - |w|^2) w ],

    which takes about D / F of the operations: 16,384 features of 768 dimensions are made in minutes instead of more
    than an hour. The directions are SAELens's but for rounding.

    Args:
        features_FD: directions of any length but 0.
        n_steps: steps of Adam.
        lr: its learning rate.
    """
    features = torch.nn.Parameter(normalize(features_FD, dim=1))
    optimizer = torch.optim.Adam([features], lr=lr)
    with Progress("making the synthetic model", n_steps, unit="steps") as progress:
        for _ in range(n_steps):
            squared_lengths = features.square().sum(dim=1, keepdim=True)
            pull = len(features) * (squared_lengths - 1) - squared_lengths
            features.grad = 4 * (features @ (features.T @ features) + pull * features)
            optimizer.step()
            progress.advance(1)
    return normalize(features, dim=1)
