"""Both protocols, several SAEs in one pass, and refusals, on a tiny model of random weights."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.reports.results import choose_outputs
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import parse_evaluation_flags
from support.evaluated import BATCH, BOS, CONTEXT, EOS, N_ROWS, result_of, save_sae


@pytest.fixture(scope="module")
def dense(tiny_model, rows):
    """Losses computed by Transformers alone in float64, with a function applied to the output of layer 2."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    tokens = rows[1]

    def losses(replace):
        seen = {}

        def hook(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen["acts"] = hidden
            new = replace(hidden)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = model.model.layers[2].register_forward_hook(hook)
        with torch.no_grad():
            log_probs = model(tokens).logits.log_softmax(-1)
        handle.remove()
        return -log_probs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2), log_probs, seen["acts"]

    return losses


def test_under_saebench_the_sae_stands_in_everywhere_and_pad_eos_and_bos_are_left_out(evaluate, tmp_path, rows, dense):
    path = save_sae(tmp_path / "sae", k=8, seqpos_slice=(1, None), exclude_special_tokens=True)
    evaluate("--sae_path", path, "--protocol", "saebench")
    result = result_of(path)
    core = result["saebench_core"]

    sae = load_sae(path, "cpu").double()
    clean, clean_log_probs, x = dense(lambda hidden: hidden)
    zero, _, _ = dense(torch.zeros_like)
    with_sae, sae_log_probs, _ = dense(sae)
    scored = (rows[1] != BOS) & (rows[1] != EOS)
    expected = {
        f"ce_loss_{name}": ce[scored[:, :-1]].mean().item()
        for name, ce in (("without_sae", clean), ("with_ablation", zero), ("with_sae", with_sae))
    }
    found = core["model_performance_preservation"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    kl = (clean_log_probs.exp() * (clean_log_probs - sae_log_probs)).sum(-1)[scored].mean().item()
    assert core["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(kl, rel=1e-3)

    features = sae.encode(x)
    recons = sae.decode(features)
    assert core["sparsity"] == pytest.approx(
        {"l0": (features[scored] != 0).sum(1).double().mean().item(), "l1": features[scored].sum(1).mean().item()},
        rel=1e-5,
    )
    bias = [
        (recons[b][scored[b]].pow(2).sum(1).mean() / (x[b] * recons[b])[scored[b]].sum(1).mean()).item()
        for b in torch.arange(N_ROWS).split(BATCH)
    ]
    assert core["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(np.mean(bias), rel=1e-5)
    density = (features[scored] > 0).double().mean(0)
    for name, rate in (("frac_alive", 0), ("freq_over_1_percent", 0.01), ("freq_over_10_percent", 0.1)):
        assert core["misc_metrics"][name] == pytest.approx((density > rate).double().mean().item())
    xs, rs = x[scored], recons[scored]
    variance = (xs - xs.mean(0)).pow(2).sum()
    assert result["metrics"]["explained_variance"] == pytest.approx(1 - ((xs - rs).pow(2).sum() / variance).item())
    assert result["metrics"]["replaced_share"] == 1
    assert result["tokens"] == int(scored.sum())


def test_under_health_the_sae_stands_in_where_it_was_trained_to(evaluate, tmp_path, rows, dense):
    norms = dense(lambda hidden: hidden)[2].norm(dim=-1)
    limit = norms.quantile(0.99).item()
    path = save_sae(tmp_path / "sae", seqpos_slice=(1, None), exclude_special_tokens=[EOS], max_activation_norm=limit)
    evaluate("--sae_path", path)
    result = result_of(path)
    sae = load_sae(path, "cpu").double()
    kept = (rows[1] != EOS) & (norms <= limit)
    kept[:, 0] = False
    with_sae, _, _ = dense(lambda hidden: torch.where(kept[..., None], sae(hidden), hidden))
    assert result["metrics"]["ce_sae"] == pytest.approx(with_sae[kept[:, :-1]].mean().item(), rel=1e-5)
    assert result["tokens"] == int(kept.sum())
    assert "saebench_core" not in result


def test_flags_choose_the_positions_whatever_the_record_says(evaluate, tmp_path, rows, dense):
    """The limit is that of training: a multiple of the median norm at the positions that are not left out."""
    record = {"seqpos_slice": (5, None), "exclude_special_tokens": True, "max_activation_norm": 1e-3}
    path = save_sae(tmp_path / "sae", **record)
    flags = ("--skip_positions", 2, "--exclude_special_tokens", BOS, "--max_activation_norm_multiple", 1.05)
    done = evaluate("--sae_path", path, *flags)
    result = result_of(path)
    norms = dense(lambda hidden: hidden)[2].norm(dim=-1)
    kept = rows[1] != BOS
    kept[:, :2] = False
    limit = 1.05 * norms[kept].median().item()
    kept &= norms <= limit
    with_sae = dense(lambda hidden: torch.where(kept[..., None], load_sae(path, "cpu").double()(hidden), hidden))[0]
    assert 0 < kept.sum() < 0.9 * kept.numel()
    assert result["tokens"] == int(kept.sum())
    assert result["metrics"]["ce_sae"] == pytest.approx(with_sae[kept[:, :-1]].mean().item(), rel=1e-5)
    assert result["positions"] == {
        "special_token_ids": [BOS],
        "skip_positions": 2,
        "max_activation_norm": pytest.approx(limit, rel=1e-5),
        "chat_tokens": None,
    }
    assert set(result["sources"].values()) == {"record", "flag"}
    for shown in (done.stderr, done.stdout, (path / "report.md").read_text()):
        assert "without 1 special token (flag), from position 2 on (flag), norms up to" in shown
    evaluate("--sae_path", path, "--max_activation_norm_multiple", 0, "--exclude_special_tokens", "false")
    assert result_of(path)["tokens"] == rows[1].numel() - 5 * N_ROWS


def test_given_tokens_are_used_as_they_are(evaluate, tmp_path, rows, dense):
    """Row for row, in order, with or without a BOS, whatever context size the SAE was trained with."""
    path = save_sae(tmp_path / "sae", context_size=128, dataset_path="embedded:wikipedia")
    evaluate("--sae_path", path, "--protocol", "saebench", "--num_samples", 12)
    result = result_of(path)
    clean, _, _ = dense(lambda hidden: hidden)
    scored = ((rows[1] != BOS) & (rows[1] != EOS))[:12, :-1]
    assert (result["context_length"], result["sequences"]) == (CONTEXT, 12)
    assert result["metrics"]["ce_clean"] == pytest.approx(clean[:12][scored].mean().item(), rel=1e-5)


@pytest.fixture
def layer_calls(monkeypatch):
    """How many sequences went through each decoder layer, counted in Transformers' own forward."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    calls: dict[int, int] = {}
    compute = LlamaDecoderLayer.forward

    def counted(self, hidden_states, *args, **kwargs):
        if hidden_states.shape[1] == CONTEXT:  # rows, and not a probe of the model's shapes
            calls[self.self_attn.layer_idx] = calls.get(self.self_attn.layer_idx, 0) + len(hidden_states)
        return compute(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return calls


def test_the_model_runs_once_for_what_several_saes_share(evaluate, tmp_path, layer_calls):
    paths = [save_sae(tmp_path / f"sae{i}", seed=i, k=None if i else 8) for i in range(3)]
    alone = []
    for path in paths:
        evaluate("--sae_path", path)
        alone.append(result_of(path))
        (path / "evaluation.json").unlink()
    layer_calls.clear()
    done = evaluate("--sae_path", tmp_path / "sae*", "--no_diagnosis")
    for path, expected in zip(paths, alone, strict=True):
        assert result_of(path)["metrics"] == expected["metrics"]
        assert path.name in done.stdout
    # Layers up to the hook: each row once. After it: clean once, each SAE once, zeros for one row.
    assert [layer_calls[i] for i in range(4)] == [N_ROWS, N_ROWS, N_ROWS, N_ROWS + 3 * N_ROWS + 1]


def test_without_the_logs_of_a_training_it_is_said_what_cannot_be_told(evaluate, tmp_path):
    done = evaluate("--sae_path", save_sae(tmp_path / "sae"))
    said = "no training_flags.json of a run: causes that need the course of the training are not looked for"
    assert done.stderr.count(said) == 1
    assert "Why" in done.stdout


def test_a_run_directory_is_all_its_checkpoints_with_curves(evaluate, script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, "--n_checkpoints", 1)
    final = Path(done.stdout.strip())
    done = evaluate("--sae_path", final.parent, "--num_samples", 12)
    for name in ("2048", "final_2048"):
        assert name in done.stdout
        assert "over training" in (final.parent / name / "report.html").read_text()
    assert result_of(final)["dead_feature_estimates"]["training_run"].keys() == {"dead", "dead_here_alive_there"}
    assert [file.form for file in find_saes([str(final.parent)])] == [
        "training form, standard",
        "inference form, standard",
    ]


def test_dead_features_are_counted_on_tokens_of_their_own(evaluate, tmp_path, text_file):
    path = save_sae(tmp_path / "sae", k=2)
    flags = ("--sae_path", path, "--num_samples", 12, "--context_length", 64)
    evaluate(*flags, dataset=text_file)
    few = result_of(path)
    evaluate(*flags, "--dead_tokens", 20_000, dataset=text_file)
    many = result_of(path)
    assert few["dead_feature_estimates"]["tokens"] == few["tokens"] == many["tokens"] == 12 * 64
    assert many["dead_feature_estimates"]["tokens"] >= 20_000
    assert many["metrics"]["dead_features"] <= few["metrics"]["dead_features"]
    assert [tokens for tokens, _ in many["dead_feature_estimates"]["curve"]][:3] == [1000, 3000, 10_000]
    assert {**many["metrics"], "dead_features": 0} == {**few["metrics"], "dead_features": 0}


def test_features_asked_for_are_in_the_report(evaluate, tmp_path, text_file):
    path = save_sae(tmp_path / "sae", k=8)
    evaluate("--sae_path", path, "--num_samples", 12, "--context_length", 64, "--features", 7, 3, dataset=text_file)
    page = (path / "report.html").read_text()
    assert '"index":7' in page
    assert '"index":3' in page
    assert "metrics healthy" in (path / "report.md").read_text()


def test_equal_rows_do_not_make_an_ablation_shared(evaluate, tmp_path, rows):
    """Zeros at one part of a layer leave the text in the residual stream, even if the first rows are equal."""
    tokens = rows[1].tolist()
    twice = tmp_path / "twice"
    datasets.Dataset.from_dict({"tokens": [tokens[0], *tokens]}).save_to_disk(twice)
    path = save_sae(tmp_path / "sae", hook="blocks.2.hook_mlp_out")
    found = []
    for batch_size in (1, 7):
        evaluate("--sae_path", path, "--batch_size", batch_size, dataset=twice)
        found.append(result_of(path)["metrics"]["ce_zero"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_tokens_raised_and_lowered_are_shown_where_the_feature_writes_to_the_residual_stream(evaluate, tmp_path):
    for hook, shown in (("blocks.2.hook_mlp_out", True), ("blocks.2.attn.hook_z", False)):
        path = save_sae(tmp_path / hook, hook=hook, k=8)
        evaluate("--sae_path", path)
        assert ('"raised":[[' in (path / "report.html").read_text()) is shown


def test_results_hold_no_nan(evaluate, tmp_path):
    """In a model of random weights, zeros at the hook may cost nothing, and then there is no loss to recover."""
    path = save_sae(tmp_path / "sae", hook="blocks.2.attn.hook_z", k=1)
    evaluate("--sae_path", path, "--protocol", "saebench")
    text = (path / "evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_results_of_saes_that_are_not_ours_go_to_a_directory_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Path(HF_HUB_CACHE) / "models--owner--name"
    files = [SAEFile(f"release:{i}", cache, "SAELens", "release", ("release", i)) for i in ("a/1", "a/2")]

    def group(*files):
        return SimpleNamespace(saes=[SimpleNamespace(file=file) for file in files])

    outputs = choose_outputs(None, [group(*files)])
    assert outputs == [[Path(f"evaluations/release_a_{i}/evaluation.json") for i in (1, 2)]]
    with pytest.raises(UserError, match=r"one file for 2 SAEs"):
        choose_outputs(tmp_path / "results.json", [group(*files)])
    with pytest.raises(UserError, match=r"the results of two SAEs would go to evaluations/release_a_1"):
        choose_outputs(None, [group(files[0]), group(replace(files[1], name="release_a 1"))])


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (60_000, "other: holds the token id 60000, and"),
        (
            2**40,
            "400 of its first 400 records cannot be used; the first is record 1: its 'tokens' holds 1099511627776",
        ),
        (-1, "the first is record 1: its 'tokens' holds -1, which is not a token id"),
    ],
)
def test_token_ids_that_the_model_has_not_are_refused(script, tiny_model, tiny_run, tmp_path, token, says):
    other = tmp_path / "other"
    datasets.Dataset.from_dict({"tokens": [[token] * 63 + [i] for i in range(400)]}).save_to_disk(other)
    flags = ("--model_name", tiny_model, "--dataset", other)
    sae_path = save_sae(tmp_path / "sae")
    for done in (
        script("evaluate_sae_real_activations.py", "--sae_path", sae_path, *flags),
        script("sae_lens_train.py", *tiny_run, "--dataset_path", other),
    ):
        assert done.status == 2
        assert says in done.error_lines[0]


def test_numbers_that_are_not_finite_are_said_to_be_the_saes_or_the_models(script, tiny_model, tmp_path, rows):
    huge = save_sae(tmp_path / "huge")
    weights = load_file(huge / "sae_weights.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in weights.items()}, huge / "sae_weights.safetensors")
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for sae_path, model, says in (
        (huge, tiny_model, "too large for a trained SAE; are the weights damaged?"),
        (save_sae(tmp_path / "sae"), broken, f"--model_name {broken}: its own losses are not finite"),
    ):
        flags = ("--sae_path", sae_path, "--model_name", model, "--dataset", rows[0])
        done = script("evaluate_sae_real_activations.py", *flags)
        assert done.status == 2
        assert says in done.error_lines[0]
        assert not (sae_path / "evaluation.json").exists()


def test_activations_that_overflow_are_said_to_do_so_whether_or_not_there_is_a_norm_limit(
    script, tiny_model, tmp_path, rows
):
    large = shutil.copytree(tiny_model, tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(3e4)
    weights["model.layers.1.mlp.up_proj.weight"] *= 100
    save_file(weights, large / "model.safetensors", metadata={"format": "pt"})
    for name, limit in (("limited", {"max_activation_norm": 100.0}), ("unlimited", {})):
        path = save_sae(tmp_path / name, **limit)
        flags = ("--sae_path", path, "--model_name", large, "--dataset", rows[0], "--lm_dtype", "float16")
        done = script("evaluate_sae_real_activations.py", *flags)
        assert done.status == 2
        says = r"--lm_dtype float16: [\d.]+% of the activations at blocks.2.hook_resid_post are not finite"
        assert re.search(says, done.error_lines[0])
    flags = ("--sae_path", path, "--model_name", large, "--dataset", rows[0], "--max_activation_norm_multiple", 2)
    done = script("evaluate_sae_real_activations.py", *flags, "--lm_dtype", "float16")
    assert "--lm_dtype float16: the median norm of the activations is" in done.error_lines[0]


def test_a_link_or_directory_in_the_place_of_a_result_is_not_written_through(script, tiny_model, tmp_path, rows):
    for name in (".report.html.partial", "report.md"):
        path = save_sae(tmp_path / name.strip("."))
        (path / name).symlink_to(tmp_path / "elsewhere")
        flags = ("--sae_path", path, "--model_name", tiny_model, "--dataset", rows[0])
        done = script("evaluate_sae_real_activations.py", *flags)
        assert done.status == 2
        assert f"{name}: is not a file that can be replaced" in done.error_lines[0]
        assert not (path / "evaluation.json").exists()


def test_its_command_measures_an_sae_of_no_record_again(evaluate, tmp_path):
    """Without what was given, it would be refused."""
    path = save_sae(tmp_path / "sae")
    evaluate("--sae_path", path, "--num_samples", 8, "--skip_positions", 1)
    before = result_of(path)
    found = [each["command"] for each in before["diagnosis"] if each["command"].startswith("python ")]
    assert found
    for words in map(shlex.split, found):
        settings = parse_evaluation_flags("", words[2:])
        assert (settings.saes.model_name, settings.text.dataset) == (before["model"], before["dataset"])
        assert settings.text.skip_positions == 1
