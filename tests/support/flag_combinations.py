"""Any combination of flags of sae_lens_train.py: sane, extreme and nonsense, on a run of a second."""

import dataclasses
import json
import shlex
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_toolkit.settings.training import ARCHITECTURES
from sae_toolkit.training.set_flag import HONOURED

# What a shell can pass on, but for "/" and "~": nonsense must not become a path out of the test's directory.
_TEXT = st.text(st.characters(exclude_characters="\0/~"), max_size=12)
_WORDS = (
    "- -- -1 0 1e3 nan inf -inf None null true 1,2 [] {} .. . /proc/nothing /dev/null ümlaut 名前 %s $HOME @".split()
)
_NONSENSE = _TEXT | st.sampled_from([*_WORDS, "", " ", "a\nb", "a b", "'", '"', "1_000", "x" * 300, "9" * 400])


def _mostly(usual, other, one_in):
    """`usual`, but for one example in so many. (`one_of` takes a strategy that stands there twice as one.)"""
    return st.sampled_from(range(one_in)).flatmap(lambda i: other if i == one_in // 2 else usual)


def _integers(*sane):
    extreme = [-1, 0, 1, 2**31, 2**63, 10**12, 10**15, 10**30]
    return _mostly(st.sampled_from(sane), st.sampled_from(extreme), 6).map(str)


def _numbers(*sane):
    extreme = "0 -1 1e-300 1e-9 1e9 1e38 1e300 nan inf 0x10 1,5".split()
    return _mostly(st.sampled_from(sane), st.sampled_from(extreme), 6)


_COMPILING = {"compile_sae", "compile_llm"}  # which take minutes
_HONOURED_FIELDS = set(HONOURED) - _COMPILING
_SAE_FIELDS = {
    f"sae.{field.name}"
    for architecture in ARCHITECTURES
    for field in dataclasses.fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])
}
_OTHER_FIELDS = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)} - _COMPILING
_FIELD = _mostly(
    st.sampled_from(sorted(_HONOURED_FIELDS | _SAE_FIELDS)),
    st.sampled_from(
        [*sorted(_OTHER_FIELDS), "sae.nonsense", "nonsense", "logger.nonsense", "sae.", ".", "", "sae.sae.k"]
    ),
    6,
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 100) | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXT, inner, max_size=2),
    max_leaves=4,
)
_SET_VALUE = _mostly(
    st.sampled_from([0, 1, -1, 0.5, 2, 10, 1e-3, True, False, None, "eos", "sep", "tanh", "quadratic"]), _JSON, 4
)
_SET = _mostly(
    st.builds(lambda key, value: f"{key}={json.dumps(value)}", _FIELD, _SET_VALUE),
    st.builds(lambda key, value: f"{key}={value}", _FIELD, _NONSENSE) | _NONSENSE,
    8,
)

