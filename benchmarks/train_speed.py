#!/usr/bin/env python
"""Times training with this project, stock SAELens and sparsify on the same job, against the floor of the hardware.

    python benchmarks/train_speed.py                             # the embedded model on this machine, half an hour
    python benchmarks/train_speed.py --device cuda               # Llama-3-8B's shapes, random weights, on one GPU
    python benchmarks/train_speed.py --repeats 1 --steps 24      # a first look
    python benchmarks/train_speed.py --profile                   # where this project's time goes

The job: layer 12, TopK with k 64. On a CPU 4,608 features, contexts of 256, batches of 1,024, the embedded model; on
a GPU 131,072 features, contexts of 2,048, batches of 4,096, thirteen Llama-3-8B layers of random weights. All
contenders read the same model directory and the same rows of tokens, each in a process of its own, interleaved:

    this project               sae_lens_train.py; and again from the activations that --cache_activations left
    SAELens                    its own CLI with its defaults; and again with its fastest flags (see SAELENS_FAST)
    sparsify                   its Trainer with Adam

The clock runs from one optimizer step to another, after warm-up, in every contender through torch's own hook. Prints
medians, spread, peak memory (resident on a CPU, allocated on a GPU) and ratios as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

JOBS: dict[str, dict[str, Any]] = {
    "embedded": {"layer": 12, "k": 64, "d_in": 576, "d_sae": 4608, "context": 256, "batch": 1024},
    "llama3-8b": {
        **{"layer": 12, "k": 64, "d_in": 4096, "d_sae": 131_072, "context": 2048, "batch": 4096},
        "model": {"intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab": 128_256},
    },
    # To try the benchmark itself: its figures mean nothing.
    "tiny": {
        **{"layer": 1, "k": 4, "d_in": 32, "d_sae": 128, "context": 64, "batch": 128},
        "model": {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab": 49_152},
    },
}
ROWS_PER_FORWARD = 8
CONTENDERS = {
    "this": "this project",
    "this_cached": "this project, cached activations",
    "saelens": "SAELens, its defaults",
    "saelens_fast": "SAELens, its fastest flags",
    "sparsify": "sparsify",
}


class _Finished(BaseException):
    """The steps to be timed are done. No `Exception`, which a script would take for a bug."""


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--job", choices=list(JOBS), help="default: embedded on a CPU, llama3-8b on a GPU")
    parser.add_argument("--steps", type=int, default=104, help="timed steps (default: 104, 13 mixing buffers)")
    parser.add_argument("--warm_up", type=int, default=16, help="steps before them (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contender (default: 5)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--profile", action="store_true", help="only show where this project's time goes")
    parser.add_argument("--work_dir", default=None, help="where model, tokens and runs go (default: a new folder)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.job = flags.job or ("embedded" if flags.device == "cpu" else "llama3-8b")
    return flags


def job(flags: argparse.Namespace) -> dict[str, Any]:
    return JOBS[flags.job]


def n_rows(flags: argparse.Namespace) -> int:
    """Rows for all steps, and for what each contender reads ahead."""
    size = job(flags)
    return (flags.warm_up + flags.steps + 24) * size["batch"] // size["context"] + 160


def prepare(flags: argparse.Namespace, work_dir: Path) -> None:
    """Saves the model and the rows of tokens that every contender reads."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
    from sae_toolkit.model.loading import find_model, load_language_model, load_tokenizer
    from sae_toolkit.text.rows import ContextFormat, token_rows
    from sae_toolkit.text.sources import open_text

    size, source = job(flags), find_model(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(source)
    if flags.job == "embedded":
        model: Any = load_language_model(source, f"model.layers.{size['layer']}", "cpu", torch.float32).model
        fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "quantization_config")}
        unquantized = LlamaForCausalLM(AutoConfig.for_model("llama", **fields))
        unquantized.load_state_dict(model.state_dict())
        unquantized.save_pretrained(work_dir / "model")
        documents = open_text(EMBEDDED_TEXT, flag="--dataset").documents()
        rows = [row for _, row in token_rows(documents, tokenizer, ContextFormat(size["context"]), tokenized=False)]
        rows_NT = np.stack(rows)[: n_rows(flags)]
    else:
        config = AutoConfig.for_model(
            "llama",
            hidden_size=size["d_in"],
            num_hidden_layers=size["layer"] + 1,
            vocab_size=size["model"]["vocab"],
            **{name: value for name, value in size["model"].items() if name != "vocab"},
            max_position_embeddings=8192,
            rope_theta=500_000.0,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        with torch.device(flags.device):
            weights = LlamaForCausalLM(config)
        weights.to(torch.bfloat16 if flags.device != "cpu" else torch.float32).save_pretrained(work_dir / "model")
        rows_NT = np.random.default_rng(0).integers(3, 49_000, (n_rows(flags), size["context"]))
        rows_NT[:, 0] = tokenizer.bos_token_id
    tokenizer.save_pretrained(work_dir / "model")
    (work_dir / "tokens").mkdir()
    pq.write_table(pa.table({"input_ids": rows_NT.tolist()}), work_dir / "tokens" / "train.parquet")


def run_this(flags: argparse.Namespace, work_dir: Path, cache: bool = False) -> None:
    import runpy

    size = job(flags)
    # As SAELens does by default: every position is trained on, in its own scale.
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


# SAELens's flags that make it faster at the same job; what else was tried is in BENCHMARKS.md.
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
    # The CLI asks the Hub of a tokenized data set's tokenizer, also where it is a local file.
    dataset = load_dataset("parquet", data_files=str(work_dir / "tokens" / "train.parquet"), split="train")
    LanguageModelSAETrainingRunner(cfg=cfg, override_dataset=dataset).run()


def run_sparsify(flags: argparse.Namespace, work_dir: Path) -> None:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if flags.device == "cpu" else "0")
    import torch
    from datasets import load_dataset
    from sparsify import SaeConfig, TrainConfig, Trainer
    from transformers import AutoModel

    size = job(flags)
    config = TrainConfig(
        SaeConfig(num_latents=size["d_sae"], k=size["k"]),
        batch_size=size["batch"] // size["context"],
        optimizer="adam",
        lr=3e-4,
        layers=[size["layer"]],
        save_dir=str(work_dir / "runs"),
        run_name="sparsify",
    )
    # As its own CLI loads it: bfloat16 on a GPU, else the file's dtype.
    dtype = torch.bfloat16 if flags.device != "cpu" else "auto"
    model = AutoModel.from_pretrained(work_dir / "model", dtype=dtype, device_map={"": flags.device})
    dataset = load_dataset("parquet", data_files=str(work_dir / "tokens" / "train.parquet"), split="train")
    Trainer(config, dataset.with_format("torch"), model).fit()


