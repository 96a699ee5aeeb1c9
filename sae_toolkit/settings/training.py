"""Settings of a training run, and the directory of a run.

Flags that the document has which this project reproduces (README) keep their names and defaults. The other flags are
those that a healthy SAE needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sae_toolkit.settings import fields
from sae_toolkit.settings.fields import Scope, as_text, flag
from sae_toolkit.settings.values import (
    Fraction,
    IntervalText,
    MemorySize,
    NonNegative,
    NonNegativeFloat,
    NormMultiple,
    PathOrNone,
    Positive,
    PositiveFloat,
    Share,
    TrueFalseOrIds,
    TrueOrFalse,
)

# The keys of SAELens's registry of training classes, written out so that --help need not import SAELens, which takes
# seconds. A test compares the two.
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


class _InsteadOfLayers(argparse.Action):
    """Keeps the layer, and forgets the --layers before it. After a hook it is refused: it is about another place."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        for name in ("hook_name", "hook_names"):
            if hooks := getattr(namespace, name, None):
                parser.error(
                    f"argument --layer {values}: --{name} {as_text(hooks)} chooses the place, and --layer is for the"
                    " residual stream; leave one of them out"
                )
        setattr(namespace, self.dest, values)
        namespace.layers = None


@dataclass(frozen=True)
class ModelSettings:
    """Language model."""

    model_name: str = "meta-llama/Meta-Llama-3-8B"
    """language model: a Hugging Face id, a directory, a .gguf file, embedded:smollm2-135m or synthetic:small"""
    layer: NonNegative = flag(12, action=_InsteadOfLayers)
    """train on the residual stream after this layer; the first layer is 0; the later of --layer and --layers counts"""
    hook_name: str | None = None
    """train on the activations at this TransformerLens hook (default: blocks.LAYER.hook_resid_post)"""
    layers: tuple[NonNegative, ...] | None = flag(None, is_swept=False)
    """train one SAE for each of these layers, all from one pass of the language model"""
    hook_names: tuple[str, ...] | None = flag(None, is_swept=False)
    """train one SAE for each of these hooks, all from one pass of the language model"""
    device: str = flag("auto", scope=Scope.PROCESS)
    """device of the SAE: cpu, cuda, cuda:N, mps (the GPU of an Apple machine; not measured), or auto: cuda if torch
    finds a CUDA device, and cpu otherwise
    """
    llm_device: str | None = flag(None, scope=Scope.PROCESS, is_swept=True)
    """device of the language model: cpu, cuda:N or mps (default: the device of the SAE)"""
    n_devices: Positive = flag(1, scope=Scope.PROCESS, is_swept=True)
    """spread the language model over this many GPUs, beginning with --llm_device"""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the language model, and on a CPU also of the SAE's matrix products; auto is bfloat16 if the hardware
    is faster in it, and float32 otherwise
    """
    cache_activations: str | None = flag(None, scope=Scope.RUN, metavar="DIRECTORY")
    """keep the activations in this directory, in bfloat16, and read the ones that an earlier run left there"""
    store_batch_size_prompts: Positive = 8
    """number of contexts in one forward pass of the language model"""
    trust_remote_code: bool = flag(False, scope=Scope.COMMAND)
    """run the Python code that comes with the model, which can do anything that you can do on this machine"""

    @property
    def is_on_one_gpu(self) -> bool:
        """Whether the SAE and the language model share one CUDA device, if torch sees one."""
        return self.device != "cpu" and self.llm_device is None and self.n_devices == 1

    @property
    def all_hook_names(self) -> list[str]:
        """The hooks; one SAE is trained at each."""
        if self.hook_names or self.hook_name:
            return list(self.hook_names or [str(self.hook_name)])
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers or [self.layer]]

    @property
    def hook_flag(self) -> str:
        """The flag that chose the hooks."""
        return next((f"--{name}" for name in ("hook_names", "hook_name", "layers") if getattr(self, name)), "--layer")


@dataclass(frozen=True)
class TextSettings:
    """Text."""

    dataset_path: str = "jyanimaulik/yahoo_finance_stockmarket_news"
    """text to train on: a Hugging Face id, a file, a directory, embedded:wikipedia or synthetic:small"""
    dataset_config: str | None = None
    """configuration of the data set, such as wikitext-2-raw-v1 (default: the one that is called default, or the
    first)
    """
    dataset_split: str | None = None
    """split of the data set to train on (default: train)"""
    text_column: str | None = None
    """column that holds conversations, text or token ids; a.b is the field b of the column a (default: found by its
    name and content)
    """
    streaming: TrueOrFalse = flag(True, is_swept=False)
    """download the data set piece by piece while it is read, not as a whole before the run"""
    chat_tokens: Literal["all", "assistant"] = flag("all", is_later=True)
    """which tokens of conversations to train on: all, or only what the assistant says"""
    fallback_dataset: str | None = None
    """data set to use if --dataset_path cannot be opened"""
    held_out_fraction: Fraction = 0.1
    """share of the documents that the SAE is not trained on, so that it can be evaluated on them"""
    held_out_seed: NonNegative | None = flag(None, is_later=True)
    """random seed that chooses the held-out documents (default: the value of --seed)"""
    epochs: Positive = flag(1, is_later=True)
    """train on a text that has fewer tokens than --training_tokens up to this many times, each time in a new order"""
    context_size: Positive = 2048
    """number of tokens in one context of the language model"""
    exclude_special_tokens: TrueFalseOrIds = True
    """do not train on special tokens, such as the start of a text: true, false, or their token ids joined by commas"""
    skip_positions: NonNegative = 1
    """do not train on this many positions at the start of each context"""
    max_activation_norm_multiple: NormMultiple = 10.0
    """do not train on activations whose norm is more than this many times the median norm; 0 keeps all"""


class _InsteadOfDSae(argparse.Action):
    """Keeps the value, and forgets the --d_sae before it, such as that of a flag file or of another run."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.d_sae = None


