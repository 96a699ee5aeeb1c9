"""Saves the checkpoints of a run in SAELens's formats, resumes from them, and loads SAEs from them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from functools import partial
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
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.whole_directory import NotSaved, check_manifest, whole_directory
from sae_toolkit.saes.weights import read_saelens
from sae_toolkit.steps.calibration import Calibration, saelens_threshold
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.steps.trainer import Trainer

log = logging.getLogger(__name__)

_RESUME_FILENAME, _RESUME_FORMAT = "resume.pt", 2
_HISTORY_FILENAME = "firing_history.safetensors"
_FOLDED = ("expected_average_only_in", "covariance_whitening")  # scales that are measured, and saved beside the weights


def save_training_checkpoint(
    trainer: MultiTrainer,
    stream_state: dict[str, Any],
    cfgs: Sequence[LanguageModelSAERunnerConfig[Any]],
    *,
    run: str,
    milestone: bool = False,
) -> Path:
    """Saves an unfinished run as {run directory}/{tokens}: SAELens's training form, and what --resume needs.

    If there are several SAEs, the checkpoint has a directory for each, which has the SAE's name in the trainer.

    Args:
        trainer: what `MultiTrainer.whole` returned. The saved SAEs are calibrated, its own are not.
        stream_state: the state of the trainer's stream.
        cfgs: the configuration of each SAE.
        run: key of the run, for the manifest.
        milestone: whether the checkpoint is kept when newer ones are saved.

    Returns:
        The checkpoint's directory.

    Raises:
        NotSaved: the disk has no room for it or fails. Other files are left as they were.
    """
    assert cfgs[0].checkpoint_path is not None
    target = Path(cfgs[0].checkpoint_path) / str(trainer.n_training_samples)
    needed, free = _training_checkpoint_bytes(trainer, stream_state), shutil.disk_usage(target.parent).free
    if needed > free:
        raise NotSaved(f"it takes {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free")
    with whole_directory(target, run=run, milestone=milestone) as directory:
        for (name, each), cfg in zip(trainer.trainers.items(), cfgs, strict=True):
            calibrated = each.calibration.applied(each.sae) if each.calibration else nullcontext()
            with _sae_directory(directory, trainer, name, run=run) as place, calibrated:
                each.save_checkpoint(place.name, base_path=place.parent)
                (place / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))
        state = {
            "format": _RESUME_FORMAT,
            "stream": stream_state,
            "trainers": {name: each.state_beside_saelens() for name, each in trainer.trainers.items()},
            "random": _random_states(trainer.first.cfg.device),
        }
        torch.save(state, directory / _RESUME_FILENAME)
    return target


@contextmanager
def _sae_directory(directory: Path, trainer: MultiTrainer, name: str, *, run: str) -> Iterator[Path]:
    """Yields the directory for one SAE: the checkpoint's own, or one inside it if the checkpoint has several SAEs."""
    if trainer.is_single:
        yield directory
    else:
        with whole_directory(directory / name, run=run) as place:
            yield place


def load_training_checkpoint(directory: Path, trainer: MultiTrainer, stream: ActivationStream) -> None:
    """Loads the state that `save_training_checkpoint` saved into a trainer and its stream.

    Raises:
        UserError: an earlier version of this project wrote the checkpoint.
    """
    state = torch.load(directory / _RESUME_FILENAME, map_location="cpu", weights_only=True)
    if state.get("format") != _RESUME_FORMAT:
        raise UserError(
            f"--resume {directory}: written by an earlier version of this project; continue with that version, or train"
            " the SAE from the start"
        )
    for name, each in trainer.trainers.items():
        place = directory if trainer.is_single else directory / name
        each.load_checkpoint(place)
        each.load_state_beside_saelens(state["trainers"][name])
    stream.load_state_dict(state["stream"])
    _restore_random_states(state["random"], trainer.first.cfg.device)
    trainer.n_training_steps, trainer.n_training_samples = (
        trainer.first.n_training_steps,
        trainer.first.n_training_samples,
    )
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]


def _random_states(device: str) -> dict[str, Any]:
    """Returns the random state of the CPU, and of the run's device if that is another."""
    kind = torch.device(device).type
    states = {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if kind == "cuda" else []}
    return states | ({"mps": torch.mps.get_rng_state()} if kind == "mps" else {})


