"""The Triton kernel gives torch's gradients. Here Triton's interpreter runs it, and it is compiled for real GPUs.

Both need a process of their own: whether Triton interprets or compiles is decided when it is imported.
"""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from sae_toolkit import ROOT
from sae_toolkit.steps import feature_kernel

pytest.importorskip("triton", reason="Triton is for Linux only")

COMPARE_STEPS = """
import json, torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_toolkit.steps import feature_kernel
from sae_toolkit.steps.sparse_topk import SPARSE_CLASSES
from sae_toolkit.steps.trainer import Trainer

def train(architecture, with_kernel):
    feature_kernel.serves = lambda W_dec_FD: with_kernel
    sae_class, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=100, d_sae=64, k=4), training_tokens=10**6, train_batch_size_tokens=16, lr=1e-3,
        dead_feature_window=1, logger=LoggingConfig(log_to_wandb=False), verbose=False,
    )
    torch.manual_seed(0)
    trainer = Trainer(cfg.to_sae_trainer_config(), SPARSE_CLASSES[sae_class](cfg.sae), iter(()))
    acts = torch.randn(3, 16, 100)
    acts[:, :, 0] += 3  # so that some features are active on many tokens
    for batch in acts:
        trainer.step(batch)
        trainer.n_training_steps += 1
    assert trainer.dead_neurons.any()
    return {name: weight.detach() for name, weight in trainer.sae.named_parameters()}

off = {}
for architecture in ("topk", "batchtopk"):
    ours, theirs = train(architecture, True), train(architecture, False)
    for name, weight in theirs.items():
        off[f"{architecture} {name}"] = ((ours[name] - weight).abs().max() / weight.abs().max()).item()
print(json.dumps(off))
"""

COMPILE = """
import subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_toolkit.steps import feature_kernel

kernel = feature_kernel._one_feature
types = dict.fromkeys(kernel.arg_names, "*fp32")
types |= dict.fromkeys(("rows", "starts"), "*i64") | dict.fromkeys(("n_features", "n_entries", "d_in"), "i32")
types["BLOCK"] = "constexpr"
for capability, d_in in ((80, 4096), (90, 4096), (90, 8192), (90, 576), (100, 4096)):
    block = triton.next_power_of_2(d_in)
    source = ASTSource(kernel, types, {"BLOCK": block})
    options = {"num_warps": feature_kernel.n_warps(block)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    print(capability, d_in, shown.split("\\n")[-2])
"""


def run(code, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_steps_with_the_kernel_are_steps_without_it():
    """Adam enlarges the rounding of gradients near 0, so the weights agree less closely than the gradients."""
    off = json.loads(run(COMPARE_STEPS, TRITON_INTERPRET="1"))
    assert len(off) == 8
    assert max(off.values()) < 1e-5


def test_the_kernel_gives_the_gradients_of_torch():
    """For widths that fill a block and that do not, a feature that is active on every token, and features on none."""
    code = """
import torch
from sae_toolkit.steps import feature_kernel
from sae_toolkit.steps.active_features import ActiveFeatures
worst = 0.0
for d_in in (64, 100, 576):
    generator = torch.Generator().manual_seed(d_in)
    B, F, K = 20, 96, 4
    features_BK = torch.stack([torch.randperm(F - 10, generator=generator)[:K] for _ in range(B)])
    features_BK[:, 0] = 90  # a feature that is active on every token; features 91 to 95 are on none
    rows_BK = torch.arange(B)[:, None].expand_as(features_BK)
    active = ActiveFeatures(features_BK.flatten(), rows_BK.flatten(), (B, F))
    values_N = torch.randn(B * K, generator=generator).relu()
    grad_BD, sae_in_BD = torch.randn(2, B, d_in, generator=generator)
    W_dec_FD = torch.randn(F, d_in, generator=generator)
    theirs = active.gradients(values_N, grad_BD, sae_in_BD, W_dec_FD)
    feature_kernel.serves = lambda W: True
    ours = active.gradients(values_N, grad_BD, sae_in_BD, W_dec_FD)
    feature_kernel.serves = lambda W: False
    assert not ours[0][91:].any() and not ours[2][91:].any()
    worst = max(worst, *(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs)))
    assert feature_kernel._works_on(torch.device("cpu"), d_in)
print(worst)
"""
    assert float(run(code, TRITON_INTERPRET="1")) < 1e-6


def test_the_kernel_compiles_for_gpus_and_keeps_its_vectors_in_registers(tmp_path):
    usages = run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).strip().splitlines()
    assert len(usages) == 5
    assert all("STACK:0 " in usage and "LOCAL:0 " in usage for usage in usages), usages


def test_a_kernel_with_wrong_results_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(feature_kernel, "gradients", lambda *tensors: [torch.ones(64, 32), torch.ones(64), tensors[-1]])
    feature_kernel._works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not feature_kernel._works_on(torch.device("cpu"), 32)
    assert "not used on cpu: its results are off by" in caplog.text


def test_a_kernel_that_cannot_be_compiled_is_not_used(caplog):
    """Without a GPU Triton has nothing to compile for."""
    feature_kernel._works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not feature_kernel._works_on(torch.device("cpu"), 32)
    assert "the step works without it" in caplog.text