@dataclass(frozen=True)
class SAESettings:
    """Sparse autoencoder."""

    architecture: Architecture = "standard"
    """kind of sparse autoencoder, by the name that SAELens gives it"""
    expansion_factor: Positive = flag(32, action=_InsteadOfDSae)
    """number of features of the SAE for each dimension of the activations"""
    d_sae: Positive | None = flag(None, is_later=True)
    """number of features of the SAE, which need not be a multiple of the dimensions (default: by --expansion_factor;
    the later of the two flags counts)
    """
    l1_coefficient: NonNegativeFloat = 5.0
    """weight of the sparsity loss; a higher weight makes fewer features active (standard, gated)"""
    l0_coefficient: NonNegativeFloat = 1.0
    """weight of the sparsity loss; a higher weight makes fewer features active (jumprelu)"""
    target_l0: PositiveFloat | None = flag(None, is_later=True)
    """adjust the weight of the sparsity loss during training until this many features are active for each token
    (standard, gated, jumprelu; jumprelu then has the loss that SAELens recommends, unless --set chooses another)
    """
    k: Positive = 100
    """number of features that are active for each token (the topk kinds; for the batchtopk kinds on average)"""
    matryoshka_widths: tuple[Positive, ...] | None = flag(None, is_swept=False)
    """numbers of features of the nested dictionaries, in ascending order (matryoshka_batchtopk; default: 1/16, 1/4 and
    all of the features)
    """
    normalize_activations: Literal[
        "none",
        "expected_average_only_in",
        "constant_norm_rescale",
        "layer_norm",
        "covariance_whitening",
        "expected_average_in_and_out",
        "expected_average_only_out",
    ] = "none"
    """how the activations are scaled before the SAE gets them; the scale of expected_average_only_in is folded into the
    saved weights
    """
    b_dec_init_method: Literal["zeros", "mean"] = flag("zeros", is_later=True)
    """the decoder's bias at the first step: zeros, or the mean of the first activations, with which fewer features are
    dead in a wide SAE
    """
    shard_features: bool = flag(False, scope=Scope.PROCESS)
    """divide the features among the processes of run_simple.sh, if one GPU cannot hold all of them (topk, batchtopk)"""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """dtype of the SAE"""
    init_from: PathOrNone = flag(None, is_later=True, metavar="SAE")
    """begin with the weights of this SAE, not with random ones: all that --sae_path of the evaluation takes, such as a
    finished SAE, a run, a checkpoint, or an SAE of another library or the Hub; none for random weights
    """

    def n_features(self, d_in: int) -> int:
        """Returns the number of features for activations of width `d_in`."""
        return self.expansion_factor * d_in if self.d_sae is None else self.d_sae

    @property
    def width_words(self) -> tuple[str, str]:
        """The flag that sets the number of features, and its value."""
        if self.d_sae is None:
            return "--expansion_factor", str(self.expansion_factor)
        return "--d_sae", str(self.d_sae)


