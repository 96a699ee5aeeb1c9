"""Text is found by name in every form it comes in, and the documents held out of training stay out of it."""

import gzip
import json
import random
import re

import datasets
import numpy as np
import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.files.embedded import EMBEDDED_TEXT
from sae_toolkit.text.markup import text_of_html
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows, collect_training_rows, token_rows
from sae_toolkit.text.sources import HeldOutSplit, open_text

BOS = 1
TEXTS = [f"Document {i} tells of {word}." for i, word in enumerate(["rivers", "kings", "trees", "stars"] * 5)]


@pytest.fixture(scope="module")
def wikipedia():
    return list(open_text(EMBEDDED_TEXT, flag="--dataset_path").documents())


def write_forms(directory):
    """The same documents as a file or directory of each kind."""
    data = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    suffixes = (".txt", ".md", ".rst", ".html", ".jsonl", ".csv", ".tsv", ".parquet")
    forms = {suffix: directory / f"data{suffix}" for suffix in suffixes}
    for suffix in (".txt", ".md", ".rst"):
        forms[suffix].write_text("\n\n".join(TEXTS))
    forms[".html"].write_text("".join(f"<p>{text}</p>" for text in TEXTS))
    data.to_csv(forms[".tsv"], index=False, sep="\t")
    data.to_json(forms[".jsonl"])
    data.to_csv(forms[".csv"], index=False)
    data.to_parquet(forms[".parquet"])
    forms["saved"] = directory / "saved"
    data.save_to_disk(forms["saved"])
    forms["saved_splits"] = directory / "saved_splits"
    datasets.DatasetDict(train=data, test=data.take(1)).save_to_disk(forms["saved_splits"])
    forms["text_directory"] = directory / "texts"
    forms["text_directory"].mkdir()
    for i, text in enumerate(TEXTS):
        suffix = (".txt", ".md", ".rst", ".html")[i % 4]
        (forms["text_directory"] / f"{i:02}{suffix}").write_text(text)
    (forms["text_directory"] / "README.md").write_text("---\nlicense: mit\n---\nThe card of a data set.")
    (forms["text_directory"] / ".git").mkdir()
    (forms["text_directory"] / ".git" / "hidden.md").write_text("Not text.")
    return forms


@pytest.mark.parametrize("streaming", [True, False])
def test_every_form_of_local_data_gives_the_same_documents(tmp_path, streaming):
    for form, path in write_forms(tmp_path).items():
        source = open_text(str(path), flag="--dataset_path", streaming=streaming)
        assert list(source.documents()) == TEXTS, form
        assert (source.column, source.split, source.tokenized) == ("text", "train", False), form


def test_a_data_set_of_several_configurations_works_as_typed(tmp_path):
    """Laid out as wikitext is on the hub: two configurations, three splits."""
    for config in ("big", "small"):
        for split in ("train", "test", "validation"):
            file = tmp_path / config / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps({"text": f"{config} {split} {i}"}) + "\n" for i in range(3)))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {config}/{s}.jsonl\n" for s in ("train", "test", "validation"))
            for config in ("big", "small")
        )
        + "---\n"
    )
    found = open_text(str(tmp_path), flag="--dataset_path")
    assert (found.config, found.split) == ("big", "train")
    assert next(iter(found.documents())) == "big train 0"
    held_out = open_text(str(tmp_path), flag="--dataset", config="small", preferred_splits=("test", "train"))
    assert next(iter(held_out.documents())) == "small test 0"
    with pytest.raises(UserError, match="--dataset_config medium: .* has big, small"):
        open_text(str(tmp_path), flag="--dataset_path", config="medium")
    with pytest.raises(UserError, match="--dataset_split dev: .* has train, test, validation"):
        open_text(str(tmp_path), flag="--dataset_path", split="dev")


def test_a_page_is_read_as_a_browser_shows_it(tmp_path):
    page = """<html><head><style>p { color: red }</style><script>var hidden = "<p>no</p>"</script></head><body>
    <!-- hidden --><h1>Rivers &amp; kings</h1><p>A line that
    goes <b>on</b>, <i>and</i> ends.</p><ul><li>one<li>two</ul><table><tr><th>a</th><td>b</td></tr></table>
    <pre>def f():\n    return 1</pre>caf\xe9<br>last</body></html>"""
    shown = (
        "Rivers & kings\n\nA line that goes on, and ends.\n\none\ntwo\n\na b\n\ndef f():\n    return 1\n\ncaf\xe9\nlast"
    )
    assert text_of_html(page.encode()) == shown
    assert text_of_html(('<meta charset="latin-1">' + page).encode("latin-1")) == shown
    assert text_of_html(b"<div>" * 3_000 + b"deep").strip() == "deep"
    (tmp_path / "bad.html").write_bytes(page.encode("latin-1"))
    with pytest.raises(UserError, match=r"bad.html: 1 of .* cannot be used; the first is record 1: not UTF-8"):
        open_text(str(tmp_path / "bad.html"), flag="--dataset_path")


