"""The settings of a training run: first the names and values of the document that this project reproduces (README),
then what a healthy SAE needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sae_toolkit.settings import fields
from sae_toolkit.settings.fields import Scope, flag
from sae_toolkit.settings.values import (
    Fraction,
    IntervalText,
    NonNegative,
    NonNegativeFloat,
    NormMultiple,
    Positive,
    PositiveFloat,
    TrueFalseOrIds,
    TrueOrFalse,
)

# SAELens's registry of training classes; written out because importing SAELens takes seconds, and --help should not.
Architecture = Literal[
    "standard",
    "topk",
    "batchtopk",
    "jumprelu",
    "gated",
    "matryoshka_batchtopk",
    "abstopk",
    "matching_pursuit",
]


@dataclass(frozen=True)
class ModelSettings:
    """Language model."""

    model_name: str = "meta-llama/Meta-Llama-3-8B"
    """Hugging Face id, directory, .gguf file or embedded model"""
    layer: NonNegative = 12
    """the layer whose residual stream is hooked, from 0"""
    hook_name: str | None = None
    """TransformerLens hook (default: blocks.LAYER.hook_resid_post)"""
    layers: tuple[NonNegative, ...] | None = flag(None, is_swept=False)
    """several layers, an SAE each, from one pass of the model"""
    hook_names: tuple[str, ...] | None = flag(None, is_swept=False)
    """several hooks, an SAE each, from one pass of the model"""
    device: str = flag("auto", scope=Scope.PROCESS)
    """cpu, cuda, cuda:N, or auto: CUDA where torch sees it"""
    llm_device: str | None = flag(None, scope=Scope.PROCESS, is_swept=True)
    """where the language model is, if not with the SAE: cpu, cuda:N"""
    n_devices: Positive = flag(1, scope=Scope.PROCESS, is_swept=True)
    """spread the language model over so many GPUs, from --llm_device on"""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """the language model's dtype, and on a CPU of the SAE's products too; auto: bfloat16 where the hardware computes
    in it, else float32
    """
    cache_activations: str | None = flag(None, scope=Scope.RUN, metavar="DIRECTORY")
    """keep the activations in this directory, in bfloat16, and take those that lie there"""
    store_batch_size_prompts: Positive = 8
    """contexts in one forward pass of the language model"""
    trust_remote_code: bool = flag(False, scope=Scope.COMMAND)
    """let code that comes with the model run"""

    @property
    def all_hook_names(self) -> list[str]:
        """The hooks that an SAE each is trained at."""
        if self.hook_names or self.hook_name:
            return list(self.hook_names or [str(self.hook_name)])
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers or [self.layer]]

    @property
    def hook_flag(self) -> str:
        """The flag that says where SAEs are trained."""
        return next((f"--{name}" for name in ("hook_names", "hook_name", "layers") if getattr(self, name)), "--layer")


@dataclass(frozen=True)
class TextSettings:
    """Text."""

    dataset_path: str = "jyanimaulik/yahoo_finance_stockmarket_news"
    """Hugging Face id, file, directory or embedded text"""
    dataset_config: str | None = None
    """configuration of the data set (default: found)"""
    dataset_split: str | None = None
    """split to train on (default: train)"""
    text_column: str | None = None
    """column of the text or of the token ids (default: found)"""
    streaming: TrueOrFalse = flag(True, is_swept=False)
    """read the data set as needed rather than download it whole"""
    fallback_dataset: str | None = None
    """data set to take where --dataset_path cannot be opened"""
    held_out_fraction: Fraction = 0.1
    """share of documents kept for evaluation, never trained on"""
    held_out_seed: NonNegative | None = flag(None, is_later=True)
    """which documents these are (default: --seed)"""
    context_size: Positive = 2048
    """tokens in one context of the language model"""
    exclude_special_tokens: TrueFalseOrIds = True
    """leave special tokens out: true, false, or token ids joined by commas"""
    skip_positions: NonNegative = 1
    """positions at the start of a context that are left out"""
    max_activation_norm_multiple: NormMultiple = 10.0
    """leave out activations whose norm is more than this many times the median; 0 keeps all"""


@dataclass(frozen=True)
class SAESettings:
    """Sparse autoencoder."""

    architecture: Architecture = "standard"
    """kind of SAE"""
    expansion_factor: Positive = 32
    """features per dimension of the activations"""
    l1_coefficient: NonNegativeFloat = 5.0
    """sparsity weight (standard, gated)"""
    l0_coefficient: NonNegativeFloat = 1.0
    """sparsity weight (jumprelu)"""
    target_l0: PositiveFloat | None = flag(None, is_later=True)
    """adjust that weight while training until so many features are active a token (jumprelu: with SAELens's
    recommended loss, unless --set chooses another)
    """
    k: Positive = 100
    """active features a token (topk; on average: batchtopk)"""
    matryoshka_widths: tuple[Positive, ...] | None = flag(None, is_swept=False)
    """widths of the nested dictionaries, ascending (matryoshka_batchtopk; default: 1/16, 1/4 and all)"""
    normalize_activations: Literal[
        "none",
        "expected_average_only_in",
        "constant_norm_rescale",
        "layer_norm",
        "covariance_whitening",
        "expected_average_in_and_out",
        "expected_average_only_out",
    ] = "none"
    """scaling of the activations; folded back into the saved weights where it is expected_average_only_in"""
    shard_features: bool = flag(False, scope=Scope.PROCESS)
    """spread the features over the ranks of run_simple.sh, where no device holds all of them (topk, batchtopk)"""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """dtype of the SAE"""


@dataclass(frozen=True)
class OptimizationSettings:
    """Optimization."""

    training_tokens: Positive = 500_000
    """activations to train on"""
    train_batch_size_tokens: Positive = 1024
    """activations in a training step"""
    n_batches_in_buffer: Positive = 64
    """contexts whose activations are mixed"""
    lr: PositiveFloat = 1e-4
    """learning rate of Adam"""
    lr_warm_up_steps: NonNegative = 0
    """steps of linear warm-up"""
    lr_decay_steps: NonNegative = 0
    """steps of linear decay to zero, at the end"""
    dead_feature_window: Positive = 1000
    """steps without firing after which a feature is dead"""
    seed: NonNegative = 42
    """of the weights, the shuffling and, by default, the held-out split"""
    set: tuple[str, ...] = flag((), action="append", metavar="KEY=VALUE")
    """any other field of SAELens's LanguageModelSAERunnerConfig, such as sae.aux_loss_coefficient=0.5"""


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    output_name: str = flag("llama_layer12_sae_saelens_500k", scope=Scope.RUN)
    """name of the run's directory"""
    checkpoint_path: str = flag("checkpoints", scope=Scope.RUN)
    """directory of all runs"""
    n_checkpoints: NonNegative = flag(0, scope=Scope.PROCESS)
    """checkpoints along the way, evenly spaced, which stay"""
    checkpoint_every: IntervalText = flag("30min", scope=Scope.PROCESS, metavar="TIME|TOKENS")
    """how often to save what a resume needs: 90s, 30min, 2h, a number of tokens, or 0 for never"""
    keep: Positive = flag(2, scope=Scope.PROCESS)
    """how many of those to keep; none is left once the run is finished"""
    resume: str | None = flag(None, scope=Scope.COMMAND, nargs="?", const="auto", metavar="DIRECTORY")
    """go on from a checkpoint, from the newest one of a run's directory, or (no value, or auto) from the newest one
    of a run with these flags, if there is any
    """
    like: str | None = flag(None, scope=Scope.COMMAND, metavar="DIRECTORY")
    """take the flags of an earlier run, except those that are given"""
    dry_run: bool = flag(False, scope=Scope.COMMAND)
    """check everything, say what would run, and stop"""
    strict: bool = flag(False, scope=Scope.COMMAND)
    """refuse to train where the result is likely to be unhealthy, rather than warn"""


