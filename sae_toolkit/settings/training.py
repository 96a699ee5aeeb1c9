"""The flags of `sae_lens_train.py`: the seed's names and values first, then what a healthy SAE needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.settings.checks import check_flags, check_paths
from sae_toolkit.settings.values import (
    Interval,
    boolean,
    boolean_or_ids,
    fraction,
    non_negative,
    non_negative_float,
    norm_multiple,
    positive,
    positive_float,
)
from sae_toolkit.terminal.console import Parser, add_talk_flags

# SAELens's registry of training classes; written out because importing SAELens takes seconds, and --help should not.
ARCHITECTURES = (
    "standard",
    "topk",
    "batchtopk",
    "jumprelu",
    "gated",
    "matryoshka_batchtopk",
    "abstopk",
    "matching_pursuit",
)
FLAGS_FILENAME = "training_flags.json"
METRICS_FILENAME, HELD_OUT_METRICS_FILENAME = "metrics.jsonl", "held_out.jsonl"

# Unset, they count as if there were none, so that runs from before there were are found.
LATER_FLAGS = ("target_l0", "held_out_seed")

# What may differ between a run and its resumption: nothing that the weights depend on.
_MAY_CHANGE = {
    "device",
    "llm_device",
    "n_devices",
    "shard_features",
    "n_checkpoints",
    "checkpoint_every",
    "keep",
    "logger",
    "wandb_mode",
    "wandb_project",
    "wandb_entity",
    "run_name",
    "verbose",
    "quiet",
    "dry_run",
    "strict",
    "resume",
    "trust_remote_code",
}

# What `--like` leaves behind.
_OF_ONE_RUN = {"resume", "dry_run", "strict", "run_name", "verbose", "quiet", "trust_remote_code"}

_EPILOG = f"""\
examples:
  # the real model and text of the package index, healthy in minutes without a GPU
  python sae_lens_train.py @presets/demo.args

  # Llama-3-8B, layer 12, on one GPU; flags after a preset override it
  python sae_lens_train.py @presets/llama3-8b.args --k 32 --output_name llama3_l12_k32

  # your own text and model
  python sae_lens_train.py @presets/demo.args --model_name ./my_model --dataset_path ./my_text.jsonl --layer 8

  # many runs on the same activations: the first computes them, the others read them
  python sae_lens_train.py @presets/demo.args --cache_activations ./activations --k 32
  python sae_lens_train.py @presets/demo.args --cache_activations ./activations --k 128

  # many layers from one pass of the model: an SAE each
  python sae_lens_train.py @presets/demo.args --layers 4 8 12 16

  # an L0 that you choose, where it is an outcome: the sparsity weight is found on the way
  python sae_lens_train.py @presets/demo.args --architecture gated --target_l0 64

  # what would run, without running it
  python sae_lens_train.py @presets/demo.args --dry_run

  # as an earlier run, but for what is given
  python sae_lens_train.py --like checkpoints/demo_1a2b3c4d/k3j2h1g0 --lr 1e-3

  # any other field of SAELens's configuration
  python sae_lens_train.py @presets/demo.args --set sae.aux_loss_coefficient=0.5 --set adam_beta1=0

  # an interrupted run: with the same flags, or by its directory, or from one of its checkpoints
  python sae_lens_train.py @presets/demo.args --resume
  python sae_lens_train.py --resume checkpoints/demo_1a2b3c4d/k3j2h1g0
  python sae_lens_train.py --resume checkpoints/demo_1a2b3c4d/k3j2h1g0/250880

