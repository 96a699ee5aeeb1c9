"""The table of --l0_check, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_toolkit.evaluation.shown import Shown


def show_l0_check(results: Mapping[str, Any]) -> Shown:
    """Returns the table of the SAEs that were compared.

    Args:
        results: of one of these SAEs, as evaluation.json stores them.
    """
    return Shown(
        title="What the decoders say about L0",
        columns=("SAE", "L0", "c_dec", "c_dec of features that fire", "s_n_dec", "95% interval"),
        rows=tuple(_row(row) for row in results["saes"]),
        how_to_read=" ".join((_ABOUT.format(**results), _what_it_says(results), _what_to_do(results))).rstrip(),
    )


_ABOUT = (
    "c_dec is the mean |cosine| of all pairs of decoder vectors (random directions: {random_c_dec:.4f}); s_n_dec is the"
    " projection of activations on decoder vectors that n = {n} features a token exceed. Both rise where features that"
    " occur together are mixed: at an L0 that is too low, and also at one that is too high (arXiv 2508.16560)."
)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    firing, interval = row["c_dec_firing"], row["s_n_dec_interval"]
    return (
        row["sae"],
        f"{row['l0']:.1f}",
        f"{row['c_dec']:.5f}",
        "?" if firing is None else f"{firing:.5f}",
        f"{row['s_n_dec']:.4g}",
        "?" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}",
    )


def _what_it_says(results: Mapping[str, Any]) -> str:
    comparison = results["comparison"]
    l0, c_dec, s_n_dec = (comparison[name] for name in ("l0", "c_dec", "s_n_dec"))
    if comparison["why_not"] == "one L0":
        return (
            "The values of one L0 do not tell whether it is right: they depend on the model, the width and the training"
            " too. Only SAEs that differ in L0 alone can be compared."
        )
    found = f"c_dec is lowest at L0 {_range(c_dec)}"
    if comparison["why_not"] == "too low":
        found += (
            f". That is the highest L0 given, so these SAEs do not say where the right one is: L0s up to {_l0(l0[-1])}"
            " may all be too low."
        )
    elif comparison["why_not"] == "too high":
        found += (
            f". The lowest L0 given is as low, so these SAEs do not say where the right one is: L0s from {_l0(l0[0])}"
            " may all be too high."
        )
    elif comparison["why_not"] == "flat":
        found += ", and as low at all the others, so these SAEs single out no L0."
    else:
        low, high = comparison["points_to_l0"]
        found += f", which points to an L0 of {_l0(low)}" + ("." if low == high else f" to {_l0(high)}.")
    agrees = "agrees" if comparison["s_n_dec_agrees"] else "does not agree"
    found += f" s_n_dec {agrees}: lowest at L0 {_range(s_n_dec)}."
    if max(comparison["n_saes"]) == 1:
        found += " There is one SAE for each L0, so how far seeds differ is not known."
    return found


def _range(curve: Mapping[str, float]) -> str:
    """Returns where a curve is lowest; from its elbow on, if lower L0s are as low."""
    elbow, lowest = curve["elbow_at_l0"], curve["lowest_at_l0"]
    return _l0(lowest) if elbow == lowest else f"{_l0(lowest)} (and as low from {_l0(elbow)} on)"


def _l0(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _what_to_do(results: Mapping[str, Any]) -> str:
    if results["comparison"]["why_not"] is None:
        return (
            "This is a hint and no proof: c_dec found the true L0 of synthetic data, and on language models agreed with"
            " sparse probing."
        )
    if not results["wanted_l0"]:
        return "No L0 up to half of the features is left to try."
    wanted = ", ".join(f"{l0:.0f}" for l0 in results["wanted_l0"])
    train = f"Train SAEs that differ in nothing else, at L0 {wanted}"
    return f"{train}: {results['command']}" if results["command"] else f"{train}, with the library that trained these."
