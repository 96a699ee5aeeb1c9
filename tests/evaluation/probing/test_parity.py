"""--probing gives the numbers of sae-probes, on a data set of sae-probes and the same activations."""

import json

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from sae_toolkit.evaluation.probing.activations import last_activations
from sae_toolkit.evaluation.probing.probe import METRICS
from sae_toolkit.evaluation.probing.run import KS, measure_probing
from sae_toolkit.evaluation.probing.tasks import read_task
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.files.own_environments import OwnEnvironment
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationTextSettings, MeasurementSettings
from sae_toolkit.terminal.progress import Progress
from support.processes import HOOK, ROOT, run_process

ENVIRONMENT = OwnEnvironment(
    "sae-probes",
    "sae-probes",
    "./run_tests.sh --parity",
    imports="sae_probes",
    python_versions=((3, 11), (3, 12)),
    because="its packages are pinned for them",
    takes="2.2 GB, some minutes",
)
WORKER = ROOT / "tests/support/probe_with_sae_probes.py"
DATASET = "149_twt_emotion_happiness"  # short texts


@pytest.fixture(scope="module")
def sae_dir(tmp_path_factory):
    """A TopK SAE of random directions at layer 12 of the embedded model."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=576, d_sae=1152, k=32))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = HOOK, EMBEDDED_MODEL
    path = tmp_path_factory.mktemp("sae")
    sae.save_model(path)
    return path


@pytest.mark.parity
def test_probes_agree_with_sae_probes_to_three_digits(sae_dir, language_model, tmp_path):
    python = ENVIRONMENT.python()
    file = tmp_path / "texts.csv"
    done = run_process(python, WORKER, "texts", DATASET, file)
    assert done.status == 0, done.stderr[-2000:]
    task = read_task(str(file), text_column="prompt", most_examples=5000, keep_repeated=True)
    (group,) = prepare_evaluations(
        EvaluatedSAESettings(sae_path=(str(sae_dir),), device="cpu"),
        EvaluationTextSettings(dataset=EMBEDDED_TEXT, num_samples=2, context_length=128),
        MeasurementSettings(),
    )
    with Progress("reading", len(task.texts), unit="texts") as progress:
        acts_ND, is_found_N = last_activations(group, language_model, task.texts, batch_size=16, progress=progress)
    assert is_found_N.all()
    cache = tmp_path / "cache/model_activations_model"
    cache.mkdir(parents=True)
    torch.save(acts_ND, cache / f"{DATASET}_{HOOK}.pt")

    done = run_process(python, WORKER, "probe", DATASET, sae_dir, HOOK, cache.parent, tmp_path / "out", *KS)
    assert done.status == 0, done.stderr[-2000:]
    (of_sae,) = tmp_path.glob("out/sae_probes_model/normal_setting/*.json")
    (of_baseline,) = tmp_path.glob("out/baseline_results_model/normal_setting/*.json")
    theirs, (their_baseline,) = json.loads(of_sae.read_text()), json.loads(of_baseline.read_text())

    results = measure_probing([task], group, language_model, 16)[0].results
    (measured,) = results["tasks"]
    assert [each["k"] for each in measured["sae"]] == [each["k"] for each in theirs]
    assert measured["features"] == theirs[-1]["indices"]
    for ours, their in zip([*measured["sae"], measured["baseline"]], [*theirs, their_baseline], strict=True):
        assert {name: ours[name] for name in METRICS} == pytest.approx({n: their[n] for n in METRICS}, abs=1e-3)
