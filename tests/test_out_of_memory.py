"""Memory that runs out is said in one line, with what to do; where a run can go on, it ends as if nothing had been."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import sae_toolkit.text.rows
import sae_toolkit.training.held_out
from sae_toolkit.errors import UserError, is_out_of_memory
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import ModelSource, find_model, load_language_model
from sae_toolkit.saes.formats import load_sae_file, recognize_sae
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.steps.trainer import Trainer
from support import failing_allocations
from support.processes import ROOT, run_process
from support.trainings import assert_same

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
HOOK = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("fail", failing_allocations.ALL, ids=lambda fail: fail.__name__)
def test_an_allocation_that_failed_is_known_as_one_also_as_the_cause_of_another_error(fail):
    with pytest.raises(Exception) as failed:
        fail()
    assert is_out_of_memory(failed.value)
    damaged = UserError("damaged")
    damaged.__cause__ = failed.value
    assert is_out_of_memory(damaged)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        OSError(28, "No space left on device"),
        UserError("--batch_size 8: ran out of memory (CUDA out of memory); lower it"),
    ],
)
def test_other_errors_and_those_that_are_answered_already_are_not(error):
    assert not is_out_of_memory(error)


def last_line(outcome) -> str:
    """The one line of an error, with exit status 2 and no traceback."""
    assert outcome.status == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    (line,) = outcome.error_lines
    return line


# The language model


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_model_that_does_not_fit_says_what_it_takes(script, tiny_run, monkeypatch, flags):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing_allocations.on_the_cpu)
    line = last_line(script("sae_lens_train.py", *tiny_run, *flags))
    assert ": loading it ran out of memory ([enforce fail at alloc_cpu.cpp" in line
    assert "it takes about 0.01 GiB in float32, and " in line
    assert line.endswith(" GiB were free on cpu; it would fit with --lm_dtype bfloat16")


def test_a_model_that_does_not_fit_for_an_evaluation(script, tiny_run, tiny_model, monkeypatch):
    sae = script("sae_lens_train.py", *tiny_run).stdout.strip()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing_allocations.in_the_driver)
    line = last_line(script("evaluate_sae_real_activations.py", "--sae_path", sae, "--device", "cpu"))
    assert f"--model_name {tiny_model}: loading it ran out of memory (CUDA error: out of memory" in line


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch say that each of three GPUs has this much memory free; loading a model onto one of them fails."""

    def have(gib: float, parameters: float, cpu_gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(gib * 2**30), 2**40))
        monkeypatch.setattr(ModelSource, "n_parameters", int(parameters))
        monkeypatch.setattr("sae_toolkit.model.devices.psutil.virtual_memory", lambda: Free(int(cpu_gib * 2**30)))
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing_allocations.on_a_gpu)

    return have


class Free:
    def __init__(self, available: int) -> None:
        self.available = available


@pytest.mark.parametrize(
    ("gib", "cpu_gib", "dtype", "n_devices", "fits"),
    [
        (24, 0, torch.float32, 1, "with --lm_dtype bfloat16 or --n_devices 2"),
        (12, 64, torch.bfloat16, 1, "with --n_devices 2 or --llm_device cpu"),
        (6, 0, torch.bfloat16, 2, "with --n_devices 3"),
        (12, 64, torch.bfloat16, None, "with --device cpu"),  # an evaluation, which has no --n_devices
        (4, 0, torch.bfloat16, 1, None),
    ],
)
def test_what_would_fit_instead_is_said(gpus, tiny_model, gib, cpu_gib, dtype, n_devices, fits):
    source = find_model(str(tiny_model))
    gpus(gib, parameters=8e9, cpu_gib=cpu_gib)
    with pytest.raises(UserError) as error:
        load_language_model(source, HOOK, "cuda:0", dtype, n_devices)
    assert f"it takes about {8e9 * dtype.itemsize / 2**30:.2f} GiB" in str(error.value)
    assert f"{gib * (n_devices or 1):.2f} GiB were free on cuda:0" in str(error.value)
    expected = "; a smaller model is needed" if fits is None else f"; it would fit {fits}"
    assert str(error.value).endswith(expected)


