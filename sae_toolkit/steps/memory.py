"""Predicts the memory that a run takes, item by item."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.util import str_to_dtype
from transformers import PreTrainedConfig

from sae_toolkit.model.loading import ModelSource
from sae_toolkit.steps.activation_sample import CAPACITY, DTYPE, held_out_tokens
from sae_toolkit.steps.calibration import has_calibration
from sae_toolkit.steps.step_memory import n_parameters_of_sae, step_bytes

# Tensors [tokens, hidden_size] and [tokens, intermediate_size] at the peak of a forward pass, which is in an MLP.
_FORWARD_PASS = {"cpu": (6, 3), "cuda": (4, 3)}  # the residual stream, its copies in attention and norm; gate, up, both
# Tensors of these two shapes that a decoder layer keeps for its backward pass, if its weights get no gradients. Counted
# for Llama's layers; Qwen's and GPT-2's keep up to a fifth more, GPT-NeoX's half. Attention that is not fused keeps its
# scores too, which are not counted.
_BACKWARD_PASS = (8, 3)
# To compare predictions on a CUDA device, the evaluation holds five tensors in float32, each of up to 512 MiB
# (`compare_predictions` in evaluation/metrics.py): logits that are converted, two log-probabilities, the one before
# the second of these, and probabilities.
_COMPARED, _CHUNK = 5, 2**29
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
    sample: int  # of activations, for the calibration of L0
    sae: int
    gradients: int
    adam: int
    step: int  # without the gradients, and with the loss of dead features at its largest
    folding: int  # what the normalization is folded with into the finished SAE
    evaluation_model: int  # all layers
    evaluation_logits: int
    evaluates: bool  # whether there are evaluations during training
    held_out_logits: int
    comparing: int  # of predictions, beside the logits
    finetunes: bool  # whether the run ends with steps of --finetune_loss
    finetuning_logits: int  # the model's own, of a step
    finetuning_pass: int  # what the layers after the hook keep for their backward pass, and the logits with the SAE
    finetuning_step: int  # as `step`, on up to half a context more
    on_cpu: bool

    @property
    def peaks(self) -> dict[str, int]:
        """The most that the run holds in each of its parts."""
        held = self.model + self.sae + self.buffer
        trained = held + self.adam + self.sample
        peaks = {
            "loading": self.loading,
            # On a CUDA device the forward passes are over, and their memory is free, when the activations are copied.
            "calibrating": held + (sum if self.on_cpu else max)((self.norm_estimate, self.forward_pass)),
            "filling": trained + self.forward_pass,
            "stepping": trained + self.gradients + self.step,
            "finishing": trained + self.folding,
        }
        if self.evaluates:  # on a finished copy of an SAE, which takes as much as its gradients
            peaks["held out"] = trained + self.gradients + max(self.folding, self.held_out_logits + self.comparing)
        if self.finetunes:  # when the buffer is freed
            finetuning = self.finetuning_logits + max(self.gradients, self.finetuning_pass) + self.finetuning_step
            peaks["fine-tuning"] = trained - self.buffer + finetuning
        if self.on_cpu:  # the process keeps this memory after it was freed, in fragments
            for name in peaks.keys() & {"stepping", "held out", "fine-tuning"}:
                peaks[name] += self.norm_estimate
        return {name: self.process + peak for name, peak in peaks.items()}

    @property
    def peak(self) -> int:
        """The most that the run holds at any time."""
        return max(self.peaks.values())

    @property
    def evaluation_peak(self) -> int:
        """The most that an evaluation in a process of its own holds: the whole model, the SAE and a batch's logits."""
        evaluating = self.evaluation_model + self.sae + self.evaluation_logits + self.comparing
        return self.process + max(self.loading, evaluating)

    def surely_above(self, free: int) -> bool:
        """Returns whether the run cannot fit, even if the prediction is too high.

        On a CPU predictions were within 12% of measured runs. On CUDA devices few runs were measured (BENCHMARKS.md, on
        one GPU), so only the SAE, its gradients and Adam's state are counted there.
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
            "--finetune_loss": self.finetuning_logits + self.finetuning_pass,
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
            "sample": self.sample,
            "SAE": self.sae,
            "gradients": self.gradients,
            "Adam": self.adam,
            "step": self.step,
            "held-out logits": self.evaluates and self.held_out_logits + self.comparing,
            "fine-tuning": self.finetuning_logits + self.finetuning_pass,
        }
        return (
            f"memory  {_gib(self.peak)} GiB at the peak, {_gib(self.process + self.loading)} while the model loads\n"
            f"        {', '.join(f'{name} {_gib(size)}' for name, size in items.items() if size)}\n"
            f"        evaluation {_gib(self.evaluation_peak)}, including logits"
            f" {_gib(self.evaluation_logits + self.comparing)}"
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
    cfgs: Sequence[LanguageModelSAERunnerConfig[Any]] = (),
    evaluates: bool = False,
    finetune_loss: Literal["none", "kl", "ce"] = "none",
    has_target_l0: bool = False,
) -> MemoryPlan:
    """Predicts a run's memory from shapes. Nothing is loaded.

    The auxiliary loss of dead features is counted on CUDA devices only, with all features dead.

    Args:
        cfg: the run's configuration; of several SAEs, that of the first.
        model: the language model's source.
        lm_dtype: the language model's dtype in the run.
        n_parameters: the number of parameters of the whole model, and of the model up to the hook.
        cached: whether activations come from a cache or another device. The model is then not counted.
        cfgs: the configurations of all SAEs of the run, if there are several; what `cfg` changes of the first holds for
            all. They take their steps one after the other. SAEs at one hook share its activations.
        evaluates: whether the run evaluates on held-out text during training, for which it keeps the whole model.
        finetune_loss: the loss of the steps at its end, for which it keeps the whole model too.
        has_target_l0: whether the sparsity weight is adjusted for a certain L0.
    """
    config = model.config.get_text_config()
    on_cpu = torch.device(cfg.device).type == "cpu"
    lm_bytes, sae_bytes = lm_dtype.itemsize, str_to_dtype(cfg.dtype).itemsize
    acts_bytes = 2 if cached else lm_bytes
    each = _like(cfg, cfgs)
    d_in = sum({one.hook_name: one.sae.d_in for one in each}.values())
    batch = cfg.train_batch_size_tokens

    whole, up_to_hook = (n * lm_bytes for n in n_parameters)
    finetunes = finetune_loss != "none"
    keeps_whole = evaluates or finetunes
    loading = whole
    if on_cpu and "gguf_file" in model.location:
        # The weights are read in float32. The largest matrix is held too: twice in float32, or once in another dtype.
        loading = 4 * n_parameters[0] + (8 if lm_bytes == 4 else lm_bytes) * config.vocab_size * config.hidden_size
    elif on_cpu and not keeps_whole and model.adapter is None:
        # Safetensors files are memory-mapped, so only the weights in use are read. Merging an adapter changes all.
        loading = up_to_hook
    tokens = cfg.store_batch_size_prompts * cfg.context_size
    n_hidden, n_intermediate = _FORWARD_PASS["cpu" if on_cpu else "cuda"]
    width = n_hidden * config.hidden_size + n_intermediate * _intermediate_size(config)
    kept_width = _BACKWARD_PASS[0] * config.hidden_size + _BACKWARD_PASS[1] * _intermediate_size(config)
    n_layers = config.num_hidden_layers - min(_layers_before(one.hook_name) for one in each)
    kept_of_row = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    mixed = cfg.n_batches_in_buffer * kept_of_row
    kept_of_pass = cfg.store_batch_size_prompts * kept_of_row
    measured = math.ceil(cfg.n_batches_for_norm_estimate * batch / kept_of_pass) * kept_of_pass  # in whole passes
    parameters = [n_parameters_of_sae(one) * sae_bytes for one in each]
    calibrates = has_calibration(cfg.sae, 1.0 if has_target_l0 else None)
    held_out = held_out_tokens(cfg.training_tokens) if on_cpu else 0  # they stay on the CPU
    sample = max(CAPACITY * DTYPE.itemsize, held_out * acts_bytes)  # bytes for each dimension
    whitens = cfg.sae.normalize_activations == "covariance_whitening"
    longer = [copy.copy(one) for one in each]
    for one in longer:
        one.train_batch_size_tokens += cfg.context_size // 2
    most_tokens = batch + cfg.context_size  # of a fine-tuning step, with those that are left out
    logits_of_row, comparing = max(_logits_bytes(one, config.vocab_size, lm_bytes, on_cpu=on_cpu) for one in each)
    return MemoryPlan(
        process=psutil.Process().memory_info().rss if on_cpu else 0,
        model=whole if keeps_whole else 0 if cached else up_to_hook,
        loading=0 if cached and not keeps_whole else loading,
        forward_pass=tokens * (d_in * acts_bytes if cached else width * lm_bytes),
        buffer=(max(mixed, batch) + tokens) * d_in * acts_bytes,
        norm_estimate=measured * d_in * (2 * acts_bytes + max(4, sae_bytes)),
        sample=calibrates * sample * sum(one.sae.d_in for one in each),
        sae=sum(parameters),
        gradients=max(parameters),
        adam=2 * sum(parameters),
        step=max(step_bytes(one, on_cpu=on_cpu) for one in each),
        finetunes=finetunes,
        finetuning_logits=(finetune_loss == "kl") * most_tokens * config.vocab_size * lm_bytes,
        finetuning_pass=finetunes
        * min(tokens, most_tokens)
        * (n_layers * kept_width + 2 * config.vocab_size)
        * lm_bytes,
        finetuning_step=finetunes * max(step_bytes(one, on_cpu=on_cpu) for one in longer),
        # a weight and its product, in float64
        folding=2 * 8 * max(one.sae.d_in * one.sae.d_sae for one in each) if whitens else 0,
        evaluation_model=whole,
        evaluates=evaluates,
        evaluation_logits=8 * logits_of_row,
        held_out_logits=HELD_OUT_ROWS_AT_ONCE * logits_of_row,
        comparing=comparing,
        on_cpu=on_cpu,
    )


def _like(
    cfg: LanguageModelSAERunnerConfig[Any], cfgs: Sequence[LanguageModelSAERunnerConfig[Any]]
) -> list[LanguageModelSAERunnerConfig[Any]]:
    """Returns the configuration of each SAE, changed as `cfg` is changed from the first of `cfgs`."""
    each = [cfg]
    for other in cfgs[1:]:
        like = copy.copy(cfg)
        like.hook_name, like.sae = other.hook_name, copy.copy(other.sae)
        like.sae.d_sae = other.sae.d_sae * cfg.sae.d_sae // cfgs[0].sae.d_sae
        if hasattr(cfg.sae, "k"):
            like.sae.k = cfg.sae.k
        each.append(like)
    return each


def _layers_before(hook_name: str) -> int:
    """Returns the number of layers that come before a hook for certain."""
    found = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(found[1]) + hook_name.endswith("hook_resid_post") if found else 0


def _logits_bytes(
    cfg: LanguageModelSAERunnerConfig[Any], vocab_size: int, lm_bytes: int, *, on_cpu: bool
) -> tuple[int, int]:
    """Returns the bytes of an evaluation's logits for each row, and what their comparison takes beside them."""
    n_logits = cfg.context_size * vocab_size
    if on_cpu:
        return n_logits * (2 * lm_bytes + 4), 0
    compared = _COMPARED * min(_CHUNK, 4 * n_logits)
    if "hook_resid_" in cfg.hook_name:  # the predictions with zeros at the hook are the same for all rows
        return n_logits * 2 * lm_bytes, n_logits * lm_bytes + compared
    return n_logits * 3 * lm_bytes, compared


def _intermediate_size(config: PreTrainedConfig) -> int:
    """Returns the width inside the language model's MLP, the largest one if its layers differ."""
    try:
        size = getattr(config, "intermediate_size", None)
    except Exception:  # a configuration that has it per layer only
        size = None
    return (max(size) if isinstance(size, list | tuple) else size) or 4 * config.hidden_size
