"""inspect_sae_features.py writes what each feature does, checked by Transformers' own hidden states."""

import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM

from sae_toolkit import ROOT
from sae_toolkit.inspection.features_file import SCHEMA, read_description
from sae_toolkit.inspection.prepare import prepare_inspection
from sae_toolkit.inspection.run import InspectedSAE, _about, encoded_rows
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.inspection import parse_inspection_flags
from support.inspection import CONTEXT, FLAGS
from support.processes import run_process


@pytest.fixture(scope="module")
def features(inspected):
    return pq.read_table(inspected).to_pylist()


@pytest.fixture(scope="module")
def acts_RTF(features, tiny_model, trained, tokenizer):
    """Activations on the contexts that examples are of, by Transformers' hidden states and SAELens's encoder."""
    sae = SAE.load_from_disk(trained)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows_RT = {}
    for feature in features:
        for example in feature["examples"]:
            row = rows_RT.setdefault(example["row"], np.full(CONTEXT, -1))
            first = example["first_position"]
            row[first : first + len(example["token_ids"])] = example["token_ids"]
    whole = {row: ids for row, ids in rows_RT.items() if (ids >= 0).all()}
    with torch.no_grad():
        hidden = model(torch.tensor(np.stack(list(whole.values()))), output_hidden_states=True).hidden_states[2]
        acts_RTF = sae.encode(hidden)
    acts_RTF[:, 0] = 0  # the position that the training left out, as it did special tokens
    acts_RTF[torch.isin(torch.tensor(np.stack(list(whole.values()))), torch.tensor(tokenizer.all_special_ids))] = 0
    return dict(zip(whole, acts_RTF, strict=True))


