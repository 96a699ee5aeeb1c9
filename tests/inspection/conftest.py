"""An SAE of the tiny model, its features as inspect_sae_features.py writes them, and a browser."""

from pathlib import Path

import pytest

from support.browser import open_chromium
from support.inspection import CONTEXT, FLAGS


@pytest.fixture(scope="session")
def trained(trainings, tiny_model, text_file, tmp_path_factory):
    """An SAE at layer 1 of the tiny model, with BOS and its position in training."""
    done = trainings.script(
        *("sae_lens_train.py", "--model_name", tiny_model, "--layer", 1, "--dataset_path", text_file),
        *("--context_size", CONTEXT, "--expansion_factor", 4, "--training_tokens", 20480, "--architecture", "topk"),
        *("--k", 6, "--recipe", "auto", "--n_batches_in_buffer", 16, "--lm_dtype", "float32", "--device", "cpu"),
        *("--checkpoint_path", tmp_path_factory.mktemp("runs"), "--wandb_mode", "disabled", "--eval_every", 0),
    )
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def inspected(trainings, trained):
    """features.parquet."""
    done = trainings.script("inspect_sae_features.py", "--sae_path", trained, *FLAGS)
    assert done.status == 0, done.stderr
    paths = [trained / "features/features.parquet", trained / "features/features.html"]
    assert done.stdout.split() == [str(path) for path in paths]
    return paths[0]


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser
