"""An SAE trained on several ranks equals the one that a single rank trains."""

from functools import cache

import pytest
import torch

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.setup import prepare_run
from support.step_in_ranks import BATCH, N_STEPS, NAMES, SHARDED, train
from support.trainings import run_flags


@pytest.fixture(scope="module")
def of_two(scaled_acts_ND, trainings, tmp_path_factory):
    """The results of 2 ranks on batches of real activations."""
    directory = tmp_path_factory.mktemp("ranks")
    torch.save(scaled_acts_ND, directory / "acts.pt")
    done = trainings.script("tests/support/step_in_ranks.py", directory / "acts.pt", directory / "results.pt")
    assert done.status == 0, done.stderr
    return torch.load(directory / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def of_one(scaled_acts_ND):
    """The results of 1 rank on the same batches, by architecture."""
    return cache(lambda architecture: train(architecture, scaled_acts_ND.double(), ALONE))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_on_the_halves_of_each_batch_are_one_on_the_whole(of_one, of_two, name):
    one, two = of_one(name.removesuffix(SHARDED)), of_two[name]
    assert one["n"] == two["n"] == N_STEPS * BATCH
    assert one["sae"].keys() == two["sae"].keys()
    for key, tensor in one["sae"].items():
        torch.testing.assert_close(two["sae"][key], tensor, rtol=1e-5, atol=1e-8, msg=key)
    for key, count in one["counts"].items():
        assert torch.equal(two["counts"][key], count), key
    assert ("batchtopk" in name) == (one["calibration"] is not None)
    if one["calibration"]:
        assert two["calibration"] == pytest.approx(one["calibration"], rel=1e-5)
    for ours, theirs in zip(two["readings"], one["readings"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_width_that_the_processes_do_not_divide_is_refused(tiny_model, text_file, tmp_path):
    flags = [*run_flags(tiny_model, text_file, tmp_path), "--shard_features", "--train_batch_size_tokens", "1020"]
    with pytest.raises(UserError, match="--shard_features: 5 processes do not divide 1,024 features evenly"):
        prepare_run(parse_training_flags(flags), Ranks(0, 5))
