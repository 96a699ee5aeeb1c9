"""Settings of an evaluation, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sae_toolkit.errors import UserError
from sae_toolkit.settings.fields import as_text, build_parser, flag, from_flags
from sae_toolkit.settings.values import NonNegative, NormMultiple, Positive, TrueFalseOrIds


@dataclass(frozen=True)
class EvaluatedSAESettings:
    """SAEs and their language model."""

    sae_path: tuple[str, ...] = flag((), metavar="SAE")
    """SAEs to evaluate: directories of SAEs or runs, patterns such as 'runs/*', SAELens's release:sae_id, or Hugging
    Face ids, with :hookpoint if the repository holds several SAEs
    """
    like: str | None = flag(None, metavar="SAE")
    """evaluate all SAEs as this SAE would be: on its model, hook, text, held-out documents and positions"""
    model_name: str | None = None
    """language model: a Hugging Face id, a directory, a .gguf file or embedded:smollm2-135m (default: the model
    that the SAE was trained on)
    """
    layer: NonNegative | None = None
    """evaluate at this layer; the first layer is 0 (default: the layer that the SAE was trained at)"""
    hook_name: str | None = None
    """evaluate at this TransformerLens hook, or at the output of this Transformers module (default: the hook that the
    SAE was trained at)
    """
    trust_remote_code: bool = False
    """run the Python code that comes with the model, which can do anything that you can do on this machine"""
    device: str = "auto"
    """device: cpu, cuda, cuda:N, mps (the GPU of an Apple machine; not measured), or auto: cuda if torch finds a CUDA
    device, and cpu otherwise
    """
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the language model; auto is bfloat16 if the hardware is faster in it, and float32 otherwise"""
    batch_size: Positive = 8
    """number of sequences in one forward pass of the language model"""


@dataclass(frozen=True)
class ReadTextSettings:
    """Text."""

    dataset: str | None = None
    """text to evaluate on: a Hugging Face id, a file, a directory or embedded:wikipedia (default: the documents that
    were held out of the SAE's training)
    """
    dataset_config: str | None = None
    """configuration of the data set, such as wikitext-2-raw-v1 (default: if the SAE was trained on this data set, the
    configuration of the training; otherwise the one that is called default, or the first)
    """
    dataset_split: str | None = None
    """split of the data set (default: if the SAE was trained on this data set, the split of the training; otherwise the
    first that exists of test, validation and train)
    """
    text_column: str | None = None
    """column that holds conversations, text or token ids; a.b is the field b of the column a (default: found by its
    name and content)
    """
    held_out_part: Literal["validation", "test"] | None = None
    """measure on one of two disjoint halves of the documents that were held out of the SAE's training: choose between
    SAEs by one half, and report what the other says (default: all of these documents)
    """
    chat_tokens: Literal["all", "assistant"] | None = None
    """which tokens of conversations to measure on: all, or only what the assistant says (default: as in training)"""
    fallback_dataset: str | None = None
    """data set to use if --dataset cannot be opened"""
    context_length: Positive | None = None
    """number of tokens in a sequence (default: as in training)"""
    exclude_special_tokens: TrueFalseOrIds | None = None
    """leave out special tokens, such as the start of a text: true, false, or their token ids joined by commas (default:
    as in training)
    """
    skip_positions: NonNegative | None = None
    """leave out this many positions at the start of each context (default: as in training)"""
    max_activation_norm_multiple: NormMultiple | None = None
    """leave out activations whose norm is more than this many times the median norm, which is measured on the text of
    the evaluation; 0 keeps all (default: the norm limit of the training)
    """

    @property
    def given_positions(self) -> str | None:
        """The first flag that chose positions, with its value; None if there is none."""
        for name in ("chat_tokens", "exclude_special_tokens", "skip_positions", "max_activation_norm_multiple"):
            if (value := getattr(self, name)) is not None:
                return f"--{name} {as_text(value)}"
        return None

    seed: NonNegative = 42
    """random seed of the choice of sequences, and of what is drawn for the measurements"""


@dataclass(frozen=True)
class EvaluationTextSettings(ReadTextSettings):
    """Text."""

    num_samples: Positive | None = None
    """number of sequences to evaluate on (default: 50,000 tokens in all, and 20,000 for the losses of the model)"""
    dead_tokens: Positive | None = None
    """count dead features on at least this many tokens (default: on the tokens of the other metrics)"""


