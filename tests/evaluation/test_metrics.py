"""Each metric equals its formula in float64, in chunks of any size, and each estimate comes true."""

import math

import pytest
import torch

from sae_toolkit.evaluation import decoder_cosines, metrics
from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates, FiringStatistics
from sae_toolkit.evaluation.decoder_cosines import measure_cosines, random_largest_cosine
from sae_toolkit.evaluation.health import STANDARDS, judge
from sae_toolkit.evaluation.metrics import (
    LossStatistics,
    ReconstructionStatistics,
    compare_predictions,
    point_and_interval,
)


@pytest.fixture(params=[2**27, 200])
def chunk_values(request, monkeypatch):
    """Runs a test twice: with everything in one chunk, and with many small chunks."""
    for name in ("_CHUNK_VALUES", "_CACHED_VALUES"):
        monkeypatch.setattr(metrics, name, request.param)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_cross_entropies_and_kl_of_the_logits(chunk_values, dtype):
    tokens = torch.randint(0, 50, (3, 12), generator=generator(1))
    clean, sae, zero = (3 * torch.randn(3, 12, 50, generator=generator(i)).to(dtype) for i in range(3))
    scored = torch.rand(3, 12, generator=generator(2)) > 0.3
    scored[0, -1] = True
    statistics = LossStatistics()
    for b in ([0, 1], [2]):
        ce, (of_sae, of_zero) = compare_predictions(tokens[b], clean[b], [sae[b], list(zero[b])])
        statistics.add(scored[b], ce, of_sae, of_zero)
    found, _ = point_and_interval(LossStatistics, statistics.sums_SK(), torch.arange(3), seed=0)

    log = {name: torch.log_softmax(x.double(), -1) for name, x in (("clean", clean), ("sae", sae), ("zero", zero))}
    positions = [(b, t) for b in range(3) for t in range(11) if scored[b, t]]
    expected = {
        f"ce_{name}": -sum(log_probs[b, t, tokens[b, t + 1]].item() for b, t in positions) / len(positions)
        for name, log_probs in log.items()
    }
    for name in ("sae", "zero"):
        kl = (log["clean"].exp() * (log["clean"] - log[name])).sum(-1)[scored]
        expected[f"kl_{name}"] = kl.mean().item()
    expected["loss_recovered"] = (expected["ce_zero"] - expected["ce_sae"]) / (
        expected["ce_zero"] - expected["ce_clean"]
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_there_is_no_loss_to_recover_where_zeros_cost_nothing():
    found = metrics.loss_recovered(*(torch.tensor([x, x], dtype=torch.double) for x in (3.0, 2.0, 2.9)))
    assert found.isnan().all()


def reconstructions():
    x = torch.randn(300, 8, generator=generator(2)) + 1_000  # with this mean, sums in float32 would lose the variance
    recons = x + 0.3 * torch.randn(300, 8, generator=generator(3))
    features = torch.relu(torch.randn(300, 20, generator=generator(4)) - 2.5)
    sequence = torch.arange(300) // 50
    return x, recons, features, sequence


def test_reconstruction_metrics_are_pooled_over_all_tokens():
    x, recons, features, sequence = reconstructions()
    statistics = ReconstructionStatistics(6)
    for chunk in torch.arange(300).split([1, 0, 150, 149]):
        statistics.add(sequence[chunk], x[chunk], recons[chunk], (features[chunk] != 0).sum(1))
    found, _ = point_and_interval(ReconstructionStatistics, statistics.sums_SK(), torch.arange(6), seed=0)

    x, recons = x.double(), recons.double()
    assert found == pytest.approx(
        {
            "explained_variance": (1 - (x - recons).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(),
            "cosine_similarity": ((x * recons).sum(1) / x.norm(dim=1) / recons.norm(dim=1)).mean().item(),
            "l2_ratio": (recons.norm(dim=1) / x.norm(dim=1)).mean().item(),
            "l0": (features > 0).sum().item() / 300,
        },
        rel=1e-9,
    )
    counts = statistics.l0_counts.tolist()
    assert sum(counts) == 300
    assert sum(n * count for n, count in enumerate(counts)) == (features > 0).sum().item()


def test_the_bootstrap_draws_whole_units():
    """If all tokens of a sequence are equal, the interval of their mean is that of the sequences' means."""
    means = torch.randn(40, generator=generator(0), dtype=torch.double) * 10 + 100
    l0 = means.round().long().repeat_interleave(25)
    statistics = ReconstructionStatistics(40)
    x = torch.randn(1000, 4, generator=generator(1))
    statistics.add(torch.arange(40).repeat_interleave(25), x, x, l0)
    sums_SK = statistics.sums_SK()
    found, intervals = point_and_interval(ReconstructionStatistics, sums_SK, torch.arange(40), seed=0)
    low, high = intervals["l0"]
    standard_error = means.round().std(correction=0).item() / 40**0.5
    assert low < found["l0"] < high
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    # Sequences of one document are one unit: if each document has its sequence twice, the interval is the same.
    doubled = point_and_interval(ReconstructionStatistics, sums_SK.repeat(2, 1), torch.arange(40).repeat(2), seed=0)
    assert doubled[1]["l0"] == pytest.approx(intervals["l0"])
    assert point_and_interval(ReconstructionStatistics, sums_SK, torch.zeros(40).long(), seed=0)[1] == {}


def test_what_is_no_number_has_no_interval():
    sums_SK = torch.ones(20, len(LossStatistics.COLUMNS), dtype=torch.double)  # zeros at the hook cost nothing
    found, intervals = point_and_interval(LossStatistics, sums_SK, torch.arange(20), seed=0)
    assert math.isnan(found["loss_recovered"])
    assert "loss_recovered" not in intervals
    assert intervals["ce_sae"] == [1, 1]


def test_a_bootstrap_interval_holds_the_truth_95_times_in_100():
    held = 0
    for seed in range(200):
        draws = torch.empty(60, dtype=torch.double).exponential_(1 / 20, generator=generator(seed))
        sums_SK = torch.zeros(60, len(ReconstructionStatistics.COLUMNS) + 1, dtype=torch.double)
        sums_SK[:, 0], sums_SK[:, 1] = 1, draws
        low, high = point_and_interval(ReconstructionStatistics, sums_SK, torch.arange(60), seed=seed)[1]["l0"]
        held += low <= 20 <= high
    assert 0.89 <= held / 200 <= 0.98  # a percentile bootstrap of 60 skewed values covers a little less


def test_firings_are_counted_by_token_by_sequence_and_by_first_time():
    _, _, features, sequence = reconstructions()
    active = features != 0
    statistics = FiringStatistics(20, "cpu")
    for chunk in torch.arange(300).split([1, 0, 150, 149]):
        statistics.add(sequence[chunk], active[chunk])
    assert statistics.n_tokens == 300
    assert torch.equal(statistics.firings_F, active.sum(0))
    assert statistics.dead == (active.sum(0) == 0).double().mean().item() > 0
    in_sequences = torch.stack([active[sequence == s].any(0) for s in range(6)]).sum(0)
    estimates = statistics.estimates()
    assert estimates.unseen_firing_share == pytest.approx((in_sequences == 1).sum().item() / in_sequences.sum().item())
    firsts = [active[:, f].nonzero()[0].item() if active[:, f].any() else None for f in range(20)]
    statistics.n_tokens = 100  # as if only 100 tokens had been added
    assert statistics.silent_share()[-1] == (100, sum(f is None or f >= 100 for f in firsts) / 20)


def test_what_a_small_sample_expects_of_a_larger_one_comes_true():
    """Firing rates over four orders of magnitude: a tenth of the features dead, many too rare for the small sample."""
    rates = 10 ** (-4 * torch.rand(5000, generator=generator(0)) - 1)
    rates[:500] = 0
    small, large = FiringStatistics(5000, "cpu"), FiringStatistics(5000, "cpu")
    for s in range(80):
        active = torch.rand(50, 5000, generator=generator(100 + s)) < rates
        for statistics in (small, large) if s < 40 else (large,):
            statistics.add(torch.full((50,), s), active)
    estimates = small.estimates()
    assert estimates.tokens == 2000
    assert estimates.expected_at_twice_the_tokens == pytest.approx(large.dead, abs=0.01)
    assert small.dead > estimates.expected_at_twice_the_tokens > estimates.expected_in_the_long_run > 0.1
    assert estimates.largest_missed_rate == 3 / 2000
    often = rates > estimates.largest_missed_rate
    assert (small.firings_F[often] == 0).double().mean() < 0.05
    assert [n for n, _ in estimates.curve] == [1000, 2000]
    mean_rate = small.firings_F.sum().item() / 2000 / 5000
    assert estimates.tokens_to_settle == math.ceil(3 / (mean_rate / 100))


def test_cosines_are_the_largest_to_any_other_direction(chunk_values):
    W = torch.randn(57, 16, generator=generator(0))
    W[3] = 2.5 * W[40]  # a duplicate direction
    alive = torch.arange(57) != 40
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    found = measure_cosines(W, alive, seed=0)
    assert found.exact
    assert found.mean == pytest.approx(cosines.max(1).values.mean().item(), rel=1e-6)
    assert found.alive_mean == pytest.approx(cosines[alive][:, alive].max(1).values.mean().item(), rel=1e-6)
    assert found.p95 == pytest.approx(cosines.max(1).values.quantile(0.95).item(), rel=1e-5)
    assert found.near_duplicate_pairs == 1
    assert sum(found.histogram[1]) == 57


def test_a_sample_of_cosines_comes_with_an_interval_that_holds_the_exact_mean(monkeypatch):
    W = torch.randn(3000, 16, generator=generator(0))
    alive = torch.ones(3000, dtype=torch.bool)
    exact = measure_cosines(W, alive, seed=0)
    monkeypatch.setitem(decoder_cosines._AFFORDABLE, "cpu", 1000 * 2 * 3000 * 16)
    sampled = [measure_cosines(W, alive, seed=seed) for seed in range(60)]
    assert {(s.rows, s.exact) for s in sampled} == {(1000, False)}
    assert sum(s.interval[0] < exact.mean < s.interval[1] for s in sampled) / 60 >= 0.88
    assert sampled[0].interval[1] - sampled[0].interval[0] < 0.01
    assert exact.interval is None


@pytest.mark.parametrize(("n", "d"), [(3000, 16), (4608, 576), (2000, 2)])
def test_the_value_of_random_directions_is_what_random_directions_have(n, d):
    drawn = measure_cosines(torch.randn(n, d, generator=generator(0)), torch.zeros(n, dtype=torch.bool), seed=0)
    assert random_largest_cosine(n, d) == pytest.approx(drawn.mean, abs=3e-3)


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("loss_recovered", {0.9: "healthy", 0.7: "healthy", 0.65: "borderline", 0.6: "borderline", 0.59: "unhealthy"}),
        (
            "l0",
            {40: "healthy", 120: "healthy", 20: "borderline", 200: "borderline", 19.9: "unhealthy", 227: "unhealthy"},
        ),
        ("dead_features", {0.0: "healthy", 0.1: "healthy", 0.2: "borderline", 0.21: "unhealthy"}),
        ("decoder_absorption", {0.25: "healthy", 0.3: "borderline", 0.36: "unhealthy"}),
    ],
)
def test_the_standards_are_those_published(metric, values):
    standard = next(s for s in STANDARDS if s.metric == metric)
    assert {value: standard.status(value) for value in values} == values


