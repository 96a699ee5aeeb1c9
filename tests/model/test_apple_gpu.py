"""On an Apple GPU (mps), which no machine of the gate has: what is refused, and that no sum is in float64 there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.metrics import ReconstructionStatistics
from sae_toolkit.evaluation.saebench.core import SAEBenchStatistics
from sae_toolkit.model.devices import choose_device, choose_llm_device, choose_lm_dtype
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.steps.sparse_topk import sparse_class
from sae_toolkit.steps.target_l0 import L0Control
from sae_toolkit.training.setup import prepare_run

N, D, F, B, T = 12, 8, 16, 2, 6


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one")
@pytest.mark.parametrize("choose", [choose_device, lambda device: choose_llm_device(device, 1, "cpu")])
def test_mps_is_refused_in_one_line_where_torch_has_none(choose):
    with pytest.raises(UserError, match=r"device mps: torch .* sees no Apple GPU on this machine; use --.*device cpu"):
        choose("mps")


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_mps_is_chosen_by_name_and_computes_in_float32_only(apple):
    assert choose_device("mps") == "mps"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_llm_device("mps", 1, "cpu") == "mps"
    assert choose_lm_dtype("auto", "mps") == choose_lm_dtype("float32", "mps") == torch.float32
    with pytest.raises(UserError, match="--lm_dtype bfloat16: on mps only float32"):
        choose_lm_dtype("bfloat16", "mps")
    with pytest.raises(UserError, match="--n_devices 2: torch sees 0 CUDA devices"):
        choose_llm_device("mps", 2, "mps")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"architecture": "batchtopk"}, "--architecture batchtopk: SAELens keeps its threshold in float64"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16: on mps only float32"),
        ({"dtype": "float64"}, "--dtype float64: on mps only float32"),
        ({"normalize_activations": "covariance_whitening"}, "SAELens estimates it in float64"),
    ],
)
def test_what_needs_float64_is_refused_on_mps(apple, tiny_model, tmp_path, flags, says):
    settings = TrainingSettings.from_flags(
        {"model_name": str(tiny_model), "layer": 1, "context_size": 64, "device": "mps", "k": 4}
        | {"checkpoint_path": str(tmp_path)}
        | flags
    )
    with pytest.raises(UserError, match=says):
        prepare_run(settings)


def test_sparse_steps_are_not_used_on_mps():
    cfg = TopKTrainingSAEConfig(d_in=64, d_sae=65536, k=4, device="cpu")
    assert sparse_class(TopKTrainingSAE, cfg) is not TopKTrainingSAE
    cfg.device = "mps"
    assert sparse_class(TopKTrainingSAE, cfg) is TopKTrainingSAE


class NoFloat64(TorchDispatchMode):
    """Raises where an operation has a float64 result on mps, as torch does on an Apple machine."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{func}: float64 on mps")
        return result


def on_mps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return FakeTensor(_FAKE, torch.empty(shape, dtype=dtype, device="meta"), torch.device("mps"))


_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def float64_on_mps() -> None:
    on_mps(N).double()


def reconstruction() -> None:
    with suppress(DynamicOutputShapeException):  # of the histogram of L0, which comes last and has values only
        ReconstructionStatistics(B).add(
            on_mps(N, dtype=torch.long), on_mps(N, D), on_mps(N, D), on_mps(N, dtype=torch.long)
        )


def saebench() -> None:
    statistics = SAEBenchStatistics(F, "cpu")
    statistics._fired_F = on_mps(F, dtype=torch.long)
    statistics.add_features(on_mps(N, F))
    statistics.add_batch(on_mps(N, D), on_mps(N, D))


def guarded(function: Callable[[], None]) -> None:
    with NoFloat64(), _FAKE:
        function()


def test_the_guard_finds_float64_on_mps():
    with pytest.raises(TypeError, match="float64 on mps"):
        guarded(float64_on_mps)


@pytest.mark.parametrize("function", [reconstruction, saebench])
def test_no_sum_is_in_float64_on_mps(function):
    guarded(function)


def test_the_l0_control_stays_in_the_dtype_of_its_device():
    control = L0Control(20.0, 0.1, "cpu", "standard", 100)
    for dtype in (torch.float64, torch.float32):  # of the CPU, and of mps
        control._integral = control._integral.to(dtype)
        control.load_state_dict(control.state_dict())
        control.update(torch.tensor(30.0), 1.0, torch.tensor(False))
        assert control._integral.dtype == dtype
