"""The stream serves every activation once in each pass, shuffled as SAELens shuffles, and can be resumed."""

import re
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

from sae_toolkit.activations.shuffle_buffer import ShuffleBuffer
from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.text.positions import PositionFilter
from support.processes import ROOT, run_process

SPECIAL = (1, 2)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_language_model(find_model(str(tiny_model)), "blocks.2.hook_resid_post", "cpu", torch.float32)


@pytest.fixture(scope="module")
def rows_NT():
    rows = np.random.default_rng(0).integers(3, 40_000, (60, 32)).astype(np.uint32)
    rows[:, 0] = 1
    rows[::7, 12] = 2
    return rows


def stream(model, rows_NT, total=1_600, positions=None, **changes):
    settings = {"batch_size": 64, "buffer_size": 8 * 31, "mix_fraction": 0.5, "rows_per_forward": 4}
    settings |= {"seed": 0, "dtype": torch.float32} | changes
    return ActivationStream(model, rows_NT, positions or PositionFilter(SPECIAL, 1), total=total, **settings)


def as_set(acts):
    return {row.numpy().tobytes() for row in acts}


@pytest.mark.parametrize("mix_fraction", [0.0, 0.5, 0.8])
def test_the_buffer_serves_the_batches_of_saelens(mix_fraction):
    chunks = [torch.randn(n, 5) for n in (30, 41, 17, 64, 90, 3, 55, 80, 12, 44)]
    torch.manual_seed(7)
    theirs = list(mixing_buffer(100, 16, iter(chunks), mix_fraction))
    generator = torch.Generator().manual_seed(7)
    buffer, ours = ShuffleBuffer(100, 16, mix_fraction, generator), []
    for chunk in chunks:
        buffer.add(chunk, [len(chunk)])
        buffer.serve_if_full()
        while not buffer.filling:
            ours.append(buffer.take())
    assert len(ours) > 15
    for our_batch, their_batch in zip(ours, theirs, strict=False):
        assert torch.equal(our_batch, their_batch)


