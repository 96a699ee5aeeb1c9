#!/usr/bin/env python
"""Measures sparse autoencoders on real activations of their language model, against published standards.

    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500736
    python evaluate_sae_real_activations.py --sae_path ./my_sae --model_name ./my_model --layer 12 --dataset wikitext

  # SAEBench's protocol, and SAEBench itself
    python evaluate_sae_real_activations.py --sae_path ./my_sae --protocol saebench --saebench core

  # published with a model card of what was measured
    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0 --push_to_hub my_name/my_sae

  # several SAEs in one pass of the model: a run with all its checkpoints or layers, or SAEs of any library
    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0
    python evaluate_sae_real_activations.py --sae_path ./my_sae EleutherAI/sae-llama-3-8b-32x:layers.12

  # an SAE of a library that does not keep what it was trained on, on the text that another one did not see
    python evaluate_sae_real_activations.py --sae_path ./sparsify/layers.12 --like checkpoints/demo_1a2b3c4d/k3j2h1g0

SAEs may be SAELens's (a directory, or release:sae_id), sparsify's or dictionary_learning's; which, is found.
Model, hook, text and the documents held out of training come from the checkpoint unless given. The table
goes to standard output; evaluation.json, report.html and report.md beside the checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.terminal.console import Parser, add_talk_flags, run_script, set_up_logging

log = logging.getLogger("sae_toolkit")

_LARGEST = 10**15  # far above any sensible count, far below what overflows


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--sae_path",
        required=True,
        nargs="+",
        metavar="SAE",
        help="directory of an SAE or of a run, release:sae_id, Hugging Face id[:hookpoint], or a pattern",
    )
    add(
        "--like",
        metavar="SAE",
        help="measure them as this SAE is: its model, hook, text, held-out documents and positions stand for theirs",
    )
    add("--model_name", help="Hugging Face id, directory, .gguf file or embedded model (default: the SAE's)")
    add("--layer", type=int, help="layer of the hook (default: the SAE's)")
    add("--trust_remote_code", action="store_true", help="let code that comes with the model run")
    add("--dataset", help="Hugging Face id, file, directory or embedded text (default: what the SAE did not train on)")
    add("--dataset_config", help="configuration of the data set (default: found)")
    add(
        "--dataset_split",
        help="split (default: the SAE's own data: as in training; another: test, validation or train)",
    )
    add("--text_column", help="column of the text or of the token ids (default: found)")
    add("--fallback_dataset", help="data set to take where --dataset cannot be opened")
    add(
        "--protocol",
        default="health",
        choices=("health", "saebench"),
        help="health: the SAE stands in where it was trained to; saebench: at every position, with SAEBench's averages",
    )
    add("--saebench", metavar="EVALS", help="run sae-bench too, in its own environment: core,absorption,...")
    add(
        "--num_samples",
        type=int,
        help="sequences (default: as many as make 50,000 tokens; 20,000 for what needs the whole model)",
    )
    add(
        "--dead_tokens",
        type=int,
        help="count dead features on at least so many tokens (default: those of the other metrics)",
    )
    add("--context_length", type=int, help="tokens in a sequence (default: as in training)")
    add("--batch_size", type=int, default=8, help="sequences in one forward pass (default: 8)")
    add("--features", type=int, nargs="+", default=[], help="features to show in the report, beside a sample of them")
    add("--n_features", type=int, default=50, help="size of that sample, spread over firing rates (default: 50)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: CUDA where torch sees it")
    add(
        "--lm_dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the language model's dtype; auto: bfloat16 where the hardware computes in it, else float32",
    )
    add("--seed", type=int, default=42, help="of the sequences drawn (default: 42)")
    add(
        "--output_json",
        type=Path,
        help="where the results go, the reports beside them (default: evaluation.json beside the checkpoint)",
    )
    add("--no_diagnosis", action="store_true", help="do not look for what makes an unhealthy SAE so")
    add("--push_to_hub", metavar="OWNER/NAME", help="publish the SAEs there, with a model card of what was measured")
    add_talk_flags(parser)
    flags = parser.parse_args(argv)
    for name in ("num_samples", "context_length", "batch_size", "dead_tokens"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    for name in ("layer", "n_features", "seed"):
        if (value := getattr(flags, name)) is not None and value < 0:
            raise UserError(f"--{name} {value}: must be 0 or more")
    for name in ("num_samples", "context_length", "batch_size", "dead_tokens", "seed"):
        if (getattr(flags, name) or 0) > _LARGEST:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at most {_LARGEST:,}")
    if flags.push_to_hub and flags.protocol != "health":
        raise UserError(f"--push_to_hub {flags.push_to_hub}: the model card has the numbers of --protocol health")
    return flags


def main() -> int:
    flags = parse_flags()
    set_up_logging(flags.verbose, flags.quiet)

    # SAELens takes seconds to import: not for --help or a mistyped flag.
    from rich.console import Console
    from sae_lens.util import dtype_to_str

    from sae_toolkit.evaluation.run import evaluate_saes
    from sae_toolkit.evaluation.saebench.run import check_evals, parse_evals, run_saebench
    from sae_toolkit.evaluation.setup import prepare_evaluations
    from sae_toolkit.model.devices import choose_lm_dtype
    from sae_toolkit.model.loading import LanguageModels
    from sae_toolkit.reports.publish import check_may_publish, publish
    from sae_toolkit.reports.results import Result, choose_outputs, write_over_layers, write_results
    from sae_toolkit.reports.tables import render, render_several

    evals = parse_evals(flags.saebench) if flags.saebench is not None else ()
    if flags.push_to_hub:
        check_may_publish(flags.push_to_hub)
    groups = prepare_evaluations(flags)
    outputs = choose_outputs(flags.output_json, groups)
    check_evals(evals, groups)
    lm_dtype = choose_lm_dtype(flags.lm_dtype, groups[0].device)
    models = LanguageModels(groups[0].device, lm_dtype)
    results: list[Result] = []
    for group, paths in zip(groups, outputs, strict=True):
        model = models.load(group.model, group.hook_name)
        of_group = write_results(group, evaluate_saes(group, model, batch_size=flags.batch_size), paths)
        for result in of_group:
            if not flags.no_diagnosis and result.is_unhealthy:
                result.diagnose(model, flags.batch_size)
        results += of_group
    del models, model  # sae-bench loads its own
    for result in results:
        if evals:
            result.add_saebench(
                run_saebench(
                    evals,
                    sae=result.evaluated.sae,
                    model=result.group.model.name,
                    hook_name=result.group.hook_name,
                    rows_NT=result.group.rows_NT[: result.group.n_loss_rows],
                    batch_size=flags.batch_size,
                    device=result.group.device,
                    dtype=dtype_to_str(lm_dtype),
                )
            )
        result.record()
    write_over_layers(results)
    summaries = [result.summary for result in results]
    Console(width=None if sys.stdout.isatty() else 100).print(
        render(summaries[0]) if len(summaries) == 1 else render_several(summaries)
    )
    if flags.push_to_hub:
        log.info("published: %s", publish(flags.push_to_hub, results))
    return 0


if __name__ == "__main__":
    run_script(main)
