"""The SAE that a fine-tuning begins with (--init_from): finding it, checking that it fits the run, and its lineage."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAEConfig

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.seen_text import TEXT_OF_TRAINING, may_have_trained_on
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata
from sae_toolkit.saes.search import find_saes
from sae_toolkit.saes.training_form import (
    BATCHTOPK_KINDS,
    single_value,
    threshold_to_begin_with,
    trained_architecture,
    training_detail,
)
from sae_toolkit.settings.training import ARCHITECTURES
from sae_toolkit.text.sources import HeldOutSplit, TextSource

_FLAG = "--init_from"
# Normalizations that the SAE computes itself for each activation. The others are folded into the weights.
_AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")
_CHECKPOINT = re.compile(r"(final_)?\d+")
# The ends of names of models that were trained further from a base model, and of base models.
_STAGES = re.compile(r"[-_](instruct|it|chat|base|pt)(?=$|[-_])", re.IGNORECASE)


@dataclass(frozen=True)
class InitialSAE:
    """An SAE that a run begins with. It is not in memory.

    Args:
        file: the SAE.
        lineage: what the record of the run says about it: its name, library, architecture, model, hook and text, the
            SHA-256 of its weights, the threshold that a BatchTopK SAE begins with, and the SAE that it began with.
    """

    file: SAEFile
    lineage: Mapping[str, Any]

    def load(self, cfg: TrainingSAEConfig, hook_name: str, device: str) -> SAE[Any]:
        """Loads the SAE in inference form, and checks again that it fits.

        Raises:
            UserError: as `open_initial_saes`.
        """
        source = load_sae_file(self.file, device, _FLAG)
        _check_fits(source, self.file, cfg, hook_name)
        return source


def open_initial_saes(name: str, cfgs: Mapping[str, TrainingSAEConfig]) -> dict[str, InitialSAE]:
    """Finds the SAE that the training at each hook begins with, and checks that it fits.

    Args:
        name: all that --sae_path of the evaluation takes. For several hooks, a run or checkpoint with an SAE for each.
        cfgs: the configuration of the SAE at each hook.

    Returns:
        An SAE for each hook.

    Raises:
        UserError: there is no such SAE, it is damaged, or it does not fit the configuration.
    """
    found = {}
    for hook_name, file in _find(name, list(cfgs)).items():
        source = load_sae_file(file, "cpu", _FLAG)
        _check_fits(source, file, cfgs[hook_name], hook_name)
        found[hook_name] = InitialSAE(file, _lineage(source, file, cfgs[hook_name]))
    return found


def _find(name: str, hook_names: Sequence[str]) -> dict[str, SAEFile]:
    """Returns the SAE for each hook: of a run, the one of the last checkpoint."""
    at_layer = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", hook_names[0])
    layer = int(at_layer[1]) if at_layer and len(hook_names) == 1 else None
    found = find_saes([name], layer=layer, flag=_FLAG)
    if len(found) > 1 and glob.has_magic(name) and not Path(name).expanduser().exists():
        raise UserError(f"{_FLAG} {name}: the pattern fits {len(found)} SAEs; name one")
    last = found[-1]
    is_of_several_hooks = _CHECKPOINT.fullmatch(last.path.parent.name) and not _CHECKPOINT.fullmatch(last.path.name)
    if len(found) == 1 or not is_of_several_hooks:
        if len(hook_names) == 1:
            return {hook_names[0]: last}
        raise UserError(
            f"{_FLAG} {name}: one SAE, and the run trains at {len(hook_names)} hooks; name a run or a checkpoint that"
            " has an SAE for each of them"
        )
    of_hooks = {file.path.name: file for file in found if file.path.parent == last.path.parent}
    missing = [hook_name for hook_name in hook_names if hook_name not in of_hooks]
    if missing:
        raise UserError(
            f"{_FLAG} {name}: no SAE for {missing[0]} in {last.path.parent.name}, which has {', '.join(of_hooks)}; name"
            f" one, as in {last.path}"
        )
    return {hook_name: of_hooks[hook_name] for hook_name in hook_names}


def _lineage(source: SAE[Any], file: SAEFile, cfg: TrainingSAEConfig) -> dict[str, Any]:
    metadata = source.cfg.metadata
    weights = hashlib.sha256()
    for name, tensor in sorted(source.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.contiguous().numpy())
    architecture = trained_architecture(source, file.path, _FLAG)
    threshold = threshold_to_begin_with(source, cfg.k) if architecture in BATCHTOPK_KINDS else None
    before = metadata.initialized_from
    return {
        "name": file.given_name,
        "library": file.library,
        "architecture": architecture,
        **{name: metadata.get(name) for name in ("model_name", "hook_name", *TEXT_OF_TRAINING)},
        "weights_sha256": weights.hexdigest(),
        "topk_threshold": threshold,
        "initialized_from": before if isinstance(before, dict) else None,
    }


def lineage_warnings(
    lineage: Mapping[str, Any], model_name: str, hook_name: str, text: TextSource, held_out: HeldOutSplit
) -> list[str]:
    """Returns a warning if an SAE was trained on another model, or at another hook, than the run that goes on with it,
    and one if it may have been trained on documents that the run holds out.

    A base model and a model that was trained further from it, such as `Llama-3-8B` and `Llama-3-8B-Instruct`, count as
    the same model.

    Args:
        lineage: `InitialSAE.lineage`.
        model_name, hook_name, text, held_out: those of the run.
    """
    found = []
    where, model, hook = f"{_FLAG} {lineage['name']}", lineage["model_name"], lineage["hook_name"]
    if model is not None and _family(model) != _family(model_name):
        found.append(
            f"{where}: trained on {model}, and this run's model is {model_name}, whose activations may have nothing to"
            " do with its features; use that model, or train an SAE from the start"
        )
    if hook is not None and hook != hook_name:
        found.append(
            f"{where}: trained at {hook}, and this run trains at {hook_name}, whose activations may have nothing to do"
            " with its features; use that hook, or train an SAE from the start"
        )
    if held_out.fraction and may_have_trained_on(lineage, text, held_out):
        share, seed = lineage.get("held_out_fraction"), lineage.get("held_out_seed")
        use = f"--held_out_seed {seed} --held_out_fraction {share:g}, as it did" if share else "other text"
        found.append(
            f"{where}: may have been trained on documents of {text.name} that this run holds out to measure on; use"
            f" {use}"
        )
    return found


def _family(model_name: str) -> str:
    """Returns the last part of a model's name, without the words for base, instruct and chat models."""
    return _STAGES.sub("", model_name.rstrip("/").rpartition("/")[2]).lower()


