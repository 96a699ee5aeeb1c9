"""c_dec and s_n_dec equal their definitions in arXiv 2508.16560, in bounded memory."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens import TopKSAE, TopKSAEConfig

from sae_toolkit.evaluation.l0_check.check import measure_decoders
from sae_toolkit.evaluation.l0_check.statistics import DecoderProjections, pairwise_cosines, random_pairwise_cosine


def c_dec(W_FD):
    """Equation 4, over the pairs themselves."""
    unit_FD = F.normalize(W_FD.double(), dim=-1)
    first_P, second_P = torch.triu_indices(len(unit_FD), len(unit_FD), offset=1)
    return (unit_FD[first_P] * unit_FD[second_P]).sum(-1).abs().mean().item()


@pytest.fixture(scope="module")
def decoder():
    """150 directions of different lengths, one of which is zero, and which of these features fire."""
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.randn(150, 24, generator=generator) * torch.rand(150, 1, generator=generator)
    W_FD[:50, 0] += 1  # mixed: they share a direction
    W_FD[7] = 0
    return W_FD, torch.rand(150, generator=generator) > 0.4


def test_c_dec_is_the_mean_over_all_pairs_that_have_directions(decoder):
    W_FD, firing_F = decoder
    has_direction_F = torch.arange(150) != 7
    of_all, of_firing, interval = pairwise_cosines(W_FD, firing_F, seed=0)
    assert of_all == pytest.approx(c_dec(W_FD[has_direction_F]), rel=1e-6)
    assert of_firing == pytest.approx(c_dec(W_FD[has_direction_F & firing_F]), rel=1e-6)
    assert interval is None
    assert pairwise_cosines(W_FD, torch.arange(150) == 3, seed=0)[1] is None  # one feature makes no pair


def test_the_interval_of_a_sample_of_features_holds_c_dec_of_all(decoder, monkeypatch):
    W_FD = torch.randn(1500, 24, generator=torch.Generator().manual_seed(1))
    W_FD[:300, 0] += 2
    exact = c_dec(W_FD)
    monkeypatch.setattr("sae_toolkit.evaluation.decoder_cosines._AFFORDABLE", {"cpu": 1})  # draws 1,000 features
    estimates = [pairwise_cosines(W_FD, torch.ones(1500, dtype=torch.bool), seed=seed) for seed in range(20)]
    assert all(estimate != exact for estimate, *_ in estimates)
    assert sum(interval[0] < exact < interval[1] for *_, interval in estimates) >= 16  # 19 expected


def test_random_directions_have_the_c_dec_that_is_shown_beside_it():
    W_FD = torch.randn(1000, 40, generator=torch.Generator().manual_seed(0))
    assert random_pairwise_cosine(40) == pytest.approx(c_dec(W_FD), rel=5e-3)


def projections(z_NF, *, per_unit, chunk):
    sums = DecoderProjections(z_NF.shape[1])
    for at in range(0, len(z_NF), chunk):
        rows = torch.arange(at, min(at + chunk, len(z_NF)))
        sums.add(z_NF[rows], rows // per_unit)
    return sums


def draw(seed, units=40, per_unit=20, features=64):
    """Projections of tokens of texts that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    of_unit = 0.5 * torch.randn(units, 1, 1, generator=generator)
    return (of_unit + torch.randn(units, per_unit, features, generator=generator)).flatten(0, 1)


@pytest.mark.parametrize("chunk", [7, 333, 5000])
def test_s_n_dec_is_the_value_at_n_times_the_tokens_in_descending_order(chunk):
    z_NF = draw(0)
    sums = projections(z_NF, per_unit=20, chunk=chunk)
    in_order = z_NF.flatten().sort(descending=True).values
    assert sums.n == 24
    assert sums.s_n_dec(seed=0)[0] == pytest.approx(in_order[sums.n * len(z_NF)].item(), abs=1e-3)


def test_the_interval_of_s_n_dec_is_as_wide_as_it_differs_over_texts():
    drawn = [projections(draw(seed), per_unit=20, chunk=500).s_n_dec(seed=0) for seed in range(20)]
    spread = np.std([value for value, _ in drawn])
    width = np.mean([high - low for _, (low, high) in drawn])
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.35)
    assert projections(draw(0), per_unit=10**6, chunk=500).s_n_dec(seed=0)[1] is None  # one text has no interval


def peak_growth(work):
    """Returns by how many MB the memory of this process grows above what it held, at most, while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    work()
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return (int(peak) - int(before)) / 1024


def test_131072_features_of_width_576_take_a_few_hundred_mb(monkeypatch):
    """Random weights: the shape is the point."""
    monkeypatch.setattr("sae_toolkit.evaluation.decoder_cosines._AFFORDABLE", {"cpu": 1})  # 1,000 features, to be fast
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=576, d_sae=131_072, k=64))
    acts_ND = torch.randn(200, 576)
    unit_N = np.arange(200) // 50
    results = []
    grown = peak_growth(lambda: results.extend(measure_decoders([sae], [(acts_ND, unit_N)], seed=0)))
    (result,) = results
    assert grown < 450
    assert result["l0"] == 64
    assert result["c_dec"] == pytest.approx(random_pairwise_cosine(576), rel=0.01)
    assert result["n"] == 49_152
