"""Fine-tuning a healthy SAE of the embedded model on the text that it was trained on leaves it healthy throughout."""

import json
from pathlib import Path

import pytest

from support.processes import train_demo

pytestmark = pytest.mark.diagnosis

# How each is trained to an L0 of about 64. A weight that was found is given to the fine-tuning.
TRAINED = {
    "standard": ["--target_l0", 64],
    "topk": ["--k", 64],
    "batchtopk": ["--k", 64],
    "jumprelu": ["--target_l0", 64],
}
WEIGHTS = {"standard": "l1_coefficient", "jumprelu": "l0_coefficient"}
FINE_TUNING = {
    "training_tokens": 100_000,
    "eval_every": 10_000,
    "lr": 2e-4,
    "lr_warm_up_steps": 5,
    "lr_decay_steps": 20,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fine_tuning")


def readings(sae_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (sae_path.parent / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("architecture", TRAINED)
def test_a_healthy_sae_stays_healthy_from_the_first_reading_on(directory, architecture):
    flags = ["--architecture", architecture, *TRAINED[architecture]]
    trained = train_demo(directory, *flags)
    start = readings(trained)[-1]
    if weight := WEIGHTS.get(architecture):
        flags += [f"--{weight}", json.loads((trained / "cfg.json").read_text())["metadata"][weight]]
    tuned = train_demo(
        directory,
        *flags,
        "--init_from",
        trained,
        *(word for name in FINE_TUNING for word in (f"--{name}", FINE_TUNING[name])),
    )
    on_the_way = readings(tuned)
    assert len(on_the_way) == 10
    for reading in [start, *on_the_way]:
        print(
            architecture, *(f"{name.partition('/')[2]} {value:.4g}" for name, value in reading.items() if "/" in name)
        )
    for reading in on_the_way:
        assert reading["held_out/ce_clean"] == pytest.approx(start["held_out/ce_clean"])  # the same text
        assert reading["held_out/loss_recovered"] > start["held_out/loss_recovered"] - 0.005
        assert reading["held_out/l0"] == pytest.approx(start["held_out/l0"], rel=0.15)
        assert reading["held_out/dead_features"] < start["held_out/dead_features"] + 0.02