def test_what_is_no_text_is_answered_with_the_kinds_that_are(tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "one.pdf").write_bytes(b"%PDF")
    for path in (tmp_path / "papers", tmp_path / "papers" / "one.pdf"):
        with pytest.raises(UserError, match=r"--dataset_path \S+: .* use \.txt, \.md, .*\.parquet$"):
            open_text(str(path), flag="--dataset_path")


def test_a_configuration_is_refused_where_there_is_none(tmp_path):
    forms = write_forms(tmp_path)
    for form in (".md", "saved", "saved_splits", "text_directory"):
        with pytest.raises(UserError, match=r"--dataset_config en: \S+ is a \w+ without configurations; leave"):
            open_text(str(forms[form]), flag="--dataset_path", config="en")


def test_the_text_column_is_found_or_refused(tmp_path):
    file = tmp_path / "news.jsonl"
    file.write_text(json.dumps({"id": 7, "headline": "Short", "body": "A much longer text than the headline"}) + "\n")
    assert open_text(str(file), flag="--dataset_path").column == "body"
    assert open_text(str(file), flag="--dataset_path", column="headline").column == "headline"
    with pytest.raises(UserError, match="--text_column story: .* has the columns id, headline, body"):
        open_text(str(file), flag="--dataset_path", column="story")
    with pytest.raises(UserError, match="--text_column id: .* it holds int"):
        open_text(str(file), flag="--dataset_path", column="id")


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_columns_of_one_name_are_refused(tmp_path, name, between):
    """pandas would call the second one text.1, and the first would be taken."""
    rows = [("id", "text", "text"), *((i, f"One, {i}", f"Another, {i}") for i in range(9))]
    content = "\n".join(between.join(f'"{field}"' for field in row) for row in rows).encode()
    file = tmp_path / "table" / name
    file.parent.mkdir()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    for path in (file, file.parent):
        with pytest.raises(UserError, match="^--dataset_path .*: 2 columns are called text; rename or remove all but"):
            open_text(str(path), flag="--dataset_path")
    file.rename(file.with_name(f".{name}"))  # hidden files are not read
    (file.parent / "b.jsonl").write_text('{"text": "Some text."}\n')
    assert list(open_text(str(file.parent), flag="--dataset_path").documents()) == ["Some text."]


def test_a_fallback_is_taken_only_where_it_was_allowed(tmp_path):
    file = tmp_path / "other.txt"
    file.write_text("Some text.")
    with pytest.raises(UserError, match=r"--dataset nowhere\.jsonl: no such file"):
        open_text("nowhere.jsonl", flag="--dataset")
    source = open_text("nowhere.jsonl", flag="--dataset", fallback=str(file))
    assert (source.name, source.fallback_from) == (str(file), "nowhere.jsonl")


def test_the_split_survives_reordering_and_is_of_the_asked_size(wikipedia):
    documents = [f"Text number {i}" for i in range(20_000)]
    split = HeldOutSplit(0.1, seed=3)
    held_out = {d for d in documents if split.holds_out(d)}
    random.Random(0).shuffle(documents)
    assert {d for d in documents if split.holds_out(d)} == held_out
    assert abs(len(held_out) / len(documents) - 0.1) < 5 * (0.1 * 0.9 / len(documents)) ** 0.5
    assert {d for d in documents if HeldOutSplit(0.1, seed=4).holds_out(d)} != held_out
    assert not any(HeldOutSplit(0.0, seed=3).holds_out(d) for d in documents)


def test_the_held_out_documents_fall_into_two_disjoint_halves():
    documents = [f"Text number {i}" for i in range(20_000)]
    chosen = {
        part: {d for d in documents if HeldOutSplit(0.2, seed=3, part=part).holds_out(d)}
        for part in (None, "validation", "test")
    }
    assert chosen["validation"] | chosen["test"] == chosen[None]
    assert not chosen["validation"] & chosen["test"]
    for part in ("validation", "test"):
        assert abs(len(chosen[part]) / len(documents) - 0.1) < 5 * (0.1 * 0.9 / len(documents)) ** 0.5


