"""The checkpoints of every architecture, finished or not, load and compute as in plain SAELens."""

import json
import logging
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig, TopKSAE, TopKSAEConfig, TrainingSAE
from sae_lens.load_model import load_model
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.files.whole_directory import check_manifest
from sae_toolkit.saes.checkpoints import _random_states, _restore_random_states, finished_copy, load_sae
from sae_toolkit.saes.weights import written_directions
from sae_toolkit.settings.training import ARCHITECTURES
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.training.run import create_sae
from support.sae_files import load

ACTS = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
SAELENS_FILES = {"cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}


def test_all_architectures_that_saelens_trains_are_offered():
    assert set(ARCHITECTURES) == set(SAE_TRAINING_CLASS_REGISTRY)


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_leaves_what_saelens_loads(script, tiny_run, architecture, normalization):
    done = script(
        "sae_lens_train.py",
        *tiny_run,
        *("--architecture", architecture, "--k", 8, "--lr", 1e-3, "--n_checkpoints", 1),
        *("--normalize_activations", normalization),
    )
    assert done.status == 0, done.stderr
    final = Path(done.stdout.strip())
    assert {file.name for file in final.iterdir()} == SAELENS_FILES | {"manifest.json", "firing_history.safetensors"}
    assert (final.name, final.parent.parent.name.rsplit("_", 1)[0]) == ("final_2048", "llama_layer12_sae_saelens_500k")

    plain = SAE.load_from_disk(final, device="cpu")
    ours = load_sae(final, "cpu")
    assert torch.equal(plain.encode(ACTS), ours.encode(ACTS))
    metadata = json.loads((final / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["model_class_name"] == "HookedTransformer"  # which has the hooks of TransformerLens's names
    assert metadata["training_architecture"] == architecture
    assert metadata["held_out_fraction"] == 0.1

    # The checkpoint along the way was taken at the same step: unfolded, unfinished, the same SAE.
    unfinished = load_sae(final.parent / "2048", "cpu")
    torch.testing.assert_close(unfinished.encode(ACTS), ours.encode(ACTS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unfinished(ACTS), ours(ACTS), rtol=1e-4, atol=1e-5)


def test_the_model_of_an_sae_at_a_transformers_module_is_loaded_by_saelens(script, tiny_run, tiny_model):
    done = script("sae_lens_train.py", *tiny_run, "--hook_name", "model.layers.1.mlp")
    final = Path(done.stdout.strip())
    metadata = SAE.load_from_disk(final, device="cpu").cfg.metadata
    assert metadata.model_class_name == json.loads((final / "runner_cfg.json").read_text())["model_class_name"]
    model = load_model(
        metadata.model_class_name,
        metadata.model_name,
        "cpu",
        metadata.model_from_pretrained_kwargs,
        hook_names=[metadata.hook_name],
    )
    tokens = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[metadata.hook_name])
        transformers_model = AutoModelForCausalLM.from_pretrained(tiny_model)
        expected: list[torch.Tensor] = []
        transformers_model.model.layers[1].mlp.register_forward_hook(lambda *call: expected.append(call[2]))
        transformers_model(tokens)
    assert torch.equal(cache[metadata.hook_name], expected[0])


@pytest.mark.parametrize(
    ("architecture", "normalization"),
    [
        (architecture, normalization)
        for architecture in ARCHITECTURES
        for normalization in ("none", "expected_average_only_in", "covariance_whitening")
        if (architecture, normalization) != ("matching_pursuit", "covariance_whitening")  # SAELens does not fold it
    ],
)
def test_a_copy_finished_during_training_is_what_saelens_would_save(tmp_path, architecture, normalization):
    trainer = stepped_trainer(architecture, normalization)
    before, cfg_before = deepcopy(trainer.sae.state_dict()), trainer.sae.cfg.to_dict()
    random_state = torch.get_rng_state()
    copied = finished_copy(trainer, None)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.sae.cfg.to_dict() == cfg_before
    for name, tensor in trainer.sae.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride(), name

    scaler, n_steps = trainer.activation_scaler, trainer.n_training_steps
    if hasattr(trainer.sae, "topk_threshold"):
        trainer.sae.topk_threshold /= 1 - 0.99**n_steps
    if scaler.scaling_factor is not None:
        trainer.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if (whitening := scaler.whitening) is not None:
        trainer.sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    trainer.sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path, device="cpu")
    assert copied.cfg.to_dict() == saved.cfg.to_dict()
    assert copied.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in copied.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]) and tensor.is_contiguous(), name
    assert torch.equal(copied(ACTS), saved(ACTS))


