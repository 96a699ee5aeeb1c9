"""Tasks, their halves, the choice of features, and the scores of probes.

The model and the SAEs are of random weights: what matters here is which texts, positions and features are used. The
numbers are compared with scikit-learn here, and with sae-probes in test_parity.py.
"""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.evaluation.probing.activations import last_activations
from sae_toolkit.evaluation.probing.embedded_tasks import embedded_tasks
from sae_toolkit.evaluation.probing.features import feature_columns, rank_features
from sae_toolkit.evaluation.probing.probe import resampled_weights, scores
from sae_toolkit.evaluation.probing.run import _units, measure_probing, read_tasks
from sae_toolkit.evaluation.probing.split import split
from sae_toolkit.evaluation.probing.table import show_probing
from sae_toolkit.evaluation.probing.tasks import Task, read_task
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.settings.evaluation import MeasurementSettings, parse_evaluation_flags
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat

COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def tasks():
    return {task.name: task for task in embedded_tasks()}


def topk_sae(d_in, d_sae, k):
    torch.manual_seed(0)
    return TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k))


def test_the_embedded_tasks_are_the_same_on_every_machine(tasks):
    digest = hashlib.sha256()
    for name, task in tasks.items():
        digest.update(json.dumps([name, task.texts, task.y_N.tolist(), task.document_N.tolist()]).encode())
    assert len(tasks) == 10
    assert digest.hexdigest()[:16] == "faaed892f07f1bd7"


def test_no_text_and_no_document_is_in_both_halves_and_the_classes_are_balanced(tasks):
    for task in tasks.values():
        halves = split(task, seed=42)
        texts, documents = ([{values[n] for n in half} for half in halves] for values in (task.texts, task.document_N))
        assert texts[0].isdisjoint(texts[1]) and documents[0].isdisjoint(documents[1]), task.name
        for half in halves:
            assert len(half) >= 200 and task.y_N[half].mean() == 0.5, task.name


def write_colours(directory, *n_of_class, name="colours.csv"):
    """Texts that end with the name of a colour, which is their label."""
    rows = [f"Number {i} on the list is {COLOURS[c]},{COLOURS[c]}" for c, n in enumerate(n_of_class) for i in range(n)]
    path = directory / name
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def test_texts_of_a_file_are_trained_on_or_tested_on_and_never_both(tmp_path):
    task = read_task(str(write_colours(tmp_path, 400, 300)), most_examples=5000)
    train, test = split(task, seed=42)
    assert set(train).isdisjoint(test) and len(set(train)) == 501 and len(set(test)) == 99
    assert (task.y_N[train].sum(), task.y_N[test].sum()) == (251, 50)


@pytest.mark.parametrize(("n_0", "n_1"), [(100, 100), (400, 150), (150, 400), (100, 101), (101, 100), (900, 561)])
def test_either_class_can_be_the_rarer(n_0, n_1):
    y_N = np.repeat([0, 1], [n_0, n_1])
    train, test = split(Task("task", "", ("",) * len(y_N), y_N, ("0", "1")), seed=42)
    assert set(train).isdisjoint(test)
    for half in (train, test):
        assert abs(2 * y_N[half].sum() - len(half)) <= 1
    assert len(test) in (98, 99, 100)


def test_rows_beyond_the_limit_are_not_read_and_a_line_says_so(tmp_path, caplog):
    task = read_task(str(write_colours(tmp_path, 150, 150)), most_examples=260)
    assert len(task.texts) == 260
    assert "reading only the first 260 rows, as --probing_examples says" in caplog.text
    with pytest.raises(UserError, match="one class .*; only the first 120 rows were read: shuffle it, or raise --prob"):
        read_task(str(write_colours(tmp_path, 150, 150)), most_examples=120)


