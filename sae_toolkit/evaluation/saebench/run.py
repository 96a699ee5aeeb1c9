"""Runs sae-bench 0.6.0 itself, in an environment of its own, and refuses the evals that cannot run here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.evaluation.saebench.reliability import reliability_note
from sae_toolkit.files.hub import check_repository
from sae_toolkit.files.own_environments import OwnEnvironment
from sae_toolkit.model.hooks import is_transformer_lens_name
from sae_toolkit.text.token_ids import TokenIds

log = logging.getLogger(__name__)

ENVIRONMENT = OwnEnvironment(
    "saebench",
    "sae-bench",
    "--saebench",
    imports="sae_bench.evals.core.main",
    python_versions=((3, 11), (3, 12)),
    because="sae-bench needs numpy 1.26",
    takes="2.5 GB, some minutes",
)

_BIAS_IN_BIOS = "LabHC/bias_in_bios"
_AMAZON_REVIEWS = "canrager/amazon_reviews_mcauley_1and5"
_FORGET_CORPUS = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl")


@dataclass(frozen=True)
class Eval:
    """One of sae-bench's evals, and what it needs apart from an SAE.

    Args:
        measures: what it measures, in a few words.
        hooked_transformer: whether it loads the model by name through TransformerLens's `HookedTransformer`.
        datasets: data sets that it reads from the Hugging Face Hub.
        models: the only models that it supports; empty if it supports any.
        min_parameters: number of parameters that a model needs at least for meaningful results.
        api_key: environment variable with the API key of its judge, if it has one.
        file: file that must be in the working directory, and where to get it.
    """

    measures: str
    hooked_transformer: bool = True
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    min_parameters: int = 0
    api_key: str | None = None
    file: tuple[Path, str] | None = None


# From the source of sae-bench 0.6.0: evals/*/main.py and eval_config.py, sae_bench_utils/dataset_utils.py, and for
# unlearning its README.
EVALS: dict[str, Eval] = {
    "core": Eval("L0, losses with the SAE in place, reconstruction", hooked_transformer=False),
    "meta_structure": Eval("how far the decoder is explained by an SAE trained on it", hooked_transformer=False),
    "absorption": Eval("first-letter features that others absorb", min_parameters=1_000_000_000),
    "autointerp": Eval(
        "how well a judge's explanations predict features",
        datasets=("monology/pile-uncopyrighted",),
        api_key="OPENAI_API_KEY",
    ),
    "mdl": Eval("description length of the features", datasets=("HuggingFaceFW/fineweb",)),
    "ravel": Eval(
        "disentanglement of attributes",
        hooked_transformer=False,
        datasets=("adamkarvonen/ravel_prompts",),
        models=("google/gemma-2-2b", "EleutherAI/pythia-160m-deduped"),
    ),
    "scr": Eval("removal of spurious correlations", datasets=(_BIAS_IN_BIOS, _AMAZON_REVIEWS)),
    "tpp": Eval("targeted perturbation of probes", datasets=(_BIAS_IN_BIOS, _AMAZON_REVIEWS)),
    "sparse_probing": Eval(
        "probes on the few best features",
        datasets=(
            _BIAS_IN_BIOS,
            _AMAZON_REVIEWS,
            "codeparrot/github-code",
            "fancyzhx/ag_news",
            "Helsinki-NLP/europarl",
        ),
    ),
    "sparse_probing_sae_probes": Eval("the same on the 113 data sets that come with sae-probes"),
    "unlearning": Eval(
        "forgetting biology and nothing else",
        datasets=("cais/wmdp", "cais/mmlu", "wikitext"),
        models=("google/gemma-2-2b-it", "google/gemma-2-9b-it"),
        file=(_FORGET_CORPUS, "on request from the authors of cais/wmdp-corpora"),
    ),
}


def parse_evals(text: str) -> tuple[str, ...]:
    """Returns the names in a list such as `core,absorption`, each once, in the order given.

    Raises:
        UserError: a name is not in `EVALS`, or the list is empty.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in EVALS]
    if unknown or not names:
        wrong = f"no eval {', '.join(unknown)}" if unknown else "no eval named"
        raise UserError(f"--saebench {text}: {wrong}; choose from {', '.join(EVALS)}")
    return names


