"""What is kept of each feature is what all of its activations say, however the text is cut into batches."""

import pytest
import torch

from sae_toolkit.inspection.examples import TOKENS_AFTER, TOKENS_BEFORE, WINDOW
from sae_toolkit.inspection.statistics import N_BINS, FeatureStatistics, bin_edges

R, T, F = 120, 64, 150
STRONGEST, DRAWN = 5, 7


@pytest.fixture(scope="module")
def acts_RTF():
    """Sparse activations in which some features fire everywhere, many rarely, and one never; some are equal."""
    torch.manual_seed(0)
    rates_F = torch.logspace(-4, -0.3, F)
    rates_F[3] = 0
    acts = torch.rand(R, T, F) * (torch.rand(R, T, F) < rates_F) * 3
    acts[..., 10] = (acts[..., 10] * 2).round() / 2
    return acts


def statistics_of(acts_RTF, rows_at_once):
    statistics = FeatureStatistics(F, n_strongest=STRONGEST, n_drawn=DRAWN, seed=1, device="cpu")
    for row in range(0, R, rows_at_once):
        batch = acts_RTF[row : row + rows_at_once]
        statistics.add(row, batch, torch.ones(batch.shape[:2], dtype=torch.bool))
    return statistics


@pytest.fixture(scope="module")
def statistics(acts_RTF):
    return statistics_of(acts_RTF, 8)


def test_counts_and_histograms_are_those_of_all_activations(statistics, acts_RTF):
    fires = acts_RTF != 0
    assert statistics.n_tokens == R * T
    assert torch.equal(statistics.n_firings_F, fires.sum((0, 1)))
    assert torch.equal(statistics.n_rows_F, fires.any(1).sum(0))
    assert torch.equal(statistics.max_F, acts_RTF.amax((0, 1)))
    assert torch.allclose(statistics.sum_F, acts_RTF.double().sum((0, 1)))
    edges = torch.tensor(bin_edges())
    for feature in (0, 3, 10, 70, 149):
        values = acts_RTF[..., feature][fires[..., feature]]
        expected = torch.bincount(torch.bucketize(values, edges, right=True) - 1, minlength=N_BINS)
        assert torch.equal(statistics.histogram_FH[feature], expected.to(torch.int32))


def test_the_strongest_examples_are_of_the_rows_with_the_highest_maxima(statistics, acts_RTF):
    kept = statistics.strongest
    highest_KF = acts_RTF.amax(1).sort(dim=0, descending=True).values[:STRONGEST]
    found_FK = kept.activation_FK.sort(dim=1, descending=True).values
    assert torch.equal(found_FK, highest_KF.T)
    for feature in range(F):
        rows = [row for row in kept.row_FK[feature].tolist() if row >= 0]
        assert len(set(rows)) == len(rows) == min(STRONGEST, int(statistics.n_rows_F[feature]))


@pytest.mark.parametrize("which", ["strongest", "drawn"])
def test_an_example_is_at_the_maximum_of_its_row_with_the_activations_around_it(statistics, acts_RTF, which):
    kept = getattr(statistics, which)
    padded_RTF = torch.nn.functional.pad(acts_RTF, (0, 0, TOKENS_BEFORE, TOKENS_AFTER))
    for feature, place in (kept.row_FK >= 0).nonzero().tolist():
        row, position = int(kept.row_FK[feature, place]), int(kept.position_FK[feature, place])
        assert kept.activation_FK[feature, place] == acts_RTF[row, :, feature].max()
        assert position == acts_RTF[row, :, feature].argmax()  # the first of them
        window_W = padded_RTF[row, position : position + WINDOW, feature]
        assert torch.equal(kept.window_FKW[feature, place], window_W.to(torch.bfloat16))


def test_the_drawn_examples_are_of_rows_drawn_without_regard_to_strength(statistics, acts_RTF):
    """Over features that fire in many rows, the mean rank of what is drawn is the middle of all ranks."""
    maxima_RF = acts_RTF.amax(1)
    kept, shares = statistics.drawn, []
    for feature in range(F):
        rows = kept.row_FK[feature][kept.row_FK[feature] >= 0].long()
        n = int(statistics.n_rows_F[feature])
        assert len(rows.unique()) == len(rows) == min(DRAWN, n)
        if n >= 40:
            fires = maxima_RF[:, feature][maxima_RF[:, feature] > 0]
            shares += [(fires < value).float().mean().item() for value in maxima_RF[rows, feature]]
    assert len(shares) > 300
    assert abs(sum(shares) / len(shares) - 0.5) < 4 * 0.29 / len(shares) ** 0.5


@pytest.mark.parametrize("rows_at_once", [1, 7, 120])
def test_batches_change_nothing(statistics, acts_RTF, rows_at_once):
    other = statistics_of(acts_RTF, rows_at_once)
    for which in ("strongest", "drawn"):
        one, two = (
            [sorted(zip(kept.rank_FK[f].tolist(), kept.row_FK[f].tolist(), strict=True)) for f in range(F) if f != 10]
            for kept in (getattr(statistics, which), getattr(other, which))
        )
        assert one == two
    assert torch.equal(statistics.histogram_FH, other.histogram_FH)


def test_what_is_saved_goes_on_bit_for_bit(statistics, acts_RTF):
    first = FeatureStatistics(F, n_strongest=STRONGEST, n_drawn=DRAWN, seed=1, device="cpu")
    second = FeatureStatistics(F, n_strongest=STRONGEST, n_drawn=DRAWN, seed=1, device="cpu")
    for row in range(0, R, 8):
        if row == 64:
            second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
        batch = acts_RTF[row : row + 8]
        (first if row < 64 else second).add(row, batch, torch.ones(batch.shape[:2], dtype=torch.bool))
    state = statistics.state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state().items())


def test_the_memory_that_is_announced_is_what_the_tensors_take(statistics):
    taken = sum(tensor.nbytes for tensor in statistics.state().values())
    assert taken == pytest.approx(FeatureStatistics.memory(F, STRONGEST, DRAWN), rel=0.01)
