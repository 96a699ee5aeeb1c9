"""Benchmarks run on real contenders and print whole tables. No test depends on a measured time."""

import re

import pytest
import torch

from support.processes import ROOT


@pytest.fixture
def benchmark(script, monkeypatch):
    """Runs a benchmark's main program in this process. What it times is in processes of its own."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name, *flags: script(f"benchmarks/{name}", *flags)


@pytest.mark.parity
def test_the_training_benchmark_prints_contenders_floors_and_ratios(benchmark):
    done = benchmark(
        *("train_speed.py", "--job", "tiny", "--repeats", 1, "--steps", 4, "--warm_up", 2),
        *("--contenders", "this", "saelens"),
    )
    assert done.status == 0, done.stderr
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    assert {"this project", "SAELens, its defaults", "floor: both parts", "floor: SAE step alone"} <= rows.keys()
    for name in ("this project", "SAELens, its defaults"):
        assert re.fullmatch(r"[\d,]+ \| [\d,]+ to [\d,]+ \| \d+\.\d\d( \| \d+% \(\d+% to \d+%\)){2}", rows[name])
    assert re.search(r"^[\d.]+ x SAELens, its defaults \([\d.]+ to [\d.]+\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^Measured peaks: \d+ GFLOP/s .* \d+ GB/s$", done.stdout, re.MULTILINE)


def test_the_training_benchmark_says_where_the_time_goes(benchmark):
    done = benchmark(*("train_speed.py", "--job", "tiny", "--profile", "--steps", 4, "--warm_up", 2))
    assert done.status == 0, done.stderr
    shares = dict(re.findall(r"^\| (\w.*?) \| ([\d.]+)% \|$", done.stdout, re.MULTILINE))
    assert {"next batch", "next batch: language model", "step", "step: Adam", "step: backward"} <= shares.keys()


@pytest.mark.cuda_shapes  # a minute
def test_the_benchmark_of_the_gpu_runs_all_of_its_parts_on_a_cpu(benchmark):
    done = benchmark("gpu.py", "--tiny")
    assert done.status == 0, done.stdout + done.stderr
    _, *parts = re.split(r"^## ", done.stdout, flags=re.MULTILINE)
    rows = {part.partition("\n")[0]: re.findall(r"^\| (\w.*?) \|", part, re.MULTILINE) for part in parts}
    a, b, c, d, e, targets = rows.values()
    assert "failed" not in done.stdout
    assert a.count("BatchTopK's selection, of the whole batch") == a.count("Adam, fused") == 2  # numbers of features
    assert b.count("topk") == b.count("batchtopk") == 2 * 5  # shares of dead features
    assert [row.partition(",")[0] for row in c[1:]] == ["eager", "layers compiled"]
    assert d[1:] == ["training, stopped", "resumed to its end", "evaluation"]
    assert e[1:] == [
        *("this project", "SAELens, its defaults", "SAELens, its fastest flags"),
        "sparsify, its default optimizer",
    ]
    assert len(targets) == 7


def test_a_part_that_fails_is_shown_and_the_next_one_runs(benchmark, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "complete").touch()  # a model without weights
    done = benchmark("gpu.py", "--tiny", "--parts", "ca", "--work_dir", tmp_path)
    assert done.status == 1
    assert re.search(r"^Part c failed: UserError\n\n```text\nTraceback", done.stdout, re.MULTILINE)
    assert "| Adam, fused | 512 |" in done.stdout


def test_the_benchmark_of_the_gpu_needs_a_gpu(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = benchmark("gpu.py")
    assert done.status == 2
    assert "--device cuda: torch" in done.stderr and "with --tiny a CPU is used" in done.stderr


@pytest.mark.scale  # a comparison of two tools, whose values other tests hold
def test_the_evaluation_benchmark_measures_the_same_l0_as_run_evals(script, benchmark, tiny_run):
    trained = script("sae_lens_train.py", *tiny_run)
    done = benchmark(
        *("eval_speed.py", "--sae_path", trained.stdout.strip()),
        *("--num_samples", 8, "--repeats", 1, "--device", "cpu"),
    )
    assert done.status == 0, done.stderr
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    l0 = {name: float(row.split(" | ")[3]) for name, row in rows.items()}
    assert l0["this project, one SAE"] > 0
    assert l0.keys() == {"this project, one SAE", "run_evals, one SAE"}
    assert re.search(r"^run_evals takes [\d.]+ x the time of this project$", done.stdout, re.MULTILINE)