def check_evals(evals: Sequence[str], groups: Sequence[PreparedEvaluation]) -> None:
    """Checks that the evals can run on the SAEs and their models, and makes sae-bench's environment.

    Does nothing if no eval is named. Warns of evals that were found to be unreliable.

    Raises:
        UserError: an eval cannot run here or on such a model, or the environment cannot be made.
    """
    if not evals:
        return
    for group in groups:
        if group.model.adapter is not None:
            raise UserError(
                f"--saebench: its environment has no peft for the adapter {group.model.name}; save the merged"
                " model and name that"
            )
        if isinstance(group.tokenizer, TokenIds):
            raise UserError(f"--saebench: it needs a tokenizer, and {group.model.name} has none; leave --saebench out")
        refuse_what_cannot_run(
            evals,
            model_name=group.model.name,
            n_parameters=group.model.n_parameters,
            hook_name=group.hook_name,
            architectures=[evaluated.sae.cfg.architecture() for evaluated in group.saes],
        )
    if note := reliability_note(evals):
        log.warning("--saebench: %s", note)
    ENVIRONMENT.python()


def refuse_what_cannot_run(
    evals: Sequence[str], *, model_name: str, n_parameters: int, hook_name: str, architectures: Iterable[str] = ()
) -> None:
    """Checks that evals can run, before any of them starts.

    The data sets of an eval are looked up on the Hugging Face Hub if nothing else refuses it.

    Args:
        evals: names in `EVALS`.
        model_name: Hugging Face id, directory, .gguf file or embedded model.
        n_parameters: number of parameters of the model.
        hook_name: hook of the SAE.
        architectures: architectures of the SAEs, by SAELens's names.

    Raises:
        UserError: an eval cannot run. The message lists every such eval with its reasons.
    """
    unknown = sorted(set(architectures) - set(SAE_CLASS_REGISTRY))
    if unknown:
        raise UserError(f"--saebench: sae-bench does not know SAEs of the architecture {unknown[0]}; leave it out")
    why_missing = cache(_why_missing)  # without a connection each lookup takes half a minute
    refusals = []
    for name in evals:
        needs = EVALS[name]
        reasons = _refuse_model(needs, model_name, n_parameters, hook_name)
        if needs.api_key and not os.environ.get(needs.api_key):
            reasons.append(f"its judge needs the environment variable {needs.api_key}")
        if needs.file and not needs.file[0].is_file():
            reasons.append(f"no file {needs.file[0]} (got {needs.file[1]})")
        if not reasons:
            missing = ((data, why) for data in needs.datasets if (why := why_missing(data)))
            reasons = [f"cannot read {data}: {why}" for data, why in islice(missing, 1)]
        if reasons:
            refusals.append(f"{name}: {', '.join(reasons)}")
    if refusals:
        raise UserError(f"--saebench: cannot run here: {'; '.join(refusals)}; leave them out")


def _refuse_model(needs: Eval, model_name: str, n_parameters: int, hook_name: str) -> list[str]:
    """Returns the reasons why an eval cannot run on a model and hook."""
    reasons = []
    if not is_transformer_lens_name(hook_name):
        reasons.append(f"the SAE's hook {hook_name} is not one of TransformerLens, such as blocks.0.hook_resid_post")
    if needs.models:
        if model_name.lower() not in {model.lower() for model in needs.models}:
            reasons.append(f"it supports only {' and '.join(needs.models)}, not {model_name}")
    elif needs.hooked_transformer and not _hooked_transformer_knows(model_name):
        reasons.append(f"HookedTransformer does not know the model {model_name}")
    if n_parameters < needs.min_parameters:
        reasons.append(
            f"its results mean nothing for a model of {n_parameters / 1e6:,.0f} M parameters, under"
            f" {needs.min_parameters / 1e9:.0f} B"
        )
    return reasons