def test_every_feature_has_a_row_by_the_schema(features, inspected, trained):
    table = pq.read_table(inspected)
    assert table.schema.equals(SCHEMA)
    assert [feature["feature"] for feature in features] == list(range(128))
    about = read_description(inspected)
    assert about["hook_name"] == "blocks.1.hook_resid_post"
    assert about["held_out"]
    assert about["contexts"] == -(-8000 // (CONTEXT - 1))  # the first position is left out
    assert sum(feature["firing_rate"] for feature in features) == pytest.approx(6, rel=0.02)
    for feature in features:
        assert sum(feature["histogram"]) == feature["n_firings"]
        assert feature["firing_rate"] == feature["n_firings"] / about["tokens"]


def test_examples_are_of_the_text_with_the_activations_that_it_gives(features, acts_RTF):
    compared = 0
    for feature in features:
        for example in feature["examples"]:
            if example["row"] not in acts_RTF:
                continue
            acts_T = acts_RTF[example["row"]][:, feature["feature"]]
            assert example["activation"] == pytest.approx(acts_T[example["position"]].item(), rel=1e-3)
            first = example["first_position"]
            expected = acts_T[first : first + len(example["token_ids"])]
            assert example["activations"] == pytest.approx(expected.tolist(), rel=1e-2, abs=1e-3)
            compared += 1
    assert compared > 100


def test_examples_are_the_strongest_first_and_then_the_drawn(features):
    for feature in features:
        kinds = [example["kind"] for example in feature["examples"]]
        assert kinds == sorted(kinds, reverse=True)
        strongest = [example["activation"] for example in feature["examples"] if example["kind"] == "strongest"]
        assert len(strongest) == min(4, feature["n_contexts"])
        assert strongest == sorted(strongest, reverse=True)
        if strongest:
            assert strongest[0] == pytest.approx(feature["max_activation"])
        drawn = [example for example in feature["examples"] if example["kind"] == "drawn"]
        assert [example["quantile"] for example in drawn] == pytest.approx(
            [1 - (i + 0.5) / len(drawn) for i in range(len(drawn))]
        )


def test_neighbors_and_promoted_tokens_are_those_of_the_weights(features, trained, tiny_model):
    sae = SAE.load_from_disk(trained)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    unit_FD = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    cosines_FF = unit_FD @ unit_FD.T - 2 * torch.eye(128)
    changes_FV = (sae.W_dec * model.model.norm.weight) @ model.lm_head.weight.T
    changes_FV -= changes_FV.mean(1, keepdim=True)
    for feature in features[::16]:
        f = feature["feature"]
        assert [each["feature"] for each in feature["neighbors"]] == cosines_FF[f].topk(5).indices.tolist()
        assert [each["change"] for each in feature["promoted"]] == pytest.approx(
            changes_FV[f].topk(10).values.tolist(), rel=1e-4
        )
        assert feature["suppressed"][0]["token_id"] == changes_FV[f].argmin()
        cosine = torch.cosine_similarity(sae.W_enc[:, f], sae.W_dec[f], dim=0).item()
        assert feature["encoder_cosine"] == pytest.approx(cosine, abs=1e-5)


def prepared(trained, tmp_path, *flags):
    words = ["--sae_path", str(trained), *FLAGS, "--output", str(tmp_path), *flags]
    settings = parse_inspection_flags("", words)
    (group,) = prepare_inspection(settings)
    return settings, group


def test_what_was_saved_of_another_dtype_or_of_an_sae_with_other_settings_is_not_gone_on_from(trained, tmp_path):
    settings, group = prepared(trained, tmp_path)
    (evaluated,) = group.saes
    about = _about(group, evaluated, settings.features, 8, torch.float32)
    assert about == _about(group, evaluated, settings.features, 8, torch.float32)
    assert about != _about(group, evaluated, settings.features, 8, torch.bfloat16)
    evaluated.sae.cfg.k += 1
    assert about != _about(group, evaluated, settings.features, 8, torch.float32)


def test_what_is_not_finite_where_nothing_is_measured_does_not_count(trained, tmp_path):
    _, group = prepared(trained, tmp_path, "--skip_positions", "1")
    each = InspectedSAE(group.saes[0], group, None, tmp_path)
    acts_BTD = 1e-3 * torch.randn(2, 5, 32)
    acts_BTD[:, 0] = torch.inf
    tokens_BT = np.full((2, 5), 7)
    for _, features_BTF, measured_BT in encoded_rows(each, tokens_BT, acts_BTD, None):
        assert features_BTF.isfinite().all()
        assert (features_BTF[:, 0] == 0).all()
        assert measured_BT.sum() == 8


@pytest.mark.faults
def test_a_killed_pass_goes_on_to_the_same_file(trained, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n\n".join(f"{i}: " + " ".join(str(i * j) for j in range(40)) for i in range(3000)))
    command = [sys.executable, "inspect_sae_features.py", "--sae_path", str(trained), *FLAGS, "--dataset", str(text)]
    command += ["--tokens", "200000", "--save_every", "1", "--no_page"]
    whole = run_process(*command, "--output", tmp_path / "whole")
    assert whole.status == 0, whole.stderr
    killed, saves = tmp_path / "killed", "unfinished/[0-9]*"
    with subprocess.Popen([*command, "--output", str(killed)], cwd=ROOT, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(killed.glob(saves)):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (killed / "unfinished/.7.partial").mkdir(exist_ok=True)  # of a kill in the middle of a save
    done = run_process(*command, "--output", killed)
    assert done.status == 0, done.stderr
    assert "going on after " in done.stderr
    assert pq.read_table(killed / "features.parquet").equals(pq.read_table(tmp_path / "whole/features.parquet"))
    assert [path.name for path in killed.iterdir()] == ["features.parquet"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--sae_path: names no SAE"),
        (("--sae_path", "nowhere"), "nowhere"),
        (("--sae_path", "SAE", "--examples", "-1"), "argument --examples"),
        (("--sae_path", "SAE", "--output", "README.md"), "--output README.md: cannot be made"),
        (("--sae_path", "SAE", "--promoted", "999999"), "--promoted 999999: these are listed for every feature"),
        (("--sae_path", "SAE", "--num_samples", "3"), "unrecognized arguments: --num_samples 3"),
    ],
)
def test_bad_input_is_one_line(script, trained, flags, says):
    done = script("inspect_sae_features.py", *(trained if flag == "SAE" else flag for flag in flags))
    assert (done.status, len(done.error_lines)) == (2, 1), done.stderr
    assert says in done.error_lines[0]


def test_examples_that_do_not_fit_into_memory_are_refused(script, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_toolkit.inspection.run.free_memory", lambda _: 100_000)
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, "--output", tmp_path / "out")
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert not (tmp_path / "out").exists()
    assert "--examples 4 --drawn_examples 3: 128 features" in done.error_lines[0]
    assert done.error_lines[0].endswith("; lower them")


@pytest.mark.parametrize("name", ["features.parquet", "delphi", "neuronpedia"])
@pytest.mark.parametrize("is_directory", [True, False])
def test_what_no_inspection_wrote_is_not_replaced(script, trained, tmp_path, name, is_directory):
    theirs = tmp_path / name / "setup.py" if is_directory else tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs")
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, "--output", tmp_path)
    assert (done.status, len(done.error_lines)) == (2, 1), done.stderr
    assert f"--output {tmp_path}: {name} " in done.error_lines[0]
    assert theirs.read_text() == "theirs"


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(script, trained, disk_of):
    disk = disk_of("64k")
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, "--output", disk)
    assert (done.status, len(done.error_lines)) == (2, 1), done.stderr
    assert "No space left on device" in done.error_lines[0]
    assert [path for path in disk.rglob("*") if path.is_file()] == []


