"""The program's CUDA path at Llama-3-8B's shapes, on fake tensors: devices, waits of the host, layouts, memory.

`paths.py` runs the path in a process of its own, since the fake device cannot be removed from a process.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from support.processes import run_process

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the fake CUDA device is compiled with g++, which is not here"
)

SPARSE, DENSE = ("topk", "batchtopk"), ("standard", "jumprelu", "gated", "matryoshka_batchtopk")
WHOLE = ("batchtopk:32768",)
STEPS = (*(f"{architecture}:32768:steps" for architecture in DENSE), "topk:131072:steps")
FAULTS = ("topk:32768:steps:cpu", "topk:32768:steps:float", "topk:32768:steps:copy", "batchtopk:32768:steps:reading")
ALL_WHOLE = tuple(f"{architecture}:{d_sae}" for architecture in (*SPARSE, *DENSE) for d_sae in (32768, 131072))
# One to copy the tokens over, one to look for packed texts, and two to leave out massive activations.
MOST_WAITS_IN_A_PASS = 4
COMPARED = ("calibrating", "filling", "stepping", "held out", "peak", "evaluation")


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory, tokenizer):
    """Llama-3-8B's configuration, another model's tokenizer, and a text of about 700,000 tokens."""
    directory = tmp_path_factory.mktemp("llama-3-8b")
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    paragraphs = (f"Paragraph {i}: " + " ".join(str(i * j) for j in range(60)) for i in range(2000))
    (directory / "text.txt").write_text("\n\n".join(paragraphs))
    return directory


def walked(directory, cases):
    """What was recorded in each case, by its name."""
    done = run_process(sys.executable, Path(__file__).with_name("paths.py"), directory, *cases)
    assert done.status == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {case.pop("case"): case for case in found}


@pytest.fixture(scope="session")
def recorded(llama_directory):
    return walked(llama_directory, (*WHOLE, *STEPS, *FAULTS))


def check_devices(case):
    assert "error" not in case, case["error"][-2000:]


def check_steady_steps(case):
    steps = {name: part["waits"] for name, part in case["parts"].items() if name.endswith("dead")}
    assert len(steps) == 4
    assert not any(steps.values()), steps


def check_stream(case):
    """Batches are taken from the buffer without a wait. Each pass of the language model that fills it has a few."""
    parts = case["parts"]
    assert not parts["batches and steps"]["waits"], parts["batches and steps"]["waits"]
    assert case["passes"] > 0
    assert sum(parts["filling"]["waits"].values()) <= MOST_WAITS_IN_A_PASS * case["passes"], parts["filling"]["waits"]


def check_memory(case):
    """The most that each part takes is within -15% and +5% of what `--dry_run` predicts."""
    planned, taken = case["planned"], {name: part["peak_bytes"] for name, part in case["parts"].items()}
    taken["stepping"] = max(n_bytes for name, n_bytes in taken.items() if name.endswith("dead"))
    if "peak" in planned:  # the evaluation is a process of its own
        taken["peak"] = max(n_bytes for name, n_bytes in taken.items() if name != "evaluation")
    compared = {name: taken[name] / planned[name] - 1 for name in COMPARED if name in taken and name in planned}
    assert "stepping" in compared
    assert all(-0.15 <= off <= 0.05 for off in compared.values()), compared


def check_finished_copy(case):
    added = case["parts"]["finished copy"]["peak_bytes"] - case["parts"]["filling"]["live_bytes"]
    assert added <= 1.01 * case["planned"]["SAE"], added / case["planned"]["SAE"]


def check_layouts(case):
    assert {"W_enc", "W_dec", "b_dec"} <= set(case["layouts"])
    for name, tensors in case["layouts"].items():
        device, _strides = tensors["weight"]
        assert device == "cuda:0", name
        assert all(tensor == tensors["weight"] for tensor in tensors.values()), (name, tensors)


@pytest.mark.parametrize("case", [*WHOLE, *STEPS])
def test_no_operator_mixes_devices(recorded, case):
    check_devices(recorded[case])


@pytest.mark.parametrize("case", [case for case in (*WHOLE, *STEPS) if case.split(":")[0] in SPARSE])
def test_a_steady_step_does_not_wait_for_the_device(recorded, case):
    """With no dead features, and with a tenth, half and all of them dead."""
    check_steady_steps(recorded[case])


@pytest.mark.parametrize("case", WHOLE)
def test_taking_batches_does_not_wait_and_filling_the_buffer_hardly_does(recorded, case):
    check_stream(recorded[case])


@pytest.mark.parametrize("case", [*WHOLE, *STEPS])
def test_a_dry_run_predicts_the_memory_of_each_part(recorded, case):
    check_memory(recorded[case])


@pytest.mark.parametrize("case", WHOLE)
def test_a_finished_copy_takes_as_much_as_the_sae(recorded, case):
    check_finished_copy(recorded[case])


@pytest.mark.parametrize("case", [*WHOLE, *STEPS])
def test_gradients_and_moments_lie_in_memory_as_their_weights(recorded, case):
    """Adam's fused kernel would copy them otherwise."""
    check_layouts(recorded[case])


def test_a_cpu_tensor_in_a_product_is_found(recorded):
    with pytest.raises(AssertionError, match="found at least two devices, cuda:0 and cpu"):
        check_devices(recorded["topk:32768:steps:cpu"])


@pytest.mark.parametrize(
    ("case", "found"),
    [("topk:32768:steps:float", "_local_scalar_dense at"), ("batchtopk:32768:steps:reading", "just recorded")],
)
def test_a_wait_in_a_step_is_found(recorded, case, found):
    with pytest.raises(AssertionError, match=found):
        check_steady_steps(recorded[case])


def test_a_copy_too_many_is_found(recorded):
    with pytest.raises(AssertionError, match="stepping"):
        check_memory(recorded["topk:32768:steps:copy"])


@pytest.mark.cuda_shapes
@pytest.mark.parametrize("case", ALL_WHOLE)
def test_all_shapes(llama_directory, case):
    found = walked(llama_directory, [case])[case]
    check_devices(found)
    if case.split(":")[0] in SPARSE:
        check_steady_steps(found)
        check_stream(found)
    check_memory(found)
    check_finished_copy(found)
    check_layouts(found)
