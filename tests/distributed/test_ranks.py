"""An SAE trained on several ranks equals the one that a single rank trains."""

import sys

import pytest
import torch

from sae_toolkit.distributed.ranks import Ranks
from sae_toolkit.errors import UserError
from sae_toolkit.files.embedded import EMBEDDED_TEXT
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.text.sources import open_text
from sae_toolkit.training.setup import prepare_run
from support.processes import ROOT, run_process
from support.step_in_ranks import BATCH, N_STEPS, NAMES
from support.trainings import run_flags

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def results(language_model, tokenizer, tmp_path_factory):
    """The results of 1 and of 2 ranks on the same batches of real activations."""
    directory = tmp_path_factory.mktemp("ranks")
    text = next(iter(open_text(EMBEDDED_TEXT, flag="--dataset_path").documents()))
    tokens_BT = torch.tensor(tokenizer(text)["input_ids"][: 12 * 256]).reshape(12, 256)
    acts = language_model.activations(tokens_BT)[:, 1:].flatten(0, 1)
    acts = acts[acts.norm(dim=-1) < 10 * acts.norm(dim=-1).median()]
    torch.save(acts * (acts.shape[1] ** 0.5 / acts.norm(dim=-1).mean()), directory / "acts.pt")
    for n in (1, 2):
        done = run_process(
            *TORCHRUN,
            f"--nproc-per-node={n}",
            ROOT / "tests" / "support" / "step_in_ranks.py",
            directory / "acts.pt",
            directory / f"{n}.pt",
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
        )
        assert done.status == 0, done.stderr
    return [torch.load(directory / f"{n}.pt", weights_only=False) for n in (1, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_on_the_halves_of_each_batch_are_one_on_the_whole(results, name):
    one, two = (result[name] for result in results)
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
    with pytest.raises(UserError, match="--shard_features: 5 processes do not divide 2,048 features evenly"):
        prepare_run(parse_training_flags(flags), Ranks(0, 5))
