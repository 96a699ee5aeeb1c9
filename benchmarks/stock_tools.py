"""Stock SAELens and stock sparsify on one tiny job, as the processes that stock_faults.py injects its faults into."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"SPARSIFY_DISABLE_TRITON": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
CONTEXT, ROWS_PER_STEP, NAN_TOKEN = 64, 4, 48_000
SMALL = {"d_sae": 256, "steps": 600, "saves": 4}
LARGE = {"d_sae": 131_072, "steps": 6, "saves": 2}  # checkpoints of 100 MB
DEFAULTS = SMALL | {"model": "model", "data": "tokens.parquet", "layer": "1", "k": 8, "lr": 1e-3}
DEFAULTS |= {"wandb": False, "seeded": True}


class SAELens:
    name, weights, state = "SAELens", "sae_weights.safetensors", "trainer_state.pt"

    def flags(self, settings: dict[str, Any]) -> list[str]:
        values = {
            **{"architecture": "topk", "model_class_name": "AutoModelForCausalLM", "d_in": 32},
            **{name: settings[name] for name in ("d_sae", "k", "lr")},
            "model_name": settings["model"],
            "hook_name": f"model.layers.{settings['layer']}",
            "dataset_path": settings["data"],
            "context_size": CONTEXT,
            "training_tokens": settings["steps"] * ROWS_PER_STEP * CONTEXT,
            "train_batch_size_tokens": ROWS_PER_STEP * CONTEXT,
            "n_checkpoints": settings["saves"],
            "checkpoint_path": settings["out"] + "/runs",
            "output_path": settings["out"] + "/output",
            "log_to_wandb": settings["wandb"],
        } | ({"resume_from_checkpoint": settings["resume"]} if "resume" in settings else {})
        return [str(part) for name, value in values.items() for part in (f"--{name}", value)] + settings.get("more", [])

    def train(self, settings: dict[str, Any]) -> None:
        from datasets import load_dataset
        from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, _parse_cfg_args

        cfg = _parse_cfg_args(self.flags(settings))
        # Given the path of a tokenized data set, the CLI asks the Hub about it, even if it is a local file.
        dataset = load_dataset("parquet", data_files=settings["data"], split="train")
        LanguageModelSAETrainingRunner(cfg=cfg, override_dataset=dataset).run()

    def checkpoints(self, out: Path) -> list[Path]:
        """Returns the whole checkpoints, oldest first."""
        return sorted((p.parent for p in out.glob("runs/*/*/runner_cfg.json")), key=lambda p: int(p.name))

    def saves_begun(self, out: Path) -> int:
        """Returns a number that changes when the tool begins to write another checkpoint."""
        return len(list(out.glob("runs/*/*")))

    def newest(self, out: Path) -> Path:
        """Returns the checkpoint that was written to last, whole or not."""
        return max(out.glob("runs/*/*"), key=lambda p: int(p.name))

    def final(self, out: Path) -> Path:
        return out / "output" / self.weights

    def load(self, checkpoint: Path) -> None:
        from sae_lens import SAE, TrainingSAE

        SAE.load_from_disk(checkpoint)
        TrainingSAE.load_from_disk(checkpoint)

    def position(self, checkpoint: Path) -> str:
        """Says what a run that is resumed from a checkpoint reads again, and what it never trains on."""
        import torch
        from safetensors.torch import load_file

        state = torch.load(checkpoint / self.state)
        store = load_file(checkpoint / "activations_store_state.safetensors")
        rows = int(store["n_dataset_processed"]) + 1  # the row handed out last is not counted yet
        skipped = rows * CONTEXT - state["n_training_samples"]
        steps = int(state["optimizer"]["state"][0]["step"])
        return (
            f"at step {steps} ({state['n_training_steps']} in its file) reads {rows:,} rows again to find its place;"
            f" {skipped:,} tokens of the mixing buffer never trained on"
        )


class Sparsify:
    name, state = "sparsify", "optimizer_0.pt"
    weights = "layers.1/sae.safetensors"

    def train(self, settings: dict[str, Any]) -> None:
        from datasets import load_dataset
        from sparsify import SaeConfig, TrainConfig, Trainer
        from sparsify.data import chunk_and_tokenize
        from transformers import AutoModel, AutoTokenizer

        # The steps of sparsify's own command line, which itself needs a GPU.
        model = AutoModel.from_pretrained(settings["model"])
        if settings["data"].endswith(".parquet"):
            dataset = load_dataset("parquet", data_files=settings["data"], split="train")
        else:
            tokenizer = AutoTokenizer.from_pretrained(settings["model"])
            dataset = chunk_and_tokenize(load_dataset(settings["data"], split="train"), tokenizer, max_seq_len=CONTEXT)
        dataset = dataset.with_format("torch").select(range(settings["steps"] * ROWS_PER_STEP))
        config = TrainConfig(
            SaeConfig(num_latents=settings["d_sae"], k=settings["k"]),
            batch_size=ROWS_PER_STEP,
            lr=settings["lr"],
            hookpoints=[f"layers.{settings['layer']}"],
            save_every=settings["steps"] // (settings["saves"] + 1),
            save_dir=settings["out"] + "/runs",
            run_name="stock",
            log_to_wandb=settings["wandb"],
        )
        trainer = Trainer(config, dataset, model)
        if "resume" in settings:
            trainer.load_state(settings["resume"])
        trainer.fit()

    def checkpoints(self, out: Path) -> list[Path]:
        return [out / "runs/stock"] if (out / "runs/stock/rank_0_state.pt").exists() else []

    def saves_begun(self, out: Path) -> int:
        return self.final(out).stat().st_mtime_ns if self.final(out).exists() else 0

    def newest(self, out: Path) -> Path:
        return out / "runs/stock"

    def final(self, out: Path) -> Path:
        return out / "runs/stock" / self.weights

    def load(self, checkpoint: Path) -> None:
        from sparsify import SparseCoder

        SparseCoder.load_from_disk((checkpoint / self.weights).parent)

    def position(self, checkpoint: Path) -> str:
        import torch

        step = torch.load(checkpoint / "state.pt")["global_step"]
        groups = torch.load(checkpoint / self.state)["param_groups"]
        return f"starts at batch {step}, after {groups[0].get('k')} steps; reads nothing again before it"


TOOLS = {tool.name: tool for tool in (SAELens(), Sparsify())}


def without_folders(text: str) -> str:
    """Returns the text with each path cut to its last name, so that equal errors have equal texts."""
    return re.sub(r"(?<![:/\w])(?:/[\w.+-]+)+/", "", text)


class Run:
    """A tool's process. `log` is the file of what it printed."""

    def __init__(self, tool: Any, out: Path, command_line: bool = False, env: dict[str, str] | None = None, **settings):
        settings = DEFAULTS | {"out": str(out)} | settings
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, tool.name, json.dumps(settings)]
        if command_line:
            command = [sys.executable, "-m", "sae_lens.llm_sae_training_runner", *tool.flags(settings)]
        self.log = Path(tempfile.mkstemp(prefix="log-", dir=Path.cwd())[1])
        self.start, self.stopped = time.monotonic(), False
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | (env or {}))

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"ended too soon: {self.said()}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.0005)

    def end(self, signal_number: int = 0, limit: float = 300) -> Run:
        """Sends the signal, if any, and waits for the process to end. Kills it after `limit` seconds."""
        if signal_number:
            if self.process.poll() is not None:
                raise RuntimeError("ended before its signal")
            self.process.send_signal(signal_number)
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stopped = True
            self.process.kill()
            self.process.wait()
        self.seconds = time.monotonic() - self.start
        return self

    def said(self) -> str:
        """Returns the exit status, and the error where the process printed one."""
        status, text = self.process.returncode, without_folders(self.log.read_text())
        if self.stopped:
            return f"still waiting after {self.seconds:.0f} s"
        how = f"exit status {status}" if status >= 0 else f"dead by {signal.Signals(-status).name}"
        if "Traceback" in text and status:
            errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", text, re.MULTILINE)
            how += f", traceback, `{errors[-1][:160] if errors else '?'}`"
        elif status > 0:
            how += f", `{text.splitlines()[-1][:140]}`"
        return how


