"""The table of an SAE's stability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_toolkit.evaluation.shown import Shown

_HOW_TO_READ = (
    "> 0.7, > 0.9: the share of this SAE's features that point the same way as one of the other SAE, with a cosine"
    " above that. One to one: the same if no two features share a partner, and the cosines of the pairs add up to the"
    " most. Shared: the encoder vectors, matched by themselves, give the same partner with a cosine of 0.7 or more; of"
    " SAEs of 131,072 features of Llama-3-8B that differ in their seed, 30% are shared (arXiv 2501.16615). Fire"
    " together: the mean correlation of the pairs above 0.7 on the same tokens, with its 95% interval (jackknife over"
    " text). mean: over the other SAEs, with its 95% interval (t distribution). random: directions with the mean and"
    " covariance of the other decoder, which is what no learning gives. A feature that is not found again may be"
    " interpretable, and depends on the seed."
)
_COLUMNS = ("Other SAE", "Mean max cosine", "> 0.7", "> 0.9", "One to one > 0.7", "Shared", "Fire together")


def show_stability(results: Mapping[str, Any]) -> Shown:
    """Returns the table of the results under `stability` in evaluation.json: a row for each other SAE."""
    partners, over = results["partners"], results["over_partners"]
    rows = [_row(partner) for partner in partners]
    in_all = f"{results['in_every_partner']:.1%} of {results['features']:,} features"
    if len(partners) == 1:
        title = f"Stability: {in_all} found again in {partners[0]['name']}"
    else:
        title = f"Stability: {in_all} found again in all {len(partners)} others, {results['in_no_partner']:.1%} in none"
        mean_cosine = f"{over['mean_max_cosine']['mean']:.3f}"
        above, *others = (_with_interval(over[name]) for name in ("above_0.7", "matched_above_0.7", "shared"))
        rows.append(("mean", mean_cosine, above, "", *others, ""))
    one_width = len({partner["features"] for partner in partners}) == 1
    for partner in partners[:1] if one_width else partners:
        random = partner["random_with_the_same_covariance"]
        above, far_above = (f"{random[name]:.1%}" for name in ("above_0.7", "above_0.9"))
        name = "random" if one_width else f"random, for {partner['name']}"
        rows.append((name, f"{random['mean']:.3f}", above, far_above, "", "", ""))
    return Shown(title, _COLUMNS, tuple(rows), _HOW_TO_READ)


def _row(partner: Mapping[str, Any]) -> tuple[str, ...]:
    together = partner["firing_correlation"]["above_0.7"]
    interval: Sequence[float] | None = together["interval"]
    ends = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return (
        partner["name"],
        f"{partner['mean_max_cosine']:.3f}",
        f"{partner['above_0.7']:.1%}",
        f"{partner['above_0.9']:.1%}",
        f"{partner['matched']['above_0.7']:.1%}",
        f"{partner['shared']:.1%}",
        "no pair" if together["mean"] is None else f"{together['mean']:.2f}{ends}",
    )


def _with_interval(over: Mapping[str, Any]) -> str:
    interval: Sequence[float] | None = over["interval"]
    return f"{over['mean']:.1%}" + (f" ({max(interval[0], 0):.1%} to {min(interval[1], 1):.1%})" if interval else "")
