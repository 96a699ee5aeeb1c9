"""--l0_check points to the L0 of synthetic data or says why it points to none, and refuses SAEs not to be compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    generate_random_correlation_matrix,
    linear_firing_probabilities,
    train_toy_sae,
)

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.further import prepare_further_evaluations
from sae_toolkit.evaluation.l0_check.check import measure_decoders
from sae_toolkit.evaluation.l0_check.comparison import compare
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.reports.further import further_tables
from sae_toolkit.settings.evaluation import parse_evaluation_flags
from support.processes import HOOK

TRUE_L0 = 2.5
K = (1.25, 1.9, 2.5, 3.75, 5.0)  # too low, too low, right, too high, too high


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """What SAEs say that SAELens trained on its synthetic data: 12 correlated features in 24 dimensions, fixed seeds.

    It is a small likeness of the toy model of arXiv 2508.16560, which has 50 features in 100 dimensions.
    """
    torch.manual_seed(0)
    features = FeatureDictionary(12, 24, seed=0)
    generator = ActivationGenerator(
        12,
        linear_firing_probabilities(12, 0.37, 0.05),
        std_firing_magnitudes=0.15,
        correlation_matrix=generate_random_correlation_matrix(
            12, min_correlation_strength=0.3, max_correlation_strength=0.9, seed=42
        ),
    )
    saes = []
    for k in K:
        torch.manual_seed(0)
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, d_in=24, d_sae=12))
        train_toy_sae(sae, features, generator, training_samples=300 * 256, batch_size=256, lr=0.01)
        path = tmp_path_factory.mktemp("sae")
        sae.save_inference_model(path)
        saes.append(SAE.load_from_disk(path))
    acts_NF = generator.sample(20_000)
    assert (acts_NF > 0).sum(1).float().mean() == pytest.approx(TRUE_L0, rel=0.02)
    return measure_decoders(saes, [(features(acts_NF).detach(), np.arange(20_000) // 100)], seed=0)


def compare_results(results):
    return compare(*([each[name] for each in results] for name in ("l0", "c_dec", "s_n_dec")))


def test_it_points_to_the_true_l0_of_synthetic_data(synthetic):
    """Both statistics fall to the true L0 and rise above it; they are flat at once above it, in the paper too."""
    comparison = compare_results(synthetic)
    assert comparison.why_not is None
    low, high = comparison.points_to
    assert low == pytest.approx(TRUE_L0, rel=0.1)
    assert high < 1.6 * TRUE_L0
    for name in ("c_dec", "s_n_dec"):
        too_low, low, right, _, too_high = (each[name] for each in synthetic)
        assert too_low > low > right < too_high


def test_it_points_to_none_if_all_are_too_low_or_too_high(synthetic):
    assert compare_results(synthetic[:3]).why_not == "too low"
    assert compare_results(synthetic[2:]).why_not == "too high"
    assert compare_results(synthetic[:1]).why_not == "one L0"


def test_seeds_of_one_l0_are_one_point_and_their_spread_says_what_is_as_low():
    l0 = [20, 20.4, 40, 40.4, 80, 80.4, 160]
    c_dec = [0.06, 0.06, 0.047, 0.043, 0.044, 0.042, 0.05]
    comparison = compare(l0, c_dec, c_dec)
    assert comparison.n_saes_G == [2, 2, 2, 1]
    assert comparison.points_to == (pytest.approx(40.2), pytest.approx(80.2))
    # Seeds that differ less tell the two apart.
    c_dec[2:6] = [0.046, 0.0461, 0.043, 0.0431]
    assert compare(l0, c_dec, c_dec).points_to == (pytest.approx(80.2), pytest.approx(80.2))


@pytest.mark.parametrize(
    ("s_n_dec", "points_to", "why_not"),
    [
        ([5, 4, 1, 2, 3], (30, 30), None),
        ([5, 4, 3, 1, 2], (30, 40), None),  # the next L0
        ([5, 4, 3, 2, 1], None, "undecided"),  # far from the lowest c_dec
        ([1, 2, 3, 4, 5], None, "undecided"),
        ([1, 1, 1, 1, 1], None, "undecided"),  # flat
    ],
)
def test_both_statistics_have_to_point_to_the_same_l0(s_n_dec, points_to, why_not):
    comparison = compare([10, 20, 30, 40, 50], [5, 4, 1, 2, 3], s_n_dec)
    assert (comparison.points_to, comparison.why_not) == (points_to, why_not)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Settings and group of three SAEs of random weights on the embedded model and text."""
    directory = tmp_path_factory.mktemp("saes")
    for k in (64, 4, 16):
        torch.manual_seed(k)
        sae = TopKSAE(TopKSAEConfig(d_in=576, d_sae=1152, k=k))
        sae.W_dec.data *= torch.rand(1152, 1) + 0.5
        sae.b_dec.data = torch.randn(576)
        sae.save_model(directory / f"k{k}")
    flags = [
        *("--sae_path", *(str(directory / f"k{k}") for k in (64, 4, 16))),
        *("--model_name", EMBEDDED_MODEL, "--hook_name", HOOK, "--device", "cpu", "--dataset", EMBEDDED_TEXT),
        *("--num_samples", "12", "--context_length", "24", "--skip_positions", "1", "--l0_check"),
    ]
    settings = parse_evaluation_flags("", flags)
    (group,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    return settings, group


@pytest.fixture(scope="module")
def measured(prepared, language_model):
    settings, group = prepared
    (further,) = prepare_further_evaluations(settings, [group])
    return group, further.measure(group, language_model, 5)


def at(evaluated, path):
    """The SAE, as if it had been loaded from another directory."""
    return replace(evaluated, file=replace(evaluated.file, path=path, name=path.name))


def test_on_real_activations_it_is_what_the_paper_defines(measured, language_model):
    group, results = measured
    acts_BTD = language_model.activations(torch.from_numpy(group.rows_NT[: group.n_sae_rows].astype(np.int64)))
    acts_ND = acts_BTD[:, 1:].flatten(0, 1).double()
    for evaluated, result, k in zip(group.saes, results, (64, 4, 16), strict=True):
        sae = evaluated.sae
        unit_FD = F.normalize(sae.W_dec.double(), dim=-1)
        z = ((acts_ND - sae.b_dec.double()) @ unit_FD.T).flatten().sort(descending=True).values
        low, high = result["s_n_dec_interval"]
        assert result["s_n_dec"] == pytest.approx(z[result["n"] * len(acts_ND)].item(), rel=1e-3)
        assert low < result["s_n_dec"] < high
        assert result["l0"] == k
        assert result["tokens"] == len(acts_ND)


def test_the_table_has_all_saes_and_says_what_to_train(measured):
    _, results = measured
    (shown,) = {further_tables({"l0_check": json.loads(json.dumps(each))})[0] for each in results}  # one for all
    assert [row[:2] for row in shown.rows] == [("k4", "4.0"), ("k16", "16.0"), ("k64", "64.0")]
    assert "There is one SAE for each L0" in shown.how_to_read
    assert (
        "Train SAEs that differ in nothing else, at L0 2, 130" in shown.how_to_read
    )  # random weights: no L0 stands out
    assert "n = 432 features" in shown.how_to_read


def test_one_sae_alone_is_told_nothing_of_its_l0(prepared, language_model, tmp_path):
    settings, group = prepared
    (tmp_path / FLAGS_FILENAME).write_text("{}")
    group = replace(group, saes=(at(group.saes[2], tmp_path / "final_1000"),))
    (further,) = prepare_further_evaluations(settings, [group])
    (result,) = further.measure(group, language_model, 5)
    (shown,) = further_tables({"l0_check": result})
    assert "The values of one L0 do not tell whether it is right" in shown.how_to_read
    assert f"python sweep_saes.py --like {tmp_path} --grid target_l0=4,8,32,64 seed=42,43,44" in shown.how_to_read


def test_saes_that_cannot_be_compared_are_refused(prepared, tmp_path):
    settings, group = prepared
    one, other, _ = group.saes
    (tmp_path / FLAGS_FILENAME).write_text("{}")
    wide = replace(one, sae=TopKSAE(TopKSAEConfig(d_in=576, d_sae=600, k=4)))
    constant = replace(one, sae=TopKSAE(TopKSAEConfig(d_in=576, d_sae=600, k=4)))
    constant.sae.W_dec.data[1:] = 0
    foreign = replace(one, file=replace(one.file, library="sparsify"))
    checkpoints = [at(one, tmp_path / "1000"), at(other, tmp_path / "final_2000")]
    mistakes = [
        ([replace(group, saes=(wide, other))], "differ in d_sae: 600 and 1152; name SAEs that differ in L0 and seed"),
        ([replace(group, saes=(foreign, other))], "differ in library: sparsify and SAELens"),
        ([replace(group, saes=tuple(checkpoints))], "1000 and final_2000 are checkpoints of one run"),
        ([replace(group, saes=(constant,))], "1 of the 600 decoder vectors of k64 are not zero"),
        (
            [replace(group, saes=(one,)), replace(group, saes=(other,))],
            "k64 and k4 are at one hook, .* give --like k64",
        ),
    ]
    for groups, says in mistakes:
        with pytest.raises(UserError, match=f"^--l0_check: .*{says}") as caught:
            prepare_further_evaluations(settings, groups)
        assert "\n" not in str(caught.value)
