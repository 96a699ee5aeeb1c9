"""A run outlasts its hosts: a cut download, a failing stream and a dead wandb host, all three in one real run.

The long form, every fault at every place, is tests/faults/.
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.loopback_hub import LoopbackHub
from support.loopback_wandb import KEY, LoopbackWandb
from support.processes import run_process
from support.wandb_reader import read_offline_runs


@pytest.fixture(scope="module")
def disturbed(tiny_model, text_file, tmp_path_factory):
    """The run, its hub, and where it was recorded."""
    served = tmp_path_factory.mktemp("served")
    recorded = tmp_path_factory.mktemp("recorded")
    shutil.copytree(tiny_model, served / "models" / "tests" / "tiny")
    data = served / "datasets" / "owner" / "text"
    data.mkdir(parents=True)
    shutil.copy(text_file, data / "train.txt")
    hub, host = LoopbackHub(served), LoopbackWandb("refuses")
    hub.inject("cut", "model.safetensors", method="GET")
    hub.inject(500, "train.txt", method="GET")
    flags = (
        *("--model_name", "tests/tiny", "--layer", 1, "--dataset_path", "owner/text", "--context_size", 64),
        *("--expansion_factor", 4, "--training_tokens", 2048, "--n_batches_in_buffer", 16, "--device", "cpu"),
        *("--lm_dtype", "float32", "--set", "n_batches_for_norm_estimate=1", "--wandb_mode", "online"),
        *("--set", "logger.wandb_log_frequency=1", "--checkpoint_path", recorded / "checkpoints"),
    )
    environment = hub.environment(recorded / "home") | host.environment(recorded) | {"WANDB_INIT_TIMEOUT": "3"}
    done = run_process(sys.executable, "sae_lens_train.py", *flags, **environment)
    assert done.status == 0, done.stderr
    yield done, hub, recorded
    hub.close()


def test_a_cut_download_and_a_failing_stream_change_nothing(disturbed, script, tiny_run):
    done, hub, _ = disturbed
    assert hub.injected == {"cut": 1, "500": 1}
    whole = script("sae_lens_train.py", *tiny_run)  # the same model and text, from files
    one, other = (Path(run.stdout.strip()) for run in (done, whole))
    assert np.array_equal(*(np.load(path.parent / "tokens.npy") for path in (one, other)))
    weights, expected = (load_file(path / "sae_weights.safetensors") for path in (one, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_each_retry_is_said_in_one_line(disturbed):
    done, *_ = disturbed
    assert len(re.findall(r"^.*500.*train\.txt.*Retrying in 1s \[Retry 1/5\]\.$", done.stderr, re.MULTILINE)) == 1
    assert len(re.findall(r"^.*model\.safetensors.*Trying to resume download", done.stderr, re.MULTILINE)) == 1


def test_a_wandb_host_that_refuses_makes_the_record_an_offline_one(disturbed):
    done, _, recorded = disturbed
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("wandb: ")]
    assert re.search(r"is recorded offline; `wandb sync \S+` uploads it", line)
    assert KEY not in done.stderr
    (run,) = read_offline_runs(recorded)
    assert any("learning/overall_loss" in row for row in run.history)