def _restore_random_states(states: dict[str, Any], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if states["cuda"] and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][0], device)
    if "mps" in states and torch.device(device).type == "mps":
        torch.mps.set_rng_state(states["mps"])


def _training_checkpoint_bytes(trainer: MultiTrainer, stream_state: dict[str, Any]) -> int:
    """Returns the bytes of the weights, Adam's two moments, the features' counters, and the activations."""
    saes = trainer.saes.values()
    samples = sum(each.sample.nbytes for each in trainer.trainers.values() if each.sample is not None)
    weights = sum(tensor.nbytes for sae in saes for tensor in sae.state_dict().values())
    counters = 5 * 4 * sum(sae.cfg.d_sae for sae in saes)
    return 3 * weights + counters + samples + stream_state["buffer"]["acts"].nbytes + len(saes) * 2**17


def finish_saes(trainer: MultiTrainer) -> None:
    """Calibrates the SAEs and folds the normalization into the weights, in place. They then take raw activations.

    Args:
        trainer: what `MultiTrainer.whole` returned.
    """
    for each in trainer.trainers.values():
        _finish(each.sae, each.activation_scaler, each.calibration, each.n_training_steps)
        each.set_final_sae_metadata()


def save_final_checkpoint(
    trainer: MultiTrainer, cfgs: Sequence[LanguageModelSAERunnerConfig[Any]], *, run: str
) -> Path:
    """Saves SAEs that `finish_saes` has finished as {run directory}/final_{tokens}.

    They are in the inference form, which `SAE.load_from_disk` reads. Each of several SAEs has its own directory, as in
    `save_training_checkpoint`.

    Raises:
        NotSaved: the disk has no room for it or fails.
    """
    assert cfgs[0].checkpoint_path is not None
    final = Path(cfgs[0].checkpoint_path) / f"final_{trainer.n_training_samples}"
    with whole_directory(final, run=run) as directory:
        for (name, each), cfg in zip(trainer.trainers.items(), cfgs, strict=True):
            with _sae_directory(directory, trainer, name, run=run) as place:
                each.sae.save_inference_model(place)
                save_file({"sparsity": each.log_feature_sparsity}, place / SPARSITY_FILENAME)
                save_file({"steps_since_fired": each.n_forward_passes_since_fired.cpu()}, place / _HISTORY_FILENAME)
                (place / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))
    return final


def _finish(sae: TrainingSAE[Any], scaler: ActivationScaler, calibration: Calibration | None, n_steps: int) -> None:
    """Calibrates a training SAE and folds its normalization, in place.

    Without a calibration the bias of SAELens's threshold is corrected, unless the SAE was saved with a calibration.
    """
    if calibration is not None:
        scale = scaler.scaling_factor
        divides = isinstance(sae, BatchTopKTrainingSAE) and sae.cfg.rescale_acts_by_decoder_norm
        calibration.apply(sae, fold=scale if divides and scale is not None else 1.0)
    elif isinstance(sae, BatchTopKTrainingSAE) and sae.cfg.metadata.calibrated_l0 is None:
        sae.topk_threshold.fill_(saelens_threshold(sae, n_steps))
    _fold_normalization(sae, scaler)


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


def load_sae(path: str | Path, device: str, flag: str = "--sae_path") -> SAE[Any]:
    """Loads an SAE for inference from a SAELens directory in inference form or training form.

    If the checkpoint is from the middle of a run, the SAE is folded and converted as it would be at the end of the run.

    Args:
        path: a directory with `cfg.json` and `sae_weights.safetensors`.
        device: where to put it.
        flag: the flag that named it, for messages.

    Returns:
        The SAE, for activations of shape [..., d_in].

    Raises:
        UserError: a file differs from its manifest, or the architecture is unknown. If there is no manifest, damaged
            files raise whatever SAELens raises; `load_sae_file` turns that into a `UserError`.
    """
    path = Path(path)
    check_manifest(path, f"{flag} {path}")
    architecture = json.loads((path / SAE_CFG_FILENAME).read_text()).get("architecture", "standard")
    if architecture in SAE_CLASS_REGISTRY:
        sae = SAE.load_from_disk(path, device=device, converter=partial(read_saelens, where=f"{flag} {path}"))
        _warn_of_missing_scale(sae, path, flag)
        _fold_normalization(sae, _load_scaler(path))
        sae.turn_off_forward_pass_hook_z_reshaping()  # this project flattens heads
        return sae.eval()
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        return _inference_form(path, device, flag)
    raise UserError(f"{flag} {path}: SAELens has no architecture {architecture!r} (cfg.json)")


