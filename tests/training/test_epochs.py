"""A text that is smaller than the training is trained on several times, and a resumed run does so as if undisturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from support.trainings import assert_same, paths_in, run_flags


@pytest.fixture(scope="module")
def small_text(text_file, tmp_path_factory):
    """About 16,000 tokens, of which the runs need 40,960."""
    path = tmp_path_factory.mktemp("small") / "small.txt"
    path.write_text("\n\n".join(text_file.read_text().split("\n\n")[:300]))
    return path


def test_a_small_text_is_trained_on_as_often_as_asked_also_after_a_kill(trainings, tiny_model, small_text, tmp_path):
    """With a cache of activations, which the second pass reads."""

    def flags(name):
        more = ["--training_tokens", "40960", "--epochs", "4", "--cache_activations", str(tmp_path / f"cache_{name}")]
        return [*run_flags(tiny_model, small_text, tmp_path / name), *more]

    assert trainings.run(flags("whole"))[0] == 0, trainings.shown()
    shown, whole = trainings.shown(), trainings.finished_sae()
    passes = json.loads((whole / "cfg.json").read_text())["metadata"]["epochs"]
    needed, there, planned = re.search(
        r"tokens  (\S+) needed, (\S+) there, for (\S+) passes over the text", shown
    ).groups()
    assert passes == pytest.approx(float(planned), rel=0.1)
    assert passes == pytest.approx(int(needed.replace(",", "")) / int(there.replace(",", "")), rel=0.02)
    assert 2 < passes < 4
    assert "warning --epochs 3: " in shown
    assert re.search(r"pass 3 over it begins$", shown, re.MULTILINE)
    n_read, n_computed = re.search(r"(\S+) contexts read, (\S+) computed", shown).groups()
    assert int(n_computed) < int(n_read) < 2 * int(n_computed)

    def kill_in_the_second_pass(pid):
        while not paths_in(tmp_path / "killed", "*/*/2*"):  # a checkpoint after 20,480 tokens or more
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    assert trainings.run(flags("killed"), kill_in_the_second_pass)[0] == -signal.SIGKILL
    (run,) = (tmp_path / "killed").glob("*/*")
    assert trainings.run(["--resume", str(run)])[0] == 0, trainings.shown()
    assert_same(whole, trainings.finished_sae())
