"""Our step is SAELens's: the same losses and weights on the same batches, in less time and without waiting."""

import copy
import json

import numpy as np
import psutil
import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file

from sae_toolkit.steps import delayed_counts, fused_adam
from sae_toolkit.steps.active_features import ActiveFeatures
from sae_toolkit.steps.selection import largest, largest_by_blocks, largest_of_rows
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE, bfloat16_linear, sparse_class
from sae_toolkit.steps.trainer import Trainer

D_IN, D_SAE, BATCH = 576, 1152, 128
SETTINGS = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "jumprelu": {"l0_coefficient": 1.0},
    "standard": {"l1_coefficient": 1.0},
}


@pytest.fixture
def acts_ND(scaled_acts_ND):
    return scaled_acts_ND


def trainers(architecture, dtype, dead_feature_window, **more):
    """SAELens's trainer and ours, on equal SAEs."""
    sae_class, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=D_IN, d_sae=D_SAE, dtype=str(dtype)[6:], **SETTINGS[architecture], **more),
        training_tokens=1000 * BATCH,
        train_batch_size_tokens=BATCH,
        lr=4e-4,
        lr_warm_up_steps=10,
        dead_feature_window=dead_feature_window,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(0)
    theirs = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    ours = sparse_class(sae_class, theirs.cfg)(copy.deepcopy(theirs.cfg))
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, SparseTopKTrainingSAE) == (architecture in ("topk", "batchtopk"))
    nothing = iter(())
    return SAETrainer(cfg.to_sae_trainer_config(), theirs, nothing), Trainer(cfg.to_sae_trainer_config(), ours, nothing)


def losses(trainer, acts_ND, n_steps):
    """The losses of each step, [n_steps, 1 or more]."""
    generator = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(n_steps):
        output = trainer.step(acts_ND[torch.randint(len(acts_ND), (BATCH,), generator=generator)])
        trainer.n_training_steps += 1
        curve.append([output.loss.item(), *(float(loss) for loss in output.losses.values())])
    return np.array(curve)


@pytest.mark.parametrize(
    ("architecture", "dead_feature_window", "rescale"),
    [("topk", 1, True), ("topk", 6, False), ("batchtopk", 1, False), ("batchtopk", 6, True), ("batchtopk", 1000, True)],
)
def test_twenty_steps_in_float64_are_saelens_own(acts_ND, architecture, dead_feature_window, rescale):
    """With a window of 1 step more features are dead than the auxiliary loss takes, with 6 some, with 1,000 none."""
    settings = {"rescale_acts_by_decoder_norm": rescale}
    theirs, ours = trainers(architecture, torch.float64, dead_feature_window, **settings)
    their_curve, our_curve = (losses(t, acts_ND.double(), 20) for t in (theirs, ours))
    np.testing.assert_allclose(our_curve, their_curve, rtol=1e-9)
    assert (their_curve[:, 2] > 0).any() == (dead_feature_window < 1000)
    for name, weight in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[name], weight, rtol=1e-7, atol=1e-10)
    for name in ("act_freq_scores", "n_forward_passes_since_fired", "n_frac_active_samples", "n_training_samples"):
        assert torch.equal(torch.as_tensor(getattr(theirs, name)), torch.as_tensor(getattr(ours, name)))


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.parity] * (name != "batchtopk")) for name in SETTINGS]
)
def test_two_hundred_steps_in_float32_keep_to_saelens_curve(acts_ND, architecture):
    """No feature is dead: with the loss of dead features, rounding the weights changes SAELens's own curve more."""
    theirs, ours = trainers(architecture, torch.float32, dead_feature_window=1000)
    their_curve, our_curve = (losses(t, acts_ND, 200)[:, 0] for t in (theirs, ours))
    assert their_curve[-1] != pytest.approx(their_curve[0], rel=0.02)
    np.testing.assert_allclose(our_curve, their_curve, rtol=1e-3)


