"""What a run leaves on disk, in SAELens's formats, and how any of it is read again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.whole_directory import NotSaved, check_manifest, whole_directory
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.steps.trainer import Trainer

log = logging.getLogger(__name__)

_RESUME_FILENAME, _RESUME_FORMAT = "resume.pt", 2
_HISTORY_FILENAME = "firing_history.safetensors"


def save_training_checkpoint(
    trainer: MultiTrainer,
    stream_state: dict[str, Any],
    cfgs: Sequence[LanguageModelSAERunnerConfig[Any]],
    *,
    run: str,
    milestone: bool = False,
) -> Path:
    """Saves an unfinished run as {run directory}/{tokens}: SAELens's training form and what a resume needs. Several
    SAEs have a directory each in it, by the name of their hook.

    Args:
        stream_state: that of its stream.
        cfgs: of each SAE.
        run: the run's key, which its manifest records.
        milestone: whether it stays when newer ones come.

    Raises:
        NotSaved: there is no room for it, or the disk fails; nothing else is touched.
    """
    assert cfgs[0].checkpoint_path is not None
    target = Path(cfgs[0].checkpoint_path) / str(trainer.n_training_samples)
    needed, free = _training_checkpoint_bytes(trainer, stream_state), shutil.disk_usage(target.parent).free
    if needed > free:
        raise NotSaved(f"it takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free")
    with whole_directory(target, run=run, milestone=milestone) as directory:
        for each, cfg in zip(trainer.trainers.values(), cfgs, strict=True):
            with _sae_directory(directory, trainer, cfg.hook_name, run=run) as place:
                each.save_checkpoint(place.name, base_path=place.parent)
                _save_runner_config(cfg, place)
        state = {
            "format": _RESUME_FORMAT,
            "stream": stream_state,
            "trainers": {name: each.state_beside_saelens() for name, each in trainer.trainers.items()},
            "random": _random_state(),
        }
        torch.save(state, directory / _RESUME_FILENAME)
    return target


@contextmanager
def _sae_directory(directory: Path, trainer: MultiTrainer, hook_name: str, *, run: str) -> Iterator[Path]:
    """Where an SAE of a checkpoint is written: the checkpoint itself, or a directory in it where it has several."""
    if trainer.is_single:
        yield directory
    else:
        with whole_directory(directory / hook_name, run=run) as place:
            yield place


def load_training_checkpoint(directory: Path, trainer: MultiTrainer, stream: ActivationStream) -> None:
    """Puts a trainer and its stream where `save_training_checkpoint` left them.

    Raises:
        UserError: another version of this project wrote the checkpoint.
    """
    state = torch.load(directory / _RESUME_FILENAME, map_location="cpu", weights_only=True)
    if state.get("format") != _RESUME_FORMAT:
        raise UserError(
            f"--resume {directory}: written by an earlier version of this project; go on with that version, or train"
            " the SAE from its start"
        )
    for name, each in trainer.trainers.items():
        place = directory if trainer.is_single else directory / name
        each.load_checkpoint(place)
        each.load_state_beside_saelens(state["trainers"][name])
    stream.load_state_dict(state["stream"])
    torch.set_rng_state(state["random"]["cpu"])
    if state["random"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"][0])
    trainer.n_training_steps, trainer.n_training_samples = (
        trainer.first.n_training_steps,
        trainer.first.n_training_samples,
    )
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]


def _random_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def _training_checkpoint_bytes(trainer: MultiTrainer, stream_state: dict[str, Any]) -> int:
    """Of the weights, Adam's two moments, the counters of each feature and the buffer's activations."""
    saes = trainer.saes.values()
    weights = sum(tensor.nbytes for sae in saes for tensor in sae.state_dict().values())
    counters = 5 * 4 * sum(sae.cfg.d_sae for sae in saes)
    return 3 * weights + counters + stream_state["buffer"]["acts"].nbytes + len(saes) * 2**17


def finish_saes(trainer: MultiTrainer, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Folds the normalization into the weights, in place: an SAE takes raw activations in and gives raw ones out."""
    for each in trainer.trainers.values():
        if cfg.from_pretrained_path is None:
            _correct_threshold_bias(each.sae, each.n_training_steps)
        _fold_normalization(each.sae, each.activation_scaler)
        each.set_final_sae_metadata()


def save_final_checkpoint(
    trainer: MultiTrainer, cfgs: Sequence[LanguageModelSAERunnerConfig[Any]], *, run: str
) -> Path:
    """Saves SAEs that `finish_saes` has finished as {run directory}/final_{tokens}, several in a directory each in it.

    They are in the inference form that `SAE.load_from_disk` reads.

    Raises:
        NotSaved: there is no room for it, or the disk fails.
    """
    assert cfgs[0].checkpoint_path is not None
    final = Path(cfgs[0].checkpoint_path) / f"final_{trainer.n_training_samples}"
    with whole_directory(final, run=run) as directory:
        for each, cfg in zip(trainer.trainers.values(), cfgs, strict=True):
            with _sae_directory(directory, trainer, cfg.hook_name, run=run) as place:
                each.sae.save_inference_model(place)
                save_file({"sparsity": each.log_feature_sparsity}, place / SPARSITY_FILENAME)
                save_file({"steps_since_fired": each.n_forward_passes_since_fired.cpu()}, place / _HISTORY_FILENAME)
                _save_runner_config(cfg, place)
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
        UserError: a file is not what its manifest says, the weights are damaged, or of an unknown kind.
    """
    path = Path(path)
    check_manifest(path, f"{flag} {path}")
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
    n_steps = 0
    if trainer_state.is_file():
        n_steps = torch.load(trainer_state, map_location="cpu", weights_only=True)["n_training_steps"]
    scaler = ActivationScaler()
    if (path / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
    return _converted(training_sae, scaler, n_steps)


def _converted(training_sae: TrainingSAE[Any], scaler: ActivationScaler, n_steps: int) -> SAE[Any]:
    """The SAE that a training SAE is saved as. Takes the weights and the scale of the one given."""
    _correct_threshold_bias(training_sae, n_steps)
    _fold_normalization(training_sae, scaler)
    state = {name: tensor.clone() for name, tensor in training_sae.state_dict().items()}
    training_sae.process_state_dict_for_saving_inference(state)
    sae = SAE.from_dict(training_sae.cfg.get_inference_sae_cfg_dict() | {"device": str(training_sae.device)})
    sae.load_state_dict(state)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval()


@torch.no_grad()
def finished_copy(trainer: Trainer) -> SAE[Any]:
    """The SAE that a run would be finished with now, as a copy on its device; the trainer stays as it is."""
    sae_class, _ = get_sae_training_class(trainer.sae.cfg.architecture())
    with torch.random.fork_rng():  # making an SAE draws weights
        copied = sae_class(trainer.sae.cfg)
        copied.load_state_dict(trainer.sae.state_dict())
        return _converted(copied, copy(trainer.activation_scaler), trainer.n_training_steps)


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


def load_steps_since_fired(path: Path) -> torch.Tensor | None:
    """For how many steps each feature had been silent at the end of its training, [F], if the SAE says so."""
    file = path / _HISTORY_FILENAME
    try:
        return load_file(file).get("steps_since_fired") if file.is_file() else None
    except SafetensorError as error:
        log.warning("%s is damaged and left out: %s", file, one_line(error))
        return None
