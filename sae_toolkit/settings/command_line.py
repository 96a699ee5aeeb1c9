"""The command line of sae_lens_train.py, and the flags that --resume and --like take from an earlier run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.settings import fields
from sae_toolkit.settings.checks import OF_RANDOM_WEIGHTS, SPARSITY_WEIGHTS, check_paths, check_settings
from sae_toolkit.settings.fields import Scope, as_text
from sae_toolkit.settings.training import RECIPE_FLAGS, TRAINING_FLAGS, ModelSettings, TrainingSettings
from sae_toolkit.terminal.console import Parser

_HOOK_FLAGS = ("hook_name", "hook_names", "layers")

_EPILOG = f"""\
examples:
  # a small model and text that come with the installation; a healthy SAE in minutes, without a GPU
  python sae_lens_train.py @presets/demo.args

  # Llama-3-8B, layer 12, on one GPU; flags after a preset replace its own
  python sae_lens_train.py @presets/llama3-8b.args --k 32 --output_name llama3_l12_k32

  # your own text and model
  python sae_lens_train.py @presets/demo.args --model_name ./my_model --dataset_path ./my_text.jsonl --layer 8

  # several runs on the same activations: the first run computes them, the others read them
  python sae_lens_train.py @presets/demo.args --cache_activations ./activations --k 32
  python sae_lens_train.py @presets/demo.args --cache_activations ./activations --k 128

  # one SAE for each of several layers, from one pass of the model
  python sae_lens_train.py @presets/demo.args --layers 4 8 12 16

  # an L0 of your choice: the weight of the sparsity loss is adjusted during training
  python sae_lens_train.py @presets/demo.args --architecture gated --target_l0 64

  # show what would run, without running it
  python sae_lens_train.py @presets/demo.args --dry_run

  # go on with an SAE on other text: with another learning rate, k or sparsity weight, if you like
  python sae_lens_train.py @presets/demo.args --init_from checkpoints/demo_1a2b3c4d/k3j2h1g0 \\
      --dataset_path ./my_text.jsonl --lr 2e-4

  # the flags of an earlier run, except for the flags that are given
  python sae_lens_train.py --like checkpoints/demo_1a2b3c4d/k3j2h1g0 --lr 1e-3

  # 4,096 features, which is no multiple of the model's 576 dimensions
  python sae_lens_train.py @presets/demo.args --d_sae 4096

  # other fields of SAELens's configuration
  python sae_lens_train.py @presets/demo.args --set sae.aux_loss_coefficient=0.5 --set adam_beta1=0

  # a model whose features are known, so that the SAE can be scored by what it finds of them
  python sae_lens_train.py @presets/synthetic.args

  # go on with an interrupted run: found by its flags, by its directory, or from one of its checkpoints
  python sae_lens_train.py @presets/demo.args --resume
  python sae_lens_train.py --resume checkpoints/demo_1a2b3c4d/k3j2h1g0
  python sae_lens_train.py --resume checkpoints/demo_1a2b3c4d/k3j2h1g0/250368

models: a Hugging Face id, a directory, a .gguf file, {EMBEDDED_MODEL}, or synthetic:small
data:   a Hugging Face id, {EMBEDDED_TEXT}, synthetic:small, or a file or directory (txt, md, rst, html,
        jsonl, csv, tsv, parquet, saved by datasets)
"""


def parse_training_flags(argv: Sequence[str] | None = None) -> TrainingSettings:
    """Parses the flags of a training run.

    With `--resume DIRECTORY` the settings are those of the resumed run. Flags that are given beside `--resume` must
    have the values that they have in that run, except for the flags that may differ (`Scope`).

    Raises:
        UserError: a flag is unknown, its value cannot be right, or two flags do not fit together.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        values = vars(_build_parser().parse_args(argv))
    except (ValueError, RecursionError) as error:  # a flag file with wrong quotes or bytes, or one that includes itself
        files = " ".join(word for word in words if word.startswith("@"))
        raise UserError(f"{files}: cannot be read as flags: {one_line(error)}") from None
    given = given_flags(argv)
    settings = TrainingSettings.from_flags(values | {"preset": _presets(words)} | _open_to_recipe(values, given))
    check_paths(settings)
    resume, like = settings.run.resume, settings.run.like
    if like is not None and resume not in (None, "auto"):
        raise UserError(f"--like {like}, --resume {resume}: a resumed run has its own flags; leave one of them out")
    if like is not None:
        settings = _settings_like(Path(like), given)
    elif resume not in (None, "auto"):
        settings = _settings_of_run(Path(resume), given)
    _check_typed_layer(settings.model, words)
    check_settings(settings)
    return settings


