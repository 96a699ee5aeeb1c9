"""Runs the program's CUDA path at Llama-3-8B's shapes on fake tensors, and prints what was recorded, a JSON a case.

    python tests/cuda/paths.py DIRECTORY batchtopk:131072 standard:32768:steps topk:32768:steps:float

DIRECTORY holds the model's `config.json`, a tokenizer and `text.txt`. A case names an architecture, a number of
features, `steps` if only the training steps are run, and a fault of `FAULTS` that is planted.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import fake_device

fake_device.install()

import numpy as np
import torch
from recorder import Recorder, fake_cuda
from sae_lens import LoggingConfig
from transformers import AutoModelForCausalLM

import sae_toolkit.training.run
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.evaluation.run import evaluate_saes
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.saes.checkpoints import finished_copy
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.steps import delayed_counts
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.training import preflight
from sae_toolkit.training.held_out import HeldOutText
from sae_toolkit.training.needs import memory_plan
from sae_toolkit.training.prepared_run import PreparedRun
from sae_toolkit.training.run import Training, create_sae, open_activations
from sae_toolkit.training.setup import prepare_run

PRESET = ROOT / "presets" / "llama3-8b.args"
SHARES_DEAD = (0.0, 0.1, 0.5, 1.0)  # of the features
_FIRST_STEPS = 4  # in which the number of dead features is read from the device


@dataclass
class Part:
    """What was recorded in a part of the path.

    Args:
        live_bytes: bytes on the device at the end.
        peak_bytes: the most bytes on the device.
        peak_at: file and line of the package at that time.
        waits: how often the host waited for the device, by reason, file and line.
        n_operators: number of operators on the device.
    """

    live_bytes: int
    peak_bytes: int
    peak_at: str
    waits: dict[str, int]
    n_operators: int


def main() -> None:
    directory, *cases = sys.argv[1:]
    for case in cases:
        try:
            found = run_case(Path(directory), case)
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({"case": case} | found), flush=True)


def run_case(directory: Path, case: str) -> dict[str, Any]:
    """Returns the parts of the path by name, the bytes that the run plans for them and for an SAE, the device and
    strides of each parameter, its gradient and its moments, and how many passes of the language model fill the
    buffer.
    """
    architecture, d_sae, *more = case.split(":")
    steps_only, fault = "steps" in more, next((name for name in FAULTS if name in more), None)
    with fake_cuda() as recorder:
        run = prepared(directory, architecture, int(d_sae), 100_000 if steps_only else 600_000)
        walk = Walk(recorder, run)
        with FAULTS[fault]() if fault else patch.object(sae_toolkit.training.run, "load_language_model", random_model):
            walk.steps_alone() if steps_only else walk.whole()
    parts = {name: asdict(part) for name, part in walk.parts.items()}
    plan = memory_plan(run)
    planned = {"stepping": plan.sae + plan.adam + plan.gradients + plan.step}  # without a language model
    if not steps_only:
        planned = plan.peaks | {"evaluation": plan.evaluation_peak, "peak": plan.peak}
    planned |= {"model": plan.model, "SAE": plan.sae}
    return {"parts": parts, "planned": planned, "layouts": walk.layouts, "passes": walk.passes}


def prepared(directory: Path, architecture: str, d_sae: int, training_tokens: int) -> PreparedRun:
    """Returns a run of the preset for Llama-3-8B, with the given SAE. 600,000 tokens fill the buffer a few times."""
    preset = [line for line in PRESET.read_text().splitlines() if line and not line.startswith(("#", "--dataset"))]
    flags = {
        "model_name": directory,
        "dataset_path": directory / "text.txt",
        "checkpoint_path": directory / "checkpoints",
        "architecture": architecture,
        "expansion_factor": d_sae // 4096,
        "device": "cuda",
        "wandb_mode": "disabled",
        "training_tokens": training_tokens,  # memory does not depend on it
        "train_batch_size_tokens": 4096,  # as for the preset's 50 M tokens
        "dead_feature_window": 250,
        "lr_warm_up_steps": 10,
        "lr_decay_steps": 10,
        "eval_every": 300_000,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    return prepare_run(parse_training_flags([*" ".join(preset).split(), *given]))


def random_model(
    source: ModelSource, hook_names: list[str], device: str, dtype: torch.dtype, _n_devices: int = 1
) -> LanguageModel:
    """Takes the place of `load_language_model`: a model without trained weights, as there are none here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LanguageModel(AutoModelForCausalLM.from_config(source.config), *hook_names)
    finally:
        torch.set_default_dtype(before)


class Walk:
    """A walk along the path of a run, part by part."""

    def __init__(self, recorder: Recorder, run: PreparedRun) -> None:
        self.recorder = recorder
        self.run = run
        self.parts: dict[str, Part] = {}
        self.layouts: dict[str, dict[str, list[Any]]] = {}
        self.passes = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        recorder = self.recorder
        recorder.begin()
        yield
        self.parts[name] = Part(
            recorder.live_bytes, recorder.peak_bytes, recorder.peak_at, dict(recorder.waits), recorder.n_operators
        )

    def whole(self) -> None:
        """Goes from loading the language model to the evaluation."""
        run = self.run
        with self.part("loading"):
            source = open_activations(run)
        with self.part("preflight"):
            preflight.measure(run, source)
        with self.part("calibrating"):
            training = Training(run, source)
        with self.part("first filling"):
            batch_BD = next(training.stream)
        self._steps(training.trainer, batch_BD)
        del batch_BD
        self.recorder.integer = 0
        with self.part("batches and steps"):
            while not training.stream.buffer.filling:
                self._step(training.trainer, next(training.stream))
        rows_before = source.sequences_run["up_to_hook"]
        with self.part("filling"):
            next(training.stream)
        self.passes = (source.sequences_run["up_to_hook"] - rows_before) // run.cfg.store_batch_size_prompts
        self.recorder.integer = 1
        with self.part("finished copy"):
            calibrations = training.trainer.calibrate()
            sae = finished_copy(training.trainer.first, calibrations[run.cfg.hook_name])
        del sae
        held_out = HeldOutText(run, source)
        with self.part("held out"):
            held_out.measure(training.trainer, calibrations, training.max_norms)
        evaluated = EvaluatedSAE(
            SAEFile("trained", run.directory, "SAELens", "finished"),
            finished_copy(training.trainer.first, calibrations[run.cfg.hook_name]),
            replace(run.positions, max_activation_norm=training.max_norms[run.cfg.hook_name]),
        )
        del training
        prepared = held_out.prepare(run.cfg.hook_name, evaluated)
        n_rows = 8
        more = replace(
            prepared,
            rows_NT=run.rows_NT[:n_rows],
            unit_N=np.arange(n_rows),
            n_loss_rows=n_rows,
            n_sae_rows=n_rows,
        )
        gc.collect()
        with self.part("evaluation"):
            evaluate_saes(more, LanguageModel(source.model, run.cfg.hook_name), batch_size=n_rows)

    def steps_alone(self) -> None:
        """Takes steps on a batch, without a language model and a buffer."""
        cfg = self.run.cfg
        trainer_cfg = cfg.to_sae_trainer_config()
        trainer_cfg.logger = LoggingConfig(log_to_wandb=False)
        trainer = MultiTrainer(trainer_cfg, {cfg.hook_name: create_sae(cfg)})
        trainer.first.activation_scaler.scaling_factor = 1.0
        self._steps(trainer, torch.randn(cfg.train_batch_size_tokens, cfg.sae.d_in, device="cuda"))

    def _step(self, trainer: MultiTrainer, batch_BD: torch.Tensor) -> None:
        self.recorder.pass_events()
        trainer.step([batch_BD])
        trainer.advance()

    def _steps(self, trainer: MultiTrainer, batch_BD: torch.Tensor) -> None:
        """Takes the first steps, and then steps with different numbers of dead features."""
        self.recorder.integer = 0
        for i in range(_FIRST_STEPS):
            with self.part(f"step {i + 1}"):
                self._step(trainer, batch_BD)
        for share in SHARES_DEAD:
            self.recorder.integer = int(share * self.run.cfg.sae.d_sae)
            for _ in range(_FIRST_STEPS):  # the number is used that many steps after it was read
                self.recorder.begin()
                self._step(trainer, batch_BD)
            with self.part(f"step, {share:.0%} dead"):
                self._step(trainer, batch_BD)
        first = trainer.first
        hook = first.optimizer.register_step_pre_hook(lambda *_: self._note_layouts(first))
        self._step(trainer, batch_BD)
        hook.remove()

    def _note_layouts(self, trainer: Trainer) -> None:
        for name, weight in trainer.sae.named_parameters():
            state = trainer.optimizer.state[weight]
            tensors = {"weight": weight, "gradient": weight.grad} | {m: state[m] for m in ("exp_avg", "exp_avg_sq")}
            self.layouts[name] = {which: [str(t.device), list(t.stride())] for which, t in tensors.items()}


@contextmanager
def _cpu_tensor_in_a_product() -> Iterator[None]:
    whole = SparseTopKTrainingSAE.process_sae_in
    with patch.object(SparseTopKTrainingSAE, "process_sae_in", lambda self, x: whole(self, x) @ torch.eye(x.shape[-1])):
        yield


@contextmanager
def _float_in_the_step() -> Iterator[None]:
    whole = Trainer._record_firings

    def record(self: Trainer, firings_F: torch.Tensor, n_tokens: int) -> None:
        float(firings_F.sum())
        whole(self, firings_F, n_tokens)

    with patch.object(Trainer, "_record_firings", record):
        yield


@contextmanager
def _copy_too_many() -> Iterator[None]:
    whole = Trainer.step

    def step(self: Trainer, batch: torch.Tensor, prediction_loss: Any) -> Any:
        _kept = [weight.detach().clone() for weight in self.sae.parameters()]
        return whole(self, batch, prediction_loss)

    with patch.object(Trainer, "step", step):
        yield


@contextmanager
def _reading_at_once() -> Iterator[None]:
    with patch.object(delayed_counts, "STEPS_BEHIND", 0):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "cpu": _cpu_tensor_in_a_product,
    "float": _float_in_the_step,
    "copy": _copy_too_many,
    "reading": _reading_at_once,
}


if __name__ == "__main__":
    main()
