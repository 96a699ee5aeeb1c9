"""A finished SAE has the L0 that was asked for, and does what training said of it."""

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class

from sae_toolkit.distributed.ranks import ALONE
from sae_toolkit.saes.checkpoints import finished_copy
from sae_toolkit.steps import activation_sample
from sae_toolkit.steps.activation_sample import ActivationSample
from sae_toolkit.steps.calibration import _find_cut
from sae_toolkit.steps.sparse_topk import sparse_class
from sae_toolkit.steps.trainer import Trainer

BATCH, K, N_STEPS = 512, 16, 250


@pytest.fixture
def acts_ND(real_acts_ND):
    return real_acts_ND


def new_trainer(architecture, d_in, dtype="float32", **settings):
    sae_class, config_class = get_sae_training_class(architecture)
    if architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [64, 288]
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(
            **{"d_in": d_in, "d_sae": 288, "k": K, "dtype": dtype, **settings},
            normalize_activations="expected_average_only_in",
        ),
        training_tokens=N_STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        lr=2e-3,
        lr_warm_up_steps=10,
        lr_decay_steps=100,
        dead_feature_window=10,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(0)
    sae = sparse_class(sae_class, cfg.sae)(TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()).cfg)
    return Trainer(cfg.to_sae_trainer_config(), sae, iter(()))


