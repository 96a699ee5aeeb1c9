"""Rows of token ids, and an evaluation of SAEs on them by a tiny model of random weights."""

import datasets
import numpy as np
import pytest
import torch

from support.evaluated import BATCH, BOS, CONTEXT, EOS, N_ROWS


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data set of token ids: half of the rows begin with a BOS, every third has an EOS (also the pad token)."""
    tokens = np.random.default_rng(0).integers(3, 40_000, (N_ROWS, CONTEXT))
    tokens[: N_ROWS // 2, 0] = BOS
    tokens[::3, 20] = EOS
    path = tmp_path_factory.mktemp("rows") / "saved"
    datasets.Dataset.from_dict({"tokens": tokens.tolist()}).save_to_disk(path)
    return path, torch.from_numpy(tokens)


@pytest.fixture
def evaluate(script, tiny_model, rows):
    def run(*flags, dataset=rows[0]):
        done = script(
            "evaluate_sae_real_activations.py",
            *("--model_name", tiny_model, "--dataset", dataset, "--batch_size", BATCH),
            *("--device", "cpu", "--lm_dtype", "float32", "--n_features", 5),
            *flags,
        )
        assert done.status == 0, done.stderr
        return done

    return run