# Sane values are such that a run takes about a second.
FLAGS = {
    "model_name": st.sampled_from(["./nowhere", "owner/model", "embedded:gpt5", "nowhere.gguf", "text.txt", "empty"]),
    "layer": _integers(0, 1, 3, 4),
    "hook_name": st.sampled_from(
        "blocks.1.hook_resid_pre blocks.1.attn.hook_z blocks.2.hook_mlp_out blocks.9.hook_resid_post model.layers.1"
        " model model.norm lm_head blocks..hook blocks.1.hook_resid_mid model.embed_tokens".split()
    ),
    "layers": st.lists(st.sampled_from([0, 1, 3, 4, -1, "x"]), max_size=3).map(
        lambda layers: " ".join(map(str, layers))
    ),
    "hook_names": st.sampled_from(
        [
            "blocks.0.hook_resid_pre blocks.2.mlp.hook_post",
            "model.layers.1 model.layers.1",
            "lm_head model.norm",
            "blocks.1.attn.hook_z nowhere",
        ]
    ),
    "llm_device": st.sampled_from(["cpu", "auto", "cuda:99", "tpu"]),
    "n_devices": _integers(1, 2),
    "device": st.sampled_from(["cpu", "auto", "cuda:99", "cuda:-1", "mps", "meta"]),
    "lm_dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "int8"]),
    "cache_activations": st.sampled_from(["cache", "text.txt", "/proc/nothing/cache", "."]),
    "store_batch_size_prompts": _integers(1, 3, 100),
    "dataset_path": st.sampled_from(
        "text.txt empty empty.txt numbers.jsonl tokens.jsonl broken.parquet embedded:news nowhere".split()
    ),
    "dataset_config": st.sampled_from(["default", "en"]),
    "dataset_split": st.sampled_from(["train", "test", "train[:10]"]),
    "text_column": st.sampled_from(["text", "tokens", "n", "n.text"]),
    "chat_tokens": st.sampled_from(["all", "assistant", "user"]),
    "streaming": st.sampled_from(["true", "yes"]),
    "fallback_dataset": st.sampled_from(["text.txt", "nowhere"]),
    "held_out_fraction": _numbers(0, 0.5, 0.999999),
    "held_out_seed": _integers(0, 1, 7, 2**32),
    "epochs": _integers(1, 2, 100),
    "context_size": _integers(2, 32, 128, 129),
    "exclude_special_tokens": st.sampled_from(["true", "false", "0,1,2", "-5", "1,,2", str(10**30)]),
    "skip_positions": _integers(0, 2, 31, 63, 64),
    "max_activation_norm_multiple": _numbers(0, 1.0001, 2, 10),
    "architecture": st.sampled_from(ARCHITECTURES),
    "expansion_factor": _integers(1, 2, 8),
    "d_sae": _integers(1, 8, 100, 128),
    "l1_coefficient": _numbers(0, 1, 5),
    "l0_coefficient": _numbers(0, 1, 5),
    "k": _integers(1, 8, 32, 64, 128),
    "matryoshka_widths": st.lists(st.sampled_from([1, 8, 32, 128, 129, 0, "x"]), max_size=4).map(
        lambda widths: " ".join(map(str, widths))
    ),
    "normalize_activations": st.sampled_from(
        "none expected_average_only_in constant_norm_rescale layer_norm covariance_whitening"
        " expected_average_in_and_out expected_average_only_out".split()
    ),
    "target_l0": _numbers(1, 16, 64, 1000),
    "shard_features": st.just(None),
    "dtype": st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    "init_from": st.sampled_from(["nowhere", "none", ".", "empty", "text.txt", "owner/sae", "gpt2-small-res-jb:x"]),
    "training_tokens": _integers(1024, 2048, 3000),
    "train_batch_size_tokens": _integers(100, 512, 1024, 2048).filter(lambda n: n != "1"),  # thousands of steps
    "n_batches_in_buffer": _integers(1, 8, 64),
    "lr": _numbers(1e-4, 1e-3, 1, 100),
    "lr_warm_up_steps": _integers(0, 1, 2, 3),
    "lr_decay_steps": _integers(0, 1, 2, 3),
    "dead_feature_window": _integers(1, 2, 100),
    "finetune_loss": st.sampled_from(["none", "kl", "ce", "mse"]),
    "finetune_fraction": _numbers(0.1, 0.5, 1),
    "seed": _integers(0, 1, 7, 2**32),
    "seeds": _integers(1, 2),
    "set": _SET,
    "output_name": st.sampled_from(["name", "a/b", "..", "x" * 300, "with space"]),
    "checkpoint_path": st.sampled_from(["out", "text.txt", "/proc/nothing", "out/deeper"]),
    "n_checkpoints": _integers(0, 1, 2, 5),
    "resume": st.sampled_from(["", "nowhere", ".", "text.txt"]),
    "like": st.sampled_from(["nowhere", ".", "text.txt", "empty"]),
    "eval_every": _integers(0, 500, 1024, 3000),
    "logger": st.sampled_from(["wandb", "tensorboard", "mlflow"]),
    "verbose": st.just(None),
    "quiet": st.just(None),
    "wandb_mode": st.sampled_from(["disabled", "never"]),
    "wandb_project": _TEXT,
    "wandb_entity": _TEXT,
    "run_name": _TEXT,
    "dry_run": st.just(None),
    "device_memory": st.sampled_from(["16GiB", "1MB", "24", "0GB", "many"]),
    "strict": st.just(None),
    "learning_rate": st.just("1"),  # no such flag
    "@": st.sampled_from(["flags.args"] * 4 + ["nowhere.args", "quotes.args", "itself.args", "bytes.args", "empty"]),
}