@dataclass(frozen=True)
class OptimizationSettings:
    """Optimization."""

    recipe: Literal["seed", "auto"] = flag("seed", is_later=True)
    """where the values come from that no flag gives: seed for the defaults, which are those of the document; auto for
    values that follow from --training_tokens, the number of features and k (docs/recipes.md)
    """
    training_tokens: Positive = 500_000
    """number of tokens whose activations the SAE is trained on"""
    train_batch_size_tokens: Positive = 1024
    """number of tokens in one training step"""
    n_batches_in_buffer: Positive = 64
    """number of contexts whose activations are mixed before they are divided into batches"""
    lr: PositiveFloat = 1e-4
    """learning rate of Adam"""
    lr_warm_up_steps: NonNegative = 0
    """number of steps at the start in which the learning rate rises linearly"""
    lr_decay_steps: NonNegative = 0
    """number of steps at the end in which the learning rate falls linearly to zero"""
    dead_feature_window: Positive = 1000
    """count a feature as dead once it was not active for this many steps"""
    finetune_loss: Literal["none", "kl", "ce"] = flag("none", is_later=True)
    """train the last tokens of the run on the model's own predictions with the SAE in place too: kl is the KL
    divergence from its predictions without the SAE, ce the cross-entropy of the next token
    """
    finetune_fraction: Share = flag(0.1, is_later=True)
    """share of --training_tokens, at the end of the run, that --finetune_loss is for; 1 is the whole run"""
    seed: NonNegative = 42
    """random seed of the weights and the shuffling and, by default, of the held-out documents"""
    seeds: Positive = flag(1, is_later=True, is_swept=False)
    """train this many SAEs side by side on the same activations. Their weights begin with the seeds --seed, --seed + 1,
    ...; at the end the run shows how many of their features are found again in the others
    """
    set: tuple[str, ...] = flag((), action="append", nargs=None, metavar="KEY=VALUE")
    """set another field of SAELens's LanguageModelSAERunnerConfig, such as sae.aux_loss_coefficient=0.5"""


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    output_name: str = flag("llama_layer12_sae_saelens_500k", scope=Scope.RUN)
    """first part of the name of the run's directory"""
    checkpoint_path: str = flag("checkpoints", scope=Scope.RUN)
    """directory in which the directories of all runs are made"""
    n_checkpoints: NonNegative = flag(0, scope=Scope.PROCESS)
    """number of evenly spaced checkpoints that are kept after the run"""
    checkpoint_every: IntervalText = flag("30min", scope=Scope.PROCESS, metavar="TIME|TOKENS")
    """how often to save a checkpoint to resume from: 90s, 30min, 2h, a number of tokens, or 0 for never"""
    keep: Positive = flag(2, scope=Scope.PROCESS)
    """number of checkpoints to resume from that are kept; they are deleted when the run is finished"""
    resume: str | None = flag(None, scope=Scope.COMMAND, nargs="?", const="auto", metavar="DIRECTORY")
    """go on with an interrupted run: from this checkpoint, or from the newest checkpoint of this run's directory.
    Without a value, or with auto: from the newest checkpoint of a run with the same flags, if there is one
    """
    like: str | None = flag(None, scope=Scope.COMMAND, metavar="DIRECTORY")
    """use the flags of the earlier run that has this directory, except for the flags that are given here"""
    dry_run: bool = flag(False, scope=Scope.COMMAND)
    """check the flags, the model and the data, show what would run, and stop"""
    device_memory: MemorySize | None = flag(None, scope=Scope.COMMAND, is_later=True)
    """with --dry_run: only show what the run takes on a CUDA device with this much memory, such as 24GB or 79.1GiB, and
    what would fit there; neither a GPU nor the text is needed
    """
    strict: bool = flag(False, scope=Scope.COMMAND)
    """refuse to train if the SAE is likely to become unhealthy; without this flag there is a warning"""


