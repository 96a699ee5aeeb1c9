#!/usr/bin/env python
"""Trains the SAEs of several libraries on the same activations, and measures them with the same evaluation.

    # SAELens, sparsify and dictionary_learning on the embedded model, at one L0, on 250,000 tokens
    python compare_sae_libraries.py @presets/demo.args --quick

    # the whole picture: four L0s, three seeds
    python compare_sae_libraries.py @presets/demo.args --l0 20 40 80 160 --seeds 3

    # some kinds of SAE alone; with another learning rate than their library's, after an @
    python compare_sae_libraries.py @presets/demo.args --libraries saelens:batchtopk dictionary_learning:batchtopk@2e-3

    # what would run
    python compare_sae_libraries.py @presets/demo.args --quick --dry_run

All other flags are those of sae_lens_train.py: model, text, width, tokens and batch hold for every library, and the
settings of the training (--lr, ...) for SAELens. Each library trains with its own code: SAELens as sae_lens_train.py
runs it, an L0 that is an outcome found by --target_l0; sparsify with its Trainer, its optimizer and its learning rate,
on the same rows of tokens but from the live model; dictionary_learning with its trainers and dictionary_learning_demo's
settings, schedules scaled to the run, in an environment of its own that is made the first time.

A comparison that was stopped goes on with the same command. The table goes to standard output; comparison.json,
comparison.md and comparison.html into its directory, with the SAEs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Entry, make_entries, parse_contenders
from sae_toolkit.many_runs.processes import claimed
from sae_toolkit.settings.training import parse_training_flags
from sae_toolkit.settings.values import positive
from sae_toolkit.terminal.console import Parser, add_talk_flags, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")

_QUICK_TOKENS = 250_000
_SETTINGS = "settings.json"


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """The comparison's own flags, and those of the trainings."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--libraries",
        nargs="+",
        default=["saelens", "sparsify", "dictionary_learning"],
        metavar="LIBRARY[:KIND][@LR]",
        help="saelens, sparsify, dictionary_learning, all kinds of SAE of each or the one named (default: all three)",
    )
    add("--l0", nargs="+", type=positive, help="features active a token (default: 20 40 80 160; with --quick 64)")
    add("--seeds", type=positive, default=1, metavar="N", help="of each, from --seed on (default: 1)")
    add("--quick", action="store_true", help="one L0 and 250,000 tokens, unless others are given")
    add("--comparison_dir", type=Path, help="directory of the comparison (default: comparisons/OUTPUT_NAME)")
    add("--num_samples", type=positive, help="sequences of the evaluation (default: the evaluation's)")
    add("--dry_run", action="store_true", help="list the SAEs, and stop")
    add_talk_flags(parser)
    return parser.parse_known_args()


def main() -> int:
    flags, words = parse_flags()
    set_up_logging(flags.verbose, flags.quiet)
    given = parse_training_flags(words)
    if given.layers or given.hook_names:
        raise UserError("--layers, --hook_names: a comparison is of one hook; give --layer")
    if given.resume or given.shard_features:
        raise UserError("--resume, --shard_features: not in a comparison, which goes on by itself; leave them out")
    if flags.quick and "--training_tokens" not in words:
        decay = given.lr_decay_steps * _QUICK_TOKENS // given.training_tokens
        words = [*words, "--training_tokens", str(_QUICK_TOKENS), "--lr_decay_steps", str(decay)]
    contenders = parse_contenders(flags.libraries)
    directory = (flags.comparison_dir or Path("comparisons") / given.output_name).absolute()
    l0s = sorted(set(flags.l0 or ([64] if flags.quick else [20, 40, 80, 160])))
    entries = make_entries(contenders, l0s, range(given.seed, given.seed + flags.seeds), directory)
    if flags.dry_run:
        for number, entry in enumerate(entries, 1):
            print(f"{number}: {entry.name}")
        return 0

    # torch and SAELens take seconds to import: not for --help or a mistyped flag.
    from rich.console import Console

    from sae_toolkit.many_runs.comparison.report import Outcome, render_comparison, summary_table, write_comparison
    from sae_toolkit.many_runs.comparison.run import describe, evaluate_entries, train_entry
    from sae_toolkit.many_runs.comparison.shared_activations import share
    from sae_toolkit.training.record.start import record_runs

    with claimed(directory, "--comparison_dir"):
        settings = _settings(words)
        _check_same(directory, settings)
        shared = share(words, directory, highest_l0=l0s[-1])
        (directory / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")  # of a comparison that can run
        failed: dict[Entry, str] = {}
        for number, entry in enumerate(entries, 1):
            log.info("SAE %d of %d: %s%s", number, len(entries), entry.name, ", from before" * bool(entry.trained()))
            try:
                train_entry(entry, shared)
            except UserError as error:
                failed[entry] = str(error).removeprefix(f"{entry.name}: ")
                log.warning("%s", error)
        more = ["--num_samples", str(flags.num_samples)] if flags.num_samples else []
        failed |= evaluate_entries(entries, shared, more)
        outcomes = [Outcome(entry, entry.trained(), entry.evaluation(), failed.get(entry)) for entry in entries]
        page = write_comparison(outcomes, directory, describe(shared))
        runs = {o.entry.name: Path(o.trained["sae"]) for o in outcomes if o.trained and o.entry.is_own}
        record_runs("comparison", directory, given, runs, summary_table(outcomes))
    log.info("written to %s", page)
    Console(width=None if sys.stdout.isatty() else 200).print(render_comparison(outcomes))
    if not any(outcome.evaluation for outcome in outcomes):
        raise UserError(f"--libraries: no SAE of {len(entries)} was evaluated; {page.with_suffix('.md')} says why")
    return 0


def _settings(words: list[str]) -> dict[str, Any]:
    """The flags that all SAEs of a comparison must have in common."""
    return {
        name: value
        for name, value in vars(parse_training_flags(words)).items()
        if name not in ("verbose", "quiet", "seed", "device", "preset") and not name.startswith(("wandb", "logger"))
    }


def _check_same(directory: Path, settings: dict[str, Any]) -> None:
    """Refuses to mix the SAEs of other settings into a comparison."""
    file = directory / _SETTINGS
    try:
        before = json.loads(file.read_text()) if file.exists() else settings
        changed = sorted(name for name in settings if settings[name] != before.get(name))
    except (OSError, ValueError, AttributeError):
        raise UserError(f"--comparison_dir {directory}: {_SETTINGS} is damaged; name another directory") from None
    if changed:
        name = changed[0]
        raise UserError(
            f"--{name} {settings[name]}: the comparison in {directory} has {before.get(name)}; name another"
            " --comparison_dir"
        )


if __name__ == "__main__":
    run_script(main)