def stepped_trainer(architecture, normalization):
    """The trainer of an SAE of 32 dimensions and 256 features, after three steps."""
    settings = {"k": 8} if "topk" in architecture else {}
    if architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [64, 256]
    _, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=32, d_sae=256, normalize_activations=normalization, **settings),
        training_tokens=5000,
        train_batch_size_tokens=50,
        lr=1e-3,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    trainer = Trainer(cfg.to_sae_trainer_config(), create_sae(cfg), iter(()))
    batches = 3 * [ACTS + 0.3]
    if normalization == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(32, iter(batches), 3)
    elif normalization == "covariance_whitening":
        trainer.activation_scaler.estimate_whitening(32, iter(batches), 3)
    for batch in batches:
        trainer.step(batch)
        trainer.n_training_steps += 1
    return trainer


def test_the_saved_sae_takes_raw_activations_in_and_gives_raw_ones_out(script, tiny_run):
    """A training checkpoint's weights are for scaled activations; the finished SAE's are for raw ones."""
    done = script(
        "sae_lens_train.py",
        *tiny_run,
        *("--normalize_activations", "expected_average_in_and_out", "--n_checkpoints", 1),
    )
    assert "expected_average_in_and_out is called expected_average_only_in in SAELens" in done.stderr
    final = Path(done.stdout.strip())
    scale = json.loads((final.parent / "2048" / "activation_scaler.json").read_text())["scaling_factor"]
    assert scale > 1.5
    scaled, raw = (load_file(d / "sae_weights.safetensors") for d in (final.parent / "2048", final))
    torch.testing.assert_close(raw["W_enc"], scaled["W_enc"] * scale)
    torch.testing.assert_close(raw["W_dec"], scaled["W_dec"] / scale)