@dataclass(frozen=True)
class RecordingSettings:
    """Recording."""

    eval_every: NonNegative = flag(0, scope=Scope.RUN, metavar="TOKENS")
    """measure the SAE on held-out text every time it has been trained on this many more tokens; 0 for never"""
    logger: Literal["wandb", "tensorboard"] = flag("wandb", scope=Scope.PROCESS)
    """what records the metrics of the run; tensorboard writes into the run's directory"""
    wandb_mode: Literal["online", "offline", "disabled"] = flag("online", scope=Scope.PROCESS)
    """whether wandb uploads the metrics, keeps them on disk or does nothing; online becomes offline without a login"""
    wandb_project: str = flag("sae_lens_training", scope=Scope.PROCESS)
    """wandb project of the run"""
    wandb_entity: str | None = flag(None, scope=Scope.PROCESS)
    """wandb user or team of the run (default: your own)"""
    run_name: str | None = flag(None, scope=Scope.COMMAND)
    """name of the wandb run (default: the output name and the run's id)"""
    verbose: bool = flag(False, scope=Scope.COMMAND, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, scope=Scope.COMMAND, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class TrainingSettings:
    """All settings of a training run.

    Args:
        preset: the names of the flag files on the command line, for the record.
        chosen: with `--recipe auto`, the names of the flags that nobody gave. The recipe chooses their values.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    text: TextSettings = field(default_factory=TextSettings)
    sae: SAESettings = field(default_factory=SAESettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    recording: RecordingSettings = field(default_factory=RecordingSettings)
    preset: str | None = None
    chosen: tuple[str, ...] = ()

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> TrainingSettings:
        """Builds the settings from flags by name, as `as_flags` returns them. Missing flags have their defaults."""
        return fields.from_flags(cls, flags, preset=flags.get("preset"), chosen=tuple(flags.get("chosen", ())))

    def as_flags(self) -> dict[str, Any]:
        """Returns the flags, the preset and what the recipe chose by name, as training_flags.json keeps them."""
        return fields.as_flags(self) | {"preset": self.preset, "chosen": list(self.chosen)}

    @property
    def held_out_seed(self) -> int:
        """The random seed that chooses the held-out documents."""
        return self.optimization.seed if self.text.held_out_seed is None else self.text.held_out_seed

    @property
    def output_directory(self) -> Path:
        """The directory of all runs with these settings: {checkpoint_path}/{output_name}_{8 hex digits}."""
        return Path(self.run.checkpoint_path) / f"{self.run.output_name}_{self._hash()}"

    def _hash(self) -> str:
        """Returns eight hex digits that are the same for runs of the same model, data, SAE and optimization."""
        relevant = {
            name: value
            for name, value in self.as_flags().items()
            if (each := TRAINING_FLAGS.get(name)) and each.scope is Scope.SAE
            if not (each.is_later and value == each.default)
        }
        if self.model.cache_activations is not None:  # a cache rounds to bfloat16; its path does not matter
            relevant["cache_activations"] = True
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]


# The flags that --recipe auto chooses where nobody gives them.
RECIPE_FLAGS = (
    "architecture",
    "expansion_factor",
    "k",
    "target_l0",
    "l1_coefficient",
    "l0_coefficient",
    "normalize_activations",
    "b_dec_init_method",
    "train_batch_size_tokens",
    "lr",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "dead_feature_window",
)
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
TRAINING_FLAGS = fields.flags_of(TrainingSettings)
"""The flags of sae_lens_train.py, by name."""
