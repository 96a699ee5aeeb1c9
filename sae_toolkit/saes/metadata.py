"""Checks the values in an SAE's cfg.json, about the SAE and its training, before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from sae_lens import SAE
from safetensors import SafetensorError, safe_open

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.trust import is_hub_name

# The types of the SAE's own fields, in inference form, in training form, and in SAELens before 6.0.
_CFG_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "dtype"), (str,)),
    **dict.fromkeys(("device", "reshape_activations", "activation_fn"), (str, NoneType)),
    **dict.fromkeys(("d_in", "d_sae"), (int,)),
    **dict.fromkeys(("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"), (bool,)),
    "metadata": (dict,),
    "activation_fn_kwargs": (dict, NoneType),
    "k": (int, float),  # a mean, in the training form of BatchTopK
    "normalize_activations": (str, bool, NoneType),
}
_LARGEST = 10**8  # limit of every size
_DTYPES = ("float32", "float64", "float16", "bfloat16")

# The types of the metadata's fields.
_METADATA_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model_name", "hook_name", "dataset_path", "dataset_config", "dataset_split"), (str,)),
    **dict.fromkeys(("text_column", "fallback_from", "chat_tokens"), (str,)),
    **dict.fromkeys(("context_size", "held_out_seed"), (int,)),
    **dict.fromkeys(("max_activation_norm", "held_out_fraction"), (int, float)),
    **dict.fromkeys(("prepend_bos", "disable_concat_sequences", "use_chat_formatting"), (bool,)),
    "sequence_separator_token": (str, int),
    "exclude_special_tokens": (bool, list, tuple),
    "seqpos_slice": (list, tuple),
    "model_from_pretrained_kwargs": (dict,),
}


def check_cfg(cfg: Mapping[str, Any], where: str) -> None:
    """Refuses a SAELens cfg.json that cannot describe an SAE. Fields may be missing.

    Raises:
        UserError: a field has another type than in SAELens, or an impossible value.
    """
    for name, types in _CFG_TYPES.items():
        if name in cfg:
            _check_type(cfg[name], types, f"{where}: {name} in cfg.json")
    for name, largest in (("d_in", _LARGEST), ("d_sae", _LARGEST), ("k", cfg.get("d_sae", _LARGEST))):
        if (size := cfg.get(name)) is not None and not 1 <= size <= largest:
            raise UserError(f"{where}: {name} in cfg.json is {size}, and must be 1 to {largest:,}")
    for name in ("activation_fn", "activation_fn_str"):  # of SAELens before 6.0
        if cfg.get(name) == "tanh-relu":
            raise UserError(f"{where}: {name} in cfg.json is tanh-relu, which SAELens dropped; name another SAE")
    if cfg.get("architecture") == "topk" and not isinstance(k := cfg.get("k", 1), int):
        raise UserError(f"{where}: k in cfg.json is {k}, and must be a whole number")
    if (dtype := cfg.get("dtype")) is not None and dtype.removeprefix("torch.") not in _DTYPES:
        raise UserError(f"{where}: dtype in cfg.json is {dtype!r:.60}, and must be {', '.join(_DTYPES)}")


def check_are_floats(file: Path, where: str) -> None:
    """Refuses integer weights, which SAELens would convert. Only the file's header is read.

    Raises:
        UserError: a weight has an integer dtype, or the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: {file.name} is damaged or incomplete: {one_line(error)}") from error
    for name, dtype in dtypes.items():
        if name.startswith(("W_", "b_", "threshold", "log_threshold")) and not dtype.startswith(("F", "BF")):
            raise UserError(f"{where}: damaged: {name} in {file.name} is of {dtype}, and must be of floats")


def _check_type(value: Any, types: tuple[type, ...], where: str) -> None:
    is_number_of_another_kind = isinstance(value, bool) and bool not in types
    if not isinstance(value, types) or is_number_of_another_kind:
        raise UserError(f"{where} is {value!r:.60}, and must be {' or '.join(t.__name__ for t in types)}")


def check_names_of_download(sae: SAE[Any], where: str, *, model_name: str | None, dataset: str | None) -> None:
    """Refuses a downloaded SAE if its model or text is not a name on the Hub and the user gave no other name.

    Such a name could be a path. Then this machine would open a file that the SAE's author chose.

    Args:
        sae: a downloaded SAE.
        where: the flag and the SAE, for messages.
        model_name: the value of --model_name, if it was given.
        dataset: the value of --dataset, if it was given.

    Raises:
        UserError: a name that would be used is not a name on the Hub.
    """
    for flag, given, name in (("--model_name", model_name, "model_name"), ("--dataset", dataset, "dataset_path")):
        value = sae.cfg.metadata.get(name)
        if given is None and value and not is_hub_name(value):
            raise UserError(
                f"{where}: a downloaded SAE, whose {name} {value!r:.80} is not a name on the Hub; if it is right, give"
                f" it by {flag}"
            )


def check_metadata(sae: SAE[Any], where: str) -> None:
    """Refuses wrong metadata, and SAEs that cannot be evaluated on the unchanged model's activations.

    Args:
        sae: the SAE. Fields may be missing from its `cfg.metadata`.
        where: the flag and the SAE, for messages.

    Raises:
        UserError: a field has another type than in SAELens, or an impossible value; the SAE is for activations of a
            model whose weights were processed; or its training left out positions other than the first ones.
    """
    metadata = sae.cfg.metadata
    for name, types in _METADATA_TYPES.items():
        if (value := metadata.get(name)) is not None:
            _check_type(value, types, f"{where}: metadata.{name} in cfg.json")
    if isinstance(excluded := metadata.exclude_special_tokens, list | tuple) and not _are_counts(excluded):
        raise UserError(
            f"{where}: metadata.exclude_special_tokens in cfg.json is {excluded!r:.60}, and must be token ids"
        )
    if (size := metadata.context_size) is not None and not 1 <= size <= _LARGEST:
        raise UserError(f"{where}: metadata.context_size in cfg.json is {size}, and must be 1 to {_LARGEST:,}")
    if isinstance(token := metadata.sequence_separator_token, str) and token not in ("bos", "eos", "sep"):
        raise UserError(
            f"{where}: metadata.sequence_separator_token in cfg.json is {token!r:.60}, and must be bos, eos, sep or a"
            " token id"
        )
    if (chosen := metadata.chat_tokens) not in (None, "all", "assistant"):
        raise UserError(f"{where}: metadata.chat_tokens in cfg.json is {chosen!r:.60}, and must be all or assistant")
    if (limit := metadata.max_activation_norm) is not None and not limit > 0:
        raise UserError(f"{where}: metadata.max_activation_norm in cfg.json is {limit}, and must be above 0")
    if (fraction := metadata.held_out_fraction) is not None:
        if not 0 <= fraction < 1:
            raise UserError(f"{where}: metadata.held_out_fraction in cfg.json is {fraction}, and must be in [0, 1)")
        if metadata.held_out_seed is None:
            raise UserError(f"{where}: metadata in cfg.json has a held_out_fraction but no held_out_seed")
    start, stop, step = (*(metadata.seqpos_slice or ()), None, None, None)[:3]
    if len(metadata.seqpos_slice or ()) == 1:
        start, stop = None, start  # as in Python's slice(n)
    if not _are_counts([start or 0]) or stop is not None or step not in (None, 1):
        raise UserError(
            f"{where}: trained at the positions seqpos_slice {metadata.seqpos_slice} alone; evaluations here can leave"
            " out the first positions and no others"
        )
    if (metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        raise UserError(
            f"{where}: trained on a model with center_writing_weights, whose activations differ from those of the"
            " unchanged model; evaluate it with TransformerLens, for instance by sae-lens's run_evals"
        )


def _are_counts(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
