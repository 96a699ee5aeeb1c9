"""How many features of an SAE other SAEs have too, and whether they fire together."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from scipy.optimize import linear_sum_assignment

from sae_toolkit.evaluation.stability.firing import FiringCorrelation, mean_with_interval
from sae_toolkit.evaluation.stability.partners import (
    find_partners,
    of_directions_with_covariance,
    of_random_directions,
    shared_features,
)
from support.processes import ROOT


def directions(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def noisy_copy(W, noise, seed=1):
    """The directions in another order, of other lengths, each turned by noise of its own size."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(W), generator=generator)
    turned = W[order] + noise * torch.rand(len(W), 1, generator=generator) * torch.randn(W.shape, generator=generator)
    return turned * (0.1 + torch.rand(len(W), 1, generator=generator)), order


def cosines(A, B):
    A, B = (W.double().numpy() / np.linalg.norm(W.double().numpy(), axis=1, keepdims=True) for W in (A, B))
    return A @ B.T


def test_partners_are_those_of_the_whole_matrix_of_cosines():
    A = directions(120, 16)
    B, _ = noisy_copy(directions(120, 16)[:90], 1.5)
    partners = find_partners(A, B)
    matrix = cosines(A, B)
    row, column = linear_sum_assignment(-matrix)
    assert partners.largest_A.numpy() == pytest.approx(matrix.max(1), abs=1e-5)
    assert partners.largest_B.numpy() == pytest.approx(matrix.max(0), abs=1e-5)
    assert partners.matched_A[row].tolist() == column.tolist()
    assert (partners.matched_A >= 0).sum() == 90
    assert partners.matched_cosine_A.sum().item() == pytest.approx(matrix[row, column].sum(), abs=1e-4)


def test_a_dictionary_in_another_order_is_found_again_one_to_one():
    A = directions(300, 32)
    B, order = noisy_copy(A, 0)
    partners = find_partners(A, B)
    assert torch.equal(order[partners.matched_A], torch.arange(300))
    assert partners.matched_cosine_A.min() > 0.999


def test_a_feature_is_shared_if_encoder_and_decoder_give_it_the_same_near_partner():
    decoder, encoder = directions(100, 32), directions(100, 32, seed=5)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    other_decoder, other_encoder = decoder[order].clone(), encoder[order].clone()
    other_encoder[:10] = other_encoder[:10].roll(1, 0)  # another partner by the encoder
    other_decoder[10:30] = directions(20, 32, seed=9)  # no near partner by the decoder
    shared_A = shared_features(find_partners(decoder, other_decoder), find_partners(encoder, other_encoder))
    assert sorted(shared_A.nonzero().squeeze(1).tolist()) == sorted(order[30:].tolist())


def test_with_many_features_the_nearest_alone_give_the_same_pairs_where_features_are_shared():
    A = directions(2000, 64)
    B, _ = noisy_copy(A, 2.0)
    exact, candidates = find_partners(A, B), find_partners(A, B, exact_up_to=100)
    assert exact.exact
    assert not candidates.exact
    shared = exact.matched_cosine_A > 0.7
    assert 0.2 < shared.double().mean() < 0.9
    assert torch.equal(candidates.matched_A[shared], exact.matched_A[shared])
    taken = candidates.matched_A[candidates.matched_A >= 0]
    assert len(taken.unique()) == len(taken)
    sums = candidates.matched_cosine_A.sum().item(), exact.matched_cosine_A.sum().item()
    assert sums[0] == pytest.approx(sums[1], rel=0.01)


