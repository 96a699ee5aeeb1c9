"""Predicts the memory that a run takes, item by item."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.util import str_to_dtype

from sae_toolkit.model.loading import ModelSource
from sae_toolkit.steps.sparse_topk import SparseBatchTopKTrainingSAE, SparseTopKTrainingSAE, sparse_class

# How much a step of SAELens's own classes adds to the peak, forward and backward, in tensors of shape [B, F]. The
# numbers were fitted to runs on a CPU (BENCHMARKS.md, memory).
_DENSE_STEP = {
    "standard": 9.5,
    "topk": 11.0,
    "batchtopk": 10.5,
    "jumprelu": 8.6,
    "gated": 12.7,
    "matryoshka_batchtopk": 13.3,
}
_OTHER_DENSE_STEP = 12.0
HELD_OUT_ROWS_AT_ONCE = 2  # how many rows' logits an evaluation during training holds at a time


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that a training run takes on its device, by item.

    On a CPU this is resident memory, and `process` is what the interpreter and its libraries hold now. On a CUDA
    device it is the memory that torch allocates.
    """

    process: int
    model: int  # the layers up to the hook
    loading: int  # the model, while it is being loaded
    forward_pass: int
    buffer: int
    norm_estimate: int  # held until the first step
    sae: int
    gradients: int
    adam: int
    step: int  # without the gradients
    evaluation_model: int  # all layers
    evaluation_logits: int
    evaluates: bool  # whether there are evaluations during training
    held_out_logits: int
    on_cpu: bool

    @property
    def peak(self) -> int:
        """The most that the run holds at any time."""
        held = self.model + self.sae + self.buffer
        calibrating = held + self.norm_estimate + self.forward_pass
        filling = held + self.adam + self.forward_pass
        stepping = held + self.adam + self.gradients + self.step
        # An evaluation during training holds a copy of the SAE, so `sae` is counted twice.
        evaluating = held + self.adam + self.sae + self.held_out_logits if self.evaluates else 0
        if self.on_cpu:  # the process keeps this memory after it was freed, in fragments
            stepping += self.norm_estimate
            evaluating += self.norm_estimate if self.evaluates else 0
        return self.process + max(self.loading, calibrating, filling, stepping, evaluating)

    @property
    def evaluation_peak(self) -> int:
        """The most that an evaluation in a process of its own holds: the whole model, the SAE and a batch's logits."""
        return self.process + max(self.loading, self.evaluation_model + self.sae + self.evaluation_logits)

    def surely_above(self, free: int) -> bool:
        """Returns whether the run cannot fit, even if the prediction is too high.

        On a CPU predictions were within 12% of measured runs. On CUDA devices no runs were measured, so only the SAE,
        its gradients and Adam's state are counted there.
        """
        return self.peak > 1.25 * free if self.on_cpu else self.sae + self.gradients + self.adam > free

    @property
    def largest_flag(self) -> str:
        """The flag that sets the size of the largest item."""
        sizes = {
            "--model_name": max(self.model, self.loading),
            "--store_batch_size_prompts": self.forward_pass,
            "--n_batches_in_buffer": self.buffer,
            "--set n_batches_for_norm_estimate": self.norm_estimate,
            "--expansion_factor": self.sae + self.gradients + self.adam,
            "--train_batch_size_tokens": self.step,
        }
        return max(sizes, key=lambda flag: sizes[flag])

    def describe(self) -> str:
        """Returns the lines that --dry_run shows."""
        items = {
            "process": self.process,
            "language model": self.model,
            "its forward pass": self.forward_pass,
            "buffer": self.buffer,
            "norm estimate": self.norm_estimate,
            "SAE": self.sae,
            "gradients": self.gradients,
            "Adam": self.adam,
            "step": self.step,
        }
        return (
            f"memory  {_gib(self.peak)} GiB at the peak, {_gib(self.process + self.loading)} while the model loads\n"
            f"        {', '.join(f'{name} {_gib(size)}' for name, size in items.items() if size)}\n"
            f"        evaluation {_gib(self.evaluation_peak)}, including logits {_gib(self.evaluation_logits)}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def plan_memory(
    cfg: LanguageModelSAERunnerConfig[Any],
    model: ModelSource,
    lm_dtype: torch.dtype,
    *,
    n_parameters: tuple[int, int],
    cached: bool,
    n_saes: int = 1,
    evaluates: bool = False,
) -> MemoryPlan:
    """Predicts a run's memory from shapes. Nothing is loaded. The auxiliary loss of dead features is not counted.

    Args:
        cfg: the run's configuration.
        model: the language model's source.
        lm_dtype: the language model's dtype in the run.
        n_parameters: the number of parameters of the whole model, and of the model up to the hook.
        cached: whether activations come from a cache or another device. The model is then not counted.
        n_saes: how many SAEs of this size are trained, one at each hook. They take their steps one after the other.
        evaluates: whether the run evaluates on held-out text during training, for which it keeps the whole model.
    """
    config = model.config.get_text_config()
    on_cpu = torch.device(cfg.device).type == "cpu"
    lm_bytes, sae_bytes = lm_dtype.itemsize, str_to_dtype(cfg.dtype).itemsize
    acts_bytes = 2 if cached else lm_bytes
    d_in, batch = n_saes * cfg.sae.d_in, cfg.train_batch_size_tokens

    whole, up_to_hook = (n * lm_bytes for n in n_parameters)
    loading = whole
    if on_cpu and "gguf_file" in model.location:
        # The weights are read in float32. The largest matrix is held too: twice in float32, or once in another dtype.
        loading = 4 * n_parameters[0] + (8 if lm_bytes == 4 else lm_bytes) * config.vocab_size * config.hidden_size
    elif on_cpu and not evaluates:  # safetensors files are memory-mapped, so only the weights in use are read
        loading = up_to_hook
    tokens = cfg.store_batch_size_prompts * cfg.context_size
    width = 6 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    mixed = cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    parameters = _n_parameters(cfg) * sae_bytes
    logits_of_row = cfg.context_size * config.vocab_size * (2 * lm_bytes + 4)
    return MemoryPlan(
        process=psutil.Process().memory_info().rss if on_cpu else 0,
        model=whole if evaluates else 0 if cached else up_to_hook,
        loading=0 if cached and not evaluates else loading,
        forward_pass=tokens * (d_in * acts_bytes if cached else width * lm_bytes),
        buffer=(max(mixed, batch) + tokens) * d_in * acts_bytes,
        norm_estimate=cfg.n_batches_for_norm_estimate * batch * d_in * (2 * acts_bytes + max(4, sae_bytes)),
        sae=n_saes * parameters,
        gradients=parameters,
        adam=2 * n_saes * parameters,
        step=_step_bytes(cfg),
        evaluation_model=whole,
        evaluates=evaluates,
        evaluation_logits=8 * logits_of_row,
        held_out_logits=HELD_OUT_ROWS_AT_ONCE * logits_of_row,
        on_cpu=on_cpu,
    )


def _n_parameters(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    sae_class, _ = get_sae_training_class(cfg.sae.architecture())
    sae_cfg = copy.copy(cfg.sae)
    sae_cfg.device = "meta"
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in sae_class(sae_cfg).parameters())


def _step_bytes(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    dtype, architecture = str_to_dtype(cfg.dtype), cfg.sae.architecture()
    pre_activations = cfg.train_batch_size_tokens * cfg.sae.d_sae * dtype.itemsize
    sae_class = sparse_class(get_sae_training_class(architecture)[0], cfg.sae, compiled=cfg.compile_sae)
    if not issubclass(sae_class, SparseTopKTrainingSAE):
        return int(_DENSE_STEP.get(architecture, _OTHER_DENSE_STEP) * pre_activations)
    copies = 2 if issubclass(sae_class, SparseBatchTopKTrainingSAE) else 1  # BatchTopK's selection makes a copy
    return copies * pre_activations + 6 * cfg.train_batch_size_tokens * cfg.sae.d_in * dtype.itemsize
