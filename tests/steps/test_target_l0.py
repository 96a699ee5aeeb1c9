"""Training finds the sparsity weight for a wanted L0, whatever weight it starts from."""

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class

from sae_toolkit.saes.checkpoints import finished_copy
from sae_toolkit.steps.target_l0 import JUMPRELU
from sae_toolkit.steps.trainer import Trainer

BATCH, N_STEPS = 128, 500


@pytest.fixture
def acts_ND(scaled_acts_ND):
    return scaled_acts_ND


def unexplained(sae, acts_ND):
    """Share of the variance that the SAE does not explain."""
    with torch.no_grad():
        return ((acts_ND - sae(acts_ND)).square().sum() / (acts_ND - acts_ND.mean(0)).square().sum()).item()


@pytest.mark.parametrize(
    ("architecture", "settings", "target"),
    [
        ("standard", {"l1_coefficient": 0.2}, 40),
        ("standard", {"l1_coefficient": 20.0}, 40),
        ("gated", {"l1_coefficient": 5.0}, 80),
        ("jumprelu", {"l0_coefficient": 1.0, **JUMPRELU}, 40),
    ],
)
def test_the_running_l0_comes_to_within_a_tenth_of_the_target(acts_ND, architecture, settings, target):
    sae_class, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=acts_ND.shape[1], d_sae=576, **settings),
        training_tokens=N_STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        lr=2e-3,
        lr_warm_up_steps=20,
        lr_decay_steps=80,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(0)
    sae = sae_class(TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()).cfg)
    trainer = Trainer(cfg.to_sae_trainer_config(), sae, iter(()), target_l0=target)
    generator = torch.Generator().manual_seed(0)
    last = []
    for _ in range(N_STEPS):
        output = trainer.step(acts_ND[torch.randint(len(acts_ND), (BATCH,), generator=generator)])
        trainer.n_training_steps += 1
        last = [*last[-19:], float((output.feature_acts != 0).sum(-1).double().mean())]
    assert sum(last) / len(last) == pytest.approx(target, rel=0.1)
    assert trainer.l0_control.is_near

    # The finished SAE has the target, and explains as much.
    calibration = trainer.calibrate()
    assert calibration.l0 == pytest.approx(target, rel=1e-4)
    finished, not_calibrated = (finished_copy(trainer, each) for each in (calibration, None))
    l0 = (finished.encode(acts_ND) > 0).sum(-1).double().mean().item()
    assert l0 == pytest.approx(target, rel=0.02)
    assert unexplained(finished, acts_ND) <= unexplained(not_calibrated, acts_ND) + 0.003
    ((name, weight),) = trainer.found_weight.items()
    reading = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    assert reading[f"details/{name}"] == pytest.approx(weight, rel=0.2)  # the current weight is near the found one