@dataclass(frozen=True)
class RecordingSettings:
    """Recording."""

    eval_every: NonNegative = flag(0, scope=Scope.RUN, metavar="TOKENS")
    """measure on held-out text after so many tokens each time: loss recovered and the rest; 0 never does"""
    logger: Literal["wandb", "tensorboard"] = flag("wandb", scope=Scope.PROCESS)
    """what records the run; tensorboard writes into the run's directory"""
    wandb_mode: Literal["online", "offline", "disabled"] = flag("online", scope=Scope.PROCESS)
    """offline is used where there is no login"""
    wandb_project: str = flag("sae_lens_training", scope=Scope.PROCESS)
    """wandb project"""
    wandb_entity: str | None = flag(None, scope=Scope.PROCESS)
    """wandb user or team (default: your own)"""
    run_name: str | None = flag(None, scope=Scope.COMMAND)
    """name of the wandb run (default: the output name and the run's id)"""
    verbose: bool = flag(False, scope=Scope.COMMAND, exclusive="verbosity")
    """log details too"""
    quiet: bool = flag(False, scope=Scope.COMMAND, exclusive="verbosity")
    """log nothing but warnings, errors and results"""


@dataclass(frozen=True)
class TrainingSettings:
    (
        """All settings of a training run.

    Args:
        preset: the names of the flag files that were given, for the record.
    """
        ""
    )

    model: ModelSettings = field(default_factory=ModelSettings)
    text: TextSettings = field(default_factory=TextSettings)
    sae: SAESettings = field(default_factory=SAESettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    recording: RecordingSettings = field(default_factory=RecordingSettings)
    preset: str | None = None

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> TrainingSettings:
        """Builds the settings from what `as_flags` returned, or from the flags that are given and defaults."""
        return fields.from_flags(cls, flags, preset=flags.get("preset"))

    def as_flags(self) -> dict[str, Any]:
        """Returns the flags by name, and the preset, as training_flags.json keeps them."""
        return fields.as_flags(self) | {"preset": self.preset}

    @property
    def held_out_seed(self) -> int:
        """The seed of the held-out split."""
        return self.optimization.seed if self.text.held_out_seed is None else self.text.held_out_seed

    @property
    def output_directory(self) -> Path:
        """Where the runs with these settings are kept: checkpoints/{output_name}_{8 hex digits}."""
        return Path(self.run.checkpoint_path) / f"{self.run.output_name}_{self._hash()}"

    def _hash(self) -> str:
        """Eight hex digits that are the same for runs of the same model, data, SAE and optimization."""
        relevant = {
            name: value
            for name, value in self.as_flags().items()
            if (each := TRAINING_FLAGS.get(name)) and each.scope is Scope.SAE
            if not (each.is_later and value == each.default)
        }
        if self.model.cache_activations is not None:  # wherever the cache lies, it rounds to bfloat16
            relevant["cache_activations"] = True
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]


ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
TRAINING_FLAGS = fields.flags_of(TrainingSettings)
"""The flags of sae_lens_train.py, by name."""