# One value in ten is nonsense. Several flags in any order, half of the time with an architecture.
_FLAG = st.sampled_from(sorted(FLAGS)).flatmap(
    lambda name: st.tuples(st.just(name), _mostly(FLAGS[name], _NONSENSE if name != "@" else FLAGS[name], 10))
)
COMBINATIONS = st.builds(
    lambda architecture, flags, sets: [*architecture, *flags, *sets],
    st.lists(st.tuples(st.just("architecture"), FLAGS["architecture"]), max_size=1),
    st.lists(_FLAG, min_size=1, max_size=4, unique_by=lambda flag: flag[0]),
    st.lists(st.tuples(st.just("set"), _SET), max_size=2),
)


def arguments(combination):
    """The combination as the words of a command line."""
    words = []
    for name, value in combination:
        words.append(f"@{value}" if name == "@" else f"--{name}")
        if value is None or name == "@":
            continue
        several = name in ("matryoshka_widths", "layers", "hook_names") and isinstance(value, str)
        words += value.split() if several else [str(value)]
    return words


def write_files(directory, text):
    """What the values above name."""
    (directory / "text.txt").write_text(text)
    (directory / "empty.txt").write_text("")
    (directory / "empty").mkdir()
    (directory / "numbers.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (directory / "tokens.jsonl").write_text("\n".join(json.dumps({"tokens": [1, i, 5] * 43}) for i in range(3, 90)))
    (directory / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (directory / "quotes.args").write_text("--run_name 'my run")
    (directory / "itself.args").write_text("@itself.args")
    (directory / "bytes.args").write_bytes(b"\xff\xfe--k 8")
    (directory / "flags.args").write_text(shlex.join(["--architecture", "topk", "--k", "8"]) + "  # a comment\n")


def run_combinations(n, script, base, text, directory, monkeypatch):
    """Runs n combinations, each in a directory of its own, and returns how each ended: `ran`, or its error line.

    Each must end well, or with exit status 2, nothing on disk and one line that names what was given.
    """
    outcomes = []

    @settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(COMBINATIONS)
    def run(combination):
        here = directory / str(len(outcomes))
        here.mkdir()
        write_files(here, text)
        monkeypatch.chdir(here)
        outcomes.append("failed the test")
        outcomes[-1] = _outcome(script, [*map(str, base), "--checkpoint_path", "checkpoints", *arguments(combination)])

    run()
    return outcomes


def _outcome(script, words):
    before = sorted(Path().rglob("*"))
    done = script("sae_lens_train.py", *words)
    if done.status == 0:
        assert done.stdout or "--dry_run" in words
        return "ran"
    assert done.status == 2, done.stderr
    (error,) = done.error_lines
    assert done.stderr.endswith(f"{error}\n"), done.stderr
    assert "Traceback" not in done.stderr
    given_words = {word.partition("=")[0] for word in words if word.startswith("--")}
    given_words |= {word[1:] for word in words if word.startswith("@")}
    assert any(name in error for name in given_words) or "unrecognized arguments: " in error, error
    assert sorted(Path().rglob("*")) == before, error
    return error
