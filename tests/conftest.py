"""Real parts, loaded once: the embedded model, its tokenizer, and a tiny model of random weights for errors."""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sae_toolkit.terminal.console import importing

# No test reaches the network: a closed port stands where the hub would be.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["SAE_TOOLKIT_RETRY_WAIT"] = "0.01"
os.environ["WANDB_DIR"] = tempfile.mkdtemp(prefix="wandb-of-tests-")
if "PYTEST_XDIST_WORKER" not in os.environ:  # one for all workers
    _assets = tempfile.TemporaryDirectory(prefix="assets-of-tests-", ignore_cleanup_errors=True)
    os.environ["HF_ASSETS_CACHE"] = _assets.name

with importing("SAELens"):
    import torch
    from sae_lens.synthetic import (
        HierarchyConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

    from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
    from sae_toolkit.model.language_model import LanguageModel
    from sae_toolkit.model.loading import ModelSource, find_model, load_language_model
    from sae_toolkit.model.tokenizer import load_tokenizer
    from sae_toolkit.text.sources import open_text
    from support.processes import HOOK, ROOT, Outcome
    from support.trainings import Trainings

# The files that take longest. They come first, so that no worker has one left to do when the others are done.
LONGEST = (
    *("test_benchmarks.py", "test_end_to_end.py", "training/test_resume.py", "many_runs/test_comparison.py"),
    *("many_runs/test_sweep.py", "scale/test_ranks.py", "test_docs.py", "cuda/test_cuda_path.py"),
    *("steps/test_target_l0.py", "steps/test_trainer.py", "training/test_every_flag.py", "steps/test_calibration.py"),
    *("training/test_finetuning.py", "test_out_of_memory.py", "distributed/test_ranks.py", "faults/test_kills.py"),
    *("reports/test_publish.py", "training/record/test_recording.py", "evaluation/test_evaluation.py"),
    *("inspection/test_steering.py", "inspection/test_inspection.py", "evaluation/synthetic/test_scores.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --device here and not in tests/gpu, so that it is known whichever tests are named."""
    parser.addoption("--device", default="cpu", help="device of tests/gpu: cpu (default), cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} sees no CUDA device on this machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported stays, so no collection has to look through it


@pytest.fixture(scope="session")
def embedded_source() -> ModelSource:
    return find_model(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def tokenizer(embedded_source: ModelSource) -> PreTrainedTokenizerBase:
    return load_tokenizer(embedded_source)


@pytest.fixture(scope="session")
def language_model(embedded_source: ModelSource) -> LanguageModel:
    """The embedded model, whole, in float32."""
    return load_language_model(embedded_source, HOOK, "cpu", torch.float32)


@pytest.fixture(scope="session")
def real_acts_ND(language_model: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """About 4,000 real activations in float32, without the massive ones."""
    text = next(iter(open_text(EMBEDDED_TEXT, flag="--dataset_path").documents()))
    tokens_BT = torch.tensor(tokenizer(text)["input_ids"][: 16 * 256]).reshape(16, 256)
    acts_ND = torch.cat([language_model.activations(rows)[:, 1:].flatten(0, 1) for rows in tokens_BT.split(8)])
    return acts_ND[acts_ND.norm(dim=-1) < 10 * acts_ND.norm(dim=-1).median()]


@pytest.fixture(scope="session")
def scaled_acts_ND(real_acts_ND: torch.Tensor) -> torch.Tensor:
    """Real activations with a mean norm of sqrt(D), as a run has them."""
    return real_acts_ND * (real_acts_ND.shape[1] ** 0.5 / real_acts_ND.norm(dim=-1).mean())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Directory of a Llama of random weights: 4 layers, width 32, contexts up to 128, the embedded tokenizer."""
    path = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a synthetic model as SAELens saves it: 96 features in 32 dimensions, 2 of them active at a time."""
    path = tmp_path_factory.mktemp("tiny_synthetic")
    config = SyntheticModelConfig(
        num_features=96,
        hidden_dim=32,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.2, min_prob=0.02),
        hierarchy=HierarchyConfig(total_root_nodes=8, branching_factor=2, max_depth=2, scale_children_by_parent=True),
        orthogonalization=OrthogonalizationConfig(num_steps=50, lr=0.01),
        correlation=LowRankCorrelationConfig(rank=4, correlation_scale=0.1),
        std_firing_magnitudes=0.3,
        bias=0.5,
        seed=7,
    )
    SyntheticModel(config).save(path)
    return path


@pytest.fixture(scope="session")
def llama3_8b_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the configuration of Llama-3-8B, without weights and tokenizer."""
    path = tmp_path_factory.mktemp("llama3_8b_shape")
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sparsify():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # triton without a GPU fails
        import sparsify

    return sparsify


@pytest.fixture
def script(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a script's main program in this process (importing SAELens anew takes seconds)."""

    def run(name: str, *flags: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capfd.readouterr()
        code: object = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        captured = capfd.readouterr()
        return Outcome(code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 paragraphs, about 60,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "paragraphs.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: " + " ".join(str(i * j) for j in range(12)) for i in range(2000)))
    return path


@pytest.fixture
def tiny_run(tiny_model: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """Flags of a run of a second: the tiny model, a tiny SAE, two steps."""
    flags = {
        "model_name": tiny_model,
        "layer": 1,
        "dataset_path": text_file,
        "context_size": 64,
        "expansion_factor": 4,
        "training_tokens": 2048,
        "n_batches_in_buffer": 16,
        "checkpoint_path": tmp_path / "checkpoints",
        "wandb_mode": "disabled",
        "device": "cpu",
        "lm_dtype": "float32",
        "set": "n_batches_for_norm_estimate=1",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


@pytest.fixture
def tiny_args(tiny_model, text_file, tmp_path):
    """A flag file of a run of a second or two."""
    flags = {
        "model_name": tiny_model,
        "layer": 1,
        "dataset_path": text_file,
        "context_size": 64,
        "architecture": "batchtopk",
        "k": 8,
        "expansion_factor": 8,
        "normalize_activations": "expected_average_only_in",
        "training_tokens": 20480,
        "n_batches_in_buffer": 32,
        "lr": 1e-3,
        "wandb_mode": "disabled",
        "device": "cpu",
        "lm_dtype": "float32",
    }
    path = tmp_path / "tiny.args"
    path.write_text("\n".join(f"--{name} {value}" for name, value in flags.items()))
    return path


@pytest.fixture(scope="session")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("trainings"))
    yield trainings
    trainings.close()


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a file system of a size, such as 2m, and returns its directory."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine allows no mount")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def record_fault(record_property: Callable[[str, object], None]) -> Callable[[str, int, str, str], None]:
    """Adds a row to the table of docs/reliability.md: the fault, how often injected, what happened, what was lost."""
    return lambda *row: record_property("fault", row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    called = (report for report in reports if getattr(report, "when", None) == "call")
    if rows := [row for report in called for name, row in report.user_properties if name == "fault"]:
        terminalreporter.section("faults")
        terminalreporter.line("| fault | injected | what happened | lost |")
        terminalreporter.line("| --- | --- | --- | --- |")
        for row in rows:
            terminalreporter.line(f"| {' | '.join(map(str, row))} |")