def after_restart(settings: TrainingSettings) -> TrainingSettings:
    """Returns the settings of ranks that torchrun starts again after one of them has failed.

    These ranks resume from the newest checkpoint, even if the run was started from an older one.
    """
    resume = settings.run.resume
    newest = "auto" if resume in (None, "auto") else str(run_directory_of(Path(resume)))
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, resume=newest))


def default_flags() -> dict[str, Any]:
    """Returns the defaults of all flags, by name."""
    return TrainingSettings().as_flags()


def training_words(flags: Mapping[str, Any], *, leave_out: Collection[str] = ()) -> list[str]:
    """Returns the words of a command line that sets the flags to these values.

    Flags at their defaults are left out, and those that the recipe chose.
    """
    chosen = flags.get("chosen", ())
    other_place = {"layer"} if flags.get("hook_name") or flags.get("hook_names") else set()
    return fields.as_words(
        TrainingSettings,
        {**flags, "set": _not_chosen(flags["set"], chosen)} if "set" in flags else flags,
        leave_out={*leave_out, *chosen, *other_place},
        keep=RECIPE_FLAGS if flags.get("recipe") == "auto" else (),
    )


def flags_with(*scopes: Scope) -> set[str]:
    """Returns the names of the flags that have one of these scopes. `preset`, not a flag, has `Scope.COMMAND`."""
    names = {name for name, each in TRAINING_FLAGS.items() if each.scope in scopes}
    return names | ({"preset"} if Scope.COMMAND in scopes else set())


def _check_typed_layer(model: ModelSettings, words: Sequence[str]) -> None:
    """Checks that a typed --layer is one of the hooks', if a flag names them. That of a flag file gives way to them."""
    hooks = model.hook_names or ([model.hook_name] if model.hook_name is not None else [])
    if "layer" in typed_flags(words) and hooks and not any(str(model.layer) in hook.split(".") for hook in hooks):
        raise UserError(
            f"--layer {model.layer}: {model.hook_flag} {as_text(hooks)} chooses the place, at another layer; leave"
            " one of them out"
        )


def _open_to_recipe(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Returns which flags the recipe chooses, as `TrainingSettings.chosen`, if it is --recipe auto.

    Args:
        values: the values of all flags.
        given: the names of the flags that a person gave.
    """
    is_auto = values["recipe"] == "auto"
    return {"chosen": [name for name in RECIPE_FLAGS if name not in given] if is_auto else []}


def run_directory_of(path: Path) -> Path:
    """Returns the directory of a run. The path is that directory, or one of the run's checkpoints."""
    return path if (path / FLAGS_FILENAME).is_file() else path.parent


def save_flags(flags: Mapping[str, Any], run_directory: Path) -> None:
    """Writes the flags of a run into its directory, where `--resume` and `--like` look for them."""
    (run_directory / FLAGS_FILENAME).write_text(json.dumps(flags, indent=1) + "\n")


def _saved_flags(flag: str, path: Path) -> dict[str, Any]:
    """Loads the flags of a run.

    Args:
        flag: `resume` or `like`, for messages.
        path: the run's directory, or one of its checkpoints.
    """
    file = run_directory_of(path) / FLAGS_FILENAME
    if not path.is_dir() or not file.is_file():
        raise UserError(f"--{flag} {path}: neither a training run nor a checkpoint of one: {file} does not exist")
    try:
        saved = default_flags() | json.loads(file.read_text())
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"--{flag} {path}: damaged: {FLAGS_FILENAME} cannot be read; name another run") from None
    saved["trust_remote_code"] = False  # only a person may allow this, on each command line
    return saved


def _not_chosen(assignments: Sequence[str], chosen: Collection[str]) -> list[str]:
    """Returns the assignments of --set without those that the recipe chose."""
    return [each for each in assignments if each.partition("=")[0] not in chosen]


