"""Under SAEBench's protocol our numbers equal those of sae-bench, on the same SAE, rows and dtype."""

import json
import sys
from pathlib import Path

import pytest

from support.processes import run_process

# All metrics of core.
AGREE = {
    "model_performance_preservation": (
        *("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    ),
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "reconstruction_quality": ("cossim", "mse", "explained_variance", "explained_variance_legacy"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "misc_metrics": (
        *("average_max_decoder_cosine_sim", "average_max_encoder_cosine_sim"),
        *("frac_alive", "freq_over_1_percent", "freq_over_10_percent"),
        *("normalized_freq_over_1_percent", "normalized_freq_over_10_percent"),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["batchtopk", "standard"])
def test_core_agrees_with_sae_bench_to_three_digits(tmp_path, architecture):
    trained = run_process(
        *(sys.executable, "sae_lens_train.py", "@presets/demo.args", "--checkpoint_path", tmp_path),
        *("--architecture", architecture, "--l1_coefficient", 1, "--wandb_mode", "disabled"),
        *("--training_tokens", 24 * 1024, "--lr_decay_steps", 4),
    )
    assert trained.status == 0, trained.stderr
    sae_path = Path(trained.stdout.strip())
    evaluated = run_process(
        *(sys.executable, "evaluate_sae_real_activations.py", "--sae_path", sae_path, "--lm_dtype", "float32"),
        *("--protocol", "saebench", "--saebench", "core"),
        *("--num_samples", 12, "--context_length", 128, "--batch_size", 4, "--n_features", 0),
        timeout=1800,
    )
    assert evaluated.status == 0, evaluated.stderr
    assert "both passes read the 12 rows given, in their order" in evaluated.stderr
    result = json.loads((sae_path / "evaluation.json").read_text())
    ours, theirs = result["saebench_core"], result["saebench"]["core"]
    for category, names in AGREE.items():
        assert {n: ours[category][n] for n in names} == pytest.approx({n: theirs[category][n] for n in names}, rel=1e-3)
    assert ours["token_stats"] == theirs["token_stats"]