def _check_fits(source: SAE[Any], file: SAEFile, cfg: TrainingSAEConfig, hook_name: str) -> None:
    """Raises a UserError, with the flag to change, if a run cannot go on with an SAE as it is."""
    where = f"{_FLAG} {file.given_name}"
    check_metadata(source, where)
    _check_architecture(source, file, cfg, where)
    theirs, d_in, d_sae = source.cfg, cfg.d_in, cfg.d_sae
    if theirs.d_in != d_in:
        raise UserError(
            f"{where}: for activations of width {theirs.d_in}, and those at {hook_name} have {d_in}; name another SAE,"
            " another --model_name or another hook"
        )
    if theirs.d_sae != d_sae:
        factor, rest = divmod(theirs.d_sae, d_in)
        flag = f"--d_sae {theirs.d_sae}" if rest else f"--expansion_factor {factor}"
        raise UserError(f"{where}: it has {theirs.d_sae:,} features, and the run {d_sae:,}; use {flag}")
    _check_normalization(source, cfg, where)
    _check_norms(source, cfg, where)
    widths, ours = training_detail(source, "matryoshka_widths"), getattr(cfg, "matryoshka_widths", None)
    if isinstance(widths, list) and ours and widths != list(ours):
        raise UserError(
            f"{where}: its nested dictionaries have {widths} features, and those of the run {list(ours)}; use"
            f" --matryoshka_widths {' '.join(map(str, widths))}"
        )


def _check_architecture(source: SAE[Any], file: SAEFile, cfg: TrainingSAEConfig, where: str) -> None:
    architecture = trained_architecture(source, file.path, where)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: its architecture is {architecture}, which SAELens does not train; name another SAE")
    if architecture != cfg.architecture():
        raise UserError(
            f"{where}: its architecture is {architecture}, and that of the run {cfg.architecture()}; use --architecture"
            f" {architecture}"
        )
    if architecture in BATCHTOPK_KINDS and single_value(source.threshold) is None:
        raise UserError(
            f"{where}: trained as {architecture}, but its features have different thresholds; name another SAE"
        )
    if architecture == "matching_pursuit" and source.cfg.apply_b_dec_to_input != cfg.apply_b_dec_to_input:
        value = str(source.cfg.apply_b_dec_to_input).lower()
        raise UserError(f"{where}: its apply_b_dec_to_input is {value}; use --set sae.apply_b_dec_to_input={value}")


def _check_normalization(source: SAE[Any], cfg: TrainingSAEConfig, where: str) -> None:
    theirs, ours = source.cfg.normalize_activations or "none", cfg.normalize_activations
    if theirs in _AT_RUN_TIME or ours in _AT_RUN_TIME:
        if theirs != ours:
            use = theirs if theirs in _AT_RUN_TIME else "expected_average_only_in, or none"
            raise UserError(
                f"{where}: its activations are normalized by {theirs}, and those of the run by {ours}; use"
                f" --normalize_activations {use}"
            )
    elif theirs != "none":
        raise UserError(
            f"{where}: for activations that were normalized by {theirs}, and activation_scaler.json is missing; name"
            " another SAE"
        )


def _check_norms(source: SAE[Any], cfg: TrainingSAEConfig, where: str) -> None:
    """Refuses an SAE whose selection of features would change with the run's use of decoder norms."""
    if not getattr(cfg, "rescale_acts_by_decoder_norm", False):
        return
    leave = "--set sae.rescale_acts_by_decoder_norm=false"
    if cfg.normalize_activations == "covariance_whitening":
        raise UserError(
            f"{where}, --normalize_activations covariance_whitening: it changes the decoder norms, by which the run"
            f" multiplies activations; use {leave} or another normalization"
        )
    are_alike = single_value(source.W_dec.norm(dim=-1)) is not None
    if not (are_alike or getattr(source.cfg, "rescale_acts_by_decoder_norm", False)):
        raise UserError(
            f"{where}: its decoder norms differ, and it does not multiply activations by them, as the run would; use"
            f" {leave}"
        )