def _hooked_transformer_knows(model_name: str) -> bool:
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        get_official_model_name(model_name)
    except ValueError:
        return False
    return True


def _why_missing(dataset: str) -> str | None:
    """Returns why a data set cannot be read from the Hugging Face Hub; None if it can."""
    try:
        check_repository(dataset, "dataset", "--saebench")
    except UserError as error:
        return str(error).removeprefix(f"--saebench {dataset}: ").rsplit(";", 1)[0]
    return None


def run_saebench(
    evals: Sequence[str],
    *,
    sae: SAE[Any],
    model: str,
    hook_name: str,
    rows_NT: np.ndarray,
    batch_size: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Runs sae-bench's evals on an SAE, in sae-bench's environment. Its progress goes to standard error.

    `core` reads the given rows twice, in their order, and applies the SAE at every position. It leaves out the rows
    after the last whole batch. The other evals read data of their own, with their default settings. The decoder norms
    of the SAE are not folded into its encoder.

    Args:
        evals: names in `EVALS`.
        sae: SAE for raw activations, on any device.
        model: Hugging Face id, directory, .gguf file or embedded model.
        hook_name: TransformerLens's name of the hook.
        rows_NT: token ids, [n_rows, context_size].
        batch_size: rows in one forward pass.
        device: cpu, cuda or cuda:N.
        dtype: float32, bfloat16 or float16: the dtype of the language model and, as in sae-bench, of the SAE.

    Returns:
        The metrics of each eval, in sae-bench's layout, such as `result["core"]["sparsity"]["l0"]`.

    Raises:
        UserError: the environment cannot be made, or sae-bench failed.
    """
    python = ENVIRONMENT.python()
    batch_size = min(batch_size, len(rows_NT))
    n_batches, n_left_out = divmod(len(rows_NT), batch_size)
    if n_left_out:
        log.warning("sae-bench: the last %d of %d rows do not fill a batch, and are left out", n_left_out, len(rows_NT))
    # Some evals leave gigabytes of activations in the working directory, so it is a temporary one.
    with tempfile.TemporaryDirectory(prefix="saebench-") as scratch:
        directory = Path(scratch).resolve()
        results = directory / "results"
        results.mkdir()
        sae.save_model(directory / "sae")
        np.save(directory / "rows.npy", rows_NT[: n_batches * batch_size].astype(np.uint32))
        if _FORGET_CORPUS.is_file():
            (directory / _FORGET_CORPUS).parent.mkdir(parents=True)
            (directory / _FORGET_CORPUS).symlink_to(_FORGET_CORPUS.resolve())
        job = directory / "job.json"
        job.write_text(
            json.dumps(
                {
                    "evals": list(evals),
                    "sae": str(directory / "sae"),
                    "model": str(Path(model).resolve()) if Path(model).exists() else model,
                    "hook_name": hook_name,
                    "rows": str(directory / "rows.npy"),
                    "batch_size": batch_size,
                    "n_batches": n_batches,
                    "device": device,
                    "dtype": dtype,
                    "output": str(results),
                }
            )
        )
        return _run_worker(python, job, evals, results)


def _run_worker(python: Path, job: Path, evals: Sequence[str], results: Path) -> dict[str, Any]:
    """Runs `worker.py` on a job file, in the directory of that file, and returns the content of its RESULT.json."""
    log.info("running sae-bench: %s", ", ".join(evals))
    # Standard output is for our table, so what sae-bench prints goes to standard error (2).
    done = subprocess.run(
        [str(python), "-m", "sae_toolkit.evaluation.saebench.worker", str(job)],
        cwd=job.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=2,
        check=False,
    )
    if done.returncode != 0:
        error = results / "ERROR.json"
        why = json.loads(error.read_text()) if error.is_file() else f"it ended with status {done.returncode}"
        raise UserError(f"--saebench {','.join(evals)}: sae-bench failed: {why}")
    return json.loads((results / "RESULT.json").read_text())
