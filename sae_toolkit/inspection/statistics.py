"""What is kept of the firings of every feature, in memory that does not grow with the text.

Shapes: F features, B rows of T tokens, N firings, H bins of the histogram.
"""

from __future__ import annotations

import numpy as np
import torch

from sae_toolkit.inspection.examples import KeptExamples, RowMaxima

BINS_OF_AN_OCTAVE = 4
LOWEST_OCTAVE, HIGHEST_OCTAVE = -12, 12  # bins reach from 2^-12 to 2^12; the first and the last take what is outside
N_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_OF_AN_OCTAVE


class FeatureStatistics:
    """Counts, histograms and examples of all features of one SAE.

    Args:
        n_features: number of features F.
        n_strongest: how many of the rows that a feature fires in are kept by their strongest activation.
        n_drawn: how many of them are drawn at random. Which ones depends on the seed and the row alone.
        seed: seed of the draw.
        device: where the statistics are kept.
    """

    TENSORS = ("n_firings_F", "sum_F", "max_F", "n_rows_F", "histogram_FH")

    def __init__(
        self, n_features: int, *, n_strongest: int, n_drawn: int, seed: int, device: str | torch.device
    ) -> None:
        self.n_features = n_features
        self.seed = seed
        self.n_tokens = 0
        self.n_firings_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.n_rows_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.sum_F = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.max_F = torch.zeros(n_features, device=device)
        self.histogram_FH = torch.zeros(n_features, N_BINS, dtype=torch.int32, device=device)
        self.strongest = KeptExamples(n_features, n_strongest, device)
        self.drawn = KeptExamples(n_features, n_drawn, device)

    @staticmethod
    def memory(n_features: int, n_strongest: int, n_drawn: int) -> int:
        """Returns the bytes that the statistics of so many features take."""
        return n_features * (8 + 8 + 8 + 4 + 4 * N_BINS) + KeptExamples.memory(n_features, n_strongest + n_drawn)

    def add(self, first_row: int, acts_BTF: torch.Tensor, measured_BT: torch.Tensor) -> None:
        """Adds a batch of rows.

        Args:
            first_row: number of its first row.
            acts_BTF: activations of all features, 0 where they do not fire or are not measured.
            measured_BT: where activations are measured.
        """
        self.n_tokens += int(measured_BT.sum())
        row_N, position_N, feature_N = acts_BTF.nonzero(as_tuple=True)
        activation_N = acts_BTF[row_N, position_N, feature_N].float()
        strength_N = activation_N.abs()
        self.n_firings_F += torch.bincount(feature_N, minlength=self.n_features)
        self.sum_F.index_add_(0, feature_N, activation_N.double())
        self.max_F.scatter_reduce_(0, feature_N, strength_N, "amax")
        bin_N = ((strength_N.log2() - LOWEST_OCTAVE) * BINS_OF_AN_OCTAVE).floor().clamp(0, N_BINS - 1).long()
        flat_FH = self.histogram_FH.view(-1)
        flat_FH.index_add_(0, feature_N * N_BINS + bin_N, torch.ones_like(bin_N, dtype=torch.int32))
        maxima = RowMaxima.of(feature_N, row_N, position_N, activation_N, len(acts_BTF))
        self.n_rows_F += torch.bincount(maxima.feature_N, minlength=self.n_features)
        self.strongest.add(maxima, maxima.activation_N.abs(), first_row, acts_BTF)
        self.drawn.add(maxima, self._draws(first_row, len(acts_BTF), maxima), first_row, acts_BTF)

    def _draws(self, first_row: int, n_rows: int, maxima: RowMaxima) -> torch.Tensor:
        """Returns random numbers [N] in [0, 1) for row maxima, which the seed, the row and the feature give."""
        draws_BF = torch.stack(
            [
                torch.rand(self.n_features, generator=torch.Generator().manual_seed(_seed_of(self.seed, row)))
                for row in range(first_row, first_row + n_rows)
            ]
        ).to(maxima.feature_N.device)
        return draws_BF[maxima.row_N, maxima.feature_N]

    def state(self) -> dict[str, torch.Tensor]:
        """Returns all that `load_state` needs, as tensors by name."""
        state = {name: getattr(self, name) for name in self.TENSORS} | {"n_tokens": torch.tensor(self.n_tokens)}
        for name in ("strongest", "drawn"):
            state |= {f"{name}.{key}": tensor for key, tensor in getattr(self, name).state().items()}
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state` returned."""
        self.n_tokens = int(state["n_tokens"])
        for name in self.TENSORS:
            getattr(self, name).copy_(state[name])
        for name in ("strongest", "drawn"):
            kept = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            getattr(self, name).load_state(kept)


def _seed_of(seed: int, row: int) -> int:
    return int(np.random.SeedSequence((seed, row)).generate_state(1)[0])


def bin_edges() -> list[float]:
    """Returns the edges [H + 1] of the histogram's bins: 0, powers of 2 with 4 steps between them, and infinity."""
    inner = [2 ** (LOWEST_OCTAVE + i / BINS_OF_AN_OCTAVE) for i in range(1, N_BINS)]
    return [0.0, *inner, float("inf")]