@pytest.fixture
def large_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Directory of a Llama of 16 GiB, all of it zeros that take no room on the disk."""
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8192, intermediate_size=32768, num_hidden_layers=4)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    assert end > 2**34
    written = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_process_whose_memory_is_limited_says_so(large_model):
    program = (
        "import sys, torch\n"
        "from sae_toolkit.model.loading import find_model, load_language_model\n"
        "from sae_toolkit.terminal.console import run_script\n"
        f"run_script(lambda: load_language_model(find_model(sys.argv[1]), {HOOK!r}, 'cpu', torch.float32))"
    )
    limited = ("bash", "-c", 'ulimit -v 12000000 && exec "$0" "$@"')
    line = last_line(run_process(*limited, sys.executable, "-c", program, large_model, OMP_NUM_THREADS="1"))
    assert f"--model_name {large_model}: loading it ran out of memory (Cannot allocate memory" in line


# Reading files


@pytest.mark.parametrize("fail", [failing_allocations.in_numpy, failing_allocations.on_the_cpu])
def test_an_sae_that_does_not_fit_is_not_called_damaged(script, tiny_run, monkeypatch, fail):
    sae = script("sae_lens_train.py", *tiny_run).stdout.strip()
    monkeypatch.setattr(SAE, "load_from_disk", fail)
    line = last_line(script("evaluate_sae_real_activations.py", "--sae_path", sae, "--device", "cpu"))
    assert f"--sae_path {sae}: loading it on cpu ran out of memory (" in line
    assert line.endswith("; free memory there, or name fewer SAEs at once")
    assert "damaged" not in line


@pytest.mark.parametrize("fail", [failing_allocations.in_numpy, failing_allocations.of_a_mapped_file])
def test_nor_is_one_of_sparsify(sparsify, tmp_path, monkeypatch, fail):
    directory, where = tmp_path / "layers.1", f"--sae_path {tmp_path / 'layers.1'}"
    sparsify.SparseCoder(32, sparsify.SparseCoderConfig(num_latents=64, k=4)).save_to_disk(directory)
    file = recognize_sae(directory, "layers.1", where)
    monkeypatch.setattr("sae_toolkit.saes.foreign.load_file", fail)
    with pytest.raises(UserError) as error:
        load_sae_file(file, "cpu")
    assert str(error.value).startswith(f"{where}: loading it on cpu ran out of memory (")
    assert "damaged" not in str(error.value)


def test_a_text_of_too_many_tokens(script, tiny_run, monkeypatch):
    monkeypatch.setattr(sae_toolkit.text.rows.np, "stack", failing_allocations.in_numpy)
    line = last_line(script("sae_lens_train.py", *tiny_run))
    assert "error: --training_tokens 2048: reading the text ran out of memory (Unable to allocate 8.00 PiB" in line


def test_a_cache_that_cannot_be_mapped(script, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "memmap", failing_allocations.of_a_mapped_file)
    line = last_line(script("sae_lens_train.py", *tiny_run, "--cache_activations", tmp_path / "cache"))
    assert f"--cache_activations {tmp_path / 'cache'}: opening it ran out of memory ([Errno 12]" in line


# Before the first step, and within the evaluation


@pytest.mark.parametrize("fail", [failing_allocations.in_cublas, failing_allocations.in_the_driver])
def test_a_step_that_does_not_fit_is_found_before_the_run(script, tiny_run, monkeypatch, fail):
    monkeypatch.setattr(Trainer, "step", fail)
    line = last_line(script("sae_lens_train.py", *tiny_run))
    assert ": a training step on cpu ran out of memory (" in line
    assert line.endswith("; lower it, --expansion_factor or --n_batches_in_buffer")


def test_an_evaluation_that_does_not_fit(script, tiny_run, monkeypatch):
    sae = script("sae_lens_train.py", *tiny_run).stdout.strip()
    monkeypatch.setattr(LanguageModel, "logits_from_hook", failing_allocations.in_the_driver)
    line = last_line(script("evaluate_sae_real_activations.py", "--sae_path", sae, "--device", "cpu"))
    assert "error: --batch_size 8: evaluating 1 SAEs on cpu ran out of memory (" in line
    assert line.endswith("; lower --batch_size, or name fewer SAEs")


def test_a_diagnosis_that_does_not_fit_leaves_the_evaluation(script, tiny_run, monkeypatch):
    sae = script("sae_lens_train.py", *tiny_run).stdout.strip()
    monkeypatch.setattr("sae_toolkit.reports.results.probe", failing_allocations.on_a_gpu)
    done = script("evaluate_sae_real_activations.py", "--sae_path", sae, "--device", "cpu", "--num_samples", 20)
    assert done.status == 0, done.stderr
    assert "--batch_size 8: the diagnosis ran out of memory (CUDA out of memory" in done.stderr
    assert (Path(sae) / "evaluation.json").is_file()


# In a run


@pytest.fixture
def saved_run(tiny_run, tmp_path):
    """Flags of a run of eight steps that is saved every second step."""
    return [*tiny_run, "--training_tokens", 8192, "--train_batch_size_tokens", 1024, "--checkpoint_every", 2048]


@pytest.fixture
def undisturbed(script, saved_run):
    return Path(script("sae_lens_train.py", *saved_run).stdout.strip())


@pytest.mark.parametrize(
    ("place", "fail"),
    [
        ("sae_toolkit.training.held_out.finished_copy", failing_allocations.on_a_gpu),
        ("sae_toolkit.model.language_model.LanguageModel.logits_from_hook", failing_allocations.in_the_driver),
        ("sae_toolkit.evaluation.run.compare_predictions", failing_allocations.on_the_cpu),
    ],
)
def test_a_held_out_measurement_is_left_out_and_the_run_ends_the_same(
    script, saved_run, undisturbed, monkeypatch, place, fail
):
    monkeypatch.setattr(place, fail)
    done = script("sae_lens_train.py", *saved_run, "--eval_every", 4096)
    assert done.status == 0, done.stderr
    left_out = [line for line in done.stderr.splitlines() if "not measured on held-out text: out of memory" in line]
    assert len(left_out) == 2
    assert "--eval_every 0 measures nothing, and a smaller --expansion_factor needs less" in left_out[0]
    assert_same(Path(done.stdout.strip()), undisturbed)


def test_what_a_measurement_held_is_freed(script, saved_run, monkeypatch):
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(_prepared, _model, *, batch_size):
        assert all(tensor() is None for tensor in held), "a measurement before this one still holds memory"
        acts = torch.zeros(batch_size)
        held.append(weakref.ref(acts))
        failing_allocations.on_a_gpu()

    monkeypatch.setattr(sae_toolkit.training.held_out, "measure_saes", fail)
    done = script("sae_lens_train.py", *saved_run, "--eval_every", 4096)
    assert (done.status, len(held)) == (0, 2), done.stderr


@pytest.mark.scale
def test_the_other_process_goes_on_too(saved_run):
    program = ROOT / "tests" / "support" / "train_without_memory.py"
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = run_process(
        *TORCHRUN, program, *saved_run, "--eval_every", 4096, PYTHONPATH=paths, OMP_NUM_THREADS="1", timeout=300
    )
    assert done.status == 0, done.stderr
    assert done.stderr.count("not measured on held-out text: out of memory") == 2
    assert Path(done.stdout.strip()).is_dir()


def test_a_checkpoint_that_does_not_fit_is_left_out_and_the_run_ends_the_same(
    script, saved_run, undisturbed, monkeypatch
):
    save, calls = Trainer.save_checkpoint, iter(range(100))

    def fails_at_first(*arguments, **options):
        return failing_allocations.on_a_gpu() if next(calls) < 2 else save(*arguments, **options)  # tried twice

    monkeypatch.setattr(Trainer, "save_checkpoint", fails_at_first)
    done = script("sae_lens_train.py", *saved_run)
    assert done.status == 0, done.stderr
    assert done.stderr.count("is not saved: CUDA out of memory") == 1
    assert_same(Path(done.stdout.strip()), undisturbed)


def test_a_run_that_ran_out_of_memory_goes_on_from_its_checkpoint(script, saved_run, undisturbed, monkeypatch):
    step = MultiTrainer.step

    def fails_late(trainer, batches):
        return failing_allocations.on_a_gpu() if trainer.n_training_samples > 5000 else step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTrainer, "step", fails_late)
        done = script("sae_lens_train.py", *saved_run)
    assert done.status == 1
    (line,) = done.error_lines
    assert "out of memory on cpu after 5,120 tokens (CUDA out of memory" in line
    checkpoint = line.rpartition("--resume ")[2]
    assert checkpoint.endswith("/4096")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "load_checkpoint", failing_allocations.on_the_cpu)
        line = last_line(script("sae_lens_train.py", "--resume", checkpoint))
    assert f"error: --resume {checkpoint}: loading it on cpu ran out of memory ([enforce fail" in line
    assert line.endswith("the checkpoint is unchanged: free memory there, or resume with another --device")
    assert "damaged" not in line

    done = script("sae_lens_train.py", "--resume", checkpoint)
    assert done.status == 0, done.stderr
    finished = Path(done.stdout.strip())
    weights, expected = (load_file(sae / "sae_weights.safetensors") for sae in (finished, undisturbed))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# CUDA's allocator


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, "max_split_size_mb:512"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:256"}, "max_split_size_mb:256"),
    ],
)
def test_the_allocator_grows_its_segments_unless_the_user_chose_otherwise(monkeypatch, given, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    program = (
        "from sae_toolkit.terminal.console import run_script\n"
        "def main():\n    import torch\n    print(torch._C._accelerator_getAllocatorSettings())\n"
        "run_script(main)"
    )
    done = run_process(sys.executable, "-c", program, **given)
    assert (done.status, done.stdout.strip()) == (0, expected), done.stderr
