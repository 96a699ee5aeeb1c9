"""Leaves massive activations out of those that SAEs are trained on, at each of several hooks."""

from __future__ import annotations

import torch


def without_massive(acts_ND: torch.Tensor, widths: list[int], limits: list[float]) -> tuple[torch.Tensor, int]:
    """Returns activations of which none is massive at any hook.

    A token that is massive at every hook is dropped. Where it is massive at some, the next token that is not takes its
    place there, so that the SAEs at the others are trained on it. After the last of these it is the token before.

    Args:
        acts_ND: activations of the hooks side by side, D being the sum of the widths.
        widths: the width of each hook.
        limits: the largest L2 norm that is not massive, at each hook.

    Returns:
        The activations [N', D], none if every token is massive at some hook, so that none can take another's place.
        Then how many activations at one hook were replaced.
    """
    at_hooks = acts_ND.split(widths, dim=-1)
    fits = [acts.float().norm(dim=-1) <= limit for acts, limit in zip(at_hooks, limits, strict=True)]
    if len(fits) == 1:
        return acts_ND[fits[0]], 0
    fits_HN = torch.stack(fits)
    if not fits_HN.any(dim=1).all():
        return acts_ND[:0], 0
    kept_N = fits_HN.any(dim=0)
    if not (n_replaced := int((kept_N & ~fits_HN).sum())):
        return acts_ND[kept_N], 0
    fitting = [acts[_next_true(fits_N)[kept_N]] for acts, fits_N in zip(at_hooks, fits_HN, strict=True)]
    return torch.cat(fitting, dim=-1), n_replaced


def _next_true(where_N: torch.Tensor) -> torch.Tensor:
    """Returns for each place the first at or after it that is true, or else the last one. At least one is true."""
    ids_N = torch.arange(len(where_N), device=where_N.device)
    next_N = ids_N.where(where_N, len(where_N)).flip(0).cummin(0).values.flip(0)
    return next_N.clamp(max=ids_N[where_N][-1])
