"""SAELens loads what is published, the card shows what was measured, and refusals are one line."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.reports.publish import check_may_publish, check_publishable, training_recipe
from sae_toolkit.saes.foreign import GroupMaxSAE, GroupMaxSAEConfig
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.settings.command_line import default_flags, parse_training_flags
from sae_toolkit.text.positions import PositionFilter
from support.loopback_hub import LoopbackHub
from support.processes import run_process
from support.trainings import Trainings

TOKEN = "hf_" + "a" * 34
ID = "blocks.1.hook_resid_post"
LOAD = f"""
import sys
from safetensors.torch import save_file
from sae_lens import SAE
sae = SAE.from_pretrained(sys.argv[1], "{ID}")
save_file({{name: tensor.contiguous() for name, tensor in sae.state_dict().items()}}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = LoopbackHub(tmp_path_factory.mktemp("hub"))
    (hub.directory / "models").mkdir()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    return hub.environment(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def scripts(environment, tmp_path_factory):
    """Runs scripts for which the hub is the Hugging Face Hub."""
    scripts = Trainings(tmp_path_factory.mktemp("scripts"), **environment, HF_TOKEN=TOKEN)
    yield scripts
    scripts.close()


@pytest.fixture(scope="module")
def trained(scripts, tiny_model, text_file, tmp_path_factory):
    done = scripts.script(
        *("sae_lens_train.py", "--model_name", tiny_model, "--layer", 1, "--dataset_path", text_file),
        *("--context_size", 64, "--expansion_factor", 4, "--training_tokens", 2048, "--n_batches_in_buffer", 16),
        *("--architecture", "batchtopk", "--k", 8, "--lr", 2e-3, "--device", "cpu", "--wandb_mode", "disabled"),
        *("--checkpoint_path", tmp_path_factory.mktemp("trained")),
    )
    assert done.status == 0, done.stderr
    return Path(done.stdout.strip())


def publish(scripts, sae_path, repository):
    return scripts.script(
        *("evaluate_sae_real_activations.py", "--sae_path", sae_path, "--num_samples", 12),
        *("--n_features", 0, "--no_diagnosis", "--push_to_hub", repository),
    )


@pytest.fixture(scope="module")
def published(hub, scripts, trained):
    """The directory of a repository to which an SAE was published twice."""
    for _ in range(2):
        done = publish(scripts, trained, "lab/my_sae")
        assert done.status == 0, done.stderr
        assert f"published: {hub.url}/lab/my_sae" in done.stderr
        assert TOKEN not in done.stderr
    return hub.directory / "models" / "lab" / "my_sae"


@pytest.mark.usefixtures("published")
def test_saelens_reads_what_was_published(environment, trained, tmp_path):
    done = run_process(sys.executable, "-c", LOAD, "lab/my_sae", tmp_path / "read.safetensors", **environment)
    assert done.status == 0, done.stderr
    theirs, ours = load_file(tmp_path / "read.safetensors"), load_file(trained / "sae_weights.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_the_card_says_what_was_measured_and_how_it_was_trained(published, trained):
    card = ModelCard.load(published / "README.md")
    assert card.data.library_name == "saelens"
    result = json.loads((trained / "evaluation.json").read_text())
    assert json.loads((published / ID / "evaluation.json").read_text()) == result
    assert f"| L0 | {result['metrics']['l0']:.1f} |" in card.text
    assert f"{result['health']['healthy']}/4 metrics healthy" in card.text
    assert f'SAE.from_pretrained("lab/my_sae", "{ID}")' in card.text
    (recipe,) = re.findall(r"^python sae_lens_train.py (.*)$", card.text, re.MULTILINE)
    again, saved = (
        parse_training_flags(shlex.split(recipe)).as_flags(),
        json.loads((trained.parent / "training_flags.json").read_text()),
    )
    of_the_sae = ("architecture", "k", "lr", "expansion_factor", "training_tokens", "seed", "layer", "dataset_path")
    assert {name: again[name] for name in of_the_sae} == {name: saved[name] for name in of_the_sae}
    assert saved["checkpoint_path"] not in recipe
    assert saved["checkpoint_path"] != default_flags()["checkpoint_path"]


def test_the_card_names_the_model_and_text_of_the_training_and_those_of_the_measurement(
    hub, scripts, trained, tiny_model, tmp_path
):
    """They can differ, and a checkpoint of the middle of a run is not called finished."""
    run = tmp_path / "run"
    shutil.copytree(trained.parent, run)
    checkpoint = (run / trained.name).rename(run / "1024")
    cfg = json.loads((checkpoint / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": "lab/their-model", "dataset_path": "lab/their-text", "dataset_split": "train"}
    (checkpoint / "cfg.json").write_text(json.dumps(cfg))
    (checkpoint / "manifest.json").unlink()
    other_text = tmp_path / "other.txt"
    other_text.write_text("\n\n".join(f"Line {i} of another text. " * 20 for i in range(60)))
    done = scripts.script(
        *("evaluate_sae_real_activations.py", "--sae_path", checkpoint, "--num_samples", 12, "--n_features", 0),
        *("--model_name", tiny_model, "--dataset", other_text, "--no_diagnosis", "--push_to_hub", "lab/other"),
    )
    assert done.status == 0, done.stderr
    card = ModelCard.load(hub.directory / "models" / "lab" / "other" / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("lab/their-model", ["lab/their-text"])
    assert "Sparse autoencoders of lab/their-model, for" in card.text
    assert f"measured with {tiny_model} on {other_text}" in card.text
    assert json.loads((hub.directory / "models" / "lab" / "other" / ID / "cfg.json").read_text())["d_in"] == 32
    assert "**Not finished**: its run saved it after 1,024 tokens." in card.text


def test_what_cannot_be_loaded_from_the_hub_or_has_the_name_of_another_is_refused_before_anything_is_measured():
    cfg = {"d_in": 4, "d_sae": 8, "device": "cpu"}
    group_max, topk = GroupMaxSAE(GroupMaxSAEConfig(k=2, **cfg)), TopKSAE(TopKSAEConfig(k=2, **cfg))

    def groups(*saes):
        found = [(SAEFile(path, Path(path), "any", "any"), sae) for path, sae in saes]
        return [SimpleNamespace(hook_name=ID, saes=[EvaluatedSAE(*each, PositionFilter()) for each in found])]

    with pytest.raises(UserError, match="a/sae is of the architecture groupmax, which SAELens could not load"):
        check_publishable(groups(("a/sae", group_max)))
    with pytest.raises(UserError, match=f"two SAEs would be published as {ID}/sae"):
        check_publishable(groups(("a/sae", topk), ("b/sae", topk)))
    check_publishable(groups(("a/first", topk), ("b/second", topk)))


def test_the_card_names_the_text_that_took_the_place_of_another(trained):
    recipe = training_recipe(trained, "lab/other-text")
    assert parse_training_flags(shlex.split(recipe)).text.dataset_path == "lab/other-text"


def test_a_readme_that_somebody_wrote_stays(hub, scripts, trained):
    repository = hub.directory / "models" / "somebody" / "theirs"
    repository.mkdir(parents=True)
    (repository / "README.md").write_text("My own words.\n")
    done = publish(scripts, trained, "somebody/theirs")
    assert done.status == 0, done.stderr
    assert (repository / "README.md").read_text() == "My own words.\n"
    assert "metrics healthy" in (repository / ID / "README.md").read_text()


def test_a_refusal_in_the_middle_is_one_line_and_the_measurements_stay(hub, scripts, trained):
    hub.inject(403, "/commit/", method="POST", times=9)
    done = publish(scripts, trained, "somebody/new")
    hub.heal()
    assert done.status == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert error.startswith(
        "error: --push_to_hub somebody/new: the Hugging Face Hub does not let this token write there"
    )
    assert "Traceback" not in done.stderr
    assert json.loads((trained / "evaluation.json").read_text())["metrics"]["l0"] > 0


@pytest.mark.parametrize(
    ("repository", "how", "says"),
    [
        (
            "somebody/sae",
            "no token",
            "nobody is logged in; run `hf auth login`, or set HF_TOKEN to a token that may write",
        ),
        ("somebody/sae", "a token that is refused", "refuses the token; log in again"),
        ("somebody/sae", "a token that may read", "the token may only read; make one that may write"),
        ("others/sae", "", "somebody is logged in, and does not belong to others; use somebody/sae"),
        ("sae", "", "must be owner/name"),
        ("some body/sae", "", "is not the name of a repository"),
        ("somebody/sae", "offline", "HF_HUB_OFFLINE is set; unset it to publish"),
        ("somebody/sae", "nobody there", "cannot be reached"),
    ],
)
def test_who_may_not_publish_is_told_so_before_anything_is_measured(hub, monkeypatch, tmp_path, repository, how, says):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9" if how == "nobody there" else hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "" if how == "no token" else TOKEN)
    monkeypatch.setattr("sae_toolkit.files.connection._FIRST_WAIT", 0.0)
    if how == "a token that may read":
        monkeypatch.setitem(hub.user, "auth", {"accessToken": {"role": "read"}})
    if how == "a token that is refused":
        hub.inject(401, "whoami")
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        check_may_publish(repository)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"--push_to_hub {repository}: ")