def measured(sae, acts_ND):
    """L0, and the explained variance as SAELens's training reads it."""
    with torch.no_grad():
        features_NF = sae.encode(acts_ND)
        squared_N = (sae.decode(features_NF) - acts_ND).square().sum(-1)
    variance_N = (acts_ND - acts_ND.mean(0)).square().sum(-1)
    return (features_NF > 0).sum(-1).double().mean().item(), (1 - squared_N.mean() / variance_N.mean()).item()


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_finished_sae_does_on_a_batch_what_training_says_of_it(acts_ND, architecture):
    """Also after 20 steps, where SAELens's threshold is the mean of thresholds that no longer fit the weights.

    Training goes over the same activations again and again, and the batch is all of them, because L0 differs much
    between few tokens.
    """
    trainer = new_trainer(architecture, acts_ND.shape[1])
    trainer.activation_scaler.estimate_scaling_factor(acts_ND.shape[1], iter([acts_ND]), 1)
    generator = torch.Generator().manual_seed(0)
    l0_by_saelens = {}
    order = torch.cat([torch.randperm(len(acts_ND), generator=generator) for _ in range(N_STEPS // 7)])
    for step in range(N_STEPS + 1):
        batch = acts_ND[order[step * BATCH :][:BATCH]]
        finished = None
        if step in (20, 100, N_STEPS):
            batch = acts_ND
            finished = finished_copy(trainer, trainer.calibrate())
            l0_by_saelens[step] = measured(finished_copy(trainer, None), batch)[0]
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        if finished is not None:
            said = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            l0, explained_variance = measured(finished, batch)
            assert l0 == pytest.approx(said["metrics/l0"], rel=0.02), step
            assert explained_variance == pytest.approx(said["metrics/explained_variance"], abs=0.01), step
    assert l0_by_saelens[20] > 1.5 * K


def test_the_sample_is_all_that_there_was_and_later_as_much_of_each_part_of_the_run(monkeypatch):
    monkeypatch.setattr(activation_sample, "CAPACITY", 2000)
    random_state = torch.get_rng_state()
    sample = ActivationSample("cpu")
    for step in range(4):
        sample.add(torch.full((500, 3), float(step)), step)
    assert len(sample) == 2000
    for step in range(4, 40):
        sample.add(torch.full((500, 3), float(step)), step)
    assert torch.equal(torch.get_rng_state(), random_state)
    counts = sample.acts_ND[:, 0].long().bincount(minlength=40).double()
    assert counts.sum() == 2000
    assert ((counts - 50).square() / 50).sum() < 75  # chi-squared with 39 degrees of freedom: p = 0.0005


def test_a_sample_goes_on_from_its_state(monkeypatch):
    monkeypatch.setattr(activation_sample, "CAPACITY", 100)
    acts_ND = torch.arange(1000.0)[:, None]
    whole, begun, resumed = (ActivationSample("cpu") for _ in range(3))
    for step in range(10):
        whole.add(acts_ND[100 * step :][:100], step)
        if step < 5:
            begun.add(acts_ND[100 * step :][:100], step)
            state = begun.state_dict()
        else:
            resumed.load_state_dict(state)
            resumed.add(acts_ND[100 * step :][:100], step)
            state = resumed.state_dict()
    assert torch.equal(whole.acts_ND, resumed.acts_ND)


def test_held_out_activations_take_the_place_of_those_that_were_trained_on(acts_ND):
    """They stay whatever is trained on, and are no part of a checkpoint. A reading calibrates on the first of them."""
    trainer = new_trainer("batchtopk", acts_ND.shape[1])
    trained_ND, held_out_ND = acts_ND.split([2 * BATCH, len(acts_ND) - 2 * BATCH])
    trainer.step(trained_ND[:BATCH])
    trainer.n_training_steps += 1
    before = trainer.calibrate()
    held_out_ND[:, 0] += 3000  # a dimension as some models have: in bfloat16 its differences would be gone
    trainer.sample.hold(held_out_ND)
    trainer.step(trained_ND[BATCH:])
    trainer.n_training_steps += 1
    for n in (None, 300):
        calibration = trainer.calibrate(n)
        assert (before.text, calibration.text) == ("training", "held-out")
        assert calibration.n_tokens == (n or len(held_out_ND))
        l0, _ = measured(finished_copy(trainer, calibration), held_out_ND[:n])
        assert l0 == pytest.approx(K, rel=1e-3)
    assert trainer.sample.state_dict()["acts"] is None


def test_the_cut_is_right_if_one_chunk_holds_nearly_all_active_features():
    """So that the first guess of how many scores of a chunk matter is far too low there."""
    generator = torch.Generator().manual_seed(0)
    scores_CN = torch.randn(8, 4000, generator=generator)
    scores_CN[3] += 10
    for n_active in (10, 3000, 5000, 31999):
        cut, n_above, n_before = _find_cut(lambda: iter(scores_CN), n_active, 0.02, 1.0, -torch.inf, ALONE)
        assert n_above == n_active == int((scores_CN > cut).sum())
        assert n_before == int((scores_CN > 1.0).sum())
    assert _find_cut(lambda: iter(scores_CN), 32000, 0.02, 1.0, -torch.inf, ALONE)[0] == -torch.inf
    for n_active in (25_000, 32_000):  # about 18,000 are above 0
        cut, n_above, _ = _find_cut(lambda: iter(scores_CN), n_active, 0.02, 1.0, 0.0, ALONE)
        assert (cut, n_above) == (0, int((scores_CN > 0).sum()))


def test_where_too_few_features_are_positive_the_record_says_what_l0_there_is(acts_ND):
    trainer = new_trainer("batchtopk", acts_ND.shape[1], k=200)
    trainer.activation_scaler.estimate_scaling_factor(acts_ND.shape[1], iter([acts_ND]), 1)
    trainer.sample.add(acts_ND, 0)
    calibration = trainer.calibrate()
    l0, _ = measured(finished_copy(trainer, calibration), acts_ND)
    assert l0 < 190
    assert calibration.l0 == pytest.approx(l0, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", [{"rescale_acts_by_decoder_norm": False}, {"apply_b_dec_to_input": False}, {}])
def test_the_l0_over_the_sample_is_k(acts_ND, dtype, settings):
    """An activation that is not finite does not matter: the step that it spoils is not applied."""
    trainer = new_trainer("batchtopk", acts_ND.shape[1], dtype, **settings)
    trainer.activation_scaler.scaling_factor = 0.3
    for batch in acts_ND[: 2 * BATCH].split(BATCH):
        trainer.step(batch.clone())
        trainer.n_training_steps += 1
    spoilt = acts_ND[:BATCH].clone()
    spoilt[5, 5] = torch.inf
    trainer.step(spoilt)
    calibration = trainer.calibrate()
    assert calibration.n_tokens == 3 * BATCH - 1
    assert calibration.l0 == pytest.approx(K, rel=1e-3)  # not equal, since each activation is there twice
    finished = finished_copy(trainer, calibration)
    sample_ND = trainer.sample.acts_ND[: 2 * BATCH]
    sample_ND = torch.cat((sample_ND, sample_ND[:BATCH][[i for i in range(BATCH) if i != 5]]))
    assert measured(finished, sample_ND.to(finished.dtype))[0] == pytest.approx(K, rel=1e-3)
    # SAELens's threshold is recorded in the units of the finished SAE's own.
    saelens = finished_copy(trainer, None).threshold.mean().item()
    assert finished.cfg.metadata.saelens_topk_threshold == pytest.approx(saelens)
