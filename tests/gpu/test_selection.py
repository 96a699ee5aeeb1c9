"""The device selects the features that torch's topk selects on the CPU, whatever is equal, infinite or not a number."""

import pytest
import torch

from sae_toolkit.steps.selection import largest, largest_of_rows

N = 1000
_RANDOM = torch.randn(8, N, generator=torch.Generator().manual_seed(0))
VALUES = {
    "random": _RANDOM,
    "ties": (2 * _RANDOM).round(),
    "all equal": torch.zeros(8, N),
    "with nan": _RANDOM.masked_fill(torch.arange(N) % 40 == 3, torch.nan),
    "with -inf": _RANDOM.masked_fill(torch.arange(N) % 3 > 0, -torch.inf),
}


def numbers(values):
    """Values as they can be compared, since nan equals nothing. nan counts as the largest."""
    return values.cpu().nan_to_num(nan=1e30, neginf=-1e30)


@pytest.mark.parametrize("values_BF", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("n", [1, 64, 4000, 8 * N])
def test_the_largest_of_a_batch(device, values_BF, n):
    flat = values_BF.flatten()
    chosen_N = largest(flat.to(device), n)
    assert chosen_N.device.type == torch.device(device).type
    assert (chosen_N.diff() > 0).all()
    assert torch.equal(numbers(flat[chosen_N.cpu()]).sort(descending=True).values, numbers(flat.topk(n).values))


@pytest.mark.parametrize("values_BF", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("k", [1, 16, 64])  # 16 of 1,000 are searched for in blocks, 64 are not
def test_the_largest_of_each_row(device, values_BF, k):
    values_BK, features_BK = largest_of_rows(values_BF.to(device), k)
    assert features_BK.device.type == torch.device(device).type
    assert torch.equal(numbers(values_BF.gather(1, features_BK.cpu())), numbers(values_BK))
    assert all(len(set(row)) == k for row in features_BK.tolist())
    assert torch.equal(numbers(values_BK).sort(descending=True).values, numbers(values_BF.topk(k).values))


@pytest.mark.parametrize("d_sae", [32_768, 131_072])
def test_at_the_size_of_the_job(cuda, d_sae):
    """Against torch's topk on the device, whose flat form is slow but exact; values from bfloat16 have many ties."""
    values_BF = torch.randn(4096, d_sae, device=cuda).bfloat16().float()
    n = 64 * len(values_BF)
    chosen_N = largest(values_BF.flatten(), n)
    assert (chosen_N.diff() > 0).all()
    threshold = values_BF.flatten()[chosen_N].min()
    assert int((values_BF > threshold).sum()) <= n <= int((values_BF >= threshold).sum())
    values_BK, features_BK = largest_of_rows(values_BF, 64)
    assert torch.equal(values_BF.gather(1, features_BK), values_BK)
    assert torch.equal(values_BK.sort(descending=True).values, values_BF.topk(64).values)