def run_floors(flags: argparse.Namespace, work_dir: Path) -> dict[str, float]:
    """Seconds a token: the language model alone, and the SAE step's arithmetic and bytes over measured peaks."""
    import torch
    import torch.nn.functional as F

    from sae_toolkit.model.devices import choose_lm_dtype
    from sae_toolkit.model.loading import find_model, load_language_model

    size = job(flags)
    batch, d_in, d_sae = size["batch"], size["d_in"], size["d_sae"]

    def seconds(work: Any, for_seconds: float) -> float:
        """Median over about as long a time as a contender takes."""
        times: list[float] = []
        end = time.perf_counter() + for_seconds
        while time.perf_counter() < end or len(times) < 4:
            _synchronize(flags)
            start = time.perf_counter()
            work()
            _synchronize(flags)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    dtype = choose_lm_dtype("auto", flags.device)
    hook = f"model.layers.{size['layer']}"
    model = load_language_model(find_model(str(work_dir / "model")), hook, flags.device, dtype)
    model.keep_only_up_to_hook()
    tokens_BT = torch.randint(3, 40_000, (ROWS_PER_FORWARD, size["context"]))
    lm = seconds(lambda: model.activations(tokens_BT), min(15.0, 0.15 * flags.steps)) / tokens_BT.numel()

    x, W = torch.randn(batch, d_in, device=flags.device), torch.randn(d_sae, d_in, device=flags.device)

    def flops(precision: str) -> float:
        torch.set_float32_matmul_precision(precision)
        return 2 * batch * d_in * d_sae / seconds(lambda: F.linear(x, W), 5)

    # in the SAE's dtype, float32 (on a GPU in TF32); and as training takes the products on a CPU that can: in bfloat16
    in_float32 = flops("highest" if flags.device == "cpu" else "high")
    in_bfloat16 = flops("medium") if flags.device == "cpu" and dtype == torch.bfloat16 else in_float32
    source = torch.empty(2**28, dtype=torch.uint8, device=flags.device)
    target = torch.empty_like(source)
    bandwidth = 2 * 2**28 / seconds(lambda: target.copy_(source), 2)
    # Encoder; decoder, gradients of values and of both weights on k features. Weights and gradients once through
    # the forward and backward pass, clipping and Adam (read 4, write 3); pre-activations written and read.
    arithmetic = 2 * batch * d_in * (d_sae + 4 * size["k"])
    moved = 4 * (2 * d_in * d_sae * (2 + 1 + 1 + 7) + 2 * batch * d_sae)
    return {
        "lm": lm,
        "sae": (arithmetic / in_float32 + moved / bandwidth) / batch,
        "sae_bfloat16": (arithmetic / in_bfloat16 + moved / bandwidth) / batch,
        "gflops": in_float32 / 1e9,
        "gflops_bfloat16": in_bfloat16 / 1e9,
        "gigabytes": bandwidth / 1e9,
        "dtype": str(dtype),  # type: ignore[dict-item]
    }


