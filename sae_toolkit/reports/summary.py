"""The content of evaluation.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sae_lens import __version__ as sae_lens_version

from sae_toolkit.evaluation.health import judge
from sae_toolkit.evaluation.measurement import Evaluation
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.saes.checkpoints import load_log_sparsity


def without_nan(values: Any) -> Any:
    """Returns values as JSON stores them, with None for NaN and infinity."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def summarize(prepared: PreparedEvaluation, evaluated: EvaluatedSAE, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the content of evaluation.json: the numbers, and everything that they depend on."""
    cosines = asdict(evaluation.cosines)
    del cosines["histogram"], cosines["interval"]
    massive = evaluation.massive_first_position
    summary = {
        "sae_lens_version": sae_lens_version,
        "sae": {
            "name": evaluated.file.name,
            "path": str(evaluated.file.path),
            "library": evaluated.file.library,
            "form": evaluated.file.form,
            "architecture": evaluated.sae.cfg.architecture(),
            "d_in": evaluated.sae.cfg.d_in,
            "d_sae": evaluated.sae.cfg.d_sae,
            "parameters": sum(weights.numel() for weights in evaluated.sae.parameters()),
        },
        "protocol": prepared.protocol,
        "model": prepared.model.name,
        "model_parameters": prepared.model.n_parameters,
        "hook_name": prepared.hook_name,
        "dataset": prepared.text.name,
        "dataset_config": prepared.text.config,
        "dataset_split": prepared.text.split,
        "text": prepared.text.described(),
        "fallback_from": prepared.text.fallback_from,
        "held_out": prepared.held_out and asdict(prepared.held_out),
        "text_may_be_trained_on": evaluated.is_text_seen,
        "context_length": prepared.context.context_size,
        "positions": asdict(evaluated.positions) if prepared.protocol == "health" else None,
        "sources": dict(evaluated.sources),
        "massive_first_position": massive
        and asdict(massive) | {"ratio": massive.norm / massive.norm_of_others, "flag": "--skip_positions 1"},
        "tokens": evaluation.tokens,
        "sequences": evaluation.sequences,
        "loss_tokens": evaluation.loss_tokens,
        "loss_sequences": evaluation.loss_sequences,
        "metrics": evaluation.metrics,
        "intervals": evaluation.intervals,
        "interval_units": prepared.units,
        "dead_feature_estimates": asdict(evaluation.dead) | {"training_run": _training_run(evaluated, evaluation)},
        "decoder_cosines": cosines,
        "health": judge(
            evaluation.metrics,
            evaluation.intervals,
            evaluation.dead,
            loss_sequences=evaluation.loss_sequences,
            sequences=evaluation.sequences,
        ),
    }
    if evaluation.saebench_core is not None:
        summary["saebench_core"] = evaluation.saebench_core
    return without_nan(summary)


def _training_run(evaluated: EvaluatedSAE, evaluation: Evaluation) -> dict[str, float] | None:
    """Returns the dead features that the training run counted in its last window, as shares of all features.

    Returns:
        `dead`, the share that never fired in that window; and `dead_here_alive_there`, the share that fired in that
        window and not in the evaluation. None if there is no sparsity.safetensors.
    """
    log_sparsity_F = load_log_sparsity(evaluated.file.path)
    if log_sparsity_F is None or log_sparsity_F.shape != evaluation.firing_rates_F.shape:
        return None
    dead_there_F = log_sparsity_F <= -9.9  # SAELens adds 1e-10 before the logarithm
    dead_here_F = evaluation.firing_rates_F == 0
    return {
        "dead": dead_there_F.double().mean().item(),
        "dead_here_alive_there": (dead_here_F & ~dead_there_F).double().mean().item(),
    }