SETTLED = {"loss_recovered": 0.97, "l0": 60, "dead_features": 0.0, "decoder_absorption": 0.2, "replaced_share": 1.0}


def verdict(changes=None, intervals=None, long_run=None, sequences=100, to_settle=50_000):
    found = SETTLED | (changes or {})
    dead = found["dead_features"]
    estimates = DeadFeatureEstimates(50_000, 6e-5, 0.0, dead, dead if long_run is None else long_run, to_settle, [])
    intervals = {m: [found[m], found[m]] for m in ("loss_recovered", "l0")} if intervals is None else intervals
    return judge(found, intervals, estimates, loss_sequences=sequences, sequences=sequences)


def test_no_verdict_is_given_where_the_sae_hardly_stood_in():
    assert verdict({"replaced_share": 0.98})["healthy"] == 4
    unsettled = verdict({"replaced_share": 0.97})
    assert unsettled["healthy"] is None
    assert {unsettled[s.metric] for s in STANDARDS} == {"unsettled"}


def test_a_metric_whose_status_the_sample_cannot_tell_is_unsettled():
    assert verdict({"l0": 130}, {"l0": [125, 135]})["l0"] == "borderline"
    assert verdict({"l0": 121}, {"l0": [115, 127]})["l0"] == "unsettled"
    assert verdict({"loss_recovered": 72.5}, {})["loss_recovered"] == "unsettled"  # no interval could be had
    assert verdict({"dead_features": 0.3})["dead_features"] == "unhealthy"
    assert verdict({"dead_features": 0.3}, long_run=0.15)["dead_features"] == "unsettled"
    assert verdict({"dead_features": 0.3}, to_settle=50_001)["dead_features"] == "unsettled"
    assert verdict({"dead_features": 0.05}, long_run=0.0, to_settle=10**6)["dead_features"] == "healthy"
    assert verdict({"loss_recovered": math.nan})["loss_recovered"] == "unsettled"
    # This interval contains the whole healthy range, and both of its ends are borderline.
    assert verdict({"l0": 30}, {"l0": [25, 125]})["l0"] == "unsettled"
    assert verdict({"dead_features": 0.3}, sequences=9)["dead_features"] == "unsettled"
    few = verdict(sequences=9)
    assert [few[s.metric] for s in STANDARDS] == ["unsettled", "unsettled", "healthy", "healthy"]
    assert few["healthy"] == 2