def test_a_text_that_occurs_again_is_in_the_task_once_unless_it_is_asked_for(tmp_path, caplog):
    file = write_colours(tmp_path, 120, 110)
    file.write_text(file.read_text() + "Number 5 on the list is red,red\n" * 30)
    assert len(read_task(str(file), most_examples=5000).texts) == 230
    assert "left out 30 texts that occur again" in caplog.text
    assert len(read_task(str(file), most_examples=5000, keep_repeated=True).texts) == 260


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "half a pair \ud800", "label": 1}, "row 301: its 'text' is not valid Unicode; remove it"),
        ({"text": "a text", "label": " "}, "row 301 has no label in the column label"),
        ({"text": "a text", "label": 1}, "row 301 has the integer 1 in the column label, and row 1 has the text 0"),
        ({"text": "a text", "label": True}, "row 301 has the truth value True in the column label"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, says):
    rows = [{"text": f"{i} is a number", "label": str(i % 2)} for i in range(300)]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*rows, row]))
    with pytest.raises(UserError, match=re.escape(says)):
        read_task(str(path), most_examples=5000)


MISTAKES = {
    "one class": (("text,label", "{i} is a number,yes"), "has one class (yes), and probing tells two apart; add texts"),
    "three classes": (
        ("text,label", "{i} is a number,{third}"),
        "has 3 classes (0, 1, 2), and probing tells two apart;",
    ),
    "few of a class": (
        ("text,label", "{i} is a number,{rare}"),
        "3 different texts labelled True; probing needs",
    ),
    "no labels": (("text,colour", "{i} is a number,{odd}"), "has no column of labels among text, colour; name one by"),
    "labels twice": (
        ("text,label,target", "{i} is a number,{odd},{odd}"),
        "has the columns label and target; name one",
    ),
    "no texts": (("number,label", "{i},{odd}"), "no column of text or token ids among number"),
    "texts in two columns": (
        ("one,two,label", "{i} is a number,and {i} is another,{odd}"),
        "its columns one and two read as text; choose one by --probing_text_column",
    ),
    "empty texts": (
        ("text,label", "{text},{odd}"),
        "3 of its 300 rows have no text in the column text, the first is row 1",
    ),
    "a text with both labels": (
        ("text,label", "{half} is a number,{odd}"),
        "row 2 has the label 1, and row 1 with the same text has 0; remove one of them",
    ),
    "labels of fractions": (
        ("text,label", "{i} is a number,{i}.5"),
        "row 1 has float 0.5 in the column label; labels",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_is_no_task_is_refused_in_one_line(tmp_path, mistake):
    (head, row), says = MISTAKES[mistake]
    rows = [
        row.format(
            i=i, half=i // 2, third=i % 3, odd=i % 2, rare=i < 3, text="" if i % 100 == 0 else f"{i} is a number"
        )
        for i in range(300)
    ]
    path = tmp_path / "task.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(UserError, match=f"^--probing {re.escape(str(path))}: .*{re.escape(says)}") as error:
        read_task(str(path), most_examples=5000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("probing", "says"),
    [
        ("embedded:news", "the only embedded tasks are embedded:tasks"),
        ("nowhere.csv", "--probing nowhere.csv: "),
    ],
)
def test_a_task_that_is_not_there_is_refused(probing, says):
    with pytest.raises(UserError, match=says):
        read_tasks(MeasurementSettings(probing=(probing,)), [])


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    files = [str(write_colours(directory, 100, 100)) for directory in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match="--probing: two tasks are called colours; leave one out"):
        read_tasks(MeasurementSettings(probing=tuple(files)), [])


def test_features_are_ranked_by_the_difference_of_their_normalized_means_and_planted_ones_come_first():
    sae = topk_sae(16, 400, 8)
    acts_ND = torch.randn(300, 16)
    y_N = np.arange(300) % 2
    acts_ND[y_N == 1] += 6 * sae.W_enc[:, 7].detach() / sae.W_enc[:, 7].norm()
    ranked_F = rank_features(sae, acts_ND, y_N)
    assert ranked_F[0] == 7
    with torch.no_grad():
        features_NF = sae.encode(acts_ND).double().numpy()
    scale_F = features_NF.sum(0) / ((features_NF != 0).sum(0) + 1e-6) + 1e-6
    difference_F = np.abs(features_NF[y_N == 1].mean(0) - features_NF[y_N == 0].mean(0)) / scale_F
    np.testing.assert_allclose(difference_F[ranked_F], np.sort(difference_F)[::-1], rtol=1e-5, atol=1e-9)
    columns_NK = feature_columns(sae, acts_ND, ranked_F[:5])
    np.testing.assert_allclose(columns_NK, features_NF[:, ranked_F[:5]], rtol=1e-6)


def test_scores_are_those_of_scikit_learn_for_any_weights():
    random = np.random.RandomState(0)
    y_M = random.randint(0, 2, 80)
    probability_M = np.round(np.clip(0.5 + 0.2 * (y_M - 0.5) + 0.3 * random.randn(80), 0, 1), 1)  # many are equal
    weight_RM = np.concatenate([np.ones((1, 80)), resampled_weights(80, np.arange(80) // 3, seed=0, resamples=20)])
    ours = scores(y_M, probability_M, weight_RM)
    for r, weight_M in enumerate(weight_RM):
        theirs = {
            "test_auc": roc_auc_score(y_M, probability_M, sample_weight=weight_M),
            "test_acc": accuracy_score(y_M, probability_M > 0.5, sample_weight=weight_M),
            "test_f1": f1_score(y_M, probability_M > 0.5, average="weighted", sample_weight=weight_M),
        }
        assert {name: values[r] for name, values in ours.items()} == pytest.approx(theirs, abs=1e-12)


def test_a_bootstrap_over_documents_draws_whole_documents():
    document_M = np.array([5, 5, 9, 9, 9, 2])
    weight_RM = resampled_weights(6, document_M, seed=0, resamples=200)
    assert (weight_RM[:, 0] == weight_RM[:, 1]).all() and (weight_RM[:, 2] == weight_RM[:, 2:5].T).all()
    assert (weight_RM[:, [0, 2, 5]].sum(1) == 3).all() and weight_RM.std() > 0.5


def test_a_flag_about_tasks_without_tasks_is_refused():
    with pytest.raises(UserError, match="^--probing_label_column topic: is about the tasks of --probing; give both"):
        parse_evaluation_flags("", ["--sae_path", "sae", "--probing_label_column", "topic"])


@pytest.fixture(scope="module")
def at_a_hook(tiny_model):
    """The tiny model, and an SAE at its hook that leaves out the token <|im_end|> and the first two positions."""
    source = find_model(str(tiny_model))
    positions = PositionFilter(special_token_ids=(2,), skip_positions=2)
    prepared = SimpleNamespace(
        saes=(EvaluatedSAE(SimpleNamespace(name="sae"), topk_sae(32, 96, 4), positions),),
        protocol="health",
        device="cpu",
        model=source,
        tokenizer=load_tokenizer(source),
        context=ContextFormat(context_size=32),
        seed=42,
    )
    return prepared, load_language_model(source, "blocks.2.hook_resid_post", "cpu", torch.float32)


def test_the_activation_of_a_text_is_that_of_its_last_token_that_the_sae_is_measured_at(at_a_hook):
    prepared, model = at_a_hook
    texts = ["a", "Five words are in here.", "And a text that is so long that it is longer than the others.<|im_end|>"]
    with Progress("reading", len(texts)) as progress:
        acts_ND, is_found_N = last_activations(prepared, model, texts, batch_size=2, progress=progress)
    assert is_found_N.tolist() == [False, True, True]  # BOS and one token are skipped
    for n, last in ((1, -1), (2, -2)):
        ids = prepared.tokenizer(texts[n], add_special_tokens=False)["input_ids"]
        alone_1TD = model.activations(torch.tensor([[1, *ids]]))
        torch.testing.assert_close(acts_ND[n], alone_1TD[0, last], rtol=1e-4, atol=1e-5)


def test_a_task_whose_texts_have_no_position_of_the_sae_is_refused(at_a_hook):
    letters = "abcdefghijklmnopqrstuvwxyz"
    task = Task("letters", "", tuple(letters * 10), np.arange(260) % 2, ("0", "1"))
    with pytest.raises(UserError, match="--probing: letters: only 0 training or test texts of a class have a position"):
        measure_probing([task], *at_a_hook, 8)


def test_the_same_text_in_training_and_test_is_counted_and_drawn_as_one(at_a_hook):
    """A bootstrap over its copies would be far too sure."""
    texts = [f"A list that has the number {i}" for i in range(120)]
    y_N = np.arange(120) % 2
    task = Task("again", "", tuple(8 * texts), np.tile(y_N, 8), ("0", "1"))
    units_M = _units(task, np.array([0, 5, 120, 7, 125]))
    assert units_M.tolist() == [0, 1, 0, 3, 1]
    (measured,) = measure_probing([task], *at_a_hook, 8)
    (of_task,) = measured.results["tasks"]
    assert of_task["n_test_trained_on"] > 0.9 * of_task["n_test"]
    ((name, *_),) = show_probing(measured.results).rows
    assert re.fullmatch(r"again \(\d+% of the test texts were trained on\)", name)


def test_an_sae_of_which_no_feature_fires_is_named(at_a_hook, caplog):
    prepared, model = at_a_hook
    sae = topk_sae(32, 96, 4)
    sae.b_enc.data.fill_(-1e4)
    silent = SimpleNamespace(**vars(prepared) | {"saes": (replace(prepared.saes[0], sae=sae),)})
    texts = tuple(f"A list that has the number {i}" for i in range(240))
    measure_probing([Task("numbers", "", texts, np.arange(240) % 2, ("0", "1"))], silent, model, 8)
    assert "--probing: numbers: no feature of sae fires at the last tokens" in caplog.text


def test_131072_features_take_a_few_hundred_megabytes_beside_the_sae():
    sae = topk_sae(576, 131_072, 32)
    acts_ND, y_N = torch.randn(240, 576), np.arange(240) % 2  # 120 MiB for one tensor of all features
    acts_ND[y_N == 1] += 20 * sae.W_enc[:, 100_000].detach() / sae.W_enc[:, 100_000].norm()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    ranked_F = rank_features(sae, acts_ND, y_N)
    columns_NK = feature_columns(sae, acts_ND, ranked_F[:128])
    assert ranked_F[0] == 100_000 and columns_NK.shape == (240, 128)
    assert memory("VmHWM") - before < 200 * 2**20


def memory(name):
    """Resident memory of this process, or the peak of it, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_the_last_token_is_found_by_few_features_and_labels_by_chance_are_not(tiny_model, text_file, tmp_path, script):
    colours = write_colours(tmp_path, 250, 250)
    random = np.random.RandomState(0)
    lines = [{"text": f"A list that has the number {i}", "label": bool(random.randint(2))} for i in range(600)]
    chance = tmp_path / "chance.jsonl"
    chance.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sae = topk_sae(32, 96, 4)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.save_model(tmp_path / "sae")
    done = script(
        "evaluate_sae_real_activations.py",
        *("--sae_path", tmp_path / "sae", "--model_name", tiny_model, "--dataset", text_file, "--num_samples", 8),
        *("--context_length", 64, "--skip_positions", 1, "--device", "cpu", "--lm_dtype", "float32"),
        *("--n_features", 0, "--no_diagnosis", "--probing", colours, chance, "--seed", 2**32 + 42),
    )
    assert done.status == 0, done.stderr
    results = json.loads((tmp_path / "sae/evaluation.json").read_text())["probing"]
    told, by_chance = results["tasks"]
    assert (told["task"], told["classes"], told["n_train"], told["n_test"]) == ("colours", ["blue", "red"], 400, 99)
    assert told["baseline"]["test_auc"] == 1 and told["sae"][3]["test_auc"] > 0.95
    assert [each["k"] for each in told["sae"]] == [1, 2, 4, 8, 16, 32, 64]  # of 96 features
    low, high = by_chance["baseline"]["intervals"]["test_auc"]
    assert low <= 0.5 <= high and high - low < 0.3
    mean = (told["baseline"]["test_auc"] + by_chance["baseline"]["test_auc"]) / 2
    assert results["mean"]["baseline"]["test_auc"] == pytest.approx(mean)
    for each in (*told["sae"], *by_chance["sae"], *results["mean"]["sae"]):
        assert all(0 <= low <= each[name] <= high <= 1 for name, (low, high) in each["intervals"].items())
    assert "k-sparse probing" in done.stdout and "k-sparse probing" in (tmp_path / "sae/report.md").read_text()
