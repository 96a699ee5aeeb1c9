"""--l0_check points to the L0 of synthetic data or says why it points to none, and refuses SAEs not to be compared."""

import copy
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

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
from sae_toolkit.files.embedded import embedded_wikipedia
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.model.loading import load_language_model
from sae_toolkit.reports.further import further_tables
from sae_toolkit.settings.evaluation import parse_evaluation_flags

TRUE_L0 = 2.5
K = (1.25, 1.9, 2.5, 3.75, 5.0)  # too low, too low, right, too high, too high


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """What SAEs say that SAELens trained on its synthetic data, by the values of `K`."""
    return measure_synthetic(tmp_path_factory.mktemp("synthetic"), seed=0)


def measure_synthetic(directory, seed):
    """12 correlated features in 24 dimensions; a likeness of arXiv 2508.16560's toy model of 50 in 100 dimensions."""
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
    acts_NF = generator.sample(20_000)
    assert (acts_NF > 0).sum(1).float().mean() == pytest.approx(TRUE_L0, rel=0.02)
    saes = []
    for k in K:
        torch.manual_seed(seed)
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, d_in=24, d_sae=12))
        train_toy_sae(sae, features, generator, training_samples=300 * 256, batch_size=256, lr=0.01)
        sae.save_inference_model(directory / f"k{k}_{seed}")
        saes.append(SAE.load_from_disk(directory / f"k{k}_{seed}"))
    return measure_decoders(saes, [(features(acts_NF).detach(), np.arange(20_000) // 100)], seed=0)


def compare_results(results):
    return compare(*([each[name] for each in results] for name in ("l0", "c_dec", "s_n_dec")))


def test_it_points_to_the_true_l0_of_synthetic_data(synthetic):
    """Both statistics are lowest at the true L0 or next to it: the paper too finds s_n_dec flat right above it."""
    comparison = compare_results(synthetic)
    assert comparison.why_not is None
    assert comparison.points_to == pytest.approx((TRUE_L0, TRUE_L0), rel=0.1)
    assert comparison.s_n_dec_agrees
    for name in ("c_dec", "s_n_dec"):
        too_low, low, right, _, too_high = (each[name] for each in synthetic)
        assert right < min(too_low, low, too_high)


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
    ("c_dec", "points_to", "why_not"),
    [
        ([5, 4, 1, 2, 3], (30, 30), None),
        ([5, 1.01, 1.01, 1, 3], (20, 40), None),  # from the elbow to the lowest value
        ([5, 4, 1, 1.01, 1.01], (30, 30), None),  # flat above the elbow
        ([5, 4, 3, 2, 1], None, "too low"),
        ([5, 4, 1.01, 1.01, 1], None, "too low"),
        ([1, 2, 3, 4, 5], None, "too high"),
        ([1.01, 1, 3, 4, 5], None, "too high"),
        ([1, 1.01, 1, 1, 1], None, "flat"),
    ],
)
def test_c_dec_points_to_an_l0_that_has_others_on_both_sides(c_dec, points_to, why_not):
    comparison = compare([10, 20, 30, 40, 50], c_dec, c_dec)
    assert (comparison.points_to, comparison.why_not) == (points_to, why_not)
    assert comparison.s_n_dec_agrees


@pytest.mark.parametrize(
    ("s_n_dec", "agrees"), [([5, 4, 3, 1, 2], True), ([3, 1, 2, 4, 5], True), ([5, 4, 3, 2, 1], False)]
)
def test_s_n_dec_agrees_if_it_is_lowest_at_the_same_l0_or_the_next(s_n_dec, agrees):
    assert compare([10, 20, 30, 40, 50], [5, 4, 1, 2, 3], s_n_dec).s_n_dec_agrees == agrees


def expected_s_n_dec(sae, acts_ND, n):
    """Equations 58 and 59 of the paper, in float64."""
    unit_FD = F.normalize(sae.W_dec.double(), dim=-1)
    z_NF = (acts_ND.double() - sae.b_dec.double()) @ unit_FD.T
    return z_NF.flatten().sort(descending=True).values[n * len(acts_ND)].item()


def random_sae(d_in, d_sae, k):
    torch.manual_seed(k)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
    sae.W_dec.data *= torch.rand(d_sae, 1) + 0.5
    sae.b_dec.data = torch.randn(d_in)
    return sae


def test_on_real_activations_it_is_what_the_paper_defines(language_model, tokenizer):
    articles = [tokenizer(article).input_ids[:40] for article in islice(embedded_wikipedia(), 12)]
    acts_BTD = language_model.activations(torch.tensor(articles))[:, 1:]
    sae = random_sae(576, 1152, 16)
    batches = [(acts_TD, np.full(len(acts_TD), b)) for b, acts_TD in enumerate(acts_BTD)]
    (result,) = measure_decoders([sae], batches, seed=0)
    low, high = result["s_n_dec_interval"]
    assert result["s_n_dec"] == pytest.approx(expected_s_n_dec(sae, acts_BTD.flatten(0, 1), 432), rel=1e-3)
    assert low < result["s_n_dec"] < high
    assert (result["l0"], result["n"], result["tokens"]) == (16, 432, 12 * 39)


@pytest.fixture(scope="module")
def prepared(tiny_model, text_file, tmp_path_factory):
    """Settings and group of three SAEs, and the model: tiny and of random weights, as what is done is the point."""
    directory = tmp_path_factory.mktemp("saes")
    for k in (64, 4, 16):
        random_sae(32, 256, k).save_model(directory / f"k{k}")
    flags = [
        *("--sae_path", *(str(directory / f"k{k}") for k in (64, 4, 16)), "--hook_name", "blocks.1.hook_resid_post"),
        *("--model_name", str(tiny_model), "--dataset", str(text_file), "--device", "cpu", "--num_samples", "12"),
        *("--context_length", "24", "--skip_positions", "1", "--l0_check"),
    ]
    settings = parse_evaluation_flags("", flags)
    (group,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    return settings, group, load_language_model(group.model, group.hook_name, "cpu", torch.float32)


@pytest.fixture(scope="module")
def measured(prepared):
    settings, group, model = prepared
    (further,) = prepare_further_evaluations(settings, [group])
    return [each.results for each in further.measure(group, model, 5)]


def at(evaluated, path):
    """The SAE, as if it had been loaded from another directory."""
    return replace(evaluated, file=replace(evaluated.file, path=path, name=path.name))


def test_it_is_measured_at_the_positions_of_the_saes(prepared, measured):
    _, group, model = prepared
    acts_BTD = model.activations(torch.from_numpy(group.rows_NT[: group.n_sae_rows].astype(np.int64)))[:, 1:]
    for evaluated, result, k in zip(group.saes, measured, (64, 4, 16), strict=True):
        assert (result["l0"], result["tokens"]) == (k, 12 * 23)
        assert result["s_n_dec"] == pytest.approx(
            expected_s_n_dec(evaluated.sae, acts_BTD.flatten(0, 1), result["n"]), rel=1e-3
        )


def test_the_table_has_all_saes_and_says_what_to_train(measured):
    (shown,) = {further_tables({"l0_check": json.loads(json.dumps(each))})[0] for each in measured}  # one for all
    assert [row[:2] for row in shown.rows] == [("k4", "4.0"), ("k16", "16.0"), ("k64", "64.0")]
    assert "There is one SAE for each L0" in shown.how_to_read
    # Random weights: no L0 stands out. L0s above half of the 256 features are not asked for.
    assert "single out no L0" in shown.how_to_read
    assert "Train SAEs that differ in nothing else, at L0 1, 2, with the library" in shown.how_to_read
    assert "n = 96 features" in shown.how_to_read


def test_one_sae_alone_is_told_nothing_of_its_l0(prepared, tmp_path):
    settings, group, model = prepared
    (tmp_path / FLAGS_FILENAME).write_text("{}")
    group = replace(group, saes=(at(group.saes[2], tmp_path / "final_1000"),))
    (further,) = prepare_further_evaluations(settings, [group])
    (result,) = further.measure(group, model, 5)
    (shown,) = further_tables({"l0_check": result.results})
    assert "The values of one L0 do not tell whether it is right" in shown.how_to_read
    command = f"python sweep_saes.py --like {tmp_path} --held_out_seed 42 --grid target_l0=4,8,32,64 seed=42,43,44"
    assert command in shown.how_to_read


def trained_with(evaluated, details):
    sae = copy.deepcopy(evaluated.sae)
    sae.cfg.metadata["training_architecture_details"] = details
    return replace(evaluated, sae=sae)


def test_saes_that_cannot_be_compared_are_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, group, _ = prepared
    one, other, _ = group.saes
    (tmp_path / FLAGS_FILENAME).write_text("{}")
    wide = replace(one, sae=TopKSAE(TopKSAEConfig(d_in=32, d_sae=600, k=4)))
    constant = replace(one, sae=TopKSAE(TopKSAEConfig(d_in=32, d_sae=600, k=4)))
    constant.sae.W_dec.data[1:] = 0
    foreign = replace(one, file=replace(one.file, library="sparsify"))
    checkpoints = [at(one, tmp_path / "1000"), at(other, tmp_path / "final_2000")]
    relative = [at(one, Path("1000")), at(other, Path("final_2000"))]
    for run in ("short", "long"):
        (tmp_path / run).mkdir()
        (tmp_path / run / FLAGS_FILENAME).write_text("{}")
    tokens = [at(one, tmp_path / "short/final_2000"), at(other, tmp_path / "long/final_20000")]
    rounded = [at(one, tmp_path / "short/final_500224"), at(other, tmp_path / "long/final_500736")]
    prepare_further_evaluations(settings, [replace(group, saes=tuple(rounded))])
    trainer = [
        at(replace(each, file=replace(each.file, library="dictionary_learning")), tmp_path / f"checkpoints/ae_{n}.pt")
        for n, each in enumerate((one, other))
    ]
    seeds = [at(one, tmp_path / "final_2000/seed_42"), at(other, tmp_path / "final_2000/seed_43")]
    prepare_further_evaluations(settings, [replace(group, saes=tuple(seeds))])
    of_other_l0 = (
        trained_with(one, {"k": 4, "aux_loss_coefficient": 1.0}),
        trained_with(other, {"k": 64, "aux_loss_coefficient": 1.0}),
    )
    prepare_further_evaluations(settings, [replace(group, saes=of_other_l0)])
    steps = []
    for run, batch in (("small_batches", 512), ("large_batches", 1024)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "runner_cfg.json").write_text(json.dumps({"train_batch_size_tokens": batch}))
        steps.append(replace(one, file=replace(one.file, path=tmp_path / run, name=run)))
    details = {"k": 4, "rescale_acts_by_decoder_norm": True}
    unlike = {"k": 8, "rescale_acts_by_decoder_norm": False}
    mistakes = [
        ([replace(group, saes=tuple(steps))], "differ in tokens in a step: 512 and 1024"),
        (
            [replace(group, saes=(trained_with(one, details), trained_with(other, unlike)))],
            "differ in rescale_acts_by_decoder_norm: True and False",
        ),
        ([replace(group, saes=(wide, other))], "differ in d_sae: 600 and 256; name SAEs that differ in L0 and seed"),
        ([replace(group, saes=(foreign, other))], "differ in library: sparsify and SAELens"),
        ([replace(group, saes=tuple(checkpoints))], "1000 and final_2000 are checkpoints of one run"),
        ([replace(group, saes=tuple(relative))], "1000 and final_2000 are checkpoints of one run"),
        ([replace(group, saes=tuple(trainer))], "ae_0.pt and ae_1.pt are checkpoints of one run"),
        ([replace(group, saes=tuple(tokens))], "final_2000 and final_20000 were trained on 2,000 and 20,000 tokens"),
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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dataset_path": "some/text", "lr": 4e-4}, "--dataset_path other/text and some/text, and the statistics also"),
        ({"dataset_path": "other/text", "lr": 1e-3}, "--lr 0.0004 and 0.001, and the statistics also depend on that"),
        ({"dataset_path": "other/text", "lr": 7e-4}, None),
        ({}, None),
    ],
)
def test_other_texts_and_learning_rates_of_the_trainings_are_said(prepared, tmp_path, caplog, settings, says):
    evaluation, group, _ = prepared
    saes = []
    for evaluated, of_training in zip(group.saes, ({"dataset_path": "other/text", "lr": 4e-4}, settings), strict=False):
        (tmp_path / evaluated.file.name).mkdir()
        (tmp_path / evaluated.file.name / "runner_cfg.json").write_text(json.dumps(of_training))
        saes.append(at(evaluated, tmp_path / evaluated.file.name))
    prepare_further_evaluations(evaluation, [replace(group, saes=tuple(saes))])
    assert says in caplog.text if says else not caplog.text


def test_several_saes_have_one_table_in_the_terminal_and_each_report(script, tiny_model, text_file, tmp_path):
    """On a tiny model of random weights: the way through the script is the point."""
    for k in (2, 4):
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=k))
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        sae.save_model(tmp_path / f"k{k}")
    done = script(
        "evaluate_sae_real_activations.py",
        *("--sae_path", tmp_path / "k2", tmp_path / "k4", "--model_name", tiny_model, "--dataset", text_file),
        *("--context_length", 16, "--num_samples", 12, "--n_features", 0, "--no_diagnosis", "--device", "cpu"),
        "--l0_check",
    )
    assert done.status == 0, done.stderr
    assert done.stdout.count("What the decoders say about L0") == 1
    for k in (2, 4):
        result = json.loads((tmp_path / f"k{k}" / "evaluation.json").read_text())["l0_check"]
        assert (result["l0"], [row["sae"] for row in result["saes"]]) == (k, ["k2", "k4"])
        assert "What the decoders say about L0" in (tmp_path / f"k{k}" / "report.html").read_text()
