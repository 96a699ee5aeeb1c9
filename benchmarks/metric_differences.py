#!/usr/bin/env python
"""Prints what each tool reports of one SAE on the same rows: the table of docs/metrics.md.

    python benchmarks/metric_differences.py --sae_path checkpoints/demo_topk_1a2b3c4d/k3j2h1g0/final_500224

The SAE must be a TopK SAE, since every tool can represent these: sparsify's SparseCoder and dictionary_learning's
AutoEncoderTopK take its weights unchanged. Every number comes from the tool's own code. SAEBench and
dictionary_learning run in environments of their own, which `./run_tests.sh --parity` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import numpy as np
import torch
from eval_speed import prepare, run_evals_inputs
from sae_lens import run_evals

from sae_toolkit.model.loading import load_language_model

# A program for dictionary_learning's environment. Its arguments: a directory with ae.pt and config.json, and a file of
# activations [B, N, D].
_DICTIONARY_LEARNING = """
import json, sys
import numpy as np, torch
from dictionary_learning.evaluation import evaluate
from dictionary_learning.utils import load_dictionary
dictionary, _ = load_dictionary(sys.argv[1], "cpu")
batches = torch.from_numpy(np.load(sys.argv[2]))
with torch.no_grad():
    print(json.dumps(evaluate(dictionary, iter(batches), n_batches=len(batches))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae_path", required=True)
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    flags = parser.parse_args()
    flags.device, flags.lm_dtype, flags.sae_path = "cpu", "float32", [flags.sae_path]
    prepared = prepare(flags)
    sae = prepared.saes[0].sae
    if sae.cfg.architecture() != "topk":
        sys.exit(f"error: --sae_path: a {sae.cfg.architecture()} SAE; give a topk one")

    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for protocol in ("health", "saebench"):
            result = evaluate(flags, protocol, Path(directory) / f"{protocol}.json")
            table[f"this project, `{protocol}`"] = result["metrics"]
        core = result["saebench"]["core"]
    table["sae-bench 0.6.0, `core`"] = named(core, dead=1 - core["misc_metrics"]["frac_alive"])

    for dtype in (torch.float32, torch.bfloat16):
        model = load_language_model(prepared.model, prepared.hook_name, "cpu", dtype)
        if dtype == torch.float32:
            rows_NT = torch.from_numpy(prepared.rows_NT.astype(np.int64))
            acts_BND = torch.stack([model.activations(rows).flatten(0, 1) for rows in rows_NT.split(flags.batch_size)])
        bridge, store, scaler, config = run_evals_inputs(flags, prepared, model)
        theirs, _ = run_evals(sae, store, bridge, scaler, config)
        table[f"SAELens 6.54.12 `run_evals`, {str(dtype).removeprefix('torch.')}"] = named(theirs)

    for which, batches in (("all positions", acts_BND), ("scored positions", without_massive(acts_BND, prepared))):
        table[f"sparsify 1.3.3, {which}"] = sparsify(sae, batches)
        table[f"dictionary_learning 0.1.0, {which}"] = dictionary_learning(sae, batches)
    show(table)


def evaluate(flags: argparse.Namespace, protocol: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, ROOT / "evaluate_sae_real_activations.py", "--sae_path", flags.sae_path[0]]
    command += ["--protocol", protocol, "--lm_dtype", "float32", "--device", "cpu", "--output_json", output]
    command += ["--num_samples", flags.num_samples, "--batch_size", flags.batch_size, "--n_features", 0]
    command += ["--saebench", "core"] if protocol == "saebench" else []
    subprocess.run([str(part) for part in command], check=True, stdout=2)
    return json.loads(output.read_text())


def named(theirs: dict[str, Any], dead: float | None = None) -> dict[str, float]:
    """Returns the metrics of SAELens's or SAEBench's categories under this project's names."""
    performance = theirs["model_performance_preservation"]
    found = {
        "loss_recovered": performance["ce_loss_score"],
        "ce_clean": performance["ce_loss_without_sae"],
        "ce_sae": performance["ce_loss_with_sae"],
        "ce_zero": performance["ce_loss_with_ablation"],
        "kl_sae": theirs["model_behavior_preservation"]["kl_div_with_sae"],
        "explained_variance": theirs["reconstruction_quality"]["explained_variance"],
        "cosine_similarity": theirs["reconstruction_quality"]["cossim"],
        "l2_ratio": theirs["shrinkage"]["l2_ratio"],
        "l0": theirs["sparsity"]["l0"],
    }
    return found if dead is None else found | {"dead_features": dead}


def without_massive(acts_BND: torch.Tensor, prepared: Any) -> torch.Tensor:
    """Returns the batches without the positions that the SAE was not trained on, all cut to the shortest batch."""
    positions = prepared.saes[0].positions
    kept_BN = torch.from_numpy(positions.keeps_tokens(prepared.rows_NT, prepared.assistant_NT)).view(acts_BND.shape[:2])
    kept_BN &= positions.keeps_norms(acts_BND)
    n = int(kept_BN.sum(1).min())
    return torch.stack([acts[kept][:n] for acts, kept in zip(acts_BND, kept_BN, strict=True)])


def sparsify(sae: Any, batches_BND: torch.Tensor) -> dict[str, float]:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(sae.cfg.d_in, SparseCoderConfig(num_latents=sae.cfg.d_sae, k=sae.cfg.k))
    coder.load_state_dict(
        {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    )
    with torch.no_grad():
        outputs = [coder(acts_ND) for acts_ND in batches_BND]
    l0 = torch.cat([(output.latent_acts != 0).sum(1).double() for output in outputs]).mean().item()
    return {"explained_variance": 1 - torch.stack([output.fvu for output in outputs]).mean().item(), "l0": l0}


def dictionary_learning(sae: Any, batches_BND: torch.Tensor) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        state = {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": sae.b_enc,
            "decoder.weight": sae.W_dec.T,
            "b_dec": sae.b_dec,
            "k": torch.tensor(sae.cfg.k),
            "threshold": torch.tensor(-1.0),
        }
        torch.save({n: t.detach().clone() for n, t in state.items()}, Path(directory) / "ae.pt")
        config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": sae.cfg.k}}
        (Path(directory) / "config.json").write_text(json.dumps(config))
        np.save(Path(directory) / "acts.npy", batches_BND.numpy())
        python = ROOT / ".venv-dictionary-learning" / "bin" / "python"
        command = [str(python), "-c", _DICTIONARY_LEARNING, directory, str(Path(directory) / "acts.npy")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    return {
        "explained_variance": theirs["frac_variance_explained"],
        "cosine_similarity": theirs["cossim"],
        "l2_ratio": theirs["l2_ratio"],
        "l0": theirs["l0"],
        "dead_features": 1 - theirs["frac_alive"],
    }


def show(table: dict[str, dict[str, float]]) -> None:
    columns = ("loss_recovered", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "explained_variance")
    columns += ("cosine_similarity", "l2_ratio", "l0", "dead_features")
    print(f"| | {' | '.join(f'`{column}`' for column in columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for tool, found in table.items():
        print(f"| {tool} | {' | '.join(f'{found[c]:.4f}' if c in found else '' for c in columns)} |")


if __name__ == "__main__":
    main()
