"""Part a of gpu.py: the operators of a training step, each alone, at the job's shapes and with random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_device import Bench, Table
from torch import Tensor

from sae_toolkit.steps import feature_kernel
from sae_toolkit.steps.active_features import ActiveFeatures
from sae_toolkit.steps.selection import largest, largest_of_rows
from sae_toolkit.steps.sparse_topk import bfloat16_linear


def time_operators(bench: Bench) -> None:
    """Prints the time of each operator and its rate: operations a second of products, bytes a second of the others.

    The bytes are those that an operator has to read and write at least; gathered rows count as often as they are read.
    """
    table = Table("operator", "features", "ms", "rate")
    for d_sae in bench.widths:
        bench.free()
        _time_width(bench, table, d_sae)


@dataclass(frozen=True)
class _Operators:
    """The operators at one number of features, and the table that their rows go to."""

    bench: Bench
    table: Table
    d_sae: int

    def show(
        self, name: str, work: Callable[[], Any], *, operations: int = 0, moved: int = 0, repeats: int = 5
    ) -> None:
        """Times an operator and prints its row, given its operations or the bytes that it moves."""
        ms = self.bench.milliseconds(work, repeats)
        rate = f"{operations / ms / 1e9:,.1f} TFLOP/s" if operations else f"{moved / ms / 1e6:,.0f} GB/s"
        self.table.row(name, f"{self.d_sae:,}", f"{ms:.3f}", rate)

    def products(self, x_BD: Tensor, W_FD: Tensor) -> None:
        operations = 2 * x_BD.numel() * self.d_sae
        before = torch.get_float32_matmul_precision()
        for precision, name in (("highest", "float32"), ("high", "TF32")):
            torch.set_float32_matmul_precision(precision)
            self.show(f"encoder's product, {name}", lambda: F.linear(x_BD, W_FD), operations=operations, repeats=3)
        torch.set_float32_matmul_precision(before)
        name = "encoder's product, bfloat16 to float32, with bias, scale and casts"
        b_F, scale_F = x_BD.new_zeros(self.d_sae), x_BD.new_ones(self.d_sae)
        self.show(name, lambda: bfloat16_linear(x_BD, W_FD, b_F, scale_F), operations=operations)
        self.show("norms of the decoder's rows", lambda: W_FD.norm(dim=-1), moved=W_FD.nbytes)

    def selections(self, pre_BF: Tensor, k: int) -> Tensor:
        """Returns the k active features of each token, [B, k]."""
        moved, n = pre_BF.nbytes, len(pre_BF) * k
        self.show("TopK's selection, by rows", lambda: largest_of_rows(pre_BF, k), moved=moved)
        name = "BatchTopK's selection, of the whole batch"
        self.show(name, lambda: largest(pre_BF.flatten(), n), moved=moved, repeats=3)
        return largest_of_rows(pre_BF, k)[1]

    def products_with_active(self, features_BK: Tensor, x_BD: Tensor, W_FD: Tensor) -> None:
        active, values_N = _active(features_BK, self.d_sae), torch.rand(features_BK.numel(), device=x_BD.device)
        gathered = values_N.numel() * W_FD.shape[1] * W_FD.itemsize
        self.show("decode", lambda: active.matmul(values_N, W_FD), moved=gathered + x_BD.nbytes)
        gradient = active.gradient_of_values
        moved = 2 * gathered
        self.show("gradient of the values", lambda: gradient(x_BD, W_FD), moved=moved)
        flat_N = features_BK.flatten().int()
        self.show("sorting the active features", lambda: flat_N.argsort(stable=True), moved=12 * len(flat_N))
        name, moved = "gradient of the decoder, or of the encoder", gathered + W_FD.nbytes
        self.show(name, lambda: active.t_matmul(values_N, x_BD), moved=moved)
        self._all_gradients(active, values_N, x_BD, W_FD)
        features_BK[:, 0] = 0
        popular = _active(features_BK, self.d_sae)
        name = "the gradient of one of them, with one feature active on every token"
        self.show(name, lambda: popular.t_matmul(values_N, x_BD), moved=moved)
        self._all_gradients(popular, values_N, x_BD, W_FD, ", with one feature active on every token")

    def _all_gradients(
        self, active: ActiveFeatures, values_N: Tensor, x_BD: Tensor, W_FD: Tensor, where: str = ""
    ) -> None:
        """Times the gradients of values, encoder and decoder together: with the Triton kernel where it works."""
        how = "the Triton kernel" if feature_kernel.serves(W_FD) else "torch"
        gathered = values_N.numel() * W_FD.shape[1] * W_FD.itemsize
        name = f"all these gradients, by {how}{where}"
        moved = 2 * gathered + 3 * W_FD.nbytes
        self.show(name, lambda: active.gradients(values_N, x_BD, x_BD, W_FD), moved=moved)

    def updates(self, W_FD: Tensor) -> None:
        """Times the norm of the gradients of encoder and decoder, and their update."""
        weights = [torch.nn.Parameter(W_FD), torch.nn.Parameter(W_FD.clone())]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        moved = 2 * W_FD.nbytes
        self.show("norm of the gradient", lambda: torch.nn.utils.get_total_norm(gradients), moved=moved)
        self.show("Adam, fused", torch.optim.Adam(weights, fused=True).step, moved=7 * moved)


def _time_width(bench: Bench, table: Table, d_sae: int) -> None:
    batch, d_in = bench.size["batch"], bench.size["d_in"]
    operators = _Operators(bench, table, d_sae)
    x_BD = torch.randn(batch, d_in, device=bench.device)
    W_FD = torch.randn(d_sae, d_in, device=bench.device) * d_in**-0.5
    operators.products(x_BD, W_FD)
    features_BK = operators.selections(F.linear(x_BD, W_FD), bench.size["k"])
    operators.products_with_active(features_BK, x_BD, W_FD)
    operators.updates(W_FD)


def _active(features_BK: Tensor, d_sae: int) -> ActiveFeatures:
    rows_BK = torch.arange(len(features_BK), device=features_BK.device)[:, None].expand_as(features_BK)
    return ActiveFeatures(features_BK.flatten(), rows_BK.flatten(), (len(features_BK), d_sae))
