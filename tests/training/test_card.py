"""What fits a CUDA device is said without one, and a launcher without a preset takes it."""

import re
import sys

import pytest
import torch

from sae_toolkit.settings.training import ModelSettings
from sae_toolkit.training.card import Card, choose_preset
from support.processes import ROOT, run_process

PRESET = f"@{ROOT}/presets/llama3-8b.args"
GIB = 2**30


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def chosen(model, gib, *words):
    card = Card("NVIDIA Test", int(gib * GIB), torch.bfloat16)
    return choose_preset(["--model_name", str(model), *words], lambda _: card)


@pytest.mark.parametrize(
    ("size", "training", "evaluation"),
    [
        ("8GiB", r"does not fit, and takes 1\d\.\d GiB even with --eval_every 0", "does not, and takes"),
        ("16GiB", "does not fit, but does with --eval_every 0", "does not, and takes 1\\d.\\d GiB even with"),
        ("24GiB", "does not fit, but does with --eval_every 0", "fits with --batch_size [124]"),
        ("42.4GB", "fits", "fits"),
        ("80GiB", "fits", "fits"),
    ],
)
def test_what_fits_a_device_is_shown_without_it(script, llama3_8b_shape, size, training, evaluation):
    flags = (PRESET, "--model_name", llama3_8b_shape, "--dry_run", "--device_memory", size)
    done = script("sae_lens_train.py", *flags)
    assert done.status == 0, done.stderr
    assert done.stdout == ""
    assert re.search(r"model   \S+, blocks\.12\.hook_resid_post, bfloat16 on a CUDA device", done.stderr)
    assert re.search(r"language model 14\.96, .*SAE 1\.00, gradients 1\.00, Adam 2\.00", done.stderr)
    assert re.search(rf"of which CUDA .*: the training {training}.*; the evaluation {evaluation}", done.stderr)


def test_a_device_is_shown_with_what_does_not_fit_together_refused(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, "--device_memory", "16GiB")
    assert done.error_lines == [
        "error: --device_memory 16GiB: shows what would fit, and trains nothing; add --dry_run to it"
    ]
    done = script("sae_lens_train.py", *tiny_run, "--device_memory", "16GiB", "--dry_run")
    assert "one CUDA device" in done.error_lines[0]  # tiny_run has --device cpu
    for size in ("16", "0GiB", "-1GB", "16 GiB", "many", "16TiB"):
        done = script("sae_lens_train.py", *tiny_run, "--dry_run", f"--device_memory={size}")
        assert "must be a size with its unit, in MB, MiB, GB or GiB, such as 24GB" in done.error_lines[0]


@pytest.mark.parametrize(
    ("gib", "words", "line"),
    [
        (79, ("--eval_every", "0", "--expansion_factor", "8"), r"Preset llama3-8b: NVIDIA Test has 79\.0 GiB free, "),
        (78.7, (), r"Preset llama3-8b: NVIDIA Test has 78\.7 GiB free, the preset takes \d\d\.\d GiB$"),
        (39.4, (), r"Preset llama3-8b: NVIDIA Test has 39\.4 GiB free, the preset takes \d\d\.\d GiB$"),
        (23.5, (), r"Preset llama3-8b with --eval_every 0: NVIDIA Test has 23\.5 .*; the evaluation has --batch_size"),
        (15.5, (), r"Preset demo, the embedded model and text: NVIDIA Test has 15\.5 .* takes at least 1\d\.\d GiB$"),
        (7.6, (), r"Preset demo, the embedded model and text: NVIDIA Test has 7\.6 GiB free, and the preset llama3-8b"),
    ],
)
def test_a_preset_is_taken_as_far_as_it_fits(in_root, llama3_8b_shape, gib, words, line):
    choice = chosen(llama3_8b_shape, gib, *words)
    assert re.match(line, choice.line), choice.line
    preset = "demo" if "Preset demo" in choice.line else "llama3-8b"
    assert choice.words[0] == f"@presets/{preset}.args"
    shown = re.match(r"Preset \S+ with ([^:]*):", choice.line)
    assert choice.words[1:] == tuple(shown[1].split() if shown else ())


def test_features_are_fewer_where_fewer_fit_and_never_below_twice_the_width(in_root, llama3_8b_shape):
    """Between the device that is large enough, and the one that has no room for the model."""
    choices = [chosen(llama3_8b_shape, gib / 4, "--dtype", "float64") for gib in range(60, 120, 2)]
    flags = [dict(zip(choice.words[1::2], choice.words[2::2], strict=True)) for choice in choices]
    factors = [int(each["--expansion_factor"]) for each in flags if "--expansion_factor" in each]
    assert factors
    assert set(factors) <= {2, 4}
    assert factors == sorted(factors)
    assert choices[0].words == ("@presets/demo.args",)
    assert choices[-1].words == ("@presets/llama3-8b.args",)


@pytest.mark.parametrize(
    "given", [("--expansion_factor", "8"), ("--eval_every", "5000000"), ("--n_batches_in_buffer", "64")]
)
def test_a_flag_that_was_given_is_not_changed(in_root, llama3_8b_shape, given):
    choice = chosen(llama3_8b_shape, 23.5, "--dtype", "float64", *given)
    assert given[0] not in choice.words


@pytest.mark.parametrize(
    "words",
    [
        ("--model_name", "owner/gated"),
        ("--model_name", "./nowhere"),
        ("--learning_rate", "1"),
        ("--device", "cpu"),
        ("--help",),
    ],
)
def test_what_cannot_be_planned_is_left_to_the_training(in_root, llama3_8b_shape, words):
    choice = chosen(llama3_8b_shape, 8, *words)
    assert choice.line == "Preset llama3-8b: torch sees a CUDA device, NVIDIA Test"
    assert choice.words == ("@presets/llama3-8b.args",)


def test_the_launcher_runs_what_fits_the_device(tmp_path, llama3_8b_shape):
    """With an interpreter that says that there is a GPU of 24 GiB."""
    card = tmp_path / "card.py"
    card.write_text(
        "import sys\n"
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\n"
        "torch.cuda.get_device_name = lambda device=0: 'NVIDIA Test'\n"
        f"torch.cuda.mem_get_info = lambda device=0: ({int(23.5 * GIB)}, {24 * GIB})\n"
        "torch.cuda.is_bf16_supported = lambda **_: True\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from sae_toolkit.training.card import main\n"
        "main()\n"
    )
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$1 $2" in\n'
        '"-c import torch"*) echo "NVIDIA Test" ;;\n'
        f'"-m sae_toolkit.training.card") exec {sys.executable} {card} "${{@:3}}" ;;\n'
        f'*) exec {sys.executable} "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    flags = ("--model_name", llama3_8b_shape, "--dry_run", "--device_memory", "24GiB")
    done = run_process("./run_saelens_training.sh", *flags, PYTHON=str(python))
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Preset llama3-8b with --eval_every 0: NVIDIA Test has 23.5 GiB free, the preset")
    assert "the training fits; the evaluation fits with --batch_size" in done.stderr


def test_one_gpu_is_that_of_the_flags_alone():
    assert ModelSettings().is_on_one_gpu
    assert ModelSettings(device="cuda:1").is_on_one_gpu
    for others in ({"device": "cpu"}, {"llm_device": "cuda:1"}, {"n_devices": 2}):
        assert not ModelSettings(**others).is_on_one_gpu
