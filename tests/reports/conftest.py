"""What a page is made of: a summary and plots of an SAE with random weights, whose shape alone matters here."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates
from sae_toolkit.evaluation.decoder_cosines import measure_cosines
from sae_toolkit.reports.tables import BESIDE
from support.pages import D, F


@pytest.fixture(scope="module")
def sae():
    """A decoder; sparse features [N, F], a fifth of them dead; and token ids of 40 rows of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.randn(F, D, generator=generator)
    thresholds_F = torch.linspace(1.0, 3.5, F)[torch.randperm(F, generator=generator)]
    features_NF = torch.relu(torch.randn(40 * 64, F, generator=generator) - thresholds_F)
    features_NF[:, ::5] = 0
    rows_NT = torch.randint(3, 49_000, (40, 64), generator=generator).numpy().astype(np.uint32)
    return W_dec_FD, features_NF, rows_NT


@pytest.fixture
def summary(sae):
    cosines = asdict(measure_cosines(sae[0], torch.ones(F, dtype=torch.bool), seed=0))
    del cosines["histogram"], cosines["interval"]
    curve = [(1000, 0.5), (3000, 0.3), (52_517, 0.17)]
    dead = DeadFeatureEstimates(52_517, 3 / 52_517, 0.001, 0.15, 0.12, 300_000, curve)
    metrics = dict.fromkeys(BESIDE, 0.5)
    metrics |= {"loss_recovered": 0.9728, "l0": 61.4, "dead_features": 0.17, "decoder_absorption": 0.41}
    metrics |= {"ce_clean": 3.022, "ce_sae": 3.233, "ce_zero": 10.803, "kl_sae": 0.281, "replaced_share": 0.9999}
    metrics |= {"explained_variance": 0.843, "cosine_similarity": 0.96, "l2_ratio": 0.958}
    statuses = {"loss_recovered": "healthy", "l0": "healthy", "dead_features": "unsettled"}
    return {
        "sae_lens_version": "6.54.12",
        "sae": {"name": "demo", "path": "checkpoints/demo", "library": "SAELens", "form": "inference"}
        | {"architecture": "jumprelu", "d_in": D, "d_sae": F},
        "protocol": "health",
        "interval_units": "documents",
        "model": "embedded:smollm2-135m",
        "model_parameters": 134_515_008,
        "hook_name": "blocks.12.hook_resid_post",
        "dataset": "embedded:wikipedia",
        "dataset_config": None,
        "dataset_split": "train",
        "fallback_from": None,
        "held_out": {"fraction": 0.2, "seed": 42},
        "text_may_be_trained_on": False,
        "context_length": 256,
        "positions": {"special_token_ids": [0, 1, 2], "skip_positions": 1, "max_activation_norm": 1418.0},
        "massive_first_position": None,
        "sources": {"hook_name": "record", "exclude_special_tokens": "default", "skip_positions": "flag"},
        "tokens": 52_517,
        "sequences": 206,
        "loss_tokens": 20_058,
        "loss_sequences": 79,
        "metrics": metrics,
        "intervals": {"loss_recovered": [0.969, 0.976], "l0": [60.1, 62.9]},
        "dead_feature_estimates": asdict(dead) | {"training_run": {"dead": 0.1, "dead_here_alive_there": 0.02}},
        "decoder_cosines": cosines,
        "health": statuses | {"decoder_absorption": "unhealthy", "healthy": 2, "of": 4},
    }


@pytest.fixture
def plots(sae, summary):
    checkpoints = [{"tokens": n, "metrics": summary["metrics"]} for n in (200_000, 100_000)]
    return {
        "log10_firing_rate": ([-6.0, -4.0, -2.0, 0.0], [0, 40, 200]),
        "never_fired": 60,
        "l0": ([-0.5, 39.5, 79.5], [100, 52_417]),
        "decoder_cosine": measure_cosines(sae[0], torch.ones(F, dtype=torch.bool), seed=0).histogram,
        "checkpoints": checkpoints,
    }
