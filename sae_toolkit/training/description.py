"""Describes a prepared run in about ten lines."""

from __future__ import annotations

from pathlib import Path

from sae_lens.util import dtype_to_str

from sae_toolkit.training.needs import disk_plan, free_disk, free_memory_of_rank, memory_plan, size_in_words
from sae_toolkit.training.prepared_run import PreparedRun


def describe(run: PreparedRun, *, details: bool) -> str:
    """Returns about ten lines that describe the run, and the memory and disk space that it needs.

    Args:
        details: whether the memory is listed item by item.
    """
    cfg, sae = run.cfg, run.cfg.sae
    n_steps = -(-cfg.training_tokens // cfg.train_batch_size_tokens)
    left_out = [
        *(["what others than the assistant say"] if run.positions.chat_tokens == "assistant" else []),
        *(["special tokens"] if run.positions.special_token_ids else []),
        *([f"the first {n} position{'s' if n > 1 else ''}"] if (n := run.positions.skip_positions) else []),
        *([f"norms above {m:g} x the median"] if (m := run.max_norm_multiple) else []),
    ]
    memory, disk = memory_plan(run), disk_plan(run)
    disk_items = ", ".join(f"{item} {size_in_words(size)}" for item, size in disk.items())
    hooks = " ".join(run.hook_names)
    passes = f", for {run.passes:.2g} passes over the text" if run.passes > 1 else ""
    saes = sae.architecture() if len(run.cfgs) == 1 else f"{len(run.cfgs)} x {sae.architecture()}"
    return "\n".join(
        (
            f"model   {run.model.name}, {hooks}, {dtype_to_str(run.lm_dtype)} on {run.llm_device}",
            f"text    {run.text.name}"
            + (f" ({run.text.config})" if run.text.config else "")
            + f", {run.text.described()}, {len(run.rows_NT):,} contexts of {cfg.context_size},"
            f" {100 * run.held_out.fraction:.4g}% of documents held out",
            f"SAE     {saes}, {sae.d_sae:,} features on {sae.d_in:,} dimensions, {sae.dtype}",
            *(f"from    {each['name']}" for each in run.initialized_from.values()),
            f"train   {cfg.training_tokens:,} tokens, {n_steps:,} steps of {cfg.train_batch_size_tokens:,},"
            f" lr {cfg.lr:g}" + _processes(run),
            *(f"{'recipe  ' if not i else ' ' * 8}{line}" for i, line in enumerate(run.recipe)),
            f"without {', '.join(left_out) or 'leaving anything out'}",
            f"into    {run.directory}",
            f"tokens  {cfg.training_tokens:,} needed, {run.n_positions:,} there{passes};"
            f" {_rounded(cfg.training_tokens / sae.d_sae)} for each feature",
            memory.describe()
            if details
            else f"memory  {memory.peak / 2**30:.2f} GiB at the peak, {free_memory_of_rank(run) / 2**30:.1f} free"
            + ("" if run.ranks.is_alone else ", for each process"),
            f"disk    up to {size_in_words(sum(disk.values()))} ({disk_items}),"
            f" {size_in_words(free_disk(Path(run.saving.checkpoint_path)))} free",
        )
    )


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _processes(run: PreparedRun) -> str:
    if run.ranks.is_alone:
        return ""
    return f", on {run.ranks.size} processes" + (" that share its features" if run.is_sharded else "")