def prepare() -> None:
    """Saves models, tokens and text in the working directory.

    `nan_model` has a token whose embedding is not finite, `nan_tokens.parquet` one row with that token, and `bad_text`
    a line that is cut short.
    """
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae_toolkit.files.embedded import EMBEDDED_MODEL
    from sae_toolkit.model.loading import find_model
    from sae_toolkit.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(find_model(EMBEDDED_MODEL))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))
    for name in ("model", "nan_model"):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        model.model.embed_tokens.weight.data[NAN_TOKEN] = float("nan")
    rows_NT = torch.randint(3, NAN_TOKEN, (2 * SMALL["steps"] * ROWS_PER_STEP, CONTEXT))
    for name in ("tokens", "nan_tokens"):
        datasets.Dataset.from_dict({"input_ids": rows_NT.tolist()}).to_parquet(f"{name}.parquet")
        rows_NT[len(rows_NT) // 4, -1] = NAN_TOKEN
    for name, bad in (("text", None), ("bad_text", 10)):
        Path(name).mkdir()
        for part in range(2):
            lines = [json.dumps({"text": " ".join(str(i * j) for j in range(12))}) for i in range(1000 + 2000 * part)]
            if bad and part:
                lines[bad] = lines[bad][:-5]
            (Path(name) / f"train-{part}.jsonl").write_text("\n".join(lines) + "\n")


def train(tool_name: str, settings: dict[str, Any]) -> None:
    """Trains with one tool, in the process that `Run` starts."""
    import torch

    if settings["seeded"]:
        torch.manual_seed(0)
    TOOLS[tool_name].train(settings)


if __name__ == "__main__":
    train(sys.argv[1], json.loads(sys.argv[2]))
