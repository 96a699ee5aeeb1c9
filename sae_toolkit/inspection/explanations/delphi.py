"""What is used of delphi (package eai-delphi): how it chooses examples, explains and scores.

delphi's package imports vLLM for a client of its own, which is not used here. vLLM takes gigabytes and a GPU; where it
is not installed, something with its names stands in for it while delphi is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_OF_VLLM = ("vllm", "vllm.distributed", "vllm.distributed.parallel_state", "vllm.inputs")


class _Absent(ModuleType):
    """A module that has any name, for what is imported and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _without_vllm() -> Iterator[None]:
    if importlib.util.find_spec("vllm"):
        yield
        return
    sys.modules.update({name: _Absent(name) for name in _OF_VLLM})
    try:
        yield
    finally:
        for name in _OF_VLLM:
            del sys.modules[name]


with _without_vllm():
    from delphi.clients.client import Client, Response
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.explainers import DefaultExplainer
    from delphi.latents import LatentRecord, constructor, sampler
    from delphi.latents.loader import TensorBuffer
    from delphi.latents.samplers import test as draw_tests
    from delphi.log.result_analysis import compute_classification_metrics, compute_confusion
    from delphi.scorers import DetectionScorer, FuzzingScorer

__all__ = [
    "Client",
    "ConstructorConfig",
    "DefaultExplainer",
    "DetectionScorer",
    "FuzzingScorer",
    "LatentRecord",
    "Response",
    "SamplerConfig",
    "TensorBuffer",
    "compute_classification_metrics",
    "compute_confusion",
    "constructor",
    "draw_tests",
    "sampler",
]
