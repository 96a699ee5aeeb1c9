"""Tries one class of language model: every hook of a block is trained, evaluated, compared and opened in SAELens.

`try_class` runs in a process of its own (`all_classes.py`), since a class may crash, hang or take all memory.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from sae_lens import SAE
from sae_lens.load_model import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError, one_line
from sae_toolkit.evaluation.massive_activations import measure_norm_limits
from sae_toolkit.evaluation.run import evaluate_saes
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.model.building import auto_class, tiny_config, with_random_weights
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.hooks import decoder_layers
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import LanguageModels, find_model, load_language_model
from sae_toolkit.settings.evaluation import parse_evaluation_flags

HOOKS = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *("attn.hook_z", "mlp.hook_post"),
)
MODULE = "module"  # the column of the layer's name in Transformers
TOKENS_BT = torch.tensor([[1, 50, 35, 28, 46, 31], [1, 28, 90, 28, 25, 95]])
# Sizes that some default configurations leave out although their class needs them.
_LACKING = {"head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "hidden_size": 64, "vocab_size": 300}
_TOLERANCE = 1e-5  # relative to the largest activation


@dataclass
class Cell:
    """What was found at one hook: each is `yes`, None if it was not tried, or what went wrong."""

    hook_name: str
    refused: str | None = None  # the line that refuses the hook
    trains: str | None = None
    evaluates: str | None = None
    agrees: str | None = None  # with TransformerLens
    unknown: str | None = None  # why it was not compared with TransformerLens
    opens: str | None = None  # in SAELens


@dataclass
class Row:
    """One kind of layer of a class, and what was found at each of its hooks."""

    layer: str  # class of the layer, and of its parts if the model has several kinds of layers
    n_layers: int  # of this kind
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Trial:
    """What was found for one class."""

    config: str
    family: str
    model: str
    not_tried: str | None = None
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_class(config_class: str, model_class: str, tokenizer: PreTrainedTokenizerBase, text_file: Path) -> Trial:
    """Tries all hooks of a class, on a tiny model with random weights."""
    cls = getattr(transformers, config_class, None) or _config_class(config_class)
    trial = Trial(config_class, cls.model_type, model_class)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        try:
            model = build(cls, tokenizer)
            kinds = kinds_of_layers(decoder_layers(model, model.config))
            model.save_pretrained(path / "model")
        except UserError as error:
            trial.not_tried = f"refused: {error}"
            return trial
        except Exception as error:
            trial.not_tried = f"Transformers: {type(error).__name__}: {one_line(error)}"
            return trial
        trial.model = type(model).__name__
        tokenizer.save_pretrained(path / "model")
        chosen = []
        for kind, indices in kinds.items():
            row = Row(kind if len(kinds) > 1 else kind.split(" ")[0], len(indices))
            layer = next((index for index in indices if index > 0), indices[0])
            names = {hook: f"blocks.{layer}.{hook}" for hook in HOOKS} | {MODULE: _path(model, layer)}
            row.cells = {hook: Cell(name) for hook, name in names.items()}
            trial.rows.append(row)
            chosen += row.cells.values()
        del model
        try:
            try_hooks(path / "model", chosen, text_file)
        except UserError as error:  # the saved configuration cannot be read again
            trial.not_tried, trial.rows = f"refused: {error}".replace(str(path / "model"), "MODEL"), []
    return trial


def warm_up(tokenizer: PreTrainedTokenizerBase) -> None:
    """Does what is slow the first time in a process. Trains nothing, as autograd does not survive a fork."""
    config = small_config(LlamaConfig(), tokenizer)
    hook_width(config, "blocks.1.hook_mlp_out")


def _config_class(name: str) -> type[PreTrainedConfig]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return next(cls for cls in CONFIG_MAPPING.values() if cls.__name__ == name)


def small_tokenizer(text_file: Path) -> PreTrainedTokenizerBase:
    """Returns a byte-level tokenizer of 300 tokens, trained on the text. A large one would take most of the time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text_file)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def build(cls: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns a model of the class's default configuration made small, with sizes that the default lacks if need be.

    Raises what Transformers raises if the model cannot be built, or does not run on text.
    """
    try:
        return _build(cls(), tokenizer)
    except UserError:
        raise
    except Exception as error:
        config = cls()
        for part in (config, config.get_text_config(decoder=True)):
            for name, value in _LACKING.items():
                if getattr(part, name, 0) is None:
                    setattr(part, name, value)
        try:
            return _build(config, tokenizer)
        except Exception:
            raise error from None


def _build(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    config = small_config(config, tokenizer)
    model = with_random_weights(config).eval()
    with torch.no_grad():
        model(TOKENS_BT, use_cache=False)
    return model


def small_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Returns a tiny configuration with the tokenizer's vocabulary, and as few layers as show all kinds of layers."""
    config = tiny_config(config)
    with torch.device("meta"):
        layers = decoder_layers(auto_class(config).from_config(config), config)
    firsts = [next((i for i in indices if i > 0), indices[0]) for indices in kinds_of_layers(layers).values()]
    with contextlib.suppress(Exception), torch.device("meta"):
        fewer = with_layers(config, max(3, *firsts) + 1)
        type(fewer).from_dict(fewer.to_dict())  # fails if it names layers that are gone
        if (
            kinds_of_layers(decoder_layers(auto_class(fewer).from_config(fewer), fewer)).keys()
            == kinds_of_layers(layers).keys()
        ):
            config = fewer
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in {
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
        }.items():
            if hasattr(part, name):
                setattr(part, name, value)
    return config


def with_layers(config: PreTrainedConfig, n_layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    part = config.get_text_config(decoder=True)
    before = getattr(part, "decoder_layers", None) or part.num_hidden_layers
    for name, value in list(vars(part).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(part, name, value[:n_layers])
    name = "decoder_layers" if getattr(part, "decoder_layers", None) else "num_hidden_layers"
    setattr(part, name, min(n_layers, before))
    return config


def kinds_of_layers(layers: nn.ModuleList) -> dict[str, list[int]]:
    """Returns the indices of the layers of each kind. Layers of one kind have parts of the same classes."""
    kinds: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        parts = [type(child).__name__ for child in layer.children()]
        kinds.setdefault(" ".join([type(layer).__name__, *parts]), []).append(index)
    return kinds


def _path(model: PreTrainedModel, layer: int) -> str:
    module = decoder_layers(model, model.config)[layer]
    return next(name for name, child in model.named_modules() if child is module)


def try_hooks(model: Path, cells: list[Cell], text_file: Path) -> None:
    source = find_model(str(model))
    for cell in cells:
        try:
            hook_width(source.config, cell.hook_name, flag="--hook_names")
        except UserError as error:
            cell.refused = str(error)
        except Exception:
            cell.trains = _last_of_traceback()
    allowed = [cell for cell in cells if cell.refused is None and cell.trains is None]
    if not allowed:
        return
    _train_and_evaluate(model, allowed, text_file)
    compare_with_transformer_lens(model, [cell for cell in allowed if cell.refused is None])


def _train_and_evaluate(model: Path, cells: list[Cell], text_file: Path) -> None:
    """Trains an SAE at each hook in one run and evaluates them; or hook by hook, if they do not run together."""
    runs = model.parent / f"runs_{len(cells)}_{cells[0].hook_name}"
    hooks = ["--hook_name" if len(cells) == 1 else "--hook_names", *(cell.hook_name for cell in cells)]
    status, said = run_script(
        "sae_lens_train.py", *hooks, *training_flags(model, text_file), "--checkpoint_path", str(runs)
    )
    if status == 0:
        for cell in cells:
            sae = _finished_sae(runs, cell, len(cells))
            cell.trains = "yes" if sae else "no SAE was saved"
            if sae:
                cell.opens = opens_in_saelens(sae)
                cell.evaluates = evaluates(sae)
    elif len(cells) > 1:
        for cell in cells:
            _train_and_evaluate(model, [cell], text_file)
    elif status == 2:
        cells[0].refused = said
    else:
        cells[0].trains = said


def training_flags(model: Path, text_file: Path) -> list[str]:
    """Flags of a few steps of a tiny SAE."""
    flags = {
        "model_name": model,
        "dataset_path": text_file,
        "context_size": 16,
        "architecture": "topk",
        "k": 8,
        "expansion_factor": 2,
        "training_tokens": 512,
        "train_batch_size_tokens": 128,
        "n_batches_in_buffer": 16,
        "wandb_mode": "disabled",
        "device": "cpu",
        "lm_dtype": "float32",
        "set": "n_batches_for_norm_estimate=1",
    }
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def _finished_sae(runs: Path, cell: Cell, n_hooks: int) -> Path | None:
    pattern = f"*/*/final_*/{cell.hook_name}" if n_hooks > 1 else "*/*/final_*"
    return next(iter(runs.glob(pattern)), None)


def evaluates(sae: Path) -> str:
    """Evaluates an SAE as evaluate_sae_real_activations.py does, without its reports."""
    flags = f"--sae_path {sae} --num_samples 8 --batch_size 4 --device cpu --lm_dtype float32 --n_features 2".split()
    settings = parse_evaluation_flags("", flags)
    try:
        (group,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
        model = LanguageModels("cpu", torch.float32).load(group.model, group.hook_name)
        group = measure_norm_limits(group, model, batch_size=settings.saes.batch_size)
        evaluate_saes(group, model, batch_size=settings.saes.batch_size)
    except UserError as error:
        return f"refused: {error}"
    except Exception:
        return _last_of_traceback()
    return "yes"


def opens_in_saelens(path: Path) -> str:
    try:
        sae = SAE.load_from_disk(str(path))
        acts_ND = torch.randn(3, sae.cfg.d_in)
        if sae.hook_z_reshaping_mode:  # it takes the heads apart
            acts_ND = acts_ND.unflatten(-1, (4, -1))
        return "yes" if sae(acts_ND).shape == acts_ND.shape else "another width"
    except Exception:
        return _last_of_traceback()


def compare_with_transformer_lens(model: Path, cells: list[Cell]) -> None:
    """Compares the activations with those of TransformerLens, and at a module's name with those of SAELens."""
    if not cells:
        return
    source = find_model(str(model))
    loaded = load_language_model(source, cells[0].hook_name, "cpu", torch.float32).model
    ours = {cell.hook_name: LanguageModel(loaded, cell.hook_name).activations(TOKENS_BT) for cell in cells}
    bridge = boot(loaded, AutoTokenizer.from_pretrained(model))  # it asks for a tokenizer that was loaded
    for cell in cells:
        theirs: Any = None
        if not cell.hook_name.startswith("blocks."):
            if auto_class(source.config) is transformers.AutoModelForCausalLM:
                theirs = _of_saelens(model, cell.hook_name)
        elif isinstance(bridge, str):
            cell.unknown = bridge
        else:
            theirs = _of_transformer_lens(bridge, cell.hook_name)
        if isinstance(theirs, torch.Tensor):
            cell.agrees = _difference(ours[cell.hook_name], theirs)
            if cell.agrees != "yes" and isinstance(bridge, TransformerBridge):
                cell.unknown = _other_logits(loaded, bridge)
                cell.agrees = cell.agrees if cell.unknown is None else None
        elif theirs is not None:
            cell.unknown = theirs


def boot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge | str:
    """Returns TransformerLens's model, or why there is none."""
    if type(model).__name__ not in SUPPORTED_ARCHITECTURES:
        return "not known to TransformerLens"
    model = copy.deepcopy(model)
    model.config.architectures = [type(model).__name__]
    # For models of images it runs `pip install torchvision`, which replaces torch too, in this very environment.
    no_pip = patch("subprocess.check_call", side_effect=OSError("nothing is installed while tests run"))
    try:
        with no_pip:
            return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, dtype=torch.float32)
    except Exception as error:
        return f"TransformerLens does not load it: {type(error).__name__}: {one_line(error)}"


def _of_transformer_lens(bridge: TransformerBridge, hook_name: str) -> torch.Tensor | str:
    """Returns TransformerLens's activations, or why there are none."""
    try:
        cache = bridge.run_with_cache(TOKENS_BT, names_filter=hook_name, prepend_bos=False)[1]
    except Exception as error:
        return f"TransformerLens does not run it: {type(error).__name__}: {one_line(error)}"
    return dict(cache.items()).get(hook_name, "TransformerLens has no such hook there")


@torch.no_grad()
def _other_logits(model: PreTrainedModel, bridge: TransformerBridge) -> str | None:
    """Returns how far TransformerLens's logits are from those of Transformers, whose model it wraps; None if equal."""
    logits = model(TOKENS_BT, use_cache=False).logits
    ratio = ((bridge(TOKENS_BT, prepend_bos=False) - logits).abs().max() / logits.abs().max()).item()
    if ratio <= 10 * _TOLERANCE:
        return None
    return f"TransformerLens computes other logits than Transformers, by {ratio:.0e} of the largest"


def _of_saelens(model: Path, hook_name: str) -> torch.Tensor | str:
    """Returns the activations that SAELens reads at a Transformers module, or why there are none."""
    try:
        proxy = load_model("AutoModelForCausalLM", str(model), "cpu", {"dtype": torch.float32}, [hook_name])
        return proxy.run_with_cache(TOKENS_BT, names_filter=[hook_name])[1][hook_name]
    except Exception as error:
        return f"SAELens does not run it: {type(error).__name__}: {one_line(error)}"


def _difference(ours_BTD: torch.Tensor, theirs: torch.Tensor) -> str:
    if not isinstance(theirs, torch.Tensor) or theirs.ndim < 3 or theirs.flatten(2).shape != ours_BTD.shape:
        return f"{list(ours_BTD.shape)} here, {list(getattr(theirs, 'shape', []))} in TransformerLens"
    ratio = ((ours_BTD - theirs.flatten(2)).abs().max() / theirs.abs().max()).item()
    return "yes" if ratio <= _TOLERANCE else f"differs by {ratio:.1e} of the largest activation"


def run_script(name: str, *flags: str) -> tuple[int, str]:
    """Runs a script in this process. Returns its exit status, and its last line or the end of its traceback."""
    with tempfile.TemporaryFile("w+") as output, _output_into(output.fileno()):
        sys.argv = [name, *flags]
        status = 1
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        output.seek(0)
        text = output.read()
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return status, errors[-1].removeprefix("error: ")
    return status, _end_of_traceback(lines)


@contextlib.contextmanager
def _output_into(descriptor: int) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        for target, source in zip((1, 2), kept, strict=True):
            os.dup2(source, target)
            os.close(source)


def _last_of_traceback() -> str:
    return _end_of_traceback(traceback.format_exc().splitlines())


def _end_of_traceback(lines: list[str]) -> str:
    places = [match for line in lines if (match := re.search(r'File ".*?([^/"]+)", line (\d+), in (\w+)', line))]
    ours = f" ({places[-1][1]}:{places[-1][2]})" if places else ""
    return (lines[-1] if lines else "nothing was said")[:200] + ours