def test_a_step_that_is_not_finite_is_not_applied(acts_ND):
    _, trainer = trainers("batchtopk", torch.float32, dead_feature_window=5)
    losses(trainer, acts_ND, 3)
    before = {name: weight.clone() for name, weight in trainer.sae.state_dict().items()}
    spoilt = acts_ND[:BATCH].clone()
    spoilt[7, 7] = torch.inf
    trainer.step(spoilt)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.sae.state_dict().items())
    assert trainer.n_not_finite == 1
    assert np.isfinite(losses(trainer, acts_ND, 3)).all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_step_that_runs_out_of_memory_is_tried_again_from_where_it_was(acts_ND, monkeypatch, error):
    """The memory runs out in the backward pass, after BatchTopK has moved its threshold."""
    undisturbed, trainer = (trainers("batchtopk", torch.float32, dead_feature_window=2)[1] for _ in range(2))
    wanted, compute, failed = losses(undisturbed, acts_ND, 4), ActiveFeatures.gradients, []

    def gradients(self, *tensors):
        if len(failed) < 1 and trainer.n_training_steps == 2:
            failed.append(error)
            raise error
        return compute(self, *tensors)

    monkeypatch.setattr(ActiveFeatures, "gradients", gradients)
    np.testing.assert_array_equal(losses(trainer, acts_ND, 4), wanted)
    assert failed
    for name, tensor in undisturbed.sae.state_dict().items():
        assert torch.equal(trainer.sae.state_dict()[name], tensor)


def test_clipping_inside_adam_is_clipping_before_it(acts_ND, monkeypatch):
    """On a CUDA device the fused Adam clips; that of the CPU can do so too."""
    before, inside = (trainers("topk", torch.float32, dead_feature_window=5)[1] for _ in range(2))
    monkeypatch.setattr(fused_adam, "_clips_in_kernel", lambda optimizer: optimizer is inside.optimizer)
    np.testing.assert_allclose(losses(inside, acts_ND, 10), losses(before, acts_ND, 10), rtol=1e-5)
    assert not hasattr(before.optimizer, "grad_scale")
    assert inside.optimizer.grad_scale > 1
    for name, weight in before.sae.named_parameters():
        torch.testing.assert_close(dict(inside.sae.named_parameters())[name], weight, rtol=1e-3, atol=1e-5)


def test_a_product_in_bfloat16_is_that_of_rounded_inputs_summed_in_float32(acts_ND):
    x, W, b, scale = acts_ND[:64], torch.randn(200, D_IN), torch.randn(200), torch.rand(200) + 0.5
    wanted = x.bfloat16().double() @ (W * scale[:, None]).bfloat16().double().t() + (b * scale).double()
    found = bfloat16_linear(x, W, b, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    exact = ((x @ W.t() + b) * scale - found).std() / found.std()
    assert 1e-4 < exact < 1e-2  # 8 bits of each input


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_an_encoder_in_bfloat16_trains_as_well(acts_ND, monkeypatch, architecture):
    """As on a CUDA device. Sums stay in float32, so only the choice of features near the border differs."""
    exact, rounded = (trainers(architecture, torch.float32, dead_feature_window=1000)[1] for _ in range(2))
    curve = losses(exact, acts_ND, 60)[:, 0]
    monkeypatch.setattr(type(rounded), "_encodes_in_bfloat16", property(lambda self: True))
    np.testing.assert_allclose(losses(rounded, acts_ND, 60)[:, 0], curve, rtol=2e-3)


def test_memory_does_not_grow_with_each_number_of_dead_features(acts_ND):
    """oneDNN keeps in memory what it prepared for each size of a product in bfloat16."""
    _, trainer = trainers("topk", torch.float32, dead_feature_window=5)
    trainer.products_in_bfloat16 = True
    held = []
    for n_dead in range(1, D_SAE, 8):
        trainer.n_forward_passes_since_fired[:] = 0
        trainer.n_forward_passes_since_fired[:n_dead] = 9
        trainer.step(acts_ND[:BATCH])
        held.append(psutil.Process().memory_info().rss)
    assert held[-1] - held[10] < 100 * 2**20


class ReadAtOnce:
    """A reading of the device whose numbers are there already. On a CPU there is nothing to wait for."""

    def __init__(self, numbers):
        self.numbers = numbers.tolist()

    def values(self):
        return self.numbers


def test_a_resumed_trainer_bounds_the_dead_features_as_if_undisturbed(acts_ND, tmp_path, monkeypatch):
    """On a CUDA device, where the bounds set the shapes of products and so their rounding. Here on a CPU: tests/gpu
    compares resumed runs bit for bit."""
    monkeypatch.setattr(delayed_counts, "_Reading", ReadAtOnce)
    monkeypatch.setattr(Trainer, "_is_on_cuda", True)
    (_, undisturbed), (_, resumed) = (trainers("topk", torch.float32, 5) for _ in range(2))
    losses(undisturbed, acts_ND, 7)
    undisturbed.save_checkpoint("checkpoint", base_path=tmp_path)
    state = undisturbed.state_beside_saelens()
    resumed.load_checkpoint(tmp_path / "checkpoint")
    resumed.load_state_beside_saelens(state)
    bounds = []
    for each in (undisturbed, resumed):
        of_steps = []
        for _ in range(6):
            losses(each, acts_ND, 1)
            of_steps.append(each.sae.dead_bound)
        bounds.append(of_steps)
    assert bounds[0] == bounds[1]
    assert None not in bounds[0] and len(set(bounds[0])) > 1


def test_steps_change_nothing_that_saelens_saves(acts_ND, tmp_path):
    """Checkpoint files hold the same names, shapes and types as SAELens's own."""
    theirs, ours = trainers("topk", torch.float32, dead_feature_window=5)
    for name, trainer in (("theirs", theirs), ("ours", ours)):
        losses(trainer, acts_ND, 2)
        trainer.save_checkpoint(name, base_path=tmp_path)
        trainer.sae.save_inference_model(tmp_path / f"{name}_finished")
    for pattern in ("{}/cfg.json", "{}_finished/cfg.json"):
        mine, wanted = (json.loads((tmp_path / pattern.format(name)).read_text()) for name in ("ours", "theirs"))
        assert mine == wanted
    for pattern in ("{}/sae_weights.safetensors", "{}_finished/sae_weights.safetensors"):
        mine, wanted = (load_file(tmp_path / pattern.format(name)) for name in ("ours", "theirs"))
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    resumed = trainers("topk", torch.float32, dead_feature_window=5)[1]
    resumed.load_trainer_state(tmp_path / "theirs")  # a checkpoint of SAELens's own trainer
    resumed.sae.load_weights_from_checkpoint(tmp_path / "theirs")
    np.testing.assert_allclose(losses(resumed, acts_ND, 3), losses(theirs, acts_ND, 3), rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "d_in", "d_sae", "k", "is_sparse"),
    [
        ("cpu", 576, 4608, 576, True),
        ("cpu", 576, 4608, 577, False),
        ("cuda", 4096, 32768, 64, True),
        ("cuda", 4096, 32768, 512, False),
        ("cuda", 576, 2304, 64, True),
    ],
)
def test_the_sparse_step_is_used_where_active_features_are_few(device, d_in, d_sae, k, is_sparse):
    sae_class, config_class = get_sae_training_class("batchtopk")
    chosen = sparse_class(sae_class, config_class(d_in=d_in, d_sae=d_sae, k=k, device=device))
    assert issubclass(chosen, SparseTopKTrainingSAE) == is_sparse