def _settings_of_run(resume: Path, given: dict[str, Any]) -> TrainingSettings:
    saved = _saved_flags("resume", resume)
    may_change = flags_with(Scope.PROCESS, Scope.COMMAND)
    for name, value in given.items():
        same = (saved.get(name), _not_chosen(saved["set"], saved["chosen"])) if name == "set" else (saved.get(name),)
        if name not in may_change and value not in same:
            raise UserError(f"--{name} {value}: the resumed run has {saved.get(name)}; leave the flag out")
    return TrainingSettings.from_flags(saved | {name: value for name, value in given.items() if name in may_change})


def _settings_like(like: Path, given: dict[str, Any]) -> TrainingSettings:
    """Returns the settings of another run, changed by the given flags.

    The other run's flags of `Scope.COMMAND` are not taken; these have their defaults. What the recipe chose for the
    other run is chosen anew.
    """
    saved, defaults = _saved_flags("like", like), default_flags()
    of_command = {name: defaults[name] for name in flags_with(Scope.COMMAND) - {"preset"}}
    was_chosen = saved["chosen"]
    before = saved | {name: defaults[name] for name in was_chosen if name in defaults} | of_command
    if (hooks := saved["hook_name"] or saved["hook_names"]) and given.get("layer") is not None:
        raise UserError(
            f"--layer {given['layer']}: is for the residual stream, and the run {like} is at {as_text(hooks)}; give"
            " --hook_name instead"
        )
    if any(given.get(name) for name in _HOOK_FLAGS):
        before |= dict.fromkeys(_HOOK_FLAGS)
    if "architecture" in given and given["architecture"] not in SPARSITY_WEIGHTS:
        before["target_l0"] = None  # it has none to reach: k is its L0
    architecture = given.get("architecture", saved["architecture"])
    has_other_width = any(name in given and given[name] != saved[name] for name in ("expansion_factor", "d_sae"))
    if architecture != saved["architecture"] or has_other_width:
        before["matryoshka_widths"] = None  # those of another kind, or of another width
    inherited = _not_chosen(saved["set"], was_chosen)
    if architecture != saved["architecture"]:
        inherited = _of_architecture(inherited, architecture)
    if given.get("init_from") is not None:  # what is about random weights cannot be left out by hand
        before |= {"b_dec_init_method": defaults["b_dec_init_method"], "seeds": defaults["seeds"]}
        inherited = [each for each in inherited if each.partition("=")[0] not in OF_RANDOM_WEIGHTS]
    values = before | given | {"set": [*inherited, *given.get("set", [])]}
    kept = {
        name
        for name in RECIPE_FLAGS
        if name not in was_chosen and (saved["recipe"] == "auto" or saved[name] != defaults[name])
    }
    return TrainingSettings.from_flags(values | _open_to_recipe(values, kept | given.keys()))


def _of_architecture(assignments: Sequence[str], architecture: str) -> list[str]:
    """Returns the values of --set without fields that SAEs of an architecture do not have."""
    if not any(assignment.startswith("sae.") for assignment in assignments):
        return list(assignments)
    from sae_lens.registry import get_sae_training_class  # here, since --help need not wait for it

    fields_there = {field.name for field in dataclasses.fields(get_sae_training_class(architecture)[1])}
    return [
        assignment
        for assignment in assignments
        if not assignment.startswith("sae.") or assignment.partition("=")[0].removeprefix("sae.") in fields_there
    ]


def given_flags(argv: Sequence[str] | None) -> dict[str, Any]:
    """Returns the flags that are on the command line, without defaults."""
    return vars(_build_parser(argument_default=argparse.SUPPRESS).parse_args(argv))


def typed_flags(words: Sequence[str]) -> set[str]:
    """Returns the names of the flags that are among the words themselves, without those of flag files (`@FILE`)."""
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def _presets(argv: Sequence[str]) -> str | None:
    """Returns the names of the flag files on a command line, without their endings."""
    return " ".join(Path(word[1:]).stem for word in argv if word.startswith("@")) or None


def _build_parser(**kwargs: Any) -> Parser:
    return fields.build_parser(
        TrainingSettings,
        prog="sae_lens_train.py",
        description="Trains a sparse autoencoder (SAE) with SAELens on the activations of a language model.",
        epilog=_EPILOG,
        fromfile_prefix_chars="@",
        **kwargs,
    )
