"""Benchmarks run on real contenders and print whole tables. No test depends on a measured time."""

import re
import sys

from support.processes import run_process


def test_the_training_benchmark_prints_contenders_floors_and_ratios():
    done = run_process(
        *(sys.executable, "benchmarks/train_speed.py", "--job", "tiny", "--repeats", 1, "--steps", 4, "--warm_up", 2),
        *("--contenders", "this", "saelens"),
    )
    assert done.status == 0, done.stderr
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    assert {"this project", "SAELens, its defaults", "floor: both parts", "floor: SAE step alone"} <= rows.keys()
    for name in ("this project", "SAELens, its defaults"):
        assert re.fullmatch(r"[\d,]+ \| [\d,]+ to [\d,]+ \| \d+\.\d\d( \| \d+% \(\d+% to \d+%\)){2}", rows[name])
    assert re.search(r"^[\d.]+ x SAELens, its defaults \([\d.]+ to [\d.]+\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^Measured peaks: \d+ GFLOP/s .* \d+ GB/s$", done.stdout, re.MULTILINE)


def test_the_training_benchmark_says_where_the_time_goes():
    done = run_process(
        *(sys.executable, "benchmarks/train_speed.py", "--job", "tiny", "--profile", "--steps", 4, "--warm_up", 2)
    )
    assert done.status == 0, done.stderr
    shares = dict(re.findall(r"^\| (\w.*?) \| ([\d.]+)% \|$", done.stdout, re.MULTILINE))
    assert {"next batch", "next batch: language model", "step", "step: Adam", "step: backward"} <= shares.keys()


def test_the_evaluation_benchmark_measures_the_same_l0_as_run_evals(script, tiny_run):
    trained = script("sae_lens_train.py", *tiny_run)
    done = run_process(
        *(sys.executable, "benchmarks/eval_speed.py", "--sae_path", trained.stdout.strip()),
        *("--num_samples", 8, "--repeats", 1, "--device", "cpu"),
    )
    assert done.status == 0, done.stderr
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    l0 = {name: float(row.split(" | ")[3]) for name, row in rows.items()}
    assert l0["this project, one SAE"] > 0
    assert l0.keys() == {"this project, one SAE", "run_evals, one SAE"}
    assert re.search(r"^run_evals takes [\d.]+ x the time of this project$", done.stdout, re.MULTILINE)
