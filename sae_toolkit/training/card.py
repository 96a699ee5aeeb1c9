"""What a run takes on a CUDA device, which need not be there, and the preset that fits the device of this machine.

    python -m sae_toolkit.training.card [flags of sae_lens_train.py]

prints what run_saelens_training.sh, which was given these flags and no preset, runs on a CUDA device: a line that says
what and why, the --batch_size of the evaluation, and the words of the command line that come before the flags.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.util import dtype_to_str

from sae_toolkit.errors import UserError
from sae_toolkit.model.devices import choose_device, choose_lm_dtype, free_memory
from sae_toolkit.model.hook_width import parameters_up_to_hook
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.settings.command_line import given_flags, parse_training_flags
from sae_toolkit.settings.evaluation import EvaluatedSAESettings
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.settings.values import memory_bytes
from sae_toolkit.steps.memory import MemoryPlan, plan_memory
from sae_toolkit.terminal.console import run_script, set_up_logging
from sae_toolkit.training.configuration import build_runner_configs
from sae_toolkit.training.lowered_run import LoweredRun, lower_peak
from sae_toolkit.training.recipe import with_recipe
from sae_toolkit.training.setup import find_model_at_hooks

log = logging.getLogger(__name__)

_PRESET, _SMALL_PRESET = "llama3-8b", "demo"
_CUDA_CONTEXT = 2**29  # bytes that CUDA and its libraries take beside what a plan counts; an estimate, not measured
_EVALUATION_ROWS = EvaluatedSAESettings.batch_size  # that the plan counts


@dataclass(frozen=True)
class RunOnCard:
    """A run whose language model and SAE are on one CUDA device, with nothing loaded and no text read.

    Args:
        model: source of the language model.
        lm_dtype: its dtype.
        cfgs: SAELens's configuration of each SAE, for a CUDA device.
        evaluates: whether the run measures on held-out text during training.
        finetune_loss: the loss of the steps at its end.
        begins_trained: whether it begins with the weights of a trained SAE, which has its number of features.
    """

    model: ModelSource
    lm_dtype: torch.dtype
    cfgs: list[LanguageModelSAERunnerConfig[Any]]
    evaluates: bool
    finetune_loss: Literal["none", "kl", "ce"]
    begins_trained: bool
    has_target_l0: bool

    @classmethod
    def of(cls, settings: TrainingSettings, auto_dtype: torch.dtype) -> RunOnCard:
        """Returns the run with these settings.

        Args:
            settings: the settings.
            auto_dtype: the dtype that `--lm_dtype auto` stands for.

        Raises:
            UserError: the settings do not fit together, or the model's configuration cannot be read.
        """
        model, widths = find_model_at_hooks(settings)
        settings = with_recipe(settings, max(widths.values())).settings
        cfgs = build_runner_configs(settings, widths, device="cuda", run_id="planned")
        chosen = settings.model.lm_dtype
        lm_dtype = auto_dtype if chosen == "auto" else getattr(torch, chosen)
        return cls(
            model,
            lm_dtype,
            cfgs,
            settings.recording.eval_every > 0,
            settings.optimization.finetune_loss,
            settings.sae.init_from is not None,
            settings.sae.target_l0 is not None,
        )

    @cached_property
    def _n_parameters(self) -> tuple[int, int]:
        """Number of parameters of the language model, and of its part up to the hooks."""
        hook_names = list(dict.fromkeys(cfg.hook_name for cfg in self.cfgs))
        up_to_hook = parameters_up_to_hook(self.model.config, hook_names, self.model.trust_remote_code)
        return self.model.n_parameters, up_to_hook

    def plan(self, cfg: LanguageModelSAERunnerConfig[Any], evaluates: bool) -> MemoryPlan:
        """Predicts the run's memory, with another configuration than its own. No activations are cached."""
        return plan_memory(
            cfg,
            self.model,
            self.lm_dtype,
            n_parameters=self._n_parameters,
            cached=False,
            cfgs=self.cfgs,
            evaluates=evaluates,
            finetune_loss=self.finetune_loss,
            has_target_l0=self.has_target_l0,
        )

    def kept(self, given: Collection[str] = ()) -> set[str]:
        """Returns the names of the flags that must stay as they are, besides those of `given`."""
        kept = {*given}
        if self.finetune_loss != "none":
            kept.add("train_batch_size_tokens")
        if self.begins_trained:
            kept.add("expansion_factor")
        return kept


def _evaluation_peak(plan: MemoryPlan, rows: int) -> int:
    """Returns the most bytes that the evaluation after the training takes, with so many rows in a forward pass."""
    return plan.evaluation_peak - plan.evaluation_logits * (_EVALUATION_ROWS - rows) // _EVALUATION_ROWS


def _evaluation_rows(plan: MemoryPlan, capacity: int) -> int:
    """Returns the --batch_size with which the evaluation fits: its default, or halved; 0 if a single row does not."""
    rows = _EVALUATION_ROWS
    while rows and _evaluation_peak(plan, rows) > capacity:
        rows //= 2
    return rows