def test_a_missing_scale_is_said(script, tiny_run, caplog, monkeypatch):
    """The weights of a checkpoint are for scaled activations, and nothing in them says which scale."""
    done = script("sae_lens_train.py", *tiny_run, "--normalize_activations", "expected_average_only_in")
    final = Path(done.stdout.strip())
    monkeypatch.setattr(logging.getLogger("sae_toolkit"), "propagate", True)  # which the script switched off
    load_sae(final, "cpu")
    assert not caplog.records  # a finished SAE needs none
    (final / "manifest.json").unlink()
    cfg = json.loads((final / "cfg.json").read_text())
    (final / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
    load_sae(final, "cpu")
    assert "and activation_scaler.json, which has their scale, is missing" in caplog.text


def test_a_checkpoint_on_the_way_has_k_active_features_for_saelens_and_for_us(script, tiny_run, tmp_path):
    """After two steps SAELens's running mean holds 2% of the threshold, and nearly all features would fire."""
    flags = ("--architecture", "batchtopk", "--k", 8, "--normalize_activations", "expected_average_only_in")
    done = script("sae_lens_train.py", *tiny_run, *flags, "--n_checkpoints", 1)
    final = Path(done.stdout.strip())
    checkpoint = final.parent / "2048"
    (state,) = torch.load(checkpoint / "resume.pt", weights_only=True)["trainers"].values()
    acts_ND = state["sample"]["acts"].float()
    assert len(acts_ND) == 2048
    scale = json.loads((checkpoint / "activation_scaler.json").read_text())["scaling_factor"]
    trained = TrainingSAE.load_from_disk(checkpoint, device="cpu")
    running = state["not_calibrated"]["topk_threshold"].item()  # as SAELens's training has it
    assert running < 0.03 * trained.topk_threshold.item()
    metadata = trained.cfg.metadata
    assert metadata.saelens_topk_threshold == pytest.approx(running / (1 - 0.99**2))
    assert (metadata.calibrated_l0, metadata.calibrated_on_tokens) == (pytest.approx(8, rel=0.01), 2048)
    trained.save_inference_model(tmp_path)
    for sae, normalized_ND in (
        (SAE.load_from_disk(tmp_path, device="cpu"), scale * acts_ND),
        (load_sae(checkpoint, "cpu"), acts_ND),
        (load_sae(final, "cpu"), acts_ND),
    ):
        assert (sae.encode(normalized_ND) > 0).sum(-1).double().mean().item() == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_checkpoints_of_saelens_6_6_4_load(tmp_path, architecture):
    """Its inference form has no `rescale_acts_by_decoder_norm`, and a `threshold` for JumpReLU."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        "W_enc": torch.randn(32, 64, generator=generator),
        "W_dec": 3 * torch.randn(64, 32, generator=generator),
        "b_enc": torch.randn(64, generator=generator),
        "b_dec": torch.randn(32, generator=generator),
    }
    cfg = {
        "d_in": 32,
        "d_sae": 64,
        "dtype": "float32",
        "device": "cuda",  # it was trained on a GPU
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.6.4", "hook_name": "blocks.12.hook_resid_post"},
        "architecture": architecture,
    }
    pre = (ACTS - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = pre.relu()
    if architecture == "topk":
        cfg["k"] = 5
        expected = torch.zeros_like(pre).scatter(1, pre.topk(5).indices, pre.topk(5).values.relu())
    elif architecture == "jumprelu":
        weights["threshold"] = torch.full((64,), 4.0)
        expected = pre * (pre > 4.0)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    save_file(weights, tmp_path / "sae_weights.safetensors")
    torch.testing.assert_close(load_sae(tmp_path, "cpu").encode(ACTS), expected)


def test_damaged_weights_are_refused(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run)
    final = Path(done.stdout.strip())
    weights = final / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged: sae_weights.safetensors is not what was written"):
        load_sae(final, "cpu")
    (final / "manifest.json").unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        load(final)


@pytest.mark.parametrize("name", ["/etc/hostname", "//etc/hostname", "../outside", "inside/../../outside"])
def test_a_manifest_names_no_file_outside_its_directory(tmp_path, name):
    (tmp_path / "outside").write_text("not ours")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "manifest.json").write_text(json.dumps({"files": {name: {}}}))
    with pytest.raises(UserError, match="names a file that is not within it"):
        check_manifest(tmp_path / "sae", "--sae_path sae")


def test_the_random_state_of_a_checkpoint_is_that_of_the_runs_device(monkeypatch):
    states = {"cuda:0": torch.tensor([0]), "cuda:1": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    saved = _random_states("cuda:1")
    drawn = torch.rand(3)
    states["cuda:1"] = torch.tensor([2])
    _restore_random_states(saved, "cuda:1")
    assert (states["cuda:0"].item(), states["cuda:1"].item()) == (0, 1)
    assert torch.equal(torch.rand(3), drawn)
    _restore_random_states(saved, "cpu")  # a run may be resumed where there is no GPU
    assert _random_states("cpu")["cuda"] == []


def test_one_unit_of_activation_writes_its_direction_whatever_the_norm_of_the_decoder_vector():
    for rescales in (True, False):
        sae = TopKSAE(TopKSAEConfig(d_in=8, d_sae=6, k=2, rescale_acts_by_decoder_norm=rescales))
        sae.W_dec.data = torch.randn(6, 8)
        features_FF = torch.eye(6)
        written_FD = sae.decode(features_FF) - sae.decode(torch.zeros(6, 6))
        torch.testing.assert_close(written_directions(sae), written_FD)
