"""--synthetic scores an SAE by features that are known, and refuses SAEs of models whose features are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import OrthogonalizationConfig, SyntheticModel, SyntheticModelConfig
from sae_lens.util import temporary_seed

from sae_toolkit.evaluation.synthetic.measure import nearest_true_cosine, score
from sae_toolkit.evaluation.synthetic.table import show_synthetic
from support.processes import run_process

N, D = 12, 32


@pytest.fixture(scope="module")
def synthetic():
    """12 features that are orthogonal but for 1e-3, in 32 dimensions."""
    orthogonal = OrthogonalizationConfig(num_steps=300, lr=0.01)
    config = SyntheticModelConfig(N, D, orthogonalization=orthogonal, bias=0.5, std_firing_magnitudes=0.1, seed=3)
    return SyntheticModel(config).requires_grad_(False)


def sae_of(synthetic, directions_FD, threshold=0.4):
    """An SAE whose features read and write these directions, above a threshold."""
    bias_D = synthetic.feature_dict.bias
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=len(directions_FD), apply_b_dec_to_input=True))
    sae.load_state_dict(
        {
            "W_dec": directions_FD,
            "W_enc": directions_FD.T.contiguous(),
            "b_enc": torch.zeros(len(directions_FD)),
            "b_dec": bias_D,
            "threshold": torch.full((len(directions_FD),), threshold),
        }
    )
    return sae


def test_the_true_features_score_one(synthetic):
    scores = score(sae_of(synthetic, synthetic.feature_dict.feature_vectors), synthetic, seed=1)
    for name in ("mcc", "uniqueness", "f1", "precision", "recall", "explained_variance", "shrinkage"):
        assert scores[name] == pytest.approx(1, abs=0.01), name
    assert scores["l0"] == pytest.approx(scores["true_l0"], rel=0.01)
    assert scores["l0_of_frequent"] == pytest.approx(scores["true_l0"], rel=0.1)
    assert scores["dead_features"] == 0


def test_each_score_falls_by_what_is_wrong(synthetic):
    """Of 12 features three never fire, two stand for the same true feature, and one is a mean of two."""
    true_FD = synthetic.feature_dict.feature_vectors
    directions_FD = true_FD.clone()
    directions_FD[1] = true_FD[0]
    directions_FD[2] = (true_FD[2] + true_FD[3]) / 2**0.5
    sae = sae_of(synthetic, directions_FD)
    sae.threshold.data[9:] = 1e6
    scores = score(sae, synthetic, seed=1)
    assert scores["dead_features"] == 3
    assert scores["recall"] == pytest.approx(9 / 12, abs=0.02)
    assert scores["uniqueness"] == pytest.approx(11 / 12 if nearest_is_two(sae, synthetic) else 10 / 12)
    assert scores["mcc"] == pytest.approx((10 + 0.5**0.5 + 0) / 12, abs=0.01)
    assert scores["f1"] < 9 / 12
    cosines_F = nearest_true_cosine(sae, synthetic)
    assert cosines_F[2].item() == pytest.approx(0.5**0.5, abs=0.01)
    assert cosines_F[[0, 1, 11]].numpy() == pytest.approx(1, abs=0.01)


def test_a_feature_is_dead_if_it_fires_on_none_of_all_draws(synthetic, monkeypatch):
    monkeypatch.setattr("sae_toolkit.evaluation.synthetic.measure._SAMPLES", 8)  # so that few fire in each draw
    scores = score(sae_of(synthetic, synthetic.feature_dict.feature_vectors, threshold=1.05), synthetic, seed=1)
    dead_in_a_draw = []
    fired_F = torch.zeros(N, dtype=torch.bool)
    for draw in range(5):
        with temporary_seed(2**31 + 5 + draw):
            features_NF = synthetic.activation_generator.sample(8)
        fires_F = (features_NF > 1.05).any(0)
        fired_F |= fires_F
        dead_in_a_draw.append(int((~fires_F).sum()))
    assert scores["dead_features"] == int((~fired_F).sum()) < min(dead_in_a_draw)


def nearest_is_two(sae, synthetic):
    """Whether the mean of the true features 2 and 3 is nearer to 2, which no other feature stands for then."""
    cosines_2 = torch.nn.functional.normalize(sae.W_dec[2], dim=0) @ synthetic.feature_dict.feature_vectors[2:4].T
    return bool(cosines_2[0] > cosines_2[1])


def test_random_directions_score_what_is_reported_for_them(synthetic):
    random_FD = torch.nn.functional.normalize(torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)
    scores = score(sae_of(synthetic, random_FD), synthetic, seed=1)
    assert scores["mcc"] == pytest.approx(scores["random_mcc"], abs=0.06)
    assert scores["mcc"] < 0.5


def test_intervals_are_over_draws_of_samples(synthetic):
    sae = sae_of(synthetic, synthetic.feature_dict.feature_vectors, threshold=1.0)
    one, other = (score(sae, synthetic, seed=seed) for seed in (1, 2))
    for name, (low, high) in one["intervals"].items():
        assert low <= one[name] <= high
    assert one["recall"] != other["recall"]
    low, high = one["intervals"]["recall"]
    assert abs(one["recall"] - other["recall"]) < 3 * (high - low)
    assert one == score(sae, synthetic, seed=1)


@pytest.mark.scale
def test_131072_features_are_scored_in_bounded_memory(tiny_synthetic):
    """Random weights: the width is the point. In a process of its own, so that its peak is that of the scores."""
    program = f"""