models: a Hugging Face id, a directory, a .gguf file, or {EMBEDDED_MODEL}
data:   a Hugging Face id, a file or directory (txt, jsonl, csv, parquet, saved by datasets), or {EMBEDDED_TEXT}
"""


def parse_training_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags of a training run.

    With `--resume DIRECTORY` the flags are those of the run that it belongs to; flags given beside it must
    agree with them, but for those that the weights do not depend on.

    Raises:
        UserError: a flag is unknown, or its value cannot be right by itself or beside the others.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        flags = _build_parser().parse_args(argv)
    except (ValueError, RecursionError) as error:  # of a flag file: its quotes, its bytes, or one that names itself
        files = " ".join(word for word in words if word.startswith("@"))
        raise UserError(f"{files}: cannot be read as flags: {one_line(error)}") from None
    check_paths(flags)
    flags.preset = _presets(words)
    if flags.resume not in (None, "auto") or flags.like is not None:
        given = vars(_build_parser(argument_default=argparse.SUPPRESS).parse_args(argv))
        if flags.like is None:
            flags = _flags_of_run(Path(flags.resume), given)
        elif flags.resume in (None, "auto"):
            flags = _flags_like(Path(flags.like), given)
        else:
            raise UserError(
                f"--like {flags.like}, --resume {flags.resume}: a resumed run has its own flags; choose one"
            )
    check_flags(flags)
    return flags


def default_flags() -> dict[str, Any]:
    """All flags that a run is made of, with what they are where nothing is said."""
    return vars(_build_parser().parse_args([]))


def as_words(flags: Mapping[str, Any], *, leave_out: Collection[str] = ()) -> list[str]:
    """The words of a command line that give flags their values, where these are not the defaults."""
    words: list[str] = []
    for action in _build_parser()._actions:
        name, value = action.dest, flags.get(action.dest, action.default)
        if name in leave_out or value == action.default or not action.option_strings:
            continue
        if isinstance(action.const, bool):  # a flag without a value
            words.append(f"--{name}")
        elif name == "set":
            words += [word for assignment in value for word in ("--set", assignment)]
        else:
            values = value if isinstance(value, list) and action.nargs else [value]
            words += [f"--{name}", *map(_as_word, values)]
    return words


def _as_word(value: Any) -> str:
    if isinstance(value, list):  # token ids
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_directory_of(path: Path) -> Path:
    """The run's directory, given it or one of its checkpoints."""
    return path if (path / FLAGS_FILENAME).is_file() else path.parent


def _saved_flags(flag: str, path: Path) -> dict[str, Any]:
    """The flags of the run that a directory is or belongs to."""
    file = run_directory_of(path) / FLAGS_FILENAME
    if not path.is_dir() or not file.is_file():
        raise UserError(f"--{flag} {path}: neither a training run nor a checkpoint of one (there is no {file})")
    try:
        saved = default_flags() | json.loads(file.read_text())
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"--{flag} {path}: damaged: {FLAGS_FILENAME} cannot be read") from None
    saved["trust_remote_code"] = False  # a person's word for each time, never a file's
    return saved


def _flags_of_run(resume: Path, given: dict[str, Any]) -> argparse.Namespace:
    saved = _saved_flags("resume", resume)
    for name, value in given.items():
        if name not in _MAY_CHANGE and value != saved.get(name):
            raise UserError(f"--{name} {value}: the run being resumed has {saved.get(name)}; leave it out")
    return argparse.Namespace(**(saved | {k: v for k, v in given.items() if k in _MAY_CHANGE}))


def _flags_like(like: Path, given: dict[str, Any]) -> argparse.Namespace:
    """Those of another run, but for what is given, and what was said of that run alone."""
    saved = _saved_flags("like", like)
    of_that_run = {name: value for name, value in default_flags().items() if name in _OF_ONE_RUN}
    settings = [*saved["set"], *given.pop("set", [])]
    return argparse.Namespace(**(saved | of_that_run | given | {"set": settings}))


def save_flags(flags: argparse.Namespace, run_directory: Path) -> None:
    """Writes the flags where `--resume` looks for them."""
    (run_directory / FLAGS_FILENAME).write_text(json.dumps(vars(flags), indent=1) + "\n")


def _presets(argv: Sequence[str]) -> str | None:
    """The names of the flag files among the words of a command line."""
    return " ".join(Path(word[1:]).stem for word in argv if word.startswith("@")) or None


