"""One pass of the model for an SAE at each of several hooks, and each of them is what its own run would make."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.diagnosis.history import load_history
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.text.positions import PositionFilter
from support.trainings import assert_same, paths_in, run_flags


def final(done):
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu"])
def test_each_sae_is_that_of_a_run_of_its_own(script, tiny_run, architecture):
    flags = ["--architecture", architecture, "--k", 8, "--max_activation_norm_multiple", 0]
    together = final(script("sae_lens_train.py", *tiny_run, *flags, "--layers", 0, 2))
    assert sorted(child.name for child in together.iterdir() if child.is_dir()) == [
        "blocks.0.hook_resid_post",
        "blocks.2.hook_resid_post",
    ]
    for layer in (0, 2):
        alone = final(script("sae_lens_train.py", *tiny_run, *flags, "--layer", layer))
        assert_same(alone, together / f"blocks.{layer}.hook_resid_post")


def test_hooks_of_several_widths_are_read_side_by_side(script, tiny_run):
    hooks = ["blocks.1.hook_mlp_out", "blocks.2.mlp.hook_post", "blocks.0.attn.hook_z"]
    many_dead = ["--architecture", "topk", "--k", 1, "--dead_feature_window", 1]
    together = final(script("sae_lens_train.py", *tiny_run, *many_dead, "--hook_names", *hooks))
    cfgs = [json.loads((together / hook / "cfg.json").read_text()) for hook in hooks]
    assert [cfg["d_in"] for cfg in cfgs] == [32, 64, 32]
    last = json.loads((together.parent / "metrics.jsonl").read_text().splitlines()[-1])
    for hook, cfg in zip(hooks, cfgs, strict=True):
        n_dead = last[f"{hook}/sparsity/dead_features"]
        assert n_dead > 0
        assert last[f"{hook}/sparsity/dead_share"] == n_dead / cfg["d_sae"]


def test_a_token_that_is_massive_at_one_hook_is_left_out_at_all(tiny_model):
    model = load_language_model(
        find_model(str(tiny_model)), ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"], "cpu", torch.float32
    )
    rows_NT = torch.randint(3, 40_000, (64, 32), generator=torch.Generator().manual_seed(0)).numpy().astype("uint32")
    settings = {"batch_size": 64, "buffer_size": 256, "mix_fraction": 0.0, "rows_per_forward": 4, "total": 10**6}
    stream = ActivationStream(
        model, rows_NT, PositionFilter(), seed=0, dtype=torch.float32, widths=[32, 32], **settings
    )
    measured = stream.calibrate(10, max_norm_multiple=1.15)
    limits = stream.max_activation_norms
    assert len(limits) == 2 and limits[0] != limits[1]
    for acts, limit in zip(stream.at_each_hook(measured), limits, strict=True):
        assert acts.norm(dim=-1).max() <= limit
    both = model.activations(torch.from_numpy(rows_NT.astype("int64"))).flatten(0, 1)
    norms = [part.norm(dim=-1) for part in both.split([32, 32], dim=-1)]
    only_at_one = (norms[0] > limits[0]) != (norms[1] > limits[1])
    assert only_at_one.any()
    left_out = (norms[0] > limits[0]) | (norms[1] > limits[1])
    assert len(measured) == int((~left_out[: len(measured) + stream.n_massive]).sum())


@pytest.mark.parametrize(
    ("several", "names"),
    [
        pytest.param(
            ["--layers", "0", "2"],
            ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post"),
            marks=pytest.mark.scale,
        ),
        (["--seeds", "2"], ("seed_42", "seed_43")),
    ],
)
def test_a_run_of_several_saes_that_is_stopped_goes_on_to_the_same_saes(
    trainings, tiny_model, text_file, tmp_path, several, names
):
    def flags(name):
        return [*run_flags(tiny_model, text_file, tmp_path / name), *several]

    def stop_after_a_checkpoint(pid):
        while not paths_in(tmp_path / "stopped"):
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)

    status, _ = trainings.run(flags("whole"))
    assert status == 0, trainings.shown()
    whole = trainings.finished_sae()
    status, _ = trainings.run(flags("stopped"), stop_after_a_checkpoint)
    assert status == 143, trainings.shown()
    status, _ = trainings.run([*flags("stopped"), "--resume"])
    assert status == 0, trainings.shown()
    for name in names:
        assert_same(whole / name, trainings.finished_sae() / name)
    for name in names:  # the diagnosis finds what was recorded of each
        history = load_history(whole / name, load_sae(whole / name, "cpu"))
        assert history.readings


def test_the_evaluation_is_one_table_and_one_plot_over_layers(script, tiny_run):
    together = final(script("sae_lens_train.py", *tiny_run, "--layers", 0, 2, 3))
    done = script("evaluate_sae_real_activations.py", "--sae_path", together, "--num_samples", 8)
    assert done.status == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "blocks." in line and "│" in line]
    assert len(rows) == 3
    page = (together / "blocks.2.hook_resid_post" / "report.html").read_text()
    assert page.count("over layers") == 4
    one = script("evaluate_sae_real_activations.py", "--sae_path", together, "--layer", 2, "--num_samples", 8)
    assert one.status == 0, one.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layers", 1, 1], "--layers 1 1: one of them is given twice"),
        (["--layers", 1, 9], "--layers 9: the model has 4 layers, 0 to 3"),
        (["--layers", 1, "--hook_name", "blocks.1.hook_mlp_out"], "--hook_name and --layers: only one of them"),
        (["--hook_names", "blocks.1.hook_mlp_out", "nowhere"], "--hook_names nowhere: not of the form"),
    ],
)
def test_hooks_that_cannot_be_are_refused(script, tiny_run, flags, says):
    done = script("sae_lens_train.py", *tiny_run, *flags)
    assert done.status == 2
    (error,) = done.error_lines
    assert says in error
