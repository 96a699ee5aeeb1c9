"""A Triton kernel for the gradients of the active features' weights.

Without it torch goes over the active entries three times: for the gradient of the values, of the decoder, and of the
encoder. Each time it gathers a row of D numbers for each entry. The kernel goes over them once. A program of the kernel
has one feature: it keeps the feature's decoder vector and both gradients, and reads the rows of the feature's tokens.

The kernel is used on CUDA devices that Triton compiles it for, after it gave torch's results on a small example there.

Shapes: B tokens, D = d_in, F = d_sae, N active entries.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from sae_toolkit.errors import one_line

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    triton = None

log = logging.getLogger(__name__)

_LARGEST_D = 8192  # five vectors of D numbers are held in the registers of one program


def serves(W_dec_FD: Tensor) -> bool:
    """Returns whether the kernel can be used for a decoder."""
    if W_dec_FD.device.type != "cuda" or W_dec_FD.dtype != torch.float32 or W_dec_FD.shape[1] > _LARGEST_D:
        return False
    return _works_on(W_dec_FD.device, W_dec_FD.shape[1])


def n_warps(block: int) -> int:
    """Returns the warps of a program for vectors of `block` numbers: 16 numbers of each vector in a thread."""
    return max(1, min(16, block // 512))


@torch.library.custom_op("sae_toolkit::feature_gradients", mutates_args=())
def gradients(
    values_N: Tensor, rows_N: Tensor, starts_F: Tensor, grad_BD: Tensor, sae_in_BD: Tensor, W_dec_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of W_enc [F, D], b_enc [F] and W_dec [F, D], in float32.

    Args:
        values_N: activations of the entries, ordered by feature. At 0 no gradient goes to the encoder.
        rows_N: the tokens of the entries.
        starts_F: index of each feature's first entry.
        grad_BD: gradient of the reconstruction.
        sae_in_BD: input of the encoder.
        W_dec_FD: decoder.
    """
    n_features, d_in = W_dec_FD.shape
    grad_W_enc_FD, grad_W_dec_FD = torch.empty_like(W_dec_FD), torch.empty_like(W_dec_FD)
    grad_b_enc_F = W_dec_FD.new_empty(n_features)
    block = triton.next_power_of_2(d_in)
    _one_feature[(n_features,)](
        *(values_N, rows_N, starts_F, grad_BD.contiguous(), sae_in_BD.contiguous(), W_dec_FD),
        *(grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD),
        *(n_features, len(values_N), d_in),
        BLOCK=block,
        num_warps=n_warps(block),
    )
    return grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD


@gradients.register_fake
def _(
    values_N: Tensor, rows_N: Tensor, starts_F: Tensor, grad_BD: Tensor, sae_in_BD: Tensor, W_dec_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(W_dec_FD), W_dec_FD.new_empty(len(W_dec_FD)), torch.empty_like(W_dec_FD)


if triton is not None:

    @triton.jit
    def _one_feature(  # type: ignore[no-untyped-def]
        values, rows, starts, grad, sae_in, W_dec,
        grad_W_enc, grad_b_enc, grad_W_dec,
        n_features, n_entries, d_in,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        feature = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < d_in
        begin = tl.load(starts + feature)
        end = tl.load(starts + feature + 1, mask=feature + 1 < n_features, other=n_entries)
        decoder = tl.load(W_dec + feature * d_in + column, mask=inside, other=0.0)
        to_decoder = tl.zeros([BLOCK], tl.float32)
        to_encoder = tl.zeros([BLOCK], tl.float32)
        to_bias = tl.full([], 0.0, tl.float32)
        for entry in range(begin, end):
            value = tl.load(values + entry)
            row = tl.load(rows + entry) * d_in
            grad_row = tl.load(grad + row + column, mask=inside, other=0.0)
            sae_in_row = tl.load(sae_in + row + column, mask=inside, other=0.0)
            to_value = tl.where(value > 0, tl.sum(grad_row * decoder), 0.0)
            to_decoder += value * grad_row
            to_encoder += to_value * sae_in_row
            to_bias += to_value
        tl.store(grad_W_dec + feature * d_in + column, to_decoder, mask=inside)
        tl.store(grad_W_enc + feature * d_in + column, to_encoder, mask=inside)
        tl.store(grad_b_enc + feature, to_bias)


@cache
def _works_on(device: torch.device, d_in: int) -> bool:
    """Compiles the kernel for a device and a width, and compares its results with those in float64 on a few entries."""
    if triton is None:
        return False
    n_rows, n_features, k = 16, 64, 8
    generator = torch.Generator().manual_seed(0)
    features_BK = torch.stack([torch.randperm(n_features, generator=generator)[:k] for _ in range(n_rows)])
    features_N, order_N = features_BK.flatten().sort(stable=True)
    rows_N, starts_F = order_N // k, torch.searchsorted(features_N, torch.arange(n_features))
    values_N = torch.randn(n_rows * k, generator=generator).relu()
    grad_BD, sae_in_BD = torch.randn(2, n_rows, d_in, generator=generator)
    W_dec_FD = torch.randn(n_features, d_in, generator=generator)
    try:
        found = gradients(*(tensor.to(device) for tensor in (values_N, rows_N, starts_F, grad_BD, sae_in_BD, W_dec_FD)))
        acts_BF = torch.zeros(n_rows, n_features).double().index_put((rows_N, features_N), values_N.double())
        to_pre_BF = (grad_BD.double() @ W_dec_FD.double().t()).where(acts_BF > 0, 0.0)
        exact = to_pre_BF.t() @ sae_in_BD.double(), to_pre_BF.sum(0), acts_BF.t() @ grad_BD.double()
        off = max(
            ((mine.cpu() - its).abs().max() / its.abs().max()).item() for mine, its in zip(found, exact, strict=True)
        )
        problem = None if off < 1e-5 else f"its results are off by {off:.1e}"
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        problem = one_line(error)
    if problem:
        log.warning("the Triton kernel is not used on %s: %s; the step works without it, slower", device, problem)
    return problem is None