def peak_of_matching(n, d):
    """Bytes that `find_partners` takes for random weights, beyond the process and the weights."""
    code = f"""if True:
        import resource, torch
        from sae_toolkit.evaluation.stability.partners import find_partners
        find_partners(torch.randn(1000, {d}), torch.randn(1000, {d}))
        weights = torch.randn({n}, {d}), torch.randn({n}, {d})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        find_partners(*weights)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_does_not_grow_with_the_matrix_of_cosines():
    assert peak_of_matching(16_000, 16) < 0.5 * 2**30  # the matrix takes 1 GiB


@pytest.mark.scale
def test_131072_features_against_as_many_take_two_gib():
    assert peak_of_matching(131_072, 576) < 2 * 2**30  # the matrix takes 64 GiB, and the directions alone 0.6


def test_random_directions_share_what_a_draw_of_them_does():
    n, d = 40, 5
    draws = [find_partners(directions(500, d, seed), directions(n, d, 100 + seed)).largest_A for seed in range(40)]
    largest = torch.stack(draws)
    expected = of_random_directions(n, d)
    assert expected["mean"] == pytest.approx(largest.mean().item(), abs=0.01)
    for bound in (0.7, 0.9):
        assert expected[f"above_{bound}"] == pytest.approx((largest > bound).double().mean().item(), abs=0.03)


def test_random_directions_with_the_covariance_of_a_decoder_have_more_in_common_where_it_is_narrow():
    wide = directions(4000, 64)
    narrow = torch.cat([directions(4000, 4, seed=2), 0.05 * directions(4000, 60, seed=3)], 1)
    of_wide, of_narrow = (of_directions_with_covariance(W, seed=0) for W in (wide, narrow))
    assert of_wide["mean"] == pytest.approx(of_random_directions(4000, 64)["mean"], abs=0.01)
    assert of_narrow["above_0.7"] > 0.9 > 0.01 > of_wide["above_0.7"]


def test_rows_of_zeros_are_no_directions_that_random_ones_are_drawn_like():
    narrow = directions(3000, 16) + 2
    assert of_directions_with_covariance(torch.cat([narrow, torch.zeros(3000, 16)]), seed=0) == pytest.approx(
        of_directions_with_covariance(narrow, seed=0), abs=1e-3
    )


def test_features_that_are_always_on_at_one_strength_have_no_correlation():
    of_firing = FiringCorrelation(3)
    a_NP = torch.rand(20_000, 3) * torch.tensor([0.0, 0.0, 1.0]) + 0.7
    b_NP = torch.rand(20_000, 3) * torch.tensor([0.0, 1.0, 1.0]) + 0.3
    of_firing.add(a_NP, b_NP, np.arange(20_000) // 1000)
    correlation_P, _ = of_firing.correlations()
    assert np.isnan(correlation_P).tolist() == [True, True, False]


def test_correlations_are_numpys_and_their_interval_holds_the_true_mean():
    generator = np.random.default_rng(0)
    n, correlation = 4000, 0.6
    # Of two normal variables with this correlation, both cut at 0 (Cho and Saul 2009, arc-cosine kernel of order 1).
    product = (np.sqrt(1 - correlation**2) + correlation * (np.pi - np.arccos(correlation))) / (2 * np.pi)
    true = (product - 1 / (2 * np.pi)) / (1 / 2 - 1 / (2 * np.pi))
    inside = 0
    for _ in range(40):
        both = generator.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], (n, 3))
        a, b = (np.maximum(both[..., i], 0) for i in (0, 1))
        of_firing = FiringCorrelation(4)
        constant = np.zeros((n, 1))
        for part in np.array_split(np.arange(n), 7):
            tensors = (torch.from_numpy(np.hstack([x, constant])[part]) for x in (a, b))
            of_firing.add(*tensors, unit_N=part // 40)
        found, left_out = of_firing.correlations()
        expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
        assert found[:3] == pytest.approx(expected, abs=1e-5)
        assert np.isnan(found[3])
        low, high = mean_with_interval(found, left_out)[1]
        inside += low < true < high
    assert inside >= 34


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """An SAE of random weights, the same with its features in another order, another seed, another width and hook."""
    directory = tmp_path_factory.mktemp("saes")

    def save(name, *, d_in=32, d_sae=96, hook="blocks.2.hook_resid_post", order=None, seed=0, max_activation_norm=None):
        torch.manual_seed(seed)
        sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=True))
        for parameter in sae.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
        if order is not None:
            sae.W_enc.data, sae.W_dec.data = sae.W_enc[:, order], sae.W_dec[order]
            sae.b_enc.data = sae.b_enc[order]
        sae.cfg.metadata.hook_name = hook
        if max_activation_norm is not None:
            sae.cfg.metadata.max_activation_norm = max_activation_norm
        if name == "zero":
            sae.W_dec.data.zero_()
        sae.save_model(directory / name)
        return directory / name

    return {
        "one": save("one"),
        "same": save("same", order=torch.randperm(96)),
        "other": save("other", seed=1),
        "wide": save("wide", d_in=64),
        "nowhere": save("nowhere", seed=2, max_activation_norm=1e-9),
        "copy": save("copy"),
        "zero": save("zero"),
        "single": save("single", d_sae=1),
        "elsewhere": save("elsewhere", hook="blocks.1.hook_resid_post"),
    }


@pytest.fixture
def evaluate(script, tiny_model, text_file):
    def run(*flags):
        return script(
            "evaluate_sae_real_activations.py",
            *("--model_name", tiny_model, "--dataset", text_file, "--context_length", 32, "--num_samples", 30),
            *("--device", "cpu", "--lm_dtype", "float32", "--no_diagnosis", *flags),
        )

    return run


def test_the_script_finds_the_features_of_an_sae_in_another_order_and_none_in_another_seed(evaluate, saes):
    done = evaluate("--sae_path", saes["one"], "--stability", saes["same"], saes["other"])
    assert done.status == 0, done.stderr
    stability = json.loads((saes["one"] / "evaluation.json").read_text())["stability"]
    same, other = stability["partners"]
    assert (same["name"], other["name"]) == ("same", "other")
    assert same["above_0.9"] == same["matched"]["above_0.9"] == 1
    assert same["firing_correlation"]["above_0.7"]["mean"] == pytest.approx(1, abs=1e-4)
    assert (same["shared"], other["shared"]) == (1, 0)
    assert other["above_0.9"] == 0
    assert other["mean_max_cosine"] == pytest.approx(other["random_directions"]["mean"], abs=0.03)
    assert stability["over_partners"]["above_0.7"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert "Stability" in done.stdout
    report = (saes["one"] / "report.html").read_text()
    assert '"measured":{"found again":' in report
    assert "Stability" in (saes["one"] / "report.md").read_text()


def test_a_damaged_sae_of_a_pattern_is_left_out_and_what_another_left_out_too_counts_for_both(evaluate, saes, tmp_path):
    names = {name: tmp_path / "saes" / name for name in ("damaged", "other", "special")}
    for name, path in names.items():
        shutil.copytree(saes["same" if name == "special" else "other"], path)
    weights = names["damaged"] / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = json.loads((names["special"] / "cfg.json").read_text())
    config["metadata"] |= {"exclude_special_tokens": True, "seqpos_slice": [3, None]}
    (names["special"] / "cfg.json").write_text(json.dumps(config))
    done = evaluate("--sae_path", saes["one"], "--stability", tmp_path / "saes/*")
    assert done.status == 0, done.stderr
    assert "damaged" in done.stderr and "left out" in done.stderr
    stability = json.loads((saes["one"] / "evaluation.json").read_text())["stability"]
    assert [each["name"] for each in stability["partners"]] == ["other", "special"]
    n_special = stability["tokens"]
    done = evaluate("--sae_path", saes["one"], "--stability", names["special"], "--exclude_special_tokens", "false")
    assert done.status == 0, done.stderr
    n_skipped = json.loads((saes["one"] / "evaluation.json").read_text())["stability"]["tokens"]
    done = evaluate("--sae_path", saes["one"], names["special"], "--stability", names["special"], saes["one"])
    assert done.status == 0, done.stderr
    n_both = json.loads((saes["one"] / "evaluation.json").read_text())["stability"]["tokens"]
    assert n_skipped == 30 * 29
    assert n_special == n_both < n_skipped


def test_other_saes_of_other_widths_each_have_their_random_directions(evaluate, saes, tmp_path):
    torch.manual_seed(3)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.save_model(tmp_path / "fewer")
    done = evaluate("--sae_path", saes["one"], "--stability", saes["other"], tmp_path / "fewer")
    assert done.status == 0, done.stderr
    report = (saes["one"] / "report.md").read_text()
    assert "random, for other" in report and "random, for fewer" in report


def test_an_sae_of_one_feature_is_compared_too(evaluate, saes):
    done = evaluate("--sae_path", saes["single"], "--stability", saes["one"])
    assert done.status == 0, done.stderr
    assert "95th percentile" not in (saes["single"] / "report.md").read_text()


def test_a_decoder_that_is_a_copy_is_said_to_be_one(evaluate, saes):
    done = evaluate("--sae_path", saes["one"], "--stability", saes["copy"], saes["same"])
    assert done.status == 0, done.stderr
    assert "copy has the decoder of one, so that all features are found again" in done.stderr
    assert "same has the decoder" not in done.stderr


def test_saes_named_by_stability_alone_are_evaluated_and_compared_with_each_other(evaluate, saes):
    done = evaluate("--stability", saes["same"], saes["other"])
    assert done.status == 0, done.stderr
    for name, partner in (("same", "other"), ("other", "same")):
        summary = json.loads((saes[name] / "evaluation.json").read_text())
        assert [each["name"] for each in summary["stability"]["partners"]] == [partner]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--stability", "one"], "there is only one SAE, one; name another one"),
        (["--sae_path", "one", "--stability", "one"], "there is only one SAE, one; name another one"),
        (["--sae_path", "one", "--stability", "wide"], "an SAE of width 64, and one has the width 32"),
        (
            ["--sae_path", "one", "--stability", "elsewhere"],
            "an SAE of blocks.1.hook_resid_post, and one is at blocks.2",
        ),
        (["--stability", "one", "elsewhere"], "compares SAEs of one hook, and these are at blocks.2.hook_resid_post"),
        (["--sae_path", "one", "--stability", "zero"], "all decoder vectors of zero are zero; leave that SAE out"),
        (["--sae_path", "one", "--stability", "nowhere"], "no token of the text is at a position that all of the SAEs"),
        ([], "--sae_path: names no SAE"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(evaluate, saes, flags, says):
    done = evaluate(*(saes.get(flag, flag) for flag in flags))
    assert done.status == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