def test_no_held_out_text_is_trained_on(wikipedia, tokenizer):
    """Every row of either side is found word for word in a document of that side, and in none of the other."""
    source = open_text(EMBEDDED_TEXT, flag="--dataset_path")
    context, split = ContextFormat(64), HeldOutSplit(0.2, seed=0)
    training = collect_training_rows(
        source, tokenizer, context, PositionFilter((BOS,), 1), split, training_tokens=40_000
    )
    held_out, _ = collect_evaluation_rows(source, tokenizer, context, split, n_rows=200, seed=0)
    sides = {
        True: "\n\n".join(d for d in wikipedia if split.holds_out(d)),
        False: "\n\n".join(d for d in wikipedia if not split.holds_out(d)),
    }
    for rows, side in ((training, False), (held_out, True)):
        for row in rows:
            pieces = np.split(row, np.flatnonzero(row == BOS))
            piece = tokenizer.decode(max(pieces, key=len)[8:-8]).strip("\ufffd")  # half a character at an end
            assert piece in sides[side]
            assert piece not in sides[not side] or len(piece) < 60


@pytest.mark.parametrize("adds_its_own", [False, True])
def test_a_context_starts_with_exactly_one_bos(tokenizer, adds_its_own):
    if adds_its_own:  # as Llama-3's tokenizer does, by its post-processor
        from copy import deepcopy

        from tokenizers.processors import TemplateProcessing

        tokenizer = deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)]
        )
        assert tokenizer("rivers")["input_ids"][0] == BOS
    rows = [row for _, row in token_rows(TEXTS * 10, tokenizer, ContextFormat(48), tokenized=False)]
    assert len(rows) > 20
    for row in rows:
        assert row[0] == BOS
        assert row[1] != BOS
        assert not ((row[1:] == BOS) & (row[:-1] == BOS)).any()


def test_tokenized_rows_are_used_as_they_are(tmp_path, tokenizer):
    rows = [[(7 * i + j) % 1000 + 3 for j in range(20)] for i in range(50)]
    path = tmp_path / "tokenized"
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(path)
    source = open_text(str(path), flag="--dataset_path")
    assert source.tokenized
    split = HeldOutSplit(0.3, seed=0)
    collected = collect_training_rows(
        source, tokenizer, ContextFormat(16), PositionFilter((BOS,), 1), split, training_tokens=100
    )
    expected = [row[:16] for row in rows if not split.holds_out(row)]
    assert collected.tolist() == expected[: len(collected)]


def test_a_row_knows_the_document_that_it_ends_in(tokenizer):
    texts = [f"word{i} " * 40 for i in range(5)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ends = np.cumsum([n + 1 for n in lengths])  # each document is followed by a separator
    found = list(token_rows(texts, tokenizer, ContextFormat(16), tokenized=False))
    for r, (document, _) in enumerate(found):
        n_taken = (r + 1) * 15  # a row is a BOS and 15 tokens
        assert abs(document - np.searchsorted(ends, n_taken)) <= (min(abs(ends - n_taken)) <= 2)


def test_too_little_text_is_said_with_both_numbers_and_the_passes_that_would_do(tmp_path, tokenizer):
    file = tmp_path / "small.txt"
    file.write_text("\n\n".join(TEXTS))

    def collect(epochs):
        return collect_training_rows(
            open_text(str(file), flag="--dataset_path"),
            tokenizer,
            ContextFormat(16),
            PositionFilter((BOS,), 1),
            HeldOutSplit(0.0, 0),
            training_tokens=5_000,
            epochs=epochs,
        )

    with pytest.raises(UserError, match=r"too small: \d+ tokens .*--training_tokens asks for 5,000; ") as refused:
        collect(1)
    enough = int(re.search(r"--epochs (\d+)\)$", str(refused.value))[1])
    rows = collect(enough)
    n_positions = int(PositionFilter((BOS,), 1).keeps_tokens(rows).sum())
    assert (enough - 1) * n_positions < 1.02 * 5_000 <= enough * n_positions
    with pytest.raises(UserError, match=rf"asks for 5,000 in --epochs 2; .*\(--epochs {enough}\)$"):
        collect(2)
