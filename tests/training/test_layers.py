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


@pytest.mark.parametrize(("context_size", "rows_per_forward"), [(32, 4), (2, 1)])
def test_a_token_that_is_massive_at_one_hook_is_trained_on_at_the_others(tiny_model, context_size, rows_per_forward):
    hooks = ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]
    model = load_language_model(find_model(str(tiny_model)), hooks, "cpu", torch.float32)
    tokens_NT = torch.randint(3, 40_000, (500, context_size), generator=torch.Generator().manual_seed(0))
    stream = ActivationStream(
        model,
        tokens_NT.numpy().astype("uint32"),
        PositionFilter(),
        batch_size=64,
        buffer_size=256,
        mix_fraction=0.0,
        rows_per_forward=rows_per_forward,
        total=10**6,
        seed=0,
        dtype=torch.float32,
        widths=[32, 32],
    )
    measured = stream.calibrate(10, max_norm_multiple=1.15)
    limits = stream.max_activation_norms
    assert len(limits) == 2 and limits[0] != limits[1]

    unfiltered = model.activations(tokens_NT).flatten(0, 1)[: len(measured) + stream.n_massive]
    at_each = unfiltered.split([32, 32], dim=-1)
    fits = [(acts.norm(dim=-1) <= limit).tolist() for acts, limit in zip(at_each, limits, strict=True)]
    taken, n_replaced, n_without = ([], []), 0, 0
    chunk = context_size * rows_per_forward
    for start in range(0, len(unfiltered), chunk):
        places = range(start, start + chunk)
        if not all(any(fits_here[place] for place in places) for fits_here in fits):
            n_without += 1
            continue
        for token in places:
            if not any(fits_here[token] for fits_here in fits):
                continue
            for of_hook, fits_here in zip(taken, fits, strict=True):
                in_order = [*range(token, places.stop), *reversed(range(start, token))]
                of_hook.append(next(place for place in in_order if fits_here[place]))
                n_replaced += of_hook[-1] != token
    assert stream.n_replaced == n_replaced > 0
    assert (n_without > 0) == (context_size == 2)  # where no token fits at a hook, none can take another's place
    for served, acts, of_hook in zip(stream.at_each_hook(measured), at_each, taken, strict=True):
        torch.testing.assert_close(served, acts[of_hook])


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
