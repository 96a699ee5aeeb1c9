"""The settings of an evaluation, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sae_toolkit.errors import UserError
from sae_toolkit.settings.fields import add_flags, flag, from_flags
from sae_toolkit.settings.values import NonNegative, Positive
from sae_toolkit.terminal.console import Parser


@dataclass(frozen=True)
class EvaluatedSAESettings:
    """SAEs and their language model."""

    sae_path: tuple[str, ...] = flag(metavar="SAE")
    """directory of an SAE or of a run, release:sae_id, Hugging Face id[:hookpoint], or a pattern"""
    like: str | None = flag(None, metavar="SAE")
    """measure them as this SAE is: its model, hook, text, held-out documents and positions stand for theirs"""
    model_name: str | None = None
    """Hugging Face id, directory, .gguf file or embedded model (default: the SAE's)"""
    layer: NonNegative | None = None
    """layer of the hook (default: the SAE's)"""
    trust_remote_code: bool = False
    """let code that comes with the model run"""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: CUDA where torch sees it"""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """the language model's dtype; auto: bfloat16 where the hardware computes in it, else float32"""
    batch_size: Positive = 8
    """sequences in one forward pass"""


@dataclass(frozen=True)
class EvaluationTextSettings:
    """Text."""

    dataset: str | None = None
    """Hugging Face id, file, directory or embedded text (default: what the SAE did not train on)"""
    dataset_config: str | None = None
    """configuration of the data set (default: found)"""
    dataset_split: str | None = None
    """split (default: the SAE's own data: as in training; another: test, validation or train)"""
    text_column: str | None = None
    """column of the text or of the token ids (default: found)"""
    fallback_dataset: str | None = None
    """data set to take where --dataset cannot be opened"""
    num_samples: Positive | None = None
    """sequences (default: as many as make 50,000 tokens; 20,000 for what needs the whole model)"""
    dead_tokens: Positive | None = None
    """count dead features on at least so many tokens (default: those of the other metrics)"""
    context_length: Positive | None = None
    """tokens in a sequence (default: as in training)"""
    seed: NonNegative = 42
    """of the sequences drawn"""


@dataclass(frozen=True)
class MeasurementSettings:
    """Measurements."""

    protocol: Literal["health", "saebench"] = "health"
    """health: the SAE stands in where it was trained to; saebench: at every position, with SAEBench's averages"""
    saebench: str | None = flag(None, metavar="EVALS")
    """run sae-bench too, in its own environment: core,absorption,..."""
    features: tuple[int, ...] = ()
    """features to show in the report, beside a sample of them"""
    n_features: NonNegative = 50
    """size of that sample, spread over firing rates"""
    no_diagnosis: bool = False
    """do not look for what makes an unhealthy SAE so"""


@dataclass(frozen=True)
class ResultSettings:
    """Results."""

    output_json: Path | None = None
    """where the results go, the reports beside them (default: evaluation.json beside the checkpoint)"""
    push_to_hub: str | None = flag(None, metavar="OWNER/NAME")
    """publish the SAEs there, with a model card of what was measured"""
    verbose: bool = flag(False, exclusive="verbosity")
    """log details too"""
    quiet: bool = flag(False, exclusive="verbosity")
    """log nothing but warnings, errors and results"""


@dataclass(frozen=True)
class EvaluationSettings:
    """All settings of an evaluation."""

    saes: EvaluatedSAESettings
    text: EvaluationTextSettings = field(default_factory=EvaluationTextSettings)
    measurements: MeasurementSettings = field(default_factory=MeasurementSettings)
    results: ResultSettings = field(default_factory=ResultSettings)


def parse_evaluation_flags(description: str, argv: Sequence[str] | None = None) -> EvaluationSettings:
    """Parses the flags of an evaluation.

    Args:
        description: of the script, for its help.

    Raises:
        UserError: a flag is unknown, or its value cannot be right by itself or beside the others.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flags(parser, EvaluationSettings)
    settings = from_flags(EvaluationSettings, vars(parser.parse_args(argv)))
    push_to_hub = settings.results.push_to_hub
    if push_to_hub and settings.measurements.protocol != "health":
        raise UserError(f"--push_to_hub {push_to_hub}: the model card has the numbers of --protocol health")
    return settings
