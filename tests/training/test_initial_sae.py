"""A fine-tuning (--init_from) begins with what the SAE computes, whoever trained it, and goes on as the flags say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file

from sae_toolkit.errors import UserError
from sae_toolkit.reports.publish import _lineage
from sae_toolkit.saes.checkpoints import finish_saes, finished_copy
from sae_toolkit.saes.training_form import unfold_normalization
from sae_toolkit.settings.command_line import parse_training_flags, save_flags
from sae_toolkit.settings.training import ARCHITECTURES, TrainingSettings
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.text.sources import HeldOutSplit, open_text
from sae_toolkit.training.initial_sae import lineage_warnings, open_initial_saes
from sae_toolkit.training.run import create_sae
from support.sae_files import (
    ACTS,
    D,
    F,
    K,
    load,
    random_dictionary,
    random_sparse_coder,
    save_dictionary,
)
from support.trainings import assert_same

HOOK = "blocks.1.hook_resid_post"
NORMALIZATIONS = ("none", "expected_average_only_in", "covariance_whitening")


def configuration(architecture: str, normalization: str = "none", **sae: object) -> LanguageModelSAERunnerConfig:
    own = {"k": K} if "topk" in architecture else {}
    if architecture == "matryoshka_batchtopk":
        own["matryoshka_widths"] = [F // 4, F]
    if "topk" in architecture and normalization == "covariance_whitening":
        own["rescale_acts_by_decoder_norm"] = False
    config_class = get_sae_training_class(architecture)[1]
    fields = {"d_in": D, "d_sae": F, "normalize_activations": normalization} | own | sae
    return LanguageModelSAERunnerConfig(
        sae=config_class(**fields),
        hook_name=HOOK,
        training_tokens=5000,
        train_batch_size_tokens=50,
        lr=1e-3,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def begin(cfg: LanguageModelSAERunnerConfig, name: Path | None = None) -> MultiTrainer:
    """The trainer of a run as it stands before its first step, with the scale of its activations measured."""
    initial = open_initial_saes(str(name), {HOOK: cfg.sae})[HOOK] if name else None
    sae = create_sae(cfg, initial)
    trainer = MultiTrainer(cfg.to_sae_trainer_config(), {HOOK: sae})
    scaler = trainer.first.activation_scaler
    if cfg.sae.normalize_activations == "expected_average_only_in":
        scaler.estimate_scaling_factor(D, iter([ACTS]), 1)
    elif cfg.sae.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(D, iter([ACTS]), 1)
    if initial:
        unfold_normalization(sae, scaler)
        sae.cfg.metadata.initialized_from = dict(initial.lineage)
    return trainer


def train(trainer: MultiTrainer, n_steps: int) -> None:
    for _ in range(n_steps):
        trainer.step([ACTS])
        trainer.advance()


def save_trained(cfg: LanguageModelSAERunnerConfig, directory: Path, *, finished: bool) -> Path:
    """An SAE of this project after 20 steps: finished, or the checkpoint that a run makes on its way."""
    trainer = begin(cfg)
    train(trainer, 20)
    if finished:
        finish_saes(trainer.whole(finished=True))
        trainer.first.sae.save_inference_model(directory)
    else:
        trainer.first.save_checkpoint(directory.name, base_path=directory.parent)
    return directory


def assert_begins_as(trainer: MultiTrainer, path: Path, tolerance: float = 1e-5) -> None:
    """What the run would save before its first step reconstructs raw activations as the SAE that it began with."""
    source, began = load(path), finished_copy(trainer.first, None)
    with torch.no_grad():
        theirs, ours = source(ACTS), began(ACTS)
        assert torch.equal(source.encode(ACTS) != 0, began.encode(ACTS) != 0)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "checkpoint"])
@pytest.mark.parametrize(
    ("architecture", "normalization"),
    [
        (architecture, normalization)
        for architecture in ARCHITECTURES
        for normalization in NORMALIZATIONS
        if (architecture, normalization) != ("matching_pursuit", "covariance_whitening")  # SAELens does not fold it
    ],
)
def test_each_architecture_begins_as_the_sae_computes(tmp_path, architecture, normalization, finished):
    """Also if that SAE was trained with another normalization than the run has."""
    path = save_trained(configuration(architecture, normalization), tmp_path / "sae", finished=finished)
    for ours in NORMALIZATIONS:
        try:
            cfg = configuration(architecture, ours)
        except ValueError:
            continue
        if "topk" in architecture and normalization == "covariance_whitening":
            cfg.sae = replace(cfg.sae, rescale_acts_by_decoder_norm=False)
        assert_begins_as(begin(cfg, path), path, 1e-4 if ours == "covariance_whitening" else 1e-5)


def unit_rows(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
def test_saes_of_sparsify_begin_as_they_compute(sparsify, tmp_path, normalization):
    coder = random_sparse_coder(sparsify, tmp_path / "any_norms")
    cfg = configuration("topk", normalization)
    with pytest.raises(UserError, match=r"decoder norms differ.* --set sae.rescale_acts_by_decoder_norm=false"):
        begin(cfg, tmp_path / "any_norms")
    unscaled = configuration("topk", normalization, rescale_acts_by_decoder_norm=False)
    assert_begins_as(begin(unscaled, tmp_path / "any_norms"), tmp_path / "any_norms")
    coder.W_dec.data = unit_rows(coder.W_dec.data)  # as sparsify trains it
    coder.save_to_disk(tmp_path / "norm_1")
    assert_begins_as(begin(cfg, tmp_path / "norm_1"), tmp_path / "norm_1")
    random_sparse_coder(sparsify, tmp_path / "groupmax", activation="groupmax")
    with pytest.raises(UserError, match="its architecture is groupmax, which SAELens does not train"):
        begin(cfg, tmp_path / "groupmax")


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("AutoEncoder", "standard"),
        ("AutoEncoderNew", "standard"),
        ("GatedAutoEncoder", "gated"),
        ("JumpReluAutoEncoder", "jumprelu"),
        ("AutoEncoderTopK", "topk"),
        ("BatchTopKSAE", "batchtopk"),
        ("MatryoshkaBatchTopKSAE", "matryoshka_batchtopk"),
    ],
)
def test_dictionaries_begin_as_they_compute(tmp_path, kind, architecture, normalization):
    state = random_dictionary(kind)
    if "TopK" in kind:  # whose decoders that library keeps at norm 1
        name = "W_dec" if "W_dec" in state else "decoder.weight"
        state[name] = unit_rows(state[name]) if name == "W_dec" else unit_rows(state[name].T).T.contiguous()
    path = save_dictionary(tmp_path, kind, state)
    assert_begins_as(begin(configuration(architecture, normalization), path), path)


def test_an_sae_that_does_not_center_its_input_begins_as_it_computes(tmp_path):
    """Also in a run that subtracts b_dec, as runs do by default, and the other way round."""
    for kind, architecture in (("JumpReluAutoEncoder", "jumprelu"), ("GatedAutoEncoder", "gated")):
        path = save_dictionary(tmp_path / kind, kind, random_dictionary(kind))
        for ours in (True, False):
            trainer = begin(configuration(architecture, apply_b_dec_to_input=ours), path)
            assert trainer.first.sae.cfg.apply_b_dec_to_input is ours
            assert_begins_as(trainer, path)


def threshold(trainer: MultiTrainer) -> float:
    return finished_copy(trainer.first, None).threshold.mean().item()


def test_a_batchtopk_sae_keeps_its_threshold_and_its_l0_from_the_first_step(tmp_path):
    """A running mean that began at 0 would be divided by 1% after one step."""
    path = save_trained(configuration("batchtopk"), tmp_path / "sae", finished=True)
    cfg = configuration("batchtopk")
    cfg.lr = 1e-9
    trainer, began = begin(cfg, path), load(path)
    for _ in range(3):
        train(trainer, 1)
        assert threshold(trainer) == pytest.approx(began.threshold.mean().item(), rel=0.05)
    trainer.first.save_checkpoint("150", base_path=tmp_path)
    assert load(tmp_path / "150").threshold.mean().item() == pytest.approx(threshold(trainer))  # it knows how it began
    again = begin(cfg, tmp_path / "150")
    assert again.first.sae.cfg.metadata.initialized_from["initialized_from"]["name"] == str(path)
    before = threshold(trainer)
    finish_saes(trainer)
    assert trainer.first.sae.topk_threshold.item() == pytest.approx(before)


def test_a_batchtopk_sae_that_goes_on_with_another_k_has_the_threshold_of_that_k(tmp_path):
    path = save_trained(configuration("batchtopk"), tmp_path / "sae", finished=True)
    cfg = configuration("batchtopk", k=K // 2)
    cfg.lr = 1e-9
    trainer = begin(cfg, path)
    assert trainer.first.sae.cfg.k == K // 2
    train(trainer, 1)
    l0 = (finished_copy(trainer.first, None).encode(ACTS) != 0).sum(-1).double().mean().item()
    assert l0 == pytest.approx(K // 2, rel=0.02)
    assert (load(path).encode(ACTS) != 0).sum(-1).double().mean().item() > 0.9 * K


@pytest.mark.parametrize(
    ("begins_with", "trains", "says"),
    [
        ({}, {"architecture": "jumprelu"}, "its architecture is batchtopk, and that of the run jumprelu; use --arch"),
        ({}, {"d_in": 2 * D}, f"for activations of width {D}, and those at {HOOK} have {2 * D}; name another SAE"),
        ({}, {"d_sae": 2 * F}, f"it has {F} features, and the run {2 * F}; use --expansion_factor {F // D}"),
        ({"d_sae": F + 1}, {}, f"it has {F + 1} features, and the run {F}; use --d_sae {F + 1}"),
        (
            {"architecture": "standard", "normalization": "layer_norm"},
            {"architecture": "standard"},
            "normalized by layer_norm, and those of the run by none; use --normalize_activations layer_norm",
        ),
        (
            {"architecture": "standard"},
            {"architecture": "standard", "normalization": "layer_norm"},
            "normalized by none, and those of the run by layer_norm; use --normalize_activations expected",
        ),
        (
            {"architecture": "matryoshka_batchtopk"},
            {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [F // 2, F]},
            f"--matryoshka_widths {F // 4} {F}",
        ),
        (
            {},
            {"normalization": "covariance_whitening", "rescale_acts_by_decoder_norm": True},
            "--normalize_activations covariance_whitening: it changes the decoder norms",
        ),
        (
            {"architecture": "matching_pursuit", "apply_b_dec_to_input": False},
            {"architecture": "matching_pursuit"},
            "use --set sae.apply_b_dec_to_input=false",
        ),
    ],
)
def test_an_sae_that_does_not_fit_is_refused_with_the_flag_to_change(tmp_path, begins_with, trains, says):
    path = save_trained(configuration(**{"architecture": "batchtopk"} | begins_with), tmp_path / "sae", finished=True)
    with pytest.raises(UserError) as error:
        begin(configuration(**{"architecture": "batchtopk"} | trains), path)
    assert str(error.value).startswith(f"--init_from {path}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_whose_scale_is_not_known_are_refused(tmp_path):
    path = save_trained(configuration("topk", "expected_average_only_in"), tmp_path / "sae", finished=False)
    (path / "activation_scaler.json").unlink()
    with pytest.raises(UserError, match=r"activation_scaler.json is missing; name another SAE"):
        begin(configuration("topk"), path)


def test_a_batchtopk_sae_whose_cfg_does_not_say_what_it_was_is_known_by_its_runner_cfg(tmp_path):
    path = save_trained(configuration("batchtopk"), tmp_path / "sae", finished=True)
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"]["training_architecture"], cfg["metadata"]["training_architecture_details"]
    (path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="its architecture is jumprelu"):
        begin(configuration("batchtopk"), path)
    (path / "runner_cfg.json").write_text(json.dumps(configuration("batchtopk").to_dict()))
    assert_begins_as(begin(configuration("batchtopk"), path), path)


def test_another_model_or_hook_is_warned_of_and_an_instruct_model_is_not(text_file):
    of_text = open_text(str(text_file), flag="--dataset_path"), HeldOutSplit(0.1, 42)
    lineage = {"name": "some SAE", "model_name": "meta-llama/Meta-Llama-3-8B", "hook_name": HOOK}
    assert lineage_warnings(lineage, "meta-llama/Meta-Llama-3-8B-Instruct", HOOK, *of_text) == []
    assert lineage_warnings(lineage | {"model_name": "google/gemma-2-2b"}, "google/gemma-2-2b-it", HOOK, *of_text) == []
    (model,) = lineage_warnings(lineage, "mistralai/Mistral-7B-v0.1", HOOK, *of_text)
    assert "trained on meta-llama/Meta-Llama-3-8B, and this run's model is mistralai/Mistral-7B-v0.1" in model
    (hook,) = lineage_warnings(lineage, "meta-llama/Meta-Llama-3-8B", "blocks.2.hook_resid_post", *of_text)
    assert f"trained at {HOOK}, and this run trains at blocks.2.hook_resid_post" in hook
    assert lineage_warnings({"name": "x", "model_name": None, "hook_name": None}, "any", HOOK, *of_text) == []


def test_documents_that_the_first_sae_may_have_seen_are_warned_of_and_not_called_held_out(script, flags, tmp_path):
    """Another seed holds out other documents, most of which the first run was trained on."""
    first = finished(script("sae_lens_train.py", *flags, "--held_out_fraction", 0.3))
    done = script("sae_lens_train.py", *flags, "--init_from", first, "--seed", 7)
    said = f"--init_from {first}: may have been trained on documents of"
    assert said in done.stderr
    assert "use --held_out_seed 42 --held_out_fraction 0.3" in done.stderr
    as_first = "--held_out_seed", 42, "--held_out_fraction", 0.3
    same = script("sae_lens_train.py", *flags, "--init_from", first, "--seed", 7, *as_first)
    assert said not in same.stderr
    for tuned, is_seen in ((finished(done), True), (finished(same), False)):
        evaluated = script("evaluate_sae_real_activations.py", "--sae_path", tuned, "--num_samples", 8)
        assert evaluated.status == 0, evaluated.stderr
        assert json.loads((tuned / "evaluation.json").read_text())["text_may_be_trained_on"] is is_seen
        assert ("in another this SAE may have been trained on them" in " ".join(evaluated.stdout.split())) is is_seen


def finished(done) -> Path:
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())


def weights(sae_path: Path) -> dict[str, torch.Tensor]:
    return load_file(sae_path / "sae_weights.safetensors")


@pytest.fixture
def flags(tiny_run):
    return [*tiny_run, "--architecture", "batchtopk", "--normalize_activations", "expected_average_only_in", "--k", 8]


def test_a_run_begins_with_the_newest_sae_of_another_run_and_records_it(script, flags):
    """What is recorded for one that began with it says whose weights they were, also in what SAELens records."""
    flags += ["--eval_every", 1024]
    trained = finished(script("sae_lens_train.py", *flags, "--n_checkpoints", 1))
    done = script("sae_lens_train.py", *flags, "--lr", 1e-12, "--init_from", trained.parent)
    tuned = finished(done)
    assert f"from    {trained}" in done.stderr
    assert weights(tuned).keys() == weights(trained).keys()
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tuned)[name], tensor, rtol=0.05 if name == "threshold" else 1e-4, atol=1e-6)
    lineage = json.loads((tuned / "cfg.json").read_text())["metadata"]["initialized_from"]
    assert lineage["name"] == str(trained)
    assert (lineage["architecture"], lineage["hook_name"]) == ("batchtopk", HOOK)
    assert len(lineage["weights_sha256"]) == 64
    assert json.loads((tuned / "runner_cfg.json").read_text())["from_pretrained_path"] == str(trained.parent)
    assert _lineage(lineage).startswith(f"Its training began with the weights of {trained}, an SAE of ")
    before, after = (
        [json.loads(line) for line in (sae.parent / "held_out.jsonl").read_text().splitlines()]
        for sae in (trained, tuned)
    )
    for name in ("held_out/l0", "held_out/ce_sae", "held_out/explained_variance", "held_out/dead_features"):
        assert after[0][name] == pytest.approx(before[-1][name], rel=0.05), name


def test_each_hook_begins_with_its_own_sae(script, flags):
    trained = finished(script("sae_lens_train.py", *flags, "--layers", 0, 2))
    still = ["--lr", 1e-12, "--init_from", trained.parent]
    together = finished(script("sae_lens_train.py", *flags, *still, "--layers", 0, 2))
    alone = finished(script("sae_lens_train.py", *flags, *still, "--layer", 2))
    for hook, tuned in (
        ("blocks.0.hook_resid_post", together / "blocks.0.hook_resid_post"),
        ("blocks.2.hook_resid_post", together / "blocks.2.hook_resid_post"),
        ("blocks.2.hook_resid_post", alone),
    ):
        torch.testing.assert_close(weights(tuned)["W_enc"], weights(trained / hook)["W_enc"], rtol=1e-4, atol=1e-6)
    for hooks, says in (
        (["--layers", 0, 1], "no SAE for blocks.1.hook_resid_post in final_2048, which has blocks.0.hook_resid_post, "),
        (["--layer", 1], "holds 2 SAEs: "),
        (
            ["--layers", 0, 2, "--init_from", alone],
            "one SAE, and the run trains at 2 hooks; name a run or a checkpoint",
        ),
    ):
        done = script("sae_lens_train.py", *flags, *still, *hooks)
        assert done.status == 2
        (error,) = done.error_lines
        assert error.startswith("error: --init_from ") and says in error


def test_a_fine_tuning_goes_on_from_a_checkpoint_to_the_same_sae_also_without_the_first_one(script, flags, tmp_path):
    first = finished(script("sae_lens_train.py", *flags))
    shutil.move(first, tmp_path / "first")
    flags += ["--init_from", tmp_path / "first", "--training_tokens", 4096, "--n_checkpoints", 1]
    whole = finished(script("sae_lens_train.py", *flags))
    (checkpoint,) = (path for path in whole.parent.iterdir() if path.name.isdigit())
    shutil.move(whole, tmp_path / "whole")  # as if the run had been killed before it was finished
    shutil.rmtree(tmp_path / "first")
    assert_same(tmp_path / "whole", finished(script("sae_lens_train.py", "--resume", checkpoint)))


def test_the_same_flags_without_the_sae_to_begin_with(tmp_path):
    """`none` takes --init_from back, beside --like."""
    save_flags(TrainingSettings().as_flags() | {"init_from": "an SAE"}, tmp_path)
    assert parse_training_flags(["--like", str(tmp_path)]).sae.init_from == "an SAE"
    assert parse_training_flags(["--like", str(tmp_path), "--init_from", "none"]).sae.init_from is None
