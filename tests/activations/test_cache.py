"""A second run reads its activations from the first run's cache, and ends in the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_toolkit.activations.cache import ActivationCache, CachedActivations
from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.setup import prepare_run

ROWS_NT = np.random.default_rng(0).integers(3, 40_000, (6, 16)).astype(np.uint32)


@pytest.fixture
def cached_run(tiny_run, tmp_path):
    return [*tiny_run, "--architecture", "topk", "--k", 8, "--lr", 1e-3, "--cache_activations", tmp_path / "cache"]


def weights(done):
    assert done.status == 0, done.stderr
    return load_file(Path(done.stdout.strip()) / "sae_weights.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_run_loads_no_language_model_and_ends_in_the_same_weights(script, cached_run):
    first = script("sae_lens_train.py", *cached_run)
    second = script("sae_lens_train.py", *cached_run)
    assert "loading" in first.stderr
    assert "loading" not in second.stderr
    assert "contexts read, 0 computed" in second.stderr
    assert equal(weights(first), weights(second))


def test_a_longer_run_computes_what_is_missing(script, cached_run):
    script("sae_lens_train.py", *cached_run)
    words = [*map(str, cached_run), "--training_tokens", "4096", "--seed", "42"]
    assert not prepare_run(parse_training_flags(words)).is_cached
    longer = script("sae_lens_train.py", *words)
    assert prepare_run(parse_training_flags(words)).is_cached
    assert longer.status == 0, longer.stderr
    assert " 0 contexts read" not in longer.stderr
    assert ", 0 computed" not in longer.stderr


def test_a_damaged_context_is_computed_again_and_said(script, cached_run, tmp_path):
    first = script("sae_lens_train.py", *cached_run)
    file = tmp_path / "cache" / "activations.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    second = script("sae_lens_train.py", *cached_run)
    assert "1 computed, 1 of them because their checksums did not match" in second.stderr
    torch.testing.assert_close(weights(second), weights(first), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--layer", 2), "holds activations with hook_name blocks.1.hook_resid_post, and this run's is blocks.2"),
        (("--context_size", 32), "holds activations with context_size 64, and this run's is 32"),
    ],
)
def test_a_cache_of_something_else_is_refused_before_a_model_is_loaded(script, cached_run, change, said):
    script("sae_lens_train.py", *cached_run)
    refused = script("sae_lens_train.py", *cached_run, *change)
    assert refused.status == 2
    assert said in refused.error_lines[0]
    assert "loading" not in refused.stderr


def test_a_directory_that_is_no_cache_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(UserError, match="not empty, and not a cache"):
        ActivationCache(tmp_path, {}, ROWS_NT, 32)
    (tmp_path / "thesis.txt").rename(tmp_path / "parameters.json")
    with pytest.raises(UserError, match="parameters.json is damaged; delete the directory"):
        ActivationCache(tmp_path, {}, ROWS_NT, 32)
    with pytest.raises(UserError, match="--cache_activations .*: needs .* GB, and .* GB are free there"):
        ActivationCache(tmp_path / "new", {}, ROWS_NT, 10**12)


def test_what_lies_there_is_the_models_own_in_bfloat16(tiny_model, tmp_path):
    model = load_language_model(find_model(str(tiny_model)), "blocks.2.hook_resid_post", "cpu", torch.float32)
    tokens_BT = torch.from_numpy(ROWS_NT.astype(np.int64))
    wanted = model.activations(tokens_BT).bfloat16()
    for expected in ((0, 6), (6, 0)):
        cached = CachedActivations(ActivationCache(tmp_path, {"layer": 2}, ROWS_NT, 32), lambda: model, "cpu")
        assert torch.equal(cached.activations(tokens_BT), wanted)
        assert (cached.cache.n_read, cached.cache.n_computed) == expected
