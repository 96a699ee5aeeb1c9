"""What an SAE's cfg.json says of its training, held to what it must be before anything relies on it."""

from __future__ import annotations

from typing import Any

from sae_lens import SAE

from sae_toolkit.errors import UserError

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model_name", "hook_name", "dataset_path", "dataset_config", "dataset_split"), (str,)),
    **dict.fromkeys(("text_column", "fallback_from"), (str,)),
    **dict.fromkeys(("context_size", "held_out_seed"), (int,)),
    **dict.fromkeys(("max_activation_norm", "held_out_fraction"), (int, float)),
    **dict.fromkeys(("prepend_bos", "disable_concat_sequences"), (bool,)),
    "sequence_separator_token": (str, int),
    "exclude_special_tokens": (bool, list, tuple),
    "seqpos_slice": (list, tuple),
    "model_from_pretrained_kwargs": (dict,),
}


def check_metadata(sae: SAE[Any], where: str) -> None:
    """Refuses metadata of the wrong kind, and SAEs that cannot be measured on a model's own activations.

    Args:
        sae: whose `cfg.metadata` to check; what it does not say is fine.
        where: the flag and the SAE, for messages.

    Raises:
        UserError: a field has another type than SAELens gives it; the SAE is for activations of a processed
            model; or it was trained at positions that are no plain end of the context.
    """
    metadata = sae.cfg.metadata
    for name, types in _TYPES.items():
        value = metadata.get(name)
        is_number_of_another_kind = isinstance(value, bool) and bool not in types
        if value is not None and (not isinstance(value, types) or is_number_of_another_kind):
            kinds = " or ".join(t.__name__ for t in types)
            raise UserError(f"{where}: metadata.{name} in cfg.json is {value!r:.60}, and must be {kinds}")
    if isinstance(excluded := metadata.exclude_special_tokens, list | tuple) and not _are_counts(excluded):
        raise UserError(
            f"{where}: metadata.exclude_special_tokens in cfg.json is {excluded!r:.60}, and must be token ids"
        )
    if (size := metadata.context_size) is not None and size < 1:
        raise UserError(f"{where}: metadata.context_size in cfg.json is {size}, and must be 1 or more")
    if (limit := metadata.max_activation_norm) is not None and not limit > 0:
        raise UserError(f"{where}: metadata.max_activation_norm in cfg.json is {limit}, and must be above 0")
    start, stop, step = (*(metadata.seqpos_slice or ()), None, None, None)[:3]
    if not _are_counts([start or 0]) or stop is not None or step not in (None, 1):
        raise UserError(
            f"{where}: trained at the positions seqpos_slice {metadata.seqpos_slice} alone; only a first position is"
            " known here"
        )
    if (metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        raise UserError(
            f"{where}: trained on a model with center_writing_weights, whose activations are not those of the model"
            " itself; it can only be measured with TransformerLens, for instance by sae-lens's run_evals"
        )


def _are_counts(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
