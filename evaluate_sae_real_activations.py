#!/usr/bin/env python
"""Measures a sparse autoencoder on real activations of its language model, against published standards.

    python evaluate_sae_real_activations.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500736
    python evaluate_sae_real_activations.py --sae_path ./my_sae --model_name ./my_model --layer 12 --dataset wikitext

Model, hook, text and the documents held out of training come from the checkpoint unless given. The table
goes to standard output, the numbers to evaluation.json beside the checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from sae_toolkit.console import Parser, run_script, set_up_logging
from sae_toolkit.errors import UserError

log = logging.getLogger("sae_toolkit")


def parse_flags() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--sae_path", required=True, help="directory of the SAE")
    add("--model_name", help="Hugging Face id, directory, .gguf file or embedded model (default: the SAE's)")
    add("--layer", type=int, help="layer of the hook (default: the SAE's)")
    add("--dataset", help="Hugging Face id, file, directory or embedded text (default: what the SAE did not train on)")
    add("--dataset_config", help="configuration of the data set (default: found)")
    add(
        "--dataset_split",
        help="split (default: the SAE's own data: as in training; another: test, validation or train)",
    )
    add("--text_column", help="column of the text or of the token ids (default: found)")
    add("--fallback_dataset", help="data set to take where --dataset cannot be opened")
    add(
        "--num_samples",
        type=int,
        help="sequences (default: as many as make 50,000 tokens; 20,000 for what needs the whole model)",
    )
    add("--context_length", type=int, help="tokens in a sequence (default: as in training)")
    add("--batch_size", type=int, default=8, help="sequences in one forward pass (default: 8)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: CUDA where torch sees it")
    add(
        "--lm_dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the language model's dtype; auto: bfloat16 where the hardware computes in it, else float32",
    )
    add("--seed", type=int, default=42, help="of the sequences drawn (default: 42)")
    add("--output_json", type=Path, help="where the results go (default: evaluation.json beside the checkpoint)")
    add("--verbose", action="store_true", help="say more")
    flags = parser.parse_args()
    for name in ("num_samples", "context_length", "batch_size"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    return flags


def main() -> int:
    flags = parse_flags()
    set_up_logging(flags.verbose)

    # SAELens takes seconds to import: not for --help or a mistyped flag.
    from rich.console import Console

    from sae_toolkit.evaluation import evaluate_sae
    from sae_toolkit.evaluation_setup import prepare_evaluation
    from sae_toolkit.health import judge
    from sae_toolkit.models import choose_lm_dtype, load_language_model
    from sae_toolkit.report import check_writable, flatten, render, summarize, write_json
    from sae_toolkit.wandb_run import training_wandb_run

    output_json = flags.output_json or Path(flags.sae_path) / "evaluation.json"
    prepared = prepare_evaluation(flags)
    check_writable(output_json)
    lm_dtype = choose_lm_dtype(flags.lm_dtype, prepared.device)
    model = load_language_model(prepared.model, prepared.hook_name, prepared.device, lm_dtype)
    evaluation = evaluate_sae(prepared, model, batch_size=flags.batch_size)
    health = judge(evaluation.metrics)
    summary = summarize(prepared, evaluation, health)
    write_json(output_json, summary)
    Console().print(render(prepared, evaluation, health))
    wandb_run = training_wandb_run(Path(flags.sae_path))
    wandb_run.summarize(flatten(summary, "evaluation"))
    wandb_run.finish()
    log.info("written to %s", output_json)
    return 0


if __name__ == "__main__":
    run_script(main)