def _synchronize(flags: argparse.Namespace) -> None:
    if flags.device != "cpu":
        import torch

        torch.cuda.synchronize()


def run_contender(flags: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Runs one contender in this process until the last timed step."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from sae_toolkit.model.devices import choose_lm_dtype

    if flags.contender == "floors":
        return run_floors(flags, work_dir)
    times: list[float] = []
    spent = _profile() if flags.profile else {}
    at_start: dict[str, float] = {}
    optimizers: list[Any] = []

    def after_step(optimizer: Any, *_: Any) -> None:
        if optimizer not in optimizers:  # what came before were steps that a run measures itself by
            optimizers.append(optimizer)
            times.clear()
        if len(times) in (flags.warm_up - 1, flags.warm_up + flags.steps - 1):
            _synchronize(flags)
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
            "sparsify": lambda: run_sparsify(flags, work_dir),
        }[flags.contender]()
    if len(times) < flags.warm_up + flags.steps:
        sys.exit(f"{flags.contender} ended after {len(times)} steps")
    peak = torch.cuda.max_memory_allocated() if flags.device != "cpu" else _peak_resident()
    seconds = times[flags.warm_up + flags.steps - 1] - times[flags.warm_up - 1]
    return {
        "tokens_per_second": flags.steps * job(flags)["batch"] / seconds,
        "peak_gib": peak / 2**30,
        "seconds": seconds,
        "spent": {name: spent[name] - at_start.get(name, 0) for name in spent},
    }


def _peak_resident() -> int:
    """In bytes, of this program alone: ru_maxrss also counts what the process held before it became this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _profile() -> dict[str, float]:
    """Seconds in each part of this project's step, as they come: parts within parts are counted in both."""
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


