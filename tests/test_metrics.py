"""Each number equals its formula in float64, however the tokens come in chunks."""

import math

import pytest
import torch

from sae_toolkit import metrics
from sae_toolkit.health import STANDARDS, judge
from sae_toolkit.metrics import LossStatistics, ReconstructionStatistics, log_probabilities, mean_max_cosine


@pytest.fixture(params=[2**27, 200])
def chunk_values(request, monkeypatch):
    """Once with everything in one chunk, once with many small ones."""
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", request.param)


def test_mean_max_cosine_is_the_mean_over_features_of_the_largest_cosine_to_another(chunk_values):
    W = torch.randn(57, 16, generator=torch.Generator().manual_seed(0))
    W[3] = 2.5 * W[40]  # a duplicate direction
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    expected = sum(max(cosines[i, j].item() for j in range(57) if j != i) for i in range(57)) / 57
    assert mean_max_cosine(W) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_cross_entropies_and_kl_of_the_logits(chunk_values, dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (12,), generator=generator)
    clean, sae, zero = (3 * torch.randn(12, 50, generator=generator).to(dtype) for _ in range(3))
    kept = torch.rand(12, generator=generator) > 0.3
    kept[-1] = True
    statistics = LossStatistics()
    statistics.add(tokens, kept, clean, sae, log_probabilities(zero))
    found = statistics.metrics()

    log = {name: torch.log_softmax(x.double(), -1) for name, x in (("clean", clean), ("sae", sae), ("zero", zero))}
    positions = [t for t in range(11) if kept[t]]
    expected = {
        f"ce_{name}": -sum(log_probs[t, tokens[t + 1]].item() for t in positions) / len(positions)
        for name, log_probs in log.items()
    }
    kl = [(log["clean"][t].exp() * (log["clean"][t] - log["sae"][t])).sum().item() for t in range(12) if kept[t]]
    expected["kl_sae"] = sum(kl) / len(kl)
    expected["loss_recovered"] = (expected["ce_zero"] - expected["ce_sae"]) / (
        expected["ce_zero"] - expected["ce_clean"]
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_reconstruction_metrics_are_pooled_over_all_tokens():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 8, generator=generator) + 1_000  # a mean that float32 sums would drown the variance in
    recons = x + 0.3 * torch.randn(300, 8, generator=generator)
    features = torch.relu(torch.randn(300, 20, generator=generator) - 2.5)
    statistics = ReconstructionStatistics()
    for chunk in torch.arange(300).split([1, 0, 150, 149]):
        statistics.add(x[chunk], recons[chunk], features[chunk])
    found = statistics.metrics()

    x, recons = x.double(), recons.double()
    assert found == pytest.approx(
        {
            "explained_variance": (1 - (x - recons).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(),
            "cosine_similarity": ((x * recons).sum(1) / x.norm(dim=1) / recons.norm(dim=1)).mean().item(),
            "l2_ratio": (recons.norm(dim=1) / x.norm(dim=1)).mean().item(),
            "l0": (features > 0).sum().item() / 300,
            "dead_features": sum(1 for f in range(20) if not (features[:, f] > 0).any()) / 20,
        },
        rel=1e-9,
    )
    assert 0 < found["dead_features"] < 1


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("loss_recovered", {0.9: "healthy", 0.7: "healthy", 0.65: "borderline", 0.6: "borderline", 0.59: "unhealthy"}),
        (
            "l0",
            {40: "healthy", 120: "healthy", 20: "borderline", 200: "borderline", 19.9: "unhealthy", 227: "unhealthy"},
        ),
        ("dead_features", {0.0: "healthy", 0.1: "healthy", 0.2: "borderline", 0.21: "unhealthy"}),
        ("decoder_absorption", {0.25: "healthy", 0.3: "borderline", 0.36: "unhealthy", math.nan: "unhealthy"}),
    ],
)
def test_the_standards_are_those_published(metric, values):
    standard = next(s for s in STANDARDS if s.metric == metric)
    assert {value: standard.status(value) for value in values} == values


def test_no_verdict_is_given_where_the_sae_hardly_stood_in():
    healthy = {"loss_recovered": 0.97, "l0": 60, "dead_features": 0.0, "decoder_absorption": 0.2}
    assert judge(healthy | {"replaced_share": 0.99})["healthy"] == 4
    unsettled = judge(healthy | {"replaced_share": 0.97})
    assert unsettled["healthy"] is None
    assert {unsettled[s.metric] for s in STANDARDS} == {"unsettled"}
