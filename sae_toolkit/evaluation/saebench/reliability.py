"""What is known of how reliable sae-bench's evals are."""

from __future__ import annotations

from collections.abc import Iterable

# Chanin 2026, "Are Sparse Autoencoder Benchmarks Reliable?", abstract.
_UNRELIABLE = ("scr", "tpp")


def reliability_note(evals: Iterable[str]) -> str | None:
    """Returns a sentence about those of the evals that were found to be unreliable; None if none is among them.

    Args:
        evals: names in `EVALS`.
    """
    named = [name for name in _UNRELIABLE if name in set(evals)]
    if not named:
        return None
    return (
        f"{' and '.join(named)} {'was' if len(named) == 1 else 'were'} found to fail several tests of reliability at"
        " standard settings (noise between seeds, agreement with a known truth, telling SAEs apart), and should not be"
        " used to evaluate SAEs; the most reliable evaluation was k-sparse probing by sae-probes"
        " (sparse_probing_sae_probes), which too struggles to separate variants of one architecture"
        " (Chanin 2026, arXiv:2605.18229)"
    )
