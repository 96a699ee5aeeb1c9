#!/usr/bin/env python
"""Measures sparse autoencoders on real activations of their language model, against published standards.

    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500224
    python evaluate_sae_real_activations.py --sae_path ./my_sae --model_name ./my_model --layer 12 --dataset wikitext

    # SAEBench's protocol, and SAEBench itself
    python evaluate_sae_real_activations.py --sae_path ./my_sae --protocol saebench --saebench core

    # publish the SAE, with a model card that shows the results
    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0 --push_to_hub my_name/my_sae

    # several SAEs in one pass of the model: all checkpoints or layers of a run, or SAEs of several libraries
    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0
    python evaluate_sae_real_activations.py --sae_path ./my_sae EleutherAI/sae-llama-3-8b-32x:layers.12

    # how many features of an SAE are found again by other seeds
    python evaluate_sae_real_activations.py --stability "checkpoints/demo_*/*/final_*"

    # an SAE of a synthetic model, whose features are known: which of them it found
    python evaluate_sae_real_activations.py --sae_path checkpoints/synthetic_1a2b3c4d/k3j2h1g0 --synthetic

    # an SAE whose library does not record the text of its training, on the held-out text of another SAE
    python evaluate_sae_real_activations.py --sae_path ./sparsify/layers.12 --like checkpoints/demo_1a2b3c4d/k3j2h1g0

    # an SAE whose library does not record where and at which positions it was trained
    python evaluate_sae_real_activations.py --sae_path ./my_sae --model_name ./my_model --dataset wikitext \\
        --hook_name blocks.12.hook_mlp_out --skip_positions 1 --exclude_special_tokens true

SAEs of SAELens (a directory, or release:sae_id), sparsify and dictionary_learning are recognized by their files.
By default, model, hook, text and held-out documents are those of the training. The table of
results goes to standard output; evaluation.json, report.html and report.md go into the directory of the SAE.
"""

from __future__ import annotations

import logging
import sys

from sae_toolkit.settings.evaluation import parse_evaluation_flags
from sae_toolkit.terminal.console import importing, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")


def main() -> int:
    settings = parse_evaluation_flags(__doc__)
    set_up_logging(settings.results.verbose, settings.results.quiet)

    # Imported here because SAELens takes seconds to import, and --help and a mistyped flag do not need it.
    with importing("SAELens"):
        from rich.console import Console
        from sae_lens.util import dtype_to_str

        from sae_toolkit.evaluation.further import prepare_further_evaluations
        from sae_toolkit.evaluation.massive_activations import measure_norm_limits
        from sae_toolkit.evaluation.run import evaluate_saes
        from sae_toolkit.evaluation.saebench.run import check_evals, parse_evals, run_saebench
        from sae_toolkit.evaluation.setup import prepare_evaluations
        from sae_toolkit.model.devices import choose_lm_dtype
        from sae_toolkit.model.loading import LanguageModels
        from sae_toolkit.reports.publish import check_may_publish, check_publishable, publish
        from sae_toolkit.reports.results import Result, choose_outputs, write_over_layers, write_results
        from sae_toolkit.reports.tables import render, render_several

    evals = parse_evals(settings.measurements.saebench) if settings.measurements.saebench is not None else ()
    if settings.results.push_to_hub:
        check_may_publish(settings.results.push_to_hub)
    groups = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    if settings.results.push_to_hub:
        check_publishable(groups)
    outputs = choose_outputs(settings.results.output_json, groups)
    check_evals(evals, groups)
    further = prepare_further_evaluations(settings, groups)
    lm_dtype = choose_lm_dtype(settings.saes.lm_dtype, groups[0].device)
    models = LanguageModels(groups[0].device, lm_dtype)
    results: list[Result] = []
    for group, paths in zip(groups, outputs, strict=True):
        model = models.load(group.model, group.hook_name)
        group = measure_norm_limits(group, model, batch_size=settings.saes.batch_size)
        of_group = write_results(group, evaluate_saes(group, model, batch_size=settings.saes.batch_size), paths)
        for result in of_group:
            if not settings.measurements.no_diagnosis and result.is_unhealthy:
                result.diagnose(model, settings)
        for each in further:
            of_each = each.measure(group, model, settings.saes.batch_size)
            for result, measured in zip(of_group, of_each, strict=True):
                result.add(each.name, measured.results, measured.of_features)
        results += of_group
    del models, model  # sae-bench loads the model itself
    for result in results:
        if evals:
            result.add(
                "saebench",
                run_saebench(
                    evals,
                    sae=result.evaluated.sae,
                    model=result.group.model.name,
                    hook_name=result.group.hook_name,
                    rows_NT=result.group.rows_NT[: result.group.n_loss_rows],
                    batch_size=settings.saes.batch_size,
                    device=result.group.device,
                    dtype=dtype_to_str(lm_dtype),
                ),
            )
        result.record()
    write_over_layers(results)
    summaries = [result.summary for result in results]
    Console(width=None if sys.stdout.isatty() else 100).print(
        render(summaries[0]) if len(summaries) == 1 else render_several(summaries)
    )
    if settings.results.push_to_hub:
        log.info("published: %s", publish(settings.results.push_to_hub, results))
    return 0


if __name__ == "__main__":
    run_script(main)
