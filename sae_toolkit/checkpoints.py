"""What a run leaves on disk, in SAELens's formats, and how any of it is read again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, SAETrainer, TrainingSAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_toolkit.activations import ActivationStream
from sae_toolkit.errors import UserError, one_line

log = logging.getLogger(__name__)

TOKENS_FILENAME = "tokens.npy"
_STREAM_FILENAME = "activation_stream.pt"


def save_training_checkpoint(
    trainer: SAETrainer[Any, Any],
    stream: ActivationStream,
    cfg: LanguageModelSAERunnerConfig[Any],
) -> Path:
    """Saves an unfinished run as {run directory}/{tokens}: SAELens's training form and what a resume needs."""
    assert cfg.checkpoint_path is not None
    with _whole_or_absent(Path(cfg.checkpoint_path) / str(trainer.n_training_samples)) as directory:
        trainer.save_checkpoint(directory.name, base_path=directory.parent)
        torch.save(stream.state_dict(), directory / _STREAM_FILENAME)
        _save_runner_config(cfg, directory)
    return Path(cfg.checkpoint_path) / str(trainer.n_training_samples)


def load_training_checkpoint(directory: Path, trainer: SAETrainer[Any, Any], stream: ActivationStream) -> None:
    """Puts a trainer and its stream where `save_training_checkpoint` left them.

    Raises:
        UserError: the directory is not a whole training checkpoint.
    """
    for name in (SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME, _STREAM_FILENAME, ACTIVATION_SCALER_CFG_FILENAME):
        if not (directory / name).is_file():
            raise UserError(
                f"--resume {directory}: no {name} in it; a finished or incomplete checkpoint cannot be resumed"
            )
    trainer.load_trainer_state(directory)
    trainer.sae.load_weights_from_checkpoint(directory)
    stream.load_state_dict(torch.load(directory / _STREAM_FILENAME, weights_only=True))
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n > trainer.n_training_samples]


def newest_training_checkpoint(output_directory: Path) -> Path | None:
    """The checkpoint with the most tokens among the unfinished runs of an output directory."""
    runs = [run for run in output_directory.glob("*") if run.is_dir() and not any(run.glob("final_*"))]
    checkpoints = [c for run in runs for c in run.iterdir() if c.name.isdigit() and (c / _STREAM_FILENAME).is_file()]
    return max(checkpoints, key=lambda c: (int(c.name), c.stat().st_mtime), default=None)


def save_final_checkpoint(trainer: SAETrainer[Any, Any], cfg: LanguageModelSAERunnerConfig[Any]) -> Path:
    """Saves a finished SAE as {run directory}/final_{tokens}, in the inference form that `SAE.load_from_disk` reads.

    The normalization is folded into the weights, in place: the saved SAE takes raw activations in and gives
    raw activations out.
    """
    assert cfg.checkpoint_path is not None
    final = Path(cfg.checkpoint_path) / f"final_{trainer.n_training_samples}"
    sae = trainer.sae
    if cfg.from_pretrained_path is None:
        _correct_threshold_bias(sae, trainer.n_training_steps)
    _fold_normalization(sae, trainer.activation_scaler)
    trainer.set_final_sae_metadata()
    with _whole_or_absent(final) as directory:
        sae.save_inference_model(directory)
        save_file({"sparsity": trainer.log_feature_sparsity}, directory / SPARSITY_FILENAME)
        _save_runner_config(cfg, directory)
    return final


def _correct_threshold_bias(sae: TrainingSAE[Any], n_steps: int) -> None:
    """Undoes the pull to zero of SAELens's BatchTopK threshold, a running mean that starts at 0.

    After n steps such a mean is low by the factor 1 - (1 - rate)^n, as the moments of Adam are (Kingma & Ba
    2015, section 3): 29% after 122 steps of the default rate, 0.7% after 488.
    """
    if isinstance(sae, BatchTopKTrainingSAE) and n_steps > 0:
        sae.topk_threshold /= 1 - (1 - sae.cfg.topk_threshold_lr) ** n_steps


def _fold_normalization(sae: SAE[Any], scaler: ActivationScaler) -> None:
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        sae.fold_activation_whitening(
            mean=scaler.whitening.mean,
            whitening_matrix=scaler.whitening.matrix,
            unwhitening_matrix=scaler.whitening.inverse_matrix,
        )
        scaler.whitening = None


def _save_runner_config(cfg: LanguageModelSAERunnerConfig[Any], directory: Path) -> None:
    (directory / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[Path]:
    """A directory to write into, which takes the target's name once it is complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():  # an interrupted run that was resumed comes by the same place again
            shutil.rmtree(target)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_sae(path: str | Path, device: str, flag: str = "--sae_path") -> SAE[Any]:
    """Loads an SAE for inference from a SAELens directory, in inference or in training form.

    A checkpoint from the middle of a run is folded and converted as a finished one would be.

    Args:
        path: a directory with `cfg.json` and `sae_weights.safetensors`.
        device: where to put it.
        flag: the flag that named it, for messages.

    Returns:
        The SAE, for activations of shape [..., d_in].

    Raises:
        UserError: the weights are damaged, or of an unknown kind.
    """
    path = Path(path)
    try:
        architecture = json.loads((path / SAE_CFG_FILENAME).read_text()).get("architecture", "standard")
        if architecture in SAE_CLASS_REGISTRY:
            sae = SAE.load_from_disk(path, device=device)
        elif architecture in SAE_TRAINING_CLASS_REGISTRY:
            return _inference_form(path, device)
        else:
            raise UserError(f"{flag} {path}: SAELens knows no architecture {architecture!r} (cfg.json)")
        if (path / ACTIVATION_SCALER_CFG_FILENAME).is_file():
            scaler = ActivationScaler()
            scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
            _fold_normalization(sae, scaler)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{flag} {path}: damaged or incomplete: {one_line(error)}") from error
    sae.turn_off_forward_pass_hook_z_reshaping()  # heads come flat here
    return sae.eval()


def _inference_form(path: Path, device: str) -> SAE[Any]:
    """Converts a training checkpoint whose architecture exists for training only (BatchTopK and its kin)."""
    training_sae = TrainingSAE.load_from_disk(path, device=device)
    trainer_state = path / TRAINER_STATE_FILENAME
    if trainer_state.is_file():
        n_steps = torch.load(trainer_state, map_location="cpu", weights_only=True)["n_training_steps"]
        _correct_threshold_bias(training_sae, n_steps)
    if (path / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        scaler = ActivationScaler()
        scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
        _fold_normalization(training_sae, scaler)
    state = {name: tensor.clone() for name, tensor in training_sae.state_dict().items()}
    training_sae.process_state_dict_for_saving_inference(state)
    sae = SAE.from_dict(training_sae.cfg.get_inference_sae_cfg_dict() | {"device": device})
    sae.load_state_dict(state)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval()


def load_log_sparsity(path: Path) -> torch.Tensor | None:
    """Logarithms (base 10) of each feature's firing rate in the last window of its training, if the SAE has them."""
    file = path / SPARSITY_FILENAME
    if not file.is_file():
        return None
    try:
        return load_file(file).get("sparsity")
    except SafetensorError as error:
        log.warning("%s is damaged and left out: %s", file, one_line(error))
        return None