@dataclass(frozen=True)
class MeasurementSettings:
    """Measurements."""

    protocol: Literal["health", "saebench"] = "health"
    """health replaces activations by the SAE's output only at the positions that it was trained on; saebench does so at
    every position, and averages as SAEBench does
    """
    saebench: str | None = flag(None, metavar="EVALS")
    """also run these evaluations of sae-bench, in an environment of its own: core,absorption,..."""
    stability: tuple[str, ...] = flag((), metavar="SAE")
    """also look for the features in these SAEs of the same hook, such as those of other seeds: how many are found
    again, and whether they fire together. Without --sae_path, these SAEs are evaluated and compared with each other
    """
    l0_check: bool = False
    """also measure what the decoder says about L0; with SAEs of several L0s at one hook, which of them it points to"""
    synthetic: bool = False
    """also score the SAEs by the true features of the synthetic model that they are for (MCC, F1, uniqueness)"""
    probing: tuple[str, ...] = flag((), metavar="TASK")
    """also probe few features on these tasks: files or Hugging Face ids with texts of two classes, or embedded:tasks"""
    probing_text_column: str | None = None
    """column of the tasks that holds the texts (default: found by its name and content)"""
    probing_label_column: str | None = None
    """column of the tasks that holds the labels (default: label, labels, target or class)"""
    probing_examples: Positive = 5000
    """read at most this many rows of each file or data set"""
    probing_keep_repeated: bool = False
    """keep texts that occur again, as sae-probes does: the same text can then be in the training and in the test"""
    features: tuple[int, ...] = ()
    """indices of features to show in the report, in addition to the sample of --n_features"""
    n_features: NonNegative = 50
    """how many features to show in the report; they are chosen so that frequent and rare ones are among them"""
    no_diagnosis: bool = False
    """do not look for the causes if an SAE is unhealthy"""


@dataclass(frozen=True)
class ResultSettings:
    """Results."""

    output_json: Path | None = None
    """file for the results, next to which the reports are written (default: evaluation.json in the SAE's directory)"""
    push_to_hub: str | None = flag(None, metavar="OWNER/NAME")
    """publish the SAEs in this Hugging Face repository, with a model card that shows the results"""
    verbose: bool = flag(False, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class EvaluationSettings:
    """All settings of an evaluation."""

    saes: EvaluatedSAESettings
    text: EvaluationTextSettings = field(default_factory=EvaluationTextSettings)
    measurements: MeasurementSettings = field(default_factory=MeasurementSettings)
    results: ResultSettings = field(default_factory=ResultSettings)


def check_hook_flags(saes: EvaluatedSAESettings) -> None:
    """Raises a UserError if two flags choose the hook."""
    if saes.hook_name is not None and saes.layer is not None:
        raise UserError(
            f"--layer {saes.layer} and --hook_name {saes.hook_name}: only one of them can choose the hook; leave out"
            " the other"
        )


def parse_evaluation_flags(description: str, argv: Sequence[str] | None = None) -> EvaluationSettings:
    """Parses the flags of an evaluation.

    Args:
        description: description of the script, for --help.

    Raises:
        UserError: a flag is unknown, its value cannot be right, or two flags do not fit together.
    """
    parser = build_parser(EvaluationSettings, description=description)
    settings = from_flags(EvaluationSettings, vars(parser.parse_args(argv)))
    if not settings.saes.sae_path:
        if not settings.measurements.stability:
            raise UserError("--sae_path: names no SAE; name the directory of an SAE or of a run")
        settings = replace(settings, saes=replace(settings.saes, sae_path=settings.measurements.stability))
    saes, text = settings.saes, settings.text
    check_hook_flags(saes)
    if settings.measurements.protocol == "saebench" and text.given_positions:
        raise UserError(
            f"{text.given_positions}: with --protocol saebench the SAE stands in at every position; leave one of the"
            " two out"
        )
    measurements = settings.measurements
    if not measurements.probing:
        without = MeasurementSettings()
        for name in ("probing_text_column", "probing_label_column", "probing_examples", "probing_keep_repeated"):
            if (value := getattr(measurements, name)) != getattr(without, name):
                given = f"--{name}" if value is True else f"--{name} {as_text(value)}"
                raise UserError(f"{given}: is about the tasks of --probing; give both, or none")
    push_to_hub = settings.results.push_to_hub
    if push_to_hub and settings.measurements.protocol != "health":
        raise UserError(f"--push_to_hub {push_to_hub}: the model card shows the results of --protocol health; use that")
    return settings
