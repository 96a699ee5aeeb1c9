"""Several seeds in one pass of the model: each is an SAE of its own, and the run says what they share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_toolkit.saes.search import find_saes
from support.trainings import assert_same


def weights(sae):
    return load_file(sae / "sae_weights.safetensors")


@pytest.mark.parametrize("eval_every", [0, 1024])  # without readings the model's upper layers are not kept
def test_the_first_is_that_of_a_run_of_its_own_and_the_run_ends_with_what_they_share(script, tiny_run, eval_every):
    flags = ["--architecture", "batchtopk", "--k", 8, "--held_out_fraction", 0.02, "--eval_every", eval_every]
    done = script("sae_lens_train.py", *tiny_run, *flags, "--seeds", 3)
    assert done.status == 0, done.stderr
    together = Path(done.stdout.strip())
    names = ["seed_42", "seed_43", "seed_44"]
    assert sorted(child.name for child in together.iterdir() if child.is_dir()) == names
    alone = script("sae_lens_train.py", *tiny_run, *flags)
    assert_same(Path(alone.stdout.strip()), together / "seed_42", but={"seed"})
    seeds = [json.loads((together / name / "cfg.json").read_text())["metadata"]["seed"] for name in names]
    assert seeds == [42, 43, 44]
    decoders = [torch.nn.functional.normalize(weights(together / name)["W_dec"], dim=-1) for name in names]
    table = [line.split("│") for line in done.stderr.splitlines() if line.startswith("│ seed_")]
    shown = {tuple(cell.strip() for cell in line[1:3]) for line in table}
    for i, j in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        mean = (decoders[i] @ decoders[j].T).amax(1).mean().item()
        assert (names[j], f"{mean:.3f}") in shown
    evaluated = script("evaluate_sae_real_activations.py", "--stability", together, "--num_samples", 8)
    assert evaluated.status == 0, evaluated.stderr
    assert "evaluated in" not in evaluated.stderr  # the same documents are held out, so one pass is enough
    assert [sae.path.name for sae in find_saes([str(together)], layer=1)] == names  # a layer chooses none of them


def test_a_sweep_has_one_seed_in_each_trial(script, tiny_run):
    done = script("sweep_saes.py", *tiny_run, "--architecture", "batchtopk", "--grid", "k=4,8", "--seeds", 2)
    assert done.status == 2
    assert "--seeds 2: a trial trains one SAE; sweep them, as in --grid seed=42,43,44" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layers", 0, 2], "--seeds 2: for SAEs at one hook"),
        (["--finetune_loss", "kl"], "--seeds 2, --finetune_loss kl"),
        (["--init_from", "."], "--seeds 2, --init_from ."),
    ],
)
def test_what_several_seeds_cannot_have_is_refused(script, tiny_run, flags, says):
    if "--layers" in flags:
        at = tiny_run.index("--layer")
        tiny_run = [*tiny_run[:at], *tiny_run[at + 2 :]]
    done = script("sae_lens_train.py", *tiny_run, "--seeds", 2, *flags)
    assert done.status == 2
    assert says in done.stderr