def _build_parser(**kwargs: Any) -> argparse.ArgumentParser:
    parser = Parser(
        prog="sae_lens_train.py",
        description="Trains a sparse autoencoder with SAELens on the activations of a language model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        **kwargs,
    )

    def flag(group: Any, name: str, default: Any, help: str, **kwargs: Any) -> None:
        if parser.argument_default is argparse.SUPPRESS:
            default = argparse.SUPPRESS
        elif default is not None:
            help += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        group.add_argument(f"--{name}", default=default, help=help, **kwargs)

    model = parser.add_argument_group("language model")
    flag(model, "model_name", "meta-llama/Meta-Llama-3-8B", "Hugging Face id, directory, .gguf file or embedded model")
    flag(model, "layer", 12, "the layer whose residual stream is hooked, from 0", type=non_negative)
    flag(model, "hook_name", None, "TransformerLens hook (default: blocks.LAYER.hook_resid_post)")
    flag(model, "layers", None, "several layers, an SAE each, from one pass of the model", type=non_negative, nargs="+")
    flag(model, "hook_names", None, "several hooks, an SAE each, from one pass of the model", nargs="+")
    flag(model, "device", "auto", "cpu, cuda, cuda:N, or auto: CUDA where torch sees it")
    flag(model, "llm_device", None, "where the language model is, if not with the SAE: cpu, cuda:N")
    flag(model, "n_devices", 1, "spread the language model over so many GPUs, from --llm_device on", type=positive)
    flag(
        model,
        "lm_dtype",
        "auto",
        "the language model's dtype, and on a CPU of the SAE's products too; auto: bfloat16 where the hardware computes"
        " in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    flag(
        model,
        "cache_activations",
        None,
        "keep the activations in this directory, in bfloat16, and take those that lie there",
        metavar="DIRECTORY",
    )
    flag(model, "store_batch_size_prompts", 8, "contexts in one forward pass of the language model", type=positive)
    flag(model, "trust_remote_code", False, "let code that comes with the model run", action="store_true")

    data = parser.add_argument_group("text")
    flag(
        data,
        "dataset_path",
        "jyanimaulik/yahoo_finance_stockmarket_news",
        "Hugging Face id, file, directory or embedded text",
    )
    flag(data, "dataset_config", None, "configuration of the data set (default: found)")
    flag(data, "dataset_split", None, "split to train on (default: train)")
    flag(data, "text_column", None, "column of the text or of the token ids (default: found)")
    flag(data, "streaming", True, "read the data set as needed rather than download it whole", type=boolean)
    flag(data, "fallback_dataset", None, "data set to take where --dataset_path cannot be opened")
    flag(data, "held_out_fraction", 0.1, "share of documents kept for evaluation, never trained on", type=fraction)
    flag(data, "held_out_seed", None, "which documents these are (default: --seed)", type=non_negative)
    flag(data, "context_size", 2048, "tokens in one context of the language model", type=positive)
    flag(
        data,
        "exclude_special_tokens",
        True,
        "leave special tokens out: true, false, or token ids joined by commas",
        type=boolean_or_ids,
    )
    flag(data, "skip_positions", 1, "positions at the start of a context that are left out", type=non_negative)
    flag(
        data,
        "max_activation_norm_multiple",
        10.0,
        "leave out activations whose norm is more than this many times the median; 0 keeps all",
        type=norm_multiple,
    )

    sae = parser.add_argument_group("sparse autoencoder")
    flag(sae, "architecture", "standard", "kind of SAE", choices=ARCHITECTURES)
    flag(sae, "expansion_factor", 32, "features per dimension of the activations", type=positive)
    flag(sae, "l1_coefficient", 5.0, "sparsity weight (standard, gated)", type=non_negative_float)
    flag(sae, "l0_coefficient", 1.0, "sparsity weight (jumprelu)", type=non_negative_float)
    flag(
        sae,
        "target_l0",
        None,
        "adjust that weight while training until so many features are active a token (jumprelu: with SAELens's"
        " recommended loss, unless --set chooses another)",
        type=positive_float,
    )
    flag(sae, "k", 100, "active features a token (topk; on average: batchtopk)", type=positive)
    flag(
        sae,
        "matryoshka_widths",
        None,
        "widths of the nested dictionaries, ascending (matryoshka_batchtopk; default: 1/16, 1/4 and all)",
        type=positive,
        nargs="+",
    )
    flag(
        sae,
        "normalize_activations",
        "none",
        "scaling of the activations; folded back into the saved weights where it is expected_average_only_in",
        choices=(
            "none",
            "expected_average_only_in",
            "constant_norm_rescale",
            "layer_norm",
            "covariance_whitening",
            "expected_average_in_and_out",
            "expected_average_only_out",
        ),
    )
    flag(
        sae,
        "shard_features",
        False,
        "spread the features over the processes of run_simple.sh, where no device holds all of them (topk, batchtopk)",
        action="store_true",
    )
    flag(sae, "dtype", "float32", "dtype of the SAE", choices=("float32", "bfloat16", "float16", "float64"))

    training = parser.add_argument_group("training")
    flag(training, "training_tokens", 500_000, "activations to train on", type=positive)
    flag(training, "train_batch_size_tokens", 1024, "activations in a training step", type=positive)
    flag(training, "n_batches_in_buffer", 64, "contexts whose activations are mixed", type=positive)
    flag(training, "lr", 1e-4, "learning rate of Adam", type=positive_float)
    flag(training, "lr_warm_up_steps", 0, "steps of linear warm-up", type=non_negative)
    flag(training, "lr_decay_steps", 0, "steps of linear decay to zero, at the end", type=non_negative)
    flag(training, "dead_feature_window", 1000, "steps without firing after which a feature is dead", type=positive)
    flag(training, "seed", 42, "of the weights, the shuffling and, by default, the held-out split", type=non_negative)
    flag(
        training,
        "set",
        [],
        "any other field of SAELens's LanguageModelSAERunnerConfig, such as sae.aux_loss_coefficient=0.5",
        action="append",
        metavar="KEY=VALUE",
    )

    output = parser.add_argument_group("output")
    flag(output, "output_name", "llama_layer12_sae_saelens_500k", "name of the run's directory")
    flag(output, "checkpoint_path", "checkpoints", "directory of all runs")
    flag(output, "n_checkpoints", 0, "checkpoints along the way, evenly spaced, which stay", type=non_negative)
    flag(
        output,
        "checkpoint_every",
        "30min",
        "how often to save what a resume needs: 90s, 30min, 2h, a number of tokens, or 0 for never",
        type=Interval.checked,
        metavar="MINUTES|TOKENS",
    )
    flag(output, "keep", 2, "how many of those to keep; none is left once the run is finished", type=positive)
    flag(
        output,
        "resume",
        None,
        "go on from a checkpoint, from the newest one of a run's directory, or (no value, or auto) from the newest one"
        " of a run with these flags, if there is any",
        nargs="?",
        const="auto",
        metavar="DIRECTORY",
    )
    flag(
        output,
        "like",
        None,
        "take the flags of an earlier run, but for those that are given",
        metavar="DIRECTORY",
    )
    flag(output, "dry_run", False, "check everything, say what would run, and stop", action="store_true")
    flag(
        output,
        "strict",
        False,
        "refuse to train where the result is likely to be unhealthy, rather than warn",
        action="store_true",
    )
    flag(
        output,
        "eval_every",
        0,
        "measure on held-out text after so many tokens each time: loss recovered and the rest; 0 never does",
        type=non_negative,
        metavar="TOKENS",
    )
    flag(
        output,
        "logger",
        "wandb",
        "what records the run; tensorboard writes into the run's directory",
        choices=("wandb", "tensorboard"),
    )
    flag(
        output,
        "wandb_mode",
        "online",
        "offline is used where there is no login",
        choices=("online", "offline", "disabled"),
    )
    flag(output, "wandb_project", "sae_lens_training", "wandb project")
    flag(output, "wandb_entity", None, "wandb user or team (default: your own)")
    flag(output, "run_name", None, "name of the wandb run (default: the output name and the run's id)")
    add_talk_flags(output)
    if parser.argument_default is not argparse.SUPPRESS:
        parser.set_defaults(preset=None)
    return parser
