"""A training step on the device is the CPU's: losses, gradients and counters, and it does not wait for the device."""

import copy
import math

import numpy as np
import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.steps.finetune_loss import PredictionLoss
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.training.run import create_sae

D_IN, D_SAE, K, BATCH = 256, 1024, 4, 256
N_STEPS = 12
ARCHITECTURES = ("topk", "batchtopk")
# Values of dead_feature_window. With the last, more features are dead than the auxiliary loss takes.
WINDOWS = {"none dead": 1000, "some dead": 6, "many dead": 1}


def configuration(device, architecture, dtype="float32", window=1000, d_in=D_IN, d_sae=D_SAE, k=K):
    _, config_class = get_sae_training_class(architecture)
    return LanguageModelSAERunnerConfig(
        sae=config_class(d_in=d_in, d_sae=d_sae, k=k, dtype=dtype, device=device),
        training_tokens=1000 * BATCH,
        train_batch_size_tokens=BATCH,
        device=device,
        dtype=dtype,
        lr=3e-3,
        dead_feature_window=window,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def equal_saes(device, architecture, dtype="float32", **more):
    """An SAE on the CPU, and the same on the device. A generator draws other numbers on each."""
    saes = [create_sae(configuration(place, architecture, dtype, **more)) for place in ("cpu", device)]
    saes[1].load_state_dict(saes[0].state_dict())
    assert all(isinstance(sae, SparseTopKTrainingSAE) for sae in saes)
    return saes


def activations(sae, n_tokens, n_features=K, seed=0):
    """Sums of a few of the SAE's own directions, so that rounding does not decide which features are active."""
    generator = torch.Generator().manual_seed(seed)
    directions_FD = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    chosen_BK = torch.rand(n_tokens, len(directions_FD), generator=generator).topk(n_features).indices
    sizes_BK = 2.5 + torch.rand(n_tokens, n_features, generator=generator)
    return torch.einsum("bk,bkd->bd", sizes_BK.to(directions_FD), directions_FD[chosen_BK])


def gradients(sae, acts_BD, n_dead):
    """The loss and the gradients of a step, on the CPU."""
    dead_F = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=acts_BD.device)
    dead_F[:n_dead] = True
    inputs = TrainStepInput(acts_BD, {}, dead_F if n_dead else None, 0, is_logging_step=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as the trainer does on a CUDA device
    try:
        loss = sae.training_forward_pass(inputs).loss
        loss.backward()
    finally:
        torch.set_float32_matmul_precision(before)
    return loss.item(), {name: weight.grad.cpu() for name, weight in sae.named_parameters()}


@pytest.mark.parametrize("n_dead", [0, 100, 500])  # 500 are more than the auxiliary loss takes
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_float32_are_the_cpus(device, architecture, n_dead):
    compare_gradients(device, equal_saes(device, architecture), K, n_dead)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_at_the_width_of_llama_are_the_cpus(cuda, architecture):
    saes = equal_saes(cuda, architecture, d_in=4096, d_sae=32_768, k=16)
    compare_gradients(cuda, saes, 16, n_dead=3000)


def compare_gradients(device, saes, n_features, n_dead):
    acts_BD = activations(saes[0], BATCH, n_features)
    (their_loss, theirs), (our_loss, ours) = (
        gradients(sae, acts_BD.to(place), n_dead) for sae, place in zip(saes, ("cpu", device), strict=True)
    )
    assert our_loss == pytest.approx(their_loss, rel=1e-3)
    assert theirs.keys() == ours.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() < 0.03 * grad.norm(), name


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_in_float64_are_the_cpus(device, architecture, window):
    theirs, ours = trainers(device, architecture, "float64", window)
    their_losses, our_losses = (losses(trainer, N_STEPS) for trainer in (theirs, ours))
    assert their_losses[-1, 1] < 0.9 * their_losses[0, 1]  # the steps change the SAE
    assert (their_losses[:, 2] > 0).any() == (window < 1000)
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-8)
    for name, weight in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name].cpu(), weight, rtol=1e-5, atol=1e-8)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_in_float32_keep_to_the_cpus_losses(device, architecture):
    theirs, ours = trainers(device, architecture, "float32", window=6)
    their_losses, our_losses = (losses(trainer, N_STEPS) for trainer in (theirs, ours))
    assert their_losses[-1, 1] < 0.9 * their_losses[0, 1]
    np.testing.assert_allclose(our_losses, their_losses, rtol=2e-3)


def trainers(device, architecture, dtype, window):
    saes = equal_saes(device, architecture, dtype, window=window)
    cfgs = (configuration(place, architecture, dtype, window) for place in ("cpu", device))
    return [Trainer(cfg.to_sae_trainer_config(), sae, iter(())) for cfg, sae in zip(cfgs, saes, strict=True)]


def losses(trainer, n_steps):
    """The losses of each step, [n_steps, 3]."""
    drawn_from = create_sae(configuration("cpu", "topk", str(trainer.sae.W_dec.dtype)[6:]))
    curve = []
    for step in range(n_steps):
        output = trainer.step(activations(drawn_from, BATCH, seed=step))
        trainer.n_training_steps += 1
        curve.append([float(loss.detach()) for loss in (output.loss, *output.losses.values())])
    return np.array(curve)


@pytest.mark.parametrize("n_dead", [0, D_SAE // 10])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_steady_step_does_not_wait_for_the_device(cuda, architecture, n_dead):
    trainer = trainers(cuda, architecture, "float32", window=1000)[1]
    batch = activations(create_sae(configuration("cpu", architecture)), BATCH).to(cuda)

    def step():
        trainer.n_forward_passes_since_fired[:n_dead] = 10**6
        trainer.step(batch)
        trainer.n_training_steps += 1

    for _ in range(6):  # the number of dead features is read four steps after it was counted
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchron"):
            batch.sum().item()
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_is_not_finite_is_not_applied(device):
    trainer = trainers(device, "batchtopk", "float32", window=5)[1]
    losses(trainer, 3)
    before = copy.deepcopy(trainer.sae.state_dict())
    spoilt = activations(create_sae(configuration("cpu", "topk")), BATCH)
    spoilt[7, 7] = math.inf
    trainer.step(spoilt)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.sae.state_dict().items())
    assert trainer.n_not_finite == 1
    assert np.isfinite(losses(trainer, 3)).all()


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_a_step_on_the_models_own_predictions_is_the_cpus(device, small_model, kind):
    """The SAE and the language model are on the device; rows of tokens are not."""
    rows_RT = np.random.default_rng(0).integers(3, 200, (5, 32))
    found = []
    for place, sae in zip(("cpu", device), equal_saes(device, "topk", d_in=64, d_sae=512), strict=True):
        model = load_language_model(find_model(str(small_model)), ["blocks.1.hook_resid_post"], place, torch.float32)
        loss = PredictionLoss(model, kind, PositionFilter(skip_positions=1), rows_at_once=2)
        cfg = configuration(place, "topk", d_in=64, d_sae=512).to_sae_trainer_config()
        trainer = Trainer(cfg, sae, iter(()))
        acts_ND = loss.read(rows_RT, loss.positions.keeps_tokens(rows_RT))
        value, gradient = loss.gradient(0.9 * acts_ND)
        output = trainer.step(acts_ND, loss)
        assert {acts_ND.device.type, trainer.finetune_weight.device.type} == {torch.device(place).type}
        found.append((value.cpu(), gradient.cpu(), output.losses[f"{kind}_loss"].cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())