def _warn_of_missing_scale(sae: SAE[Any] | TrainingSAE[Any], path: Path, flag: str) -> None:
    mode = sae.cfg.normalize_activations
    if mode in _FOLDED and not (path / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        log.warning(
            "%s %s: trained on activations that were normalized by %s, and %s, which has their scale, is missing: the"
            " SAE gets them as they are in the model, which is right only if its weights already hold the scale",
            *(flag, path, mode, ACTIVATION_SCALER_CFG_FILENAME),
        )


def _load_scaler(path: Path) -> ActivationScaler:
    """Returns the normalization saved beside an SAE's weights; if there is none, a normalization that does nothing."""
    scaler = ActivationScaler()
    if (path / ACTIVATION_SCALER_CFG_FILENAME).is_file():
        scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
    return scaler


def _inference_form(path: Path, device: str, flag: str) -> SAE[Any]:
    """Converts a training checkpoint whose architecture exists for training only, such as BatchTopK."""
    training_sae = TrainingSAE.load_from_disk(path, device=device)
    _warn_of_missing_scale(training_sae, path, flag)
    trainer_state = path / TRAINER_STATE_FILENAME
    n_steps = 0
    if trainer_state.is_file():
        n_steps = torch.load(trainer_state, map_location="cpu", weights_only=True)["n_training_steps"]
    return _converted(training_sae, _load_scaler(path), None, n_steps)


def _converted(
    training_sae: TrainingSAE[Any], scaler: ActivationScaler, calibration: Calibration | None, n_steps: int
) -> SAE[Any]:
    """Returns the inference form of a training SAE. It takes the weights of the given SAE, and changes them in place.

    So it needs no memory, except for the folding of a whitening.
    """
    device, cfg = training_sae.device, training_sae.cfg
    _finish(training_sae, scaler, calibration, n_steps)
    inference_cfg = cfg.get_inference_sae_cfg_dict()
    if isinstance(training_sae, TopKTrainingSAE) and cfg.rescale_acts_by_decoder_norm:
        # SAELens folds the norms into new tensors when it converts the weights. Here the same is done in place.
        training_sae.fold_W_dec_norm()
        cfg.rescale_acts_by_decoder_norm = False
    state = training_sae.state_dict()
    training_sae.process_state_dict_for_saving_inference(state)
    sae = _with_weights(SAE.from_dict(inference_cfg | {"device": "meta"}), state, device)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval()


def _with_weights(sae: SAE[Any], state: dict[str, torch.Tensor], device: torch.device) -> SAE[Any]:
    """Returns the SAE, which was made on `meta`, with weights that are on the given device. They are not copied."""
    sae.load_state_dict(state, assign=True)
    sae.device, sae.cfg.device = device, str(device)
    return sae


@torch.no_grad()
def finished_copy(trainer: Trainer, calibration: Calibration | None) -> SAE[Any]:
    """Returns a copy of the SAE, on the same device, as the run would save it if it ended now.

    No more memory is needed than the copy takes, except for the folding of a whitening.

    Args:
        trainer: trainer of a whole SAE.
        calibration: what its `calibrate` returned.
    """
    sae_class, _ = get_sae_training_class(trainer.sae.cfg.architecture())
    cfg = deepcopy(trainer.sae.cfg)
    cfg.device = "meta"  # where random weights take neither memory nor random numbers
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in trainer.sae.state_dict().items()
    }
    copied = _with_weights(sae_class(cfg), state, trainer.sae.device)
    return _converted(copied, copy(trainer.activation_scaler), calibration, trainer.n_training_steps)


def load_log_sparsity(path: Path) -> torch.Tensor | None:
    """Returns the log10 of each feature's firing rate in the last window of training, [F]; None if it is not saved."""
    return _load_tensor(path / SPARSITY_FILENAME, "sparsity")


def load_steps_since_fired(path: Path) -> torch.Tensor | None:
    """Returns for how many steps each feature had not fired when training ended, [F]; None if it is not saved."""
    return _load_tensor(path / _HISTORY_FILENAME, "steps_since_fired")


def _load_tensor(file: Path, name: str) -> torch.Tensor | None:
    try:
        return load_file(file).get(name) if file.is_file() else None
    except SafetensorError as error:
        log.warning("%s: damaged, and left out: %s", file, one_line(error))
        return None
