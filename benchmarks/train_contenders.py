"""The trainings that train_speed.py times. Each runs in a process of its own and is stopped after the last timed step.

Libraries are imported by the functions that use them, so that the peak memory of a contender is its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import weakref
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from train_job import ROWS_PER_FORWARD, job

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {
    "this": "this project",
    "this_cached": "this project, cached activations",
    "saelens": "SAELens, its defaults",
    "saelens_fast": "SAELens, its fastest flags",
    "sparsify": "sparsify, Adam",
    "sparsify_signum": "sparsify, its default optimizer",
}


class _Finished(BaseException):
    """All timed steps are done. It is no `Exception`, so that the contender does not handle it as an error."""


def run_this(flags: argparse.Namespace, work_dir: Path, cache: bool = False) -> None:
    """Trains by sae_lens_train.py; with `cache` it writes its activations to disk, or reads them where they are."""
    import runpy

    size = job(flags)
    # SAELens's defaults: it trains at every position, and normalizes no activations.
    values = {
        "model_name": work_dir / "model",
        "dataset_path": work_dir / "tokens" / "train.parquet",
        "layer": size["layer"],
        "device": flags.device,
        "held_out_fraction": 0,
        "context_size": size["context"],
        "store_batch_size_prompts": ROWS_PER_FORWARD,
        "exclude_special_tokens": "false",
        "skip_positions": 0,
        "max_activation_norm_multiple": 0,
        "architecture": "topk",
        "expansion_factor": size["d_sae"] // size["d_in"],
        "k": size["k"],
        "lr": 3e-4,
        "train_batch_size_tokens": size["batch"],
        "training_tokens": (flags.warm_up + flags.steps + 8) * size["batch"],
        "checkpoint_path": work_dir / "runs",
        "wandb_mode": "offline",
    }
    if cache:
        values["cache_activations"] = work_dir / "activations"
    sys.argv = ["sae_lens_train.py", *(str(part) for name, value in values.items() for part in (f"--{name}", value))]
    runpy.run_path(str(ROOT / "sae_lens_train.py"), run_name="__main__")


# The flags of SAELens that make it faster at the same job. BENCHMARKS.md lists what else was tried.
SAELENS_FAST = {
    "cpu": ["--store_batch_size_prompts", "8"],
    "cpu_bfloat16": [
        *("--store_batch_size_prompts", "8", "--autocast", "true"),
        *("--model_from_pretrained_kwargs", '{"dtype": "bfloat16"}'),
    ],
    "cuda": [
        *("--store_batch_size_prompts", "8", "--autocast", "true", "--compile_sae", "true"),
        *("--model_from_pretrained_kwargs", '{"dtype": "bfloat16"}'),
    ],
}


def run_saelens(flags: argparse.Namespace, work_dir: Path, more: list[str]) -> None:
    """Trains by SAELens's own CLI, with its defaults and `more` flags."""
    from datasets import load_dataset
    from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, _parse_cfg_args

    size = job(flags)
    values = {
        "architecture": "topk",
        "model_name": work_dir / "model",
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": f"model.layers.{size['layer']}",
        "dataset_path": "tokens",
        "context_size": size["context"],
        "d_in": size["d_in"],
        "d_sae": size["d_sae"],
        "k": size["k"],
        "training_tokens": (flags.warm_up + flags.steps + 8) * size["batch"],
        "train_batch_size_tokens": size["batch"],
        "device": flags.device,
        "checkpoint_path": work_dir / "runs",
        "output_path": work_dir / "output",
    }
    cfg = _parse_cfg_args([str(part) for name, value in values.items() for part in (f"--{name}", value)] + more)
    # Given the path of a tokenized data set, the CLI asks the Hub for its tokenizer, even if it is a local file.
    dataset = load_dataset("parquet", data_files=str(work_dir / "tokens" / "train.parquet"), split="train")
    LanguageModelSAETrainingRunner(cfg=cfg, override_dataset=dataset).run()