def test_no_examples_are_no_obstacle(script, trained, tmp_path):
    none = ("--examples", "0", "--drawn_examples", "0", "--neighbors", "0", "--promoted", "0")
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, *none, "--output", tmp_path)
    assert done.status == 0, done.stderr
    features = pq.read_table(tmp_path / "features.parquet").to_pylist()
    assert not any(feature["examples"] or feature["neighbors"] or feature["promoted"] for feature in features)


def test_activations_that_are_not_finite_are_refused(script, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sae_toolkit.model.language_model.LanguageModel.activations",
        lambda self, tokens_BT: torch.full((*tokens_BT.shape, 32), torch.nan),
    )
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, "--output", tmp_path)
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "--lm_dtype: activations at blocks.1.hook_resid_post are not finite" in done.error_lines[0]
    assert not (tmp_path / "features.parquet").exists()


def test_saes_of_several_layers_go_through_in_one_pass(script, tiny_model, text_file, tmp_path, monkeypatch):
    """Their files are those that each gets alone. The weights are random, since only the passes matter."""
    saes = []
    for layer in (0, 2):
        metadata = SAEMetadata(
            model_name=str(tiny_model), hook_name=f"blocks.{layer}.hook_resid_post", context_size=CONTEXT,
            dataset_path=str(text_file), prepend_bos=True,
        )  # fmt: skip
        torch.manual_seed(layer)
        saes.append(tmp_path / f"layer {layer}")
        TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4, metadata=metadata)).save_model(saes[-1])
    rows_of_passes = []
    activations = LanguageModel.activations

    def counted(self, tokens_BT):
        if tokens_BT.shape[1] == CONTEXT:  # not the few tokens that find the width at a hook
            rows_of_passes.append(len(tokens_BT))
        return activations(self, tokens_BT)

    monkeypatch.setattr(LanguageModel, "activations", counted)
    flags = (*FLAGS, "--no_page", "--skip_positions", "1", "--max_activation_norm_multiple", "0", "--output")
    n_rows = []
    for i, given in enumerate(([saes[0]], [saes[1]], saes)):
        rows_of_passes.clear()
        done = script("inspect_sae_features.py", "--sae_path", *given, *flags, tmp_path / f"out {i}")
        assert done.status == 0, done.stderr
        n_rows.append(sum(rows_of_passes))
    assert n_rows[0] == n_rows[1] == n_rows[2] > 0
    for i, name in enumerate(("layer 0", "layer 2")):
        alone, together = tmp_path / f"out {i}", tmp_path / "out 2" / name
        assert pq.read_table(alone / "features.parquet").equals(pq.read_table(together / "features.parquet"))


def test_features_are_looked_for_in_other_saes(script, trained, tmp_path):
    """In one with every second decoder vector of the SAE, at other lengths; the rest are of another seed."""
    sae = SAE.load_from_disk(trained)
    other = TopKSAE(TopKSAEConfig(d_in=32, d_sae=128, k=4, metadata=sae.cfg.metadata))
    W_dec_FD, W_other_FD = sae.W_dec.detach(), other.W_dec.detach().clone()
    W_other_FD[::2] = 3 * W_dec_FD[::2]
    other.load_state_dict(other.state_dict() | {"W_dec": W_other_FD})
    other.save_model(tmp_path / "other")
    flags = ("--sae_path", trained, *FLAGS, "--stability", tmp_path / "other", trained, "--output", tmp_path / "out")
    done = script("inspect_sae_features.py", *flags)
    assert done.status == 0, done.stderr
    table = pq.read_table(tmp_path / "out/features.parquet")
    found = torch.from_numpy(table["found_again"].to_numpy().copy())
    cosines_FF = torch.nn.functional.cosine_similarity(W_dec_FD[:, None], W_other_FD[None], dim=-1)
    torch.testing.assert_close(found, cosines_FF.max(1).values, rtol=1e-4, atol=1e-5)
    assert (found[::2] > 0.999).all() and found[1::2].min() < 0.9
    assert read_description(tmp_path / "out/features.parquet")["stability"] == ["other"]


def test_an_sae_alone_cannot_be_looked_for_in_itself(script, trained):
    done = script("inspect_sae_features.py", "--sae_path", trained, *FLAGS, "--stability", trained)
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "there is only one SAE" in done.error_lines[0]
