"""Each flag of a training reaches what it names, in a run from the start and in a fine-tuning, or is refused.

One flag is changed at a time. The change must be found in what is trained, in how, on what, or in the record: not
merely in the settings, which a part of the run may never read. A new flag or a new field of SAELens's configuration
fails here until it has another value in `OTHER` or `OTHER_FIELDS`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from transformers import LlamaConfig, LlamaForCausalLM

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import ARCHITECTURES, TRAINING_FLAGS, SAESettings, TrainingSettings
from sae_toolkit.text.sources import open_text
from sae_toolkit.training import setup, text
from sae_toolkit.training.configuration import build_runner_config
from sae_toolkit.training.record import start
from sae_toolkit.training.run import Training, create_sae, open_activations
from sae_toolkit.training.set_flag import HONOURED, NOT_HONOURED_IN_SAE, OWNED
from sae_toolkit.training.without_effect import flags_of_other_architectures, without_effect

HOOK = "blocks.1.hook_resid_post"
# Another value for each flag. After a comma: the flags that it needs beside it, in both runs that are compared.
OTHER: dict[str, tuple[str, ...]] = {
    "model_name": ("OTHER_MODEL",),
    "layer": ("2",),
    "hook_name": ("blocks.1.hook_resid_pre",),
    "layers": ("1 2",),
    "hook_names": ("blocks.1.hook_resid_post blocks.1.hook_mlp_out",),
    "device": ("cuda:99",),
    "llm_device": ("cuda:99",),
    "n_devices": ("2",),
    "lm_dtype": ("bfloat16",),
    "cache_activations": ("CACHE",),
    "store_batch_size_prompts": ("2",),
    "trust_remote_code": ("",),
    "dataset_path": ("OTHER_TEXT",),
    "dataset_config": ("other",),
    "dataset_split": ("train[:90%]",),
    "text_column": ("other",),
    "chat_tokens": ("assistant",),
    "streaming": ("false",),
    "fallback_dataset": ("OTHER_TEXT",),
    "held_out_fraction": ("0.3",),
    "held_out_seed": ("7",),
    "context_size": ("32",),
    "exclude_special_tokens": ("false",),
    "skip_positions": ("3",),
    "max_activation_norm_multiple": ("1.2",),
    "architecture": ("topk",),
    "expansion_factor": ("8",),
    "d_sae": ("100",),
    "l1_coefficient": ("7", "--architecture", "standard"),
    "l0_coefficient": ("7", "--architecture", "jumprelu"),
    "target_l0": ("9", "--architecture", "standard"),
    "k": ("5",),
    "matryoshka_widths": ("16 128", "--architecture", "matryoshka_batchtopk"),
    "normalize_activations": ("none",),
    "b_dec_init_method": ("mean",),
    "shard_features": ("", "--architecture", "standard"),
    "dtype": ("float64",),
    "init_from": ("OTHER_SAE",),
    "recipe": ("auto",),
    "training_tokens": ("3072",),
    "train_batch_size_tokens": ("512",),
    "n_batches_in_buffer": ("64",),
    "lr": ("2e-3",),
    "lr_warm_up_steps": ("1",),
    "lr_decay_steps": ("1",),
    "dead_feature_window": ("1",),
    "finetune_loss": ("kl",),
    "finetune_fraction": ("0.9", "--finetune_loss", "kl"),
    "seed": ("7",),
    "seeds": ("2",),
    "output_name": ("other",),
    "checkpoint_path": ("OTHER_DIRECTORY",),
    "n_checkpoints": ("1",),
    "checkpoint_every": ("90s",),
    "resume": ("nowhere",),
    "like": ("nowhere",),
    "device_memory": ("24GB",),
    "eval_every": ("1024",),
    "logger": ("tensorboard",),
    "wandb_mode": ("offline",),
    "wandb_project": ("other",),
    "wandb_entity": ("other",),
    "run_name": ("other",),
}
# Flags that only the script reads, or that act at the end of a run: the test that shows what they do.
SHOWN_BY = {
    "set": "training/test_every_flag.py::test_each_field_that_set_takes_is_found",
    "epochs": "training/test_epochs.py::test_a_small_text_is_trained_on_as_often_as_asked_also_after_a_kill",
    "keep": "training/test_resume.py::test_checkpoints_are_kept_as_asked",
    "dry_run": "training/test_preflight.py::test_a_dry_run_measures_and_leaves_nothing",
    "strict": "training/test_preflight.py::test_strict_refuses_before_anything_is_loaded",
    "verbose": "training/test_preflight.py::test_verbose_shows_more_and_quiet_less",
    "quiet": "training/test_preflight.py::test_verbose_shows_more_and_quiet_less",
}
# Another value for each field that --set takes, likewise.
OTHER_FIELDS: dict[str, tuple[str, ...]] = {
    "adam_beta1": ("0.5",),
    "adam_beta2": ("0.5",),
    "lr_scheduler_name": ("cosineannealing",),
    "lr_end": ("5e-4", "--set", "lr_scheduler_name=cosineannealing"),
    "n_restart_cycles": ("2", "--set", "lr_scheduler_name=cosineannealingwarmrestarts"),
    "feature_sampling_window": ("1",),
    "n_batches_for_norm_estimate": ("1",),
    "autocast": ("true",),
    "compile_sae": ("true",),
    "sae_compilation_mode": ("max-autotune", "--set", "compile_sae=true"),
    "compile_llm": ("true",),
    "llm_compilation_mode": ("max-autotune", "--set", "compile_llm=true"),
    "activations_mixing_fraction": ("0",),
    "prepend_bos": ("false",),
    "sequence_separator_token": ("null",),
    "disable_concat_sequences": ("true",),
    "model_from_pretrained_kwargs": ('{"revision":"other"}',),
    "logger.wandb_log_frequency": ("2",),
    "logger.log_weights_to_wandb": ("true",),
    "sae.apply_b_dec_to_input": ("false",),
    "sae.decoder_init_norm": ("0.5",),
    "sae.lp_norm": ("0.5",),
    "sae.l1_warm_up_steps": ("2",),
    "sae.l0_warm_up_steps": ("2",),
    "sae.use_sparse_activations": ("true",),
    "sae.aux_loss_coefficient": ("0.5",),
    "sae.rescale_acts_by_decoder_norm": ("false",),
    "sae.topk_threshold_lr": ("0.5",),
    "sae.use_matryoshka_aux_loss": ("true",),
    "sae.jumprelu_init_threshold": ("0.5",),
    "sae.jumprelu_bandwidth": ("0.5",),
    "sae.jumprelu_sparsity_loss_mode": ("tanh",),
    "sae.pre_act_loss_coefficient": ("0.5",),
    "sae.jumprelu_tanh_scale": ("0.5",),
    "sae.jumprelu_ste_to_input": ("true",),
    "sae.target_l0": ("9",),
    "sae.residual_threshold": ("0.5",),
    "sae.max_iterations": ("3",),
    "sae.stop_on_duplicate_support": ("false",),
}
NEEDING = ("lr_end", "n_restart_cycles", "sae_compilation_mode", "llm_compilation_mode")  # another field, as above
TRAINED = ("batchtopk", "standard", "jumprelu", "matryoshka_batchtopk", "matching_pursuit")  # all fields are of one


def fields_of_set() -> dict[str, str]:
    """Each field that --set takes, with an architecture that has it."""
    found = dict.fromkeys(sorted(HONOURED), TRAINED[0])
    for architecture in ARCHITECTURES:
        for field in dataclasses.fields(get_sae_training_class(architecture)[1]):
            key = f"sae.{field.name}"
            if key not in OWNED and field.name not in NOT_HONOURED_IN_SAE:
                found.setdefault(key, architecture)
    return found


def digest(tensor) -> bytes:
    return torch.as_tensor(tensor).detach().double().numpy().tobytes()


class Recorder:
    """Stands where wandb's and TensorBoard's records are, and keeps what they are started with."""

    def __init__(self, *args, **kwargs):
        self.found = {"args": args, **{name: value for name, value in kwargs.items() if name not in ("config", "uses")}}


class Bench:
    """Runs of two steps on a tiny model of random weights, in this process."""

    def __init__(self, base: list[str], directory: Path, places: dict[str, str], patch: pytest.MonkeyPatch):
        self.base, self.directory, self.places = base, directory, places
        self.found: dict = {}
        self.baseline = functools.cache(self._baseline)
        self.sae = functools.cache(self._sae)
        patch.setattr(text, "open_text", self._open_text)
        patch.setattr(torch, "compile", self._compile)
        for name in ("WandbRun", "TensorBoardRun"):
            patch.setattr(start, name, type(name, (Recorder,), {}))

    def _open_text(self, name: str, **kwargs):
        self.found["text"] = (kwargs["streaming"], kwargs["fallback"])  # of a file here neither shows
        return open_text(name, **kwargs)

    def _compile(self, function, **kwargs):
        self.found.setdefault("compiled", []).append((getattr(function, "__qualname__", ""), kwargs))
        return function

    def _sae(self, architecture: str, seed: int = 0) -> Path:
        """An SAE of random weights, finished."""
        settings = TrainingSettings(sae=SAESettings(architecture, expansion_factor=4, k=6))
        cfg = build_runner_config(settings, HOOK, d_in=32, device="cpu", run_id="any")
        cfg.seed = seed
        path = self.directory / f"{architecture}_{seed}"
        create_sae(cfg).save_inference_model(path)
        return path

    def _baseline(self, architecture: str, fine_tunes: bool, *words: str) -> list[dict]:
        return list(self.stages(architecture, fine_tunes, words))

    def stages(self, architecture: str, fine_tunes: bool, words: Sequence[str]) -> Iterator[dict]:
        """What a run with these flags is, by the names of its parts: first as prepared, then after two steps.

        Raises:
            UserError: it is refused.
        """
        own = {"architecture": architecture} | ({"init_from": str(self.sae(architecture))} if fine_tunes else {})
        flags = [word for name, value in own.items() for word in (f"--{name}", value)]
        self.found = {}
        settings = parse_training_flags([*self.base, *flags, *(self.places.get(word, word) for word in words)])
        run = setup.prepare_run(settings)
        record, name, model = start.start_record(run), run.directory.name, run.model
        yield self.found | {
            "model": (model.name, model.model_kwargs, model.trust_remote_code, run.llm_device, run.lm_dtype),
            "cache": run.cache_directory,
            "rows": digest(run.rows_NT.astype("int64")),
            "held out": (run.held_out, run.held_out_NT is not None),
            "positions": (run.positions, run.max_norm_multiple),
            "directory": (str(run.directory.parents[1]), run.directory.parent.name.rsplit("_", 1)[0]),
            "record": [str(each).replace(name, "ID") for each in (type(record), record.found, vars(run.cfg.logger))],
            "hooks": run.hook_names,
            "began with": run.initialized_from,
        }
        training = Training(run, open_activations(run))
        trainer = training.trainer.first
        batches, rates = [], []
        for _ in range(2):
            batches.append(next(training.stream))
            training.trainer.step(training.stream.at_each_hook(batches[-1]))
            training.trainer.advance()
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        not_settings = ("checkpoint_path", "logger")
        yield self.found | {
            "warned": without_effect(run),
            "checkpoints": (trainer.checkpoint_thresholds, training.checkpoints._every),
            "sae": [{k: v for k, v in s.cfg.to_dict().items() if k != "metadata"} for s in training.saes.values()],
            "optimizer": [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups],
            "learning rates": rates,
            "trainer": {name: value for name, value in vars(trainer.cfg).items() if name not in not_settings},
            "stream": (training.stream.total, training.stream.rows_per_forward),
            "batches": list(map(digest, batches)),
            "weights": [digest(tensor) for sae in training.saes.values() for tensor in sae.state_dict().values()],
        }


@pytest.fixture(scope="module")
def bench(tiny_model, text_file, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("every_flag")
    other_model, other_text = directory / "other_model", directory / "other.txt"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model)).save_pretrained(other_model)
    tokenizer.save_pretrained(other_model)
    other_text.write_text(text_file.read_text().replace("Paragraph", "Section"))
    base = {
        "model_name": tiny_model,
        "layer": 1,
        "dataset_path": text_file,
        "context_size": 64,
        "k": 6,
        "expansion_factor": 4,
        "normalize_activations": "expected_average_only_in",
        "training_tokens": 2048,
        "n_batches_in_buffer": 16,
        "lr": 1e-3,
        "checkpoint_path": directory / "runs",
        "device": "cpu",
        "lm_dtype": "float32",
    }
    with pytest.MonkeyPatch.context() as patch:
        found = Bench([str(w) for name, value in base.items() for w in (f"--{name}", value)], directory, {}, patch)
        found.places |= {
            "OTHER_MODEL": str(other_model),
            "OTHER_TEXT": str(other_text),
            "OTHER_SAE": str(found.sae("batchtopk", 1)),
            "OTHER_DIRECTORY": str(directory / "others"),
            "CACHE": str(directory / "cache"),
        }
        patch.setattr(setup, "load_tokenizer", lambda _: tokenizer)  # of both models; loading it takes most of the time
        yield found


def assert_found(bench: Bench, change: list[str], needs: Sequence[str], architecture: str, fine_tunes: bool) -> None:
    """The change is found in a part of the run, or is refused in a line that names the flag."""
    if needs[:1] == ("--architecture",):
        architecture, needs = needs[1], needs[2:]
    before = bench.baseline(architecture, fine_tunes, *needs)
    try:
        for was, became in zip(before, bench.stages(architecture, fine_tunes, [*needs, *change]), strict=False):
            if [part for part in was | became if became.get(part) != was.get(part)]:
                return
    except UserError as refusal:
        flag = " ".join(change[:2]).partition("=")[0] if change[0] == "--set" else change[0]
        assert flag in str(refusal) or (fine_tunes and str(refusal).startswith("--init_from "))
    else:
        raise AssertionError(f"{change}: found nowhere")


def test_the_same_flags_make_the_same_run(bench):
    """Otherwise any change would be found below."""
    for fine_tunes in (False, True):
        assert list(bench.stages("batchtopk", fine_tunes, ())) == bench.baseline("batchtopk", fine_tunes)


@pytest.mark.parametrize("fine_tunes", [False, True], ids=["run", "fine-tuning"])
@pytest.mark.parametrize("name", [name for name in TRAINING_FLAGS if name not in SHOWN_BY])
def test_each_flag_is_found(bench, name, fine_tunes):
    value, *needs = OTHER[name]
    assert_found(bench, [f"--{name}", *value.split()], tuple(needs), "batchtopk", fine_tunes)


@pytest.mark.parametrize("fine_tunes", [False, True], ids=["run", "fine-tuning"])
@pytest.mark.parametrize(("field", "architecture"), fields_of_set().items())
def test_each_field_that_set_takes_is_found(bench, field, architecture, fine_tunes):
    value, *needs = OTHER_FIELDS[field]
    assert_found(bench, ["--set", f"{field}={value}"], tuple(needs), architecture, fine_tunes)


def test_what_only_the_script_does_has_a_test():
    for test in SHOWN_BY.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_flag_that_the_architecture_has_no_use_for_is_said_to_be_without_effect(architecture):
    given = {"k": 5, "l1_coefficient": 7.0, "l0_coefficient": 7.0}
    said = flags_of_other_architectures(SAESettings(architecture, **given))
    settings = TrainingSettings(sae=SAESettings(architecture, **given))
    cfg = build_runner_config(settings, HOOK, d_in=32, device="cpu", run_id="any")
    for name, value in given.items():
        assert (getattr(cfg.sae, name, None) == value) != any(line.startswith(f"--{name} ") for line in said), name


@pytest.mark.parametrize(
    ("words", "needs", "architecture"),
    [
        *((["--set", f"{name}={OTHER_FIELDS[name][0]}"], OTHER_FIELDS[name][1:], "batchtopk") for name in NEEDING),
        (["--set", "n_batches_for_norm_estimate=1"], ("--max_activation_norm_multiple", "5"), "batchtopk"),
        (["--set", "logger.log_weights_to_wandb=true"], ("--wandb_mode", "offline"), "batchtopk"),
        (["--set", "sae.jumprelu_tanh_scale=2"], ("--set", "sae.jumprelu_sparsity_loss_mode=tanh"), "jumprelu"),
        (["--set", "sae.target_l0=9"], ("--set", "sae.jumprelu_sparsity_loss_mode=quadratic"), "jumprelu"),
        (["--held_out_seed", "7"], ("--held_out_fraction", "0.1"), "batchtopk"),
    ],
    ids=lambda value: value[-1].partition("=")[0] if isinstance(value, list) else "",
)
def test_what_only_counts_beside_another_flag_is_said_to_be_without_effect(bench, words, needs, architecture):
    measures_nothing = "--max_activation_norm_multiple 0 --normalize_activations none"
    without = f"{measures_nothing} --held_out_fraction 0 --wandb_mode disabled --architecture {architecture}".split()
    for others, is_without_effect in ((without, True), ([*without, *needs], False)):
        run = setup.prepare_run(parse_training_flags([*bench.base, *others, *words]))
        said = [line for line in without_effect(run) if line.startswith(" ".join(words))]
        assert bool(said) is is_without_effect, others