import resource, torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.synthetic import SyntheticModel
from sae_toolkit.evaluation.synthetic import measure
measure._SAMPLES = 1024
synthetic = SyntheticModel.load_from_disk({str(tiny_synthetic)!r}).requires_grad_(False)
sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=131_072, k=4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mcc = measure.score(sae, synthetic, seed=0)["mcc"]
print(mcc, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    done = run_process(sys.executable, "-c", program)
    assert done.status == 0, done.stderr
    mcc, grown_gib = map(float, done.stdout.split()[-2:])
    assert 0.5 < mcc < 0.95  # each true feature has a good partner among so many directions
    assert grown_gib < 4


def test_too_many_features_for_the_memory_are_refused(trained, script, monkeypatch):
    monkeypatch.setattr("sae_toolkit.evaluation.synthetic.measure.free_memory", lambda _: 100_000)
    done = script("evaluate_sae_real_activations.py", "--sae_path", trained, "--synthetic")
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "matching its 64 features with 96 true ones takes about 0.0 GiB" in done.error_lines[0]


@pytest.fixture(scope="module")
def trained(trainings, tiny_synthetic, tmp_path_factory):
    """An SAE that sae_lens_train.py trained on a synthetic model."""
    name = f"synthetic:{tiny_synthetic}"
    done = trainings.script(
        *("sae_lens_train.py", "@presets/synthetic.args", "--model_name", name, "--dataset_path", name),
        *("--k", 4, "--expansion_factor", 2, "--training_tokens", 60_000, "--held_out_fraction", 0.5),
        *("--checkpoint_path", tmp_path_factory.mktemp("trained"), "--wandb_mode", "disabled", "--eval_every", 0),
    )
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_trained_sae_is_scored_in_the_reports(trained, script):
    done = script(
        *("evaluate_sae_real_activations.py", "--sae_path", trained, "--synthetic", "--lm_dtype", "float32"),
        *("--num_samples", 16),
    )
    assert done.status == 0, done.stderr
    found = json.loads((trained / "evaluation.json").read_text())
    scores, metrics = found["synthetic"], found["metrics"]
    assert scores["random_mcc"] + 0.1 < scores["mcc"] < 1
    assert (scores["n_features"], scores["n_true_features"]) == (64, 96)
    # The text's samples and those of the scores are of one distribution, and the four metrics hold for both.
    assert scores["l0"] == pytest.approx(metrics["l0"], rel=0.03)
    assert scores["explained_variance"] == pytest.approx(metrics["explained_variance"], abs=0.03)
    assert 0.3 < metrics["loss_recovered"] < 1
    assert "What is found of the true features" in done.stdout
    page = (trained / "report.html").read_text()
    assert "What is found of the true features" in page
    assert "nearest true feature" in page
    assert f"{scores['mcc']:.3f}" in page
    rows = dict(row[:2] for row in show_synthetic(scores).rows)
    assert rows["F1"] == f"{scores['f1']:.3f}"


def test_an_sae_of_another_model_is_refused(script, tiny_run):
    path = script("sae_lens_train.py", *tiny_run).stdout.strip()
    done = script("evaluate_sae_real_activations.py", "--sae_path", path, "--synthetic")
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "--synthetic: " in done.error_lines[0]
    assert "whose true features nobody knows" in done.error_lines[0]
