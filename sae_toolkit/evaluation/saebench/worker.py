"""A program that runs evals of sae-bench on one SAE. `run.py` starts it in the environment of sae-bench:

python -m sae_toolkit.evaluation.saebench.worker JOB.json

JOB.json holds the fields of `Job`. The program writes RESULT.json, {name of the eval: its metrics}, into the output
directory. If it fails, it writes ERROR.json, which holds the error in one line.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE, ActivationsStore
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.devices import choose_device
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.terminal.console import set_up_logging

log = logging.getLogger("sae_toolkit.evaluation.saebench.worker")

_SAE_NAME = "sae_toolkit"  # the SAE's name in sae-bench's result files


@dataclass(frozen=True)
class Job:
    """The evals to run, and the SAE, model and text to run them on.

    Args:
        evals: names in `EVALS` of `run.py`.
        sae: directory of the SAE, in SAELens's inference form.
        model: Hugging Face id, directory, .gguf file or embedded model.
        hook_name: TransformerLens's name of the hook.
        rows: .npy file of token ids, [n_batches * batch_size, context_size].
        batch_size: rows in one forward pass.
        n_batches: number of batches.
        device: cpu, cuda or cuda:N.
        dtype: float32, bfloat16 or float16: the dtype of the language model and, as in sae-bench, of the SAE.
        output: directory for the results.
    """

    evals: list[str]
    sae: str
    model: str
    hook_name: str
    rows: str
    batch_size: int
    n_batches: int
    device: str
    dtype: str
    output: str


class RowStore(ActivationsStore):
    """An activations store that serves the given rows in order, again and again. It raises if SAELens serves others."""

    rows_NT: torch.Tensor
    n_served: int = 0

    def get_batch_tokens(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens_BT = super().get_batch_tokens(batch_size, *args, **kwargs)
        start = self.n_served % len(self.rows_NT)
        if not torch.equal(tokens_BT.cpu(), self.rows_NT[start : start + len(tokens_BT)]):
            raise RuntimeError(f"SAELens's store served other tokens than rows {start} to {start + len(tokens_BT) - 1}")
        self.n_served += len(tokens_BT)
        return tokens_BT


def load_sae(job: Job) -> SAE[Any]:
    """Loads the SAE, and sets the fields of its configuration that sae-bench reads."""
    sae = SAE.load_from_disk(job.sae, device=job.device)
    sae.cfg.metadata.model_name = job.model
    sae.cfg.metadata.hook_name = job.hook_name
    sae.cfg.metadata.prepend_bos = bool(sae.cfg.metadata.prepend_bos)  # SAELens refuses None; the rows do not change
    sae.cfg.metadata.context_size = np.load(job.rows, mmap_mode="r").shape[1]
    sae.cfg.metadata.seqpos_slice = None
    general_utils.load_and_format_sae(_SAE_NAME, sae, job.device)
    return sae.to(device=job.device, dtype=general_utils.str_to_dtype(job.dtype))


def run_core(job: Job) -> dict[str, Any]:
    """Runs sae-bench's `core` on the given rows, as its `multiple_evals` does.

    Returns:
        SAEBench's categories, each with its metrics by name.
    """
    sae = load_sae(job)
    source = find_model(job.model)
    tokenizer = load_tokenizer(source)
    dtype = general_utils.str_to_dtype(job.dtype)
    language_model = load_language_model(source, job.hook_name, job.device, dtype).model
    language_model.config.use_cache = False
    model = TransformerBridge.boot_transformers(job.model, hf_model=language_model, tokenizer=tokenizer, dtype=dtype)

    rows_NT = torch.from_numpy(np.load(job.rows).astype(np.int64))
    if len(rows_NT) != job.n_batches * job.batch_size:
        raise ValueError(f"{len(rows_NT)} rows for {job.n_batches} batches of {job.batch_size}")
    context_size = rows_NT.shape[1]
    store = RowStore.from_sae(
        model,
        sae,
        dataset=Dataset.from_dict({"tokens": rows_NT.numpy()}),
        context_size=context_size,
        streaming=False,
        store_batch_size_prompts=job.batch_size,
        total_tokens=len(rows_NT),
        device=job.device,
    )
    store.rows_NT = rows_NT
    config = CoreEvalConfig(
        model_name=job.model,
        llm_dtype=job.dtype,
        batch_size_prompts=job.batch_size,
        n_eval_reconstruction_batches=job.n_batches,
        n_eval_sparsity_variance_batches=job.n_batches,
        dataset=job.rows,
        context_size=context_size,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    metrics, feature_metrics = core.run_evals(
        sae=sae,
        activation_store=store,
        model=model,
        eval_config=config,
        ignore_tokens={tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None},
        verbose=True,
    )
    if store.n_served != 2 * len(rows_NT):
        raise RuntimeError(f"sae-bench read {store.n_served} rows in two passes over {len(rows_NT)}")
    log.info("core: both passes read the %d rows given, in their order", len(rows_NT))
    metrics["misc_metrics"] = core.calculate_misc_metrics(feature_metrics)
    return metrics


# Name of the eval -> module under sae_bench.evals, class of its configuration, and fields that are not the defaults.
_RUN_EVALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "absorption": ("absorption", "AbsorptionEvalConfig", {}),
    "autointerp": ("autointerp", "AutoInterpEvalConfig", {}),
    "mdl": ("mdl", "MDLEvalConfig", {}),
    "meta_structure": ("meta_structure", "MetaStructureEvalConfig", {}),
    "ravel": ("ravel", "RAVELEvalConfig", {}),
    "scr": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": True}),
    "tpp": ("scr_and_tpp", "ScrAndTppEvalConfig", {"perform_scr": False}),
    "sparse_probing": ("sparse_probing", "SparseProbingEvalConfig", {}),
    "sparse_probing_sae_probes": ("sparse_probing_sae_probes", "SparseProbingSaeProbesEvalConfig", {}),
    "unlearning": ("unlearning", "UnlearningEvalConfig", {}),
}


def run_other(name: str, job: Job, output: Path) -> dict[str, Any]:
    """Runs an eval other than `core` by its `run_eval`, with its own data and default settings.

    Args:
        name: name in `_RUN_EVALS`.
        job: what to run it on.
        output: empty directory for sae-bench's result file.

    Returns:
        The metrics in that file.
    """
    module_name, config_name, fields = _RUN_EVALS[name]
    package = f"sae_bench.evals.{module_name}"
    config_class = getattr(importlib.import_module(f"{package}.eval_config"), config_name)
    common = {"model_name": short_name(job.model), "llm_dtype": job.dtype, "llm_batch_size": job.batch_size}
    known = config_class.__dataclass_fields__
    config = config_class(**fields, **{key: value for key, value in common.items() if key in known})
    arguments = {"api_key": os.environ["OPENAI_API_KEY"]} if name == "autointerp" else {}
    importlib.import_module(f"{package}.main").run_eval(
        config, [(_SAE_NAME, load_sae(job))], job.device, output_path=str(output), force_rerun=True, **arguments
    )
    files = list(output.rglob("*_eval_results.json"))
    if not files:
        raise UserError(f"--saebench {name}: sae-bench wrote no result; see its own lines above for the reason")
    result = json.loads(files[0].read_text())
    return result.get("eval_result_metrics") or result["eval_results"]


def short_name(model: str) -> str:
    """Returns the model's name without its owner, as sae-bench expects it, if TransformerLens knows that short name."""
    short = model.rpartition("/")[2]
    try:
        return short if get_official_model_name(short) == get_official_model_name(model) else model
    except ValueError:
        return model


def main() -> int:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    set_up_logging()
    results = {}
    try:
        choose_device(job.device)
        for name in job.evals:
            output = Path(job.output) / name
            output.mkdir()
            torch.set_grad_enabled(True)  # mdl turns it off for the whole process
            results[name] = run_core(job) if name == "core" else run_other(name, job, output)
            (Path(job.output) / "RESULT.json").write_text(json.dumps(results, indent=2))
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        (Path(job.output) / "ERROR.json").write_text(json.dumps(message))
        if not isinstance(error, UserError):
            traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