def show_fit(settings: TrainingSettings) -> None:
    """Logs what a run takes on a CUDA device with the memory of --device_memory, and what would fit there.

    Raises:
        UserError: as `RunOnCard.of`.
    """
    size = str(settings.run.device_memory)
    run = RunOnCard.of(settings, auto_dtype=torch.bfloat16)  # as on all CUDA devices since 2020
    cfg, capacity = run.cfgs[0], memory_bytes(size) - _CUDA_CONTEXT
    lowered = lower_peak(cfg, lambda *other: run.plan(*other).peak, capacity, evaluates=run.evaluates, given=run.kept())
    saes = cfg.sae.architecture() if len(run.cfgs) == 1 else f"{len(run.cfgs)} x {cfg.sae.architecture()}"
    log.info(
        "model   %s, %s, %s on a CUDA device\n"
        "SAE     %s, %s features on %s dimensions, %s\n"
        "%s\n"
        "device  %s, of which CUDA itself takes about %s: the training %s; the evaluation %s",
        run.model.name,
        " ".join(dict.fromkeys(each.hook_name for each in run.cfgs)),
        dtype_to_str(run.lm_dtype),
        saes,
        f"{cfg.sae.d_sae:,}",
        f"{cfg.sae.d_in:,}",
        cfg.sae.dtype,
        run.plan(cfg, run.evaluates).describe(),
        _gib(memory_bytes(size)),
        _gib(_CUDA_CONTEXT),
        _training_fit(lowered, capacity),
        _evaluation_fit(run.plan(lowered.cfg, lowered.evaluates), capacity),
    )


def _training_fit(lowered: LoweredRun, capacity: int) -> str:
    flags = " ".join(lowered.flags)
    if lowered.peak > capacity:
        return f"does not fit, and takes {_gib(lowered.peak)}{' even with ' if flags else ''}{flags}"
    return f"does not fit, but does with {flags}" if flags else "fits"


def _evaluation_fit(plan: MemoryPlan, capacity: int) -> str:
    rows = _evaluation_rows(plan, capacity)
    if rows == 0:
        return f"does not, and takes {_gib(_evaluation_peak(plan, 1))} even with --batch_size 1"
    return "fits" if rows == _EVALUATION_ROWS else f"fits with --batch_size {rows}"


@dataclass(frozen=True)
class Choice:
    """What run_saelens_training.sh runs where no preset is named.

    Args:
        line: says what it runs and why.
        words: the words of the command line that come before the person's own.
        evaluation_rows: the --batch_size of the evaluation.
    """

    line: str
    words: tuple[str, ...]
    evaluation_rows: int = _EVALUATION_ROWS


@dataclass(frozen=True)
class Card:
    """A CUDA device of this machine.

    Args:
        name: its name.
        free: the bytes that are free on it.
        lm_dtype: dtype of the language model there, if no flag chooses it.
    """

    name: str
    free: int
    lm_dtype: torch.dtype

    @classmethod
    def of(cls, device: str) -> Card:
        """Returns the device that a value of --device stands for.

        Raises:
            UserError: torch does not see it.
        """
        device = choose_device(device)
        return cls(torch.cuda.get_device_name(device), free_memory(device), choose_lm_dtype("auto", device))


def choose_preset(words: Sequence[str], card_of: Callable[[str], Card] = Card.of) -> Choice:
    """Returns the preset llama3-8b with what it takes to fit a CUDA device, or the preset demo if it does not fit.

    A flag that the person gives is not changed. Where the run cannot be planned, such as for a model that cannot be
    reached, the choice is the preset as it is, and the training says what is wrong.

    Args:
        words: the person's own words of the command line.
        card_of: returns the device that a value of --device stands for.
    """
    as_it_is = Choice(f"Preset {_PRESET}: torch sees a CUDA device, {card_of('cuda').name}", (_words_of(_PRESET),))
    if {"-h", "--help"} & set(words):
        return as_it_is
    try:
        settings = parse_training_flags([*as_it_is.words, *words])
        if not settings.model.is_on_one_gpu:
            return as_it_is
        card = card_of(settings.model.device)
        run = RunOnCard.of(settings, auto_dtype=card.lm_dtype)
    except UserError:
        return as_it_is

    def peak(cfg: LanguageModelSAERunnerConfig[Any], evaluates: bool) -> int:
        plan = run.plan(cfg, evaluates)
        return max(plan.peak, _evaluation_peak(plan, 1))

    lowered = lower_peak(run.cfgs[0], peak, card.free, evaluates=run.evaluates, given=run.kept(given_flags(words)))
    has = f"{card.name} has {_gib(card.free)} free"
    if lowered.peak > card.free:
        return Choice(
            f"Preset {_SMALL_PRESET}, the embedded model and text: {has}, and the preset {_PRESET} takes at least"
            f" {_gib(lowered.peak)}",
            (_words_of(_SMALL_PRESET),),
        )
    flags = "".join(f" {word}" for word in lowered.flags)
    takes = run.plan(run.cfgs[0], run.evaluates).peak
    rows = _evaluation_rows(run.plan(lowered.cfg, lowered.evaluates), card.free)
    return Choice(
        f"Preset {_PRESET}{' with' if flags else ''}{flags}: {has}, the preset takes {_gib(takes)}"
        + (f"; the evaluation has --batch_size {rows}" if rows < _EVALUATION_ROWS else ""),
        (*as_it_is.words, *lowered.flags),
        rows,
    )


def _words_of(preset: str) -> str:
    return f"@presets/{preset}.args"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def main() -> None:
    set_up_logging(quiet=True)
    choice = choose_preset(sys.argv[1:])
    print(choice.line, choice.evaluation_rows, *choice.words, sep="\n")


if __name__ == "__main__":
    run_script(main)