@pytest.mark.parametrize("find", [largest, largest_by_blocks])  # on a CPU, and on a CUDA device
@pytest.mark.parametrize("values", [torch.randn(1000), torch.randint(0, 5, (1000,)).float(), torch.zeros(1000)])
def test_the_largest_are_found_whatever_is_equal(values, find):
    values = values.clone()
    for n in (1, 62, 64, 999, 1000):
        found = find(values, n)
        assert len(found) == n
        assert torch.equal(values[found].sort(descending=True).values, values.topk(n).values)
        assert (found.diff() > 0).all()
    values[3::4] = torch.nan
    for n in (1, 62, 999):  # fewer than there are nan values, and more
        assert len(find(values, n)) == n
        assert values[find(values, n)].isnan().sum() == min(n, 250)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_by_blocks_are_those_of_topk(seed):
    values = torch.randn(64 * 4096, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(largest_by_blocks(values, 64 * 64), values.topk(64 * 64).indices.sort().values)


@pytest.mark.parametrize("n_features", [4096, 4097, 200])  # the first in blocks, the others not
@pytest.mark.parametrize("equal", [False, True])
def test_the_largest_of_a_row_are_those_that_topk_finds(n_features, equal):
    values_BF = torch.randn(50, n_features)
    if equal:
        values_BF = values_BF.round()
    values_BF[3, :70] = torch.nan
    values_BF[4] = -torch.inf
    values_BK, features_BK = largest_of_rows(values_BF, 64)
    assert torch.equal(values_BF.gather(1, features_BK).nan_to_num(99.0), values_BK.nan_to_num(99.0))
    assert all(len(set(row.tolist())) == 64 for row in features_BK)
    wanted_BK = values_BF.topk(64).values
    assert torch.equal(values_BK.sort(descending=True).values.nan_to_num(99.0), wanted_BK.nan_to_num(99.0))
