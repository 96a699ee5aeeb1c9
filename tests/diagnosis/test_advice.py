"""The seed's recipe on the embedded model ends healthy if the first advice of each evaluation is followed.

python tests/diagnosis/test_advice.py DIRECTORY 0 1 2     prints the transcript of these seeds for docs/diagnosis.md
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.diagnosis

ROOT = Path(__file__).resolve().parents[2]
MOST_ROUNDS = 3


@dataclass(frozen=True)
class Round:
    """One training with its evaluation: the command that was run, and the content of evaluation.json."""

    command: str
    result: dict[str, Any]


def follow_advice(directory: Path, seed: int) -> Iterator[Round]:
    """Trains by the seed's recipe, then runs the first command of each diagnosis, until an evaluation has none."""
    command = (
        f"./run_saelens_training.sh seed-recipe-demo --seed {seed} --wandb_mode disabled --eval_every 0"
        f" --checkpoint_path {directory / f'seed{seed}'} --cache_activations {directory / 'activations'}"
    )
    for _ in range(1 + MOST_ROUNDS):
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        files = (directory / f"seed{seed}").glob("*/*/final_*/evaluation.json")
        result = json.loads(max(files, key=lambda file: file.stat().st_mtime).read_text())
        yield Round(command, result)
        if not result.get("diagnosis"):
            return
        command = result["diagnosis"][0]["command"]
        assert "".join(command.split()) in "".join(
            done.stdout.split()
        )  # whitespace aside, since the terminal folds lines


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_seeds_recipe_is_healthy_after_three_rounds_of_its_first_advice(tmp_path_factory, seed):
    directory = tmp_path_factory.getbasetemp() / "advice"
    rounds = list(follow_advice(directory, seed))
    assert len(rounds) <= 1 + MOST_ROUNDS
    assert rounds[0].result["health"]["healthy"] < 4
    assert rounds[-1].result["health"]["healthy"] == 4
    for each in rounds[1:]:
        words = shlex.split(each.command)
        assert words[:2] == ["./run_saelens_training.sh", "--like"]
        assert 1 <= sum(word.startswith("--") for word in words[2:]) <= 3
        assert not any(word.startswith("@") for word in words)
        assert "--training_tokens" not in words


def transcript(rounds: list[Round]) -> str:
    """Returns the rounds in Markdown: the command, the metrics and the first cause of each."""
    parts = []
    for number, each in enumerate(rounds):
        metrics, health = each.result["metrics"], each.result["health"]
        parts.append(f"```bash\n{each.command}\n```")
        parts.append(
            f"Loss recovered {metrics['loss_recovered']:.2%}, L0 {metrics['l0']:.1f}, dead features"
            f" {metrics['dead_features']:.2%}, decoder absorption {metrics['decoder_absorption']:.3f}, explained"
            f" variance {metrics['explained_variance']:.3f}: **{health['healthy']}/4 healthy**."
        )
        if number < len(rounds) - 1:
            first = each.result["diagnosis"][0]
            parts.append(f"> {first['cause']}: {first['says']}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    for argument in sys.argv[2:]:
        print(
            f"### Seed {argument}\n\n{transcript(list(follow_advice(Path(sys.argv[1]), int(argument))))}\n", flush=True
        )
