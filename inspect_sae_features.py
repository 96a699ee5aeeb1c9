#!/usr/bin/env python
"""Looks at every feature of sparse autoencoders: how often and how strongly it fires, on what text, what it promotes.

    python inspect_sae_features.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500224
    python inspect_sae_features.py --sae_path ./my_sae --tokens 10000000 --examples 50 --drawn_examples 50

    # other text than what was held out of the training
    python inspect_sae_features.py --sae_path ./my_sae --dataset my_text.jsonl --tokens 200000

    # what the model writes when a feature is turned: clamped to 8, raised by 3, or switched off
    python inspect_sae_features.py --sae_path ./my_sae --steer 12=8 40=+3 77=0 --prompt "The weather today"

    # with how near each feature comes to one of other seeds
    python inspect_sae_features.py --sae_path ./my_sae --stability ./my_seed_1 ./my_seed_2

    # what 50 of the features do to the loss, and to the tokens that they promote, when they are turned
    python inspect_sae_features.py --sae_path ./my_sae --effects 50

    # for other tools too: neuronpedia, saedashboard, delphi, or several of them
    python inspect_sae_features.py --sae_path ./my_sae --export neuronpedia delphi

    # 50 features in the words of a language model, and how well these tell where each fires
    python inspect_sae_features.py --sae_path ./my_sae --explain meta-llama/Llama-3.1-8B-Instruct
    python inspect_sae_features.py --sae_path ./my_sae --explain my-judge --explain_url http://127.0.0.1:8000/v1

    # all layers or seeds of a run, in one pass of the model
    python inspect_sae_features.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0 --output ./features

features.parquet, a row for each feature, goes into the directory `features` of each SAE; docs/features.md says what
the columns are. features.html beside it is a page of all features, which opens without a network. Memory does not grow
with the text. After a kill the same command goes on where the work was saved.
Progress goes to standard error, and the paths of the files to standard output.
"""

from __future__ import annotations

import logging

from sae_toolkit.settings.inspection import parse_inspection_flags
from sae_toolkit.terminal.console import importing, run_script, set_up_logging
from sae_toolkit.terminal.stop_signals import Stopped, StopSignals, hear_stop_signals

log = logging.getLogger("sae_toolkit")


def main() -> int:
    with hear_stop_signals() as signals:
        try:
            return inspect(signals)
        except Stopped as stopped:
            log.warning("%s; what was saved is kept, and the same command goes on from it", stopped)
            return stopped.exit_status


def inspect(signals: StopSignals) -> int:
    settings = parse_inspection_flags(__doc__)
    set_up_logging(settings.run.verbose, settings.run.quiet)

    # Imported here because SAELens takes seconds to import, and --help and a mistyped flag do not need it.
    with importing("SAELens"):
        from sae_toolkit.inspection.prepare import choose_directories, in_passes, prepare_inspection, prepare_others
        from sae_toolkit.inspection.results import write_results
        from sae_toolkit.inspection.run import inspect_features, remove_saves
        from sae_toolkit.inspection.steering import check_steering, show_steering, write_with_and_without
        from sae_toolkit.model.devices import choose_lm_dtype
        from sae_toolkit.model.loading import LanguageModels

    groups = prepare_inspection(settings)
    if steers := settings.steering.steers:
        check_steering(steers, groups)
        lm_dtype = choose_lm_dtype(settings.saes.lm_dtype, groups[0].device)
        model = LanguageModels(groups[0].device, lm_dtype).load(groups[0].model, groups[0].hook_name)
        print(show_steering(steers, write_with_and_without(groups[0], model, steers, settings.steering)))
        return 0
    others, in_order = prepare_others(settings, groups), in_passes(groups)
    directories = iter(choose_directories(settings.run.output, [group for of_pass in in_order for group in of_pass]))
    models = LanguageModels(groups[0].device, choose_lm_dtype(settings.saes.lm_dtype, groups[0].device))
    for of_pass in in_order:
        model = models.load(of_pass[0].model, of_pass[0].hook_name)
        inspected = inspect_features(
            of_pass,
            model,
            [next(directories) for _ in of_pass],
            settings.features,
            signals,
            batch_size=settings.saes.batch_size,
            save_every=settings.run.save_every,
        )
        for each in inspected:
            for path in write_results(each, others, models, settings):
                print(path, flush=True)
            remove_saves(each)
    return 0


if __name__ == "__main__":
    run_script(main)
