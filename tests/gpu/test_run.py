"""A run on the device: it is resumed bit for bit, takes the memory that was planned, and survives a lack of it."""

import gc

import pytest
import torch

from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.held_out import HeldOutText
from sae_toolkit.training.needs import memory_plan
from sae_toolkit.training.run import Training, open_activations
from sae_toolkit.training.setup import prepare_run
from support.many_processes import Launch, assert_close


def start(run):
    """A run at its first step, or at the checkpoint that --resume names."""
    training = Training(run, open_activations(run))
    run.open_directory()
    return training


def take_steps(training, n):
    """Takes n steps. Returns their batches and losses."""
    taken = []
    for _ in range(n):
        batch_BD = next(training.stream)
        (output,) = training.trainer.step([batch_BD]).values()
        training.trainer.advance()
        taken.append((batch_BD.clone(), output.loss.item()))
    return taken


def tensors_of(training):
    """Every tensor that the next steps depend on, by name."""
    (trainer,) = training.trainer.trainers.values()
    found = dict(trainer.sae.state_dict())
    for i, state in enumerate(trainer.optimizer.state_dict()["state"].values()):
        found |= {f"Adam's {name} {i}": value for name, value in state.items()}
    for name in ("act_freq_scores", "n_forward_passes_since_fired", "n_not_finite", "n_not_finite_in_a_row"):
        found[name] = getattr(trainer, name)
    return found


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(device, small_model, run_flags, architecture):
    run = prepare_run(parse_training_flags(run_flags(small_model, architecture=architecture)))
    with run.run_directory:
        training = start(run)
        take_steps(training, 7)
        training.checkpoints.save()
    resumed_run = prepare_run(parse_training_flags(["--resume", str(training.checkpoints.newest)]))
    with resumed_run.run_directory:
        resumed = start(resumed_run)
    ours, theirs = tensors_of(resumed), tensors_of(training)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].device == tensor.device and ours[name].stride() == tensor.stride(), name
    assert {tensor.device.type for name, tensor in ours.items() if "step" not in name} == {torch.device(device).type}
    mine, its = resumed.trainer.first, training.trainer.first
    assert mine.n_training_steps == its.n_training_steps == 7
    assert mine.activation_scaler.scaling_factor == its.activation_scaler.scaling_factor != 1
    for (our_batch, our_loss), (their_batch, their_loss) in zip(
        *(take_steps(each, 3) for each in (resumed, training)), strict=True
    ):
        assert torch.equal(our_batch, their_batch)
        assert our_loss == their_loss
    for name, tensor in tensors_of(training).items():
        assert torch.equal(tensors_of(resumed)[name], tensor), name


def run_of_gigabytes(run_flags, model, architecture="batchtopk"):
    """Flags of a run whose SAE has 32,768 features of width 1,024, with two measurements of held-out text.

    The plan is for a step in which all features are dead. Here at least seven eighths are: with k 1 at most 4,096 fire
    in two steps.
    """
    sizes = {"k": 1, "expansion_factor": 32, "train_batch_size_tokens": 2048, "training_tokens": 12 * 2048}
    more = {"eval_every": 6 * 2048, "n_batches_in_buffer": 256, "architecture": architecture}
    return run_flags(model, **sizes, **more, dead_feature_window=1)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_a_run_takes_the_memory_that_was_planned(cuda, script, wide_model, run_flags, architecture):
    flags = run_of_gigabytes(run_flags, wide_model, architecture)
    planned = memory_plan(prepare_run(parse_training_flags(flags))).peak
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    done = script("sae_lens_train.py", *flags)
    assert done.status == 0, done.stderr
    measured = torch.cuda.max_memory_allocated() - held
    assert measured > 2**30
    assert planned == pytest.approx(measured, rel=0.15)


def test_a_held_out_measurement_without_memory_is_left_out(cuda, script, wide_model, run_flags, monkeypatch):
    """Only while it measures, torch may take no more of the device than the run already holds."""
    measure = HeldOutText.measure
    tries = []

    def measure_without_memory(self, *args):
        gc.collect()
        torch.cuda.empty_cache()
        there = torch.cuda.get_device_properties(cuda).total_memory
        tries.append(torch.cuda.memory_reserved())
        torch.cuda.set_per_process_memory_fraction((tries[-1] + 2**20) / there)
        try:
            return measure(self, *args)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    monkeypatch.setattr(HeldOutText, "measure", measure_without_memory)
    done = script("sae_lens_train.py", *run_of_gigabytes(run_flags, wide_model))
    assert done.status == 0, done.stderr
    assert len(tries) == 2
    assert done.stderr.count("not measured on held-out text") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [(), ("--shard_features",)], ids=["whole", "sharded"])
def test_two_ranks_train_the_sae_of_one(cuda, small_model, run_flags, tmp_path, more):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; tests/distributed has two ranks on a CPU")
    compare_ranks(run_flags, small_model, tmp_path, more, CUDA_VISIBLE_DEVICES="0,1")


def compare_ranks(run_flags, model, directory, more, **environment):
    finished = []
    for n in (1, 2):
        flags = run_flags(model, dtype="float64", checkpoint_path=directory / f"{n} ranks")
        finished.append(Launch(n, [*flags, *more], **environment).finished_sae())
    assert_close(*finished)
