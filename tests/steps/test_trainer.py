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

from sae_toolkit.files.embedded import embedded_wikipedia
from sae_toolkit.steps.selection import largest, largest_of_rows
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE, sparse_class
from sae_toolkit.steps.trainer import Trainer

D_IN, D_SAE, BATCH = 576, 1152, 128
SETTINGS = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "jumprelu": {"l0_coefficient": 1.0},
    "standard": {"l1_coefficient": 1.0},
}


@pytest.fixture(scope="module")
def acts_ND(language_model, tokenizer):
    """5,000 real activations with a mean norm of sqrt(d_in), without those of the first position."""
    text = next(text for text in embedded_wikipedia() if len(text) > 60_000)
    tokens_BT = torch.tensor(tokenizer(text)["input_ids"][: 20 * 256]).reshape(20, 256)
    acts = language_model.activations(tokens_BT)[:, 1:].flatten(0, 1)
    acts = acts[acts.norm(dim=-1) < 10 * acts.norm(dim=-1).median()]
    return acts * (D_IN**0.5 / acts.norm(dim=-1).mean())


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


@pytest.mark.parametrize("architecture", SETTINGS)
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


@pytest.mark.parametrize("values", [torch.randn(1000), torch.randint(0, 5, (1000,)).float(), torch.zeros(1000)])
def test_the_largest_are_found_whatever_is_equal(values):
    for n in (1, 64, 999, 1000):
        found = largest(values, n)
        assert len(found) == n
        assert torch.equal(values[found].sort(descending=True).values, values.topk(n).values)
        assert (found.diff() > 0).all()
    values[3::4] = torch.nan
    for n in (1, 64, 999):  # fewer than there are nan values, and more
        assert len(largest(values, n)) == n
        assert values[largest(values, n)].isnan().sum() == min(n, 250)


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