def run_sparsify(flags: argparse.Namespace, work_dir: Path, optimizer: Literal["adam", "signum"]) -> None:
    """Trains by sparsify's Trainer."""
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if flags.device == "cpu" else "0")
    import torch
    from datasets import load_dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from transformers import AutoModel

    size = job(flags)
    config = TrainConfig(
        SaeConfig(num_latents=size["d_sae"], k=size["k"]),
        batch_size=size["batch"] // size["context"],
        optimizer=optimizer,
        lr=3e-4 if optimizer == "adam" else None,
        layers=[size["layer"]],
        save_dir=str(work_dir / "runs"),
        run_name="sparsify",
    )
    # sparsify's CLI loads the model in bfloat16 on a GPU, else in the dtype of the file.
    dtype = torch.bfloat16 if flags.device != "cpu" else "auto"
    model = AutoModel.from_pretrained(work_dir / "model", dtype=dtype, device_map={"": flags.device})
    dataset = load_dataset("parquet", data_files=str(work_dir / "tokens" / "train.parquet"), split="train")
    Trainer(config, dataset.with_format("torch"), model).fit()


def run_contender(flags: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Runs one contender in this process until the last timed step.

    Returns:
        `tokens_per_second` and `seconds` of the timed steps; `peak_gib`, the memory that the process took at most;
        with --profile also `spent`, the seconds in each part of a step.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from sae_toolkit.model.devices import choose_lm_dtype

    times: list[float] = []
    spent = _profile() if flags.profile else {}
    at_start: dict[str, float] = {}
    latest: weakref.ref[Any] | None = None  # weak, so that an optimizer's moments are freed with it
    synchronize = torch.cuda.synchronize if flags.device != "cpu" else lambda: None

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal latest
        # The steps of an earlier optimizer were those that a run measures itself by.
        if latest is None or optimizer is not latest():
            latest = weakref.ref(optimizer)
            times.clear()
        if len(times) in (flags.warm_up - 1, flags.warm_up + flags.steps - 1):
            synchronize()
        times.append(time.perf_counter())
        if len(times) == flags.warm_up:
            at_start.update(spent)
        if len(times) == flags.warm_up + flags.steps:
            raise _Finished

    register_optimizer_step_post_hook(after_step)
    bfloat16 = choose_lm_dtype("auto", flags.device) == torch.bfloat16
    fast = SAELENS_FAST["cuda" if flags.device != "cpu" else "cpu_bfloat16" if bfloat16 else "cpu"]
    with suppress(_Finished):
        {
            "this": lambda: run_this(flags, work_dir),
            "this_cached": lambda: run_this(flags, work_dir, cache=True),
            "saelens": lambda: run_saelens(flags, work_dir, []),
            "saelens_fast": lambda: run_saelens(flags, work_dir, fast),
            "sparsify": lambda: run_sparsify(flags, work_dir, "adam"),
            "sparsify_signum": lambda: run_sparsify(flags, work_dir, "signum"),
        }[flags.contender]()
    if len(times) < flags.warm_up + flags.steps:
        sys.exit(f"{flags.contender} ended after {len(times)} steps")
    peak = torch.cuda.max_memory_allocated() if flags.device != "cpu" else peak_resident()
    seconds = times[flags.warm_up + flags.steps - 1] - times[flags.warm_up - 1]
    return {
        "tokens_per_second": flags.steps * job(flags)["batch"] / seconds,
        "peak_gib": peak / 2**30,
        "seconds": seconds,
        "spent": {name: spent[name] - at_start.get(name, 0) for name in spent},
    }


def peak_resident() -> int:
    """Returns the peak of this process's resident memory in bytes.

    ru_maxrss may be the peak of its parent, since it counts the time before the process started its program.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _profile() -> dict[str, float]:
    """Returns a dict that the parts of this project's step add their seconds to, those of inner parts to both."""
    import torch

    import sae_toolkit.steps.trainer
    from sae_toolkit.activations.stream import ActivationStream
    from sae_toolkit.model.language_model import LanguageModel
    from sae_toolkit.steps.trainer import Trainer

    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                spent[name] += time.perf_counter() - start

        setattr(owner, method, outer)

    timed(LanguageModel, "activations", "next batch: language model")
    timed(ActivationStream, "__next__", "next batch")
    timed(torch.Tensor, "backward", "step: backward")
    timed(Trainer, "_grad_norm", "step: norm of the gradient")
    timed(torch.optim.Adam, "step", "step: Adam")
    timed(torch.nn.utils, "clip_grads_with_norm_", "step: clipping")
    timed(sae_toolkit.steps.trainer, "_count_firings", "step: counting firings")
    timed(Trainer, "step", "step")
    timed(Trainer, "build_train_step_log_dict", "reading the metrics")
    return spent
