"""What the tests of a device share: the device, and a small Llama of random weights with text and a tokenizer.

The tests show that the device computes what the CPU computes. For that shapes and devices matter and the words do not,
so model, text and tokenizer are made here, from this repository's own files, and nothing is downloaded.

`pytest tests/gpu --device cuda` runs all of them. Without --device the same tests run on the CPU, and those that need a
CUDA device are skipped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.repository_text import BOS, EOS, N_TOKENS, save_tokenizer, write_documents

CONTEXT = 64
RunFlags = Callable[..., list[str]]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def cuda_device(device: str) -> str:
    if torch.device(device).type != "cuda":
        pytest.skip("needs a CUDA device: ./run_tests.sh --gpu")
    return device


@pytest.fixture
def cuda(cuda_device: str) -> str:
    """The CUDA device, with the memory of earlier tests given back."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return cuda_device


def _save_llama(directory: Path, width: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=width**-0.5,  # the layers then change the residual stream, and the losses depend on them
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers and width 64."""
    return _save_llama(tmp_path_factory.mktemp("small_model"), 64)


@pytest.fixture(scope="session")
def wide_model(cuda_device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers and width 1,024, whose SAEs take gigabytes: for tests on a CUDA device."""
    return _save_llama(tmp_path_factory.mktemp("wide_model"), 1024)


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents, about 180,000 tokens."""
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    write_documents(file, 300)
    return file


@pytest.fixture
def run_flags(device: str, documents: Path, tmp_path: Path) -> RunFlags:
    """Returns flags of a run of 20 steps on the device; other values may be given.

    There are 256 features for each active one, so that the sparse step is used on a CUDA device too.
    """

    def flags(model: Path, **more: object) -> list[str]:
        values = {
            "model_name": model,
            "layer": 1,
            "dataset_path": documents,
            "context_size": CONTEXT,
            "architecture": "batchtopk",
            "k": 8,
            "expansion_factor": 32,
            "normalize_activations": "expected_average_only_in",
            "training_tokens": 20 * 512,
            "train_batch_size_tokens": 512,
            "n_batches_in_buffer": 32,
            "lr": 1e-3,
            "dead_feature_window": 5,
            "checkpoint_path": tmp_path / "runs",
            "wandb_mode": "disabled",
            "device": device,
            "lm_dtype": "float32",
            "set": "n_batches_for_norm_estimate=2",
        } | more
        return [str(part) for name, value in values.items() for part in (f"--{name}", value)]

    return flags