def measure(flags: argparse.Namespace, contender: str, work_dir: Path) -> dict[str, Any]:
    """Runs a contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--work_dir", str(work_dir)]
    for name in ("device", "job", "steps", "warm_up"):
        command += [f"--{name}", str(getattr(flags, name))]
    command += ["--profile"] if flags.profile else []
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(work_dir), "WANDB_SILENT": "true"}
    if contender == "floors":  # memory that glibc gives back after each layer and takes again is no part of a floor
        environment |= {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    done = subprocess.run(command, cwd=work_dir, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    flags = parse_flags()
    if flags.contender:
        result = run_contender(flags, Path(flags.work_dir))
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # the contender was stopped in the middle of its run
    with tempfile.TemporaryDirectory(prefix="train_speed-") as temporary:
        work_dir = Path(flags.work_dir or temporary).absolute()
        work_dir.mkdir(parents=True, exist_ok=True)
        if not (work_dir / "tokens").exists():
            print("saving the model and the tokens", file=sys.stderr)
            prepare(flags, work_dir)
        if flags.profile:
            show_profile(measure(flags, "this", work_dir))
            return
        if "this_cached" in flags.contenders and not (work_dir / "activations").exists():
            print("caching the activations", file=sys.stderr)
            measure(flags, "this_cached", work_dir)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ["floors", *flags.contenders]}
        for repeat in range(flags.repeats):
            for name, runs in results.items():
                runs.append(measure(flags, name, work_dir))
                figure = runs[-1].get("tokens_per_second")
                print(
                    f"repeat {repeat + 1} of {flags.repeats}: {name}" + (f" {figure:.0f} tokens/s" if figure else ""),
                    file=sys.stderr,
                )
        report(flags, results)


def show_profile(result: dict[str, Any]) -> None:
    print("| part | share of the time |\n| --- | --- |")
    for name, seconds in sorted(result["spent"].items()):
        print(f"| {name} | {seconds / result['seconds']:.1%} |")


def report(flags: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    from importlib.metadata import version

    import torch

    size = job(flags)
    where = torch.cuda.get_device_name() if flags.device != "cpu" else f"{os.cpu_count()} cores, {_processor()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "sae-lens", "transformers", "eai-sparsify"))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {where}; {versions}; {flags.job} job: layer"
        f" {size['layer']}, {size['d_sae']:,} features, TopK k {size['k']}, context {size['context']}, batch"
        f" {size['batch']:,}; {flags.steps} steps after {flags.warm_up}, medians of {flags.repeats}\n"
    )
    names = ("lm", "sae", "sae_bfloat16")
    floors = {name: statistics.median(run[name] for run in results["floors"]) for name in names}
    print("| | tokens/s | spread | peak memory, GiB | of the floor | of the lower |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {}
    for name in flags.contenders:
        figures = [run["tokens_per_second"] for run in results[name]]
        medians[name] = statistics.median(figures)
        shares = [
            [
                run["tokens_per_second"] * (floor["lm"] + floor[sae])
                for run, floor in zip(results[name], results["floors"], strict=True)
            ]
            for sae in ("sae", "sae_bfloat16")
        ]
        print(
            f"| {CONTENDERS[name]} | {medians[name]:,.0f} | {min(figures):,.0f} to {max(figures):,.0f} |"
            f" {statistics.median(run['peak_gib'] for run in results[name]):.2f} |"
            + "".join(f" {'' if name == 'this_cached' else _with_spread(each)} |" for each in shares)
        )
    print(
        f"| floor: both parts | {1 / (floors['lm'] + floors['sae']):,.0f} | | | | |\n"
        f"| floor: language model alone, {results['floors'][0]['dtype']} | {1 / floors['lm']:,.0f} | | | | |\n"
        f"| floor: SAE step alone | {1 / floors['sae']:,.0f} | | | | |\n"
        "| lower floor: both parts, the SAE's products in the language model's dtype |"
        f" {1 / (floors['lm'] + floors['sae_bfloat16']):,.0f} | | | | |\n"
    )
    peaks = results["floors"][0]
    print(
        f"Measured peaks: {peaks['gflops']:.0f} GFLOP/s in the encoder's product ({peaks['gflops_bfloat16']:.0f} in the"
        f" language model's dtype), {peaks['gigabytes']:.0f} GB/s\n"
    )
    for name in flags.contenders:
        if not name.startswith("this") and "this" in medians:
            pairs = [
                a["tokens_per_second"] / b["tokens_per_second"]
                for a, b in zip(results["this"], results[name], strict=True)
            ]
            print(f"{statistics.median(pairs):.2f} x {CONTENDERS[name]} ({min(pairs):.2f} to {max(pairs):.2f})")


def _with_spread(shares: list[float]) -> str:
    """Of what the floor measured just before allowed."""
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return model + (", AVX512-BF16" if "avx512_bf16" in flags else ", no bfloat16 arithmetic")


if __name__ == "__main__":
    main()