def test_a_pass_serves_each_kept_activation_once(model, rows_NT):
    positions = PositionFilter(SPECIAL, 1)
    kept = positions.keeps_tokens(rows_NT)
    all_acts = model.activations(torch.from_numpy(rows_NT.astype(np.int64)))
    wanted = all_acts[torch.from_numpy(kept)]
    total = len(wanted) // 64 * 64
    served = torch.cat(list(islice(stream(model, rows_NT, total), total // 64)))
    assert len(as_set(served)) == len(served) == total
    # Rows go through the model in other batches here than above, which moves the last digits.
    distance = torch.cdist(served.double(), wanted.double()).min(dim=1).values
    assert distance.max() < 1e-4


def test_each_of_several_passes_serves_each_activation_once_in_an_order_of_its_own(model, rows_NT, caplog):
    positions = PositionFilter(SPECIAL, 1)
    keep_NT = torch.from_numpy(positions.keeps_tokens(rows_NT))
    wanted, row_of = model.activations(torch.from_numpy(rows_NT.astype(np.int64)))[keep_NT], keep_NT.nonzero()[:, 0]
    n = len(wanted)
    several = stream(model, rows_NT, total=3 * n, batch_size=1, buffer_size=1, epochs=2)
    with caplog.at_level("INFO", "sae_toolkit"):
        served = torch.cat(list(islice(several, 3 * n)))
    index = torch.cdist(served.double(), wanted.double()).argmin(dim=1)
    passes = index.reshape(3, n)  # as the buffer holds only the rows of one forward pass
    assert all(torch.equal(each.sort().values, torch.arange(n)) for each in passes)
    first_rows = [set(row_of[each[:60]].tolist()) for each in passes]
    assert first_rows[0] != first_rows[1] != first_rows[2] != first_rows[0]
    assert several.passes == 3
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [
        ("INFO", "the training text is used up; pass 2 over it begins"),
        ("WARNING", "the training text is used up; pass 3 over it begins, more than --epochs 2"),
    ]


def test_massive_activations_are_measured_once_and_left_out_everywhere(model, rows_NT):
    plain = stream(model, rows_NT)
    unfiltered = torch.cat(list(islice(plain, 20)))
    norms = unfiltered.norm(dim=-1)
    limited = stream(model, rows_NT)
    measured = limited.calibrate(5, max_norm_multiple=1.1)
    (limit,) = limited.max_activation_norms
    assert limit == pytest.approx(1.1 * norms.median().item(), rel=0.05)
    assert measured.norm(dim=-1).max() <= limit < norms.max()
    served = list(islice(limited, 20))
    assert torch.cat(served).norm(dim=-1).max() <= limit
    assert limited.n_massive > 0
    assert as_set(measured) & as_set(torch.cat(served))  # what was measured is trained on too


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_resumed_stream_serves_what_the_undisturbed_one_does(tmp_path, model, rows_NT, after):
    undisturbed = stream(model, rows_NT, total=3_000)
    undisturbed.calibrate(3, 1.2)
    for _ in range(after):
        next(undisturbed)
    torch.save(undisturbed.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(123)  # nothing may depend on the global generator
    resumed = stream(model, rows_NT, total=3_000)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(40):  # past the end of the first pass over the rows
        assert torch.equal(next(undisturbed), next(resumed))
    assert undisturbed.epoch == resumed.epoch >= 1


class OnAnotherDevice:
    """The model, which pretends to be on another device than the SAE."""

    device, dtype = torch.device("meta"), torch.float32

    def __init__(self, model):
        self.activations = model.activations


def test_rows_that_run_ahead_on_another_device_are_the_same(tmp_path, model, rows_NT):
    here = list(islice(stream(model, rows_NT), 50))  # this reaches the second pass over the rows
    ahead = stream(OnAnotherDevice(model), rows_NT, device="cpu")
    assert all(torch.equal(batch, next(ahead)) for batch in here[:20])
    torch.save(ahead.state_dict(), tmp_path / "state.pt")
    ahead._ahead.shutdown()  # the model takes one call at a time
    resumed = stream(OnAnotherDevice(model), rows_NT, device="cpu")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(batch, next(resumed)) for batch in here[20:])


def test_rows_keep_their_order_where_nothing_is_to_be_mixed(model, rows_NT):
    served = next(stream(model, rows_NT, mix_fraction=0.0, batch_size=31))
    in_order = model.activations(torch.from_numpy(rows_NT[:4].astype(np.int64))).flatten(0, 1)
    kept = PositionFilter(SPECIAL, 1).keeps_tokens(rows_NT[:4]).ravel()
    assert torch.equal(served, in_order[torch.from_numpy(kept)][:31])


def test_activations_that_are_not_finite_are_said(tiny_model, rows_NT):
    overflowing = load_language_model(find_model(str(tiny_model)), "blocks.2.hook_resid_post", "cpu", torch.float32)
    overflowing.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="--lm_dtype .*: the median norm of the activations is nan; use another dtype"):
        stream(overflowing, rows_NT).calibrate(3, max_norm_multiple=10)


_UNDER_A_LIMIT = """
import logging, resource, sys
import numpy as np, torch
from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.text.positions import PositionFilter

logging.basicConfig(stream=sys.stdout)
model = load_language_model(find_model(sys.argv[1]), "blocks.2.hook_resid_post", "cpu", torch.float32)
rows_NT = np.random.default_rng(0).integers(3, 40_000, (2048, 128)).astype(np.uint32)
stream = ActivationStream(
    model, rows_NT, PositionFilter(), batch_size=64, buffer_size=256, mix_fraction=0.5,
    rows_per_forward=int(sys.argv[2]), total=10_000, seed=0, dtype=torch.float32,
)
model.activations(torch.from_numpy(rows_NT[:1].astype(np.int64)))
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20, resource.RLIM_INFINITY))
assert next(stream).isfinite().all()
print("rows", stream.rows_at_once, stream.next_row)
"""


def test_a_forward_pass_that_does_not_fit_is_halved_until_it_does(tiny_model):
    """The operating system lets the process take no more than 100 MiB on top of what it holds."""
    done = run_process(sys.executable, "-c", _UNDER_A_LIMIT, tiny_model, 2048, 100, PYTHONPATH=str(ROOT))
    assert done.status == 0, done.stderr
    halved = [int(n) for n in re.findall(r"out of memory: going on with --store_batch_size_prompts (\d+)", done.stdout)]
    assert halved
    assert halved == [2048 // 2 ** (i + 1) for i in range(len(halved))]
    assert f"rows {halved[-1]} {halved[-1]}" in done.stdout
