"""The column of a data set is chosen by what its values are; what is no text is never trained on unasked."""

import json

import datasets
import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.text.sources import open_text

SENTENCES = [
    "The river was named after a king.",
    "Most trees of this forest are pines, and few are old.",
    "Nobody has counted the stars that one can see there.",
    "It rains in spring, and in autumn it snows on the hills.",
    "Ships came up to the old mill until the lock was closed.",
]
WITHOUT_SPACES = [
    "今天的天气很好。",
    "日本の首都は東京です。",
    "ประเทศไทยมีแม่น้ำหลายสาย",
    "他喜欢看书和电影。",
    "山の上に雪が降った。",
]
IDS = [f"{i:08x}-4c1e-4fa2-9d3b-{i:012x}" for i in range(5)]
CHAT = [[{"role": "user", "content": s}, {"role": "assistant", "content": s[::-1]}] for s in SENTENCES]
SHAREGPT = [[{"from": "human", "value": s}, {"from": "gpt", "value": s[::-1]}] for s in SENTENCES]


def column_of(tmp_path, rows, column=None):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_text(str(file), flag="--dataset_path", column=column)


def table(**columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        (table(conversation_id=IDS, model=["gpt-4"] * 5, conversation=CHAT), "conversation"),
        (table(id=IDS, prompt=SENTENCES, conversations=SHAREGPT), "conversations"),
        (table(text=SENTENCES, messages=CHAT), "messages"),
        (table(chosen=CHAT, rejected=CHAT, score=[1.0] * 5), "chosen"),
        (table(text=SENTENCES, input_ids=[[5, 6, 7]] * 5), "input_ids"),
        (table(title=SENTENCES, text=["a b"] * 5), "text"),
        (table(title=SENTENCES, content=SENTENCES), "content"),
        (table(text=IDS, comment=SENTENCES), "comment"),
        (table(text=IDS, n=[1] * 5), "text"),
        (table(sha=[f"{i:040x}" for i in range(5)], abstract=SENTENCES), "abstract"),
        (table(date=["2024-01-02 10:00:00"] * 5, url=[f"https://a.org/{i}" for i in IDS], note=SENTENCES), "note"),
        (table(file=[f"notes of day {i}.txt" for i in range(5)], path=["/data/a b/c.md"] * 5, said=SENTENCES), "said"),
        (table(label=["not the same at all"] * 5, hypothesis=SENTENCES), "hypothesis"),
        (table(raw=[json.dumps({"the key is": "a value of words"})] * 5, review=SENTENCES), "review"),
        (table(name=IDS, satz=WITHOUT_SPACES), "satz"),
        (table(id=IDS, paragraphs=[SENTENCES[i:] for i in range(5)]), "paragraphs"),
        (table(id=IDS, body=[None, None, None, *SENTENCES[:2]]), "body"),
    ],
)  # fmt: skip
def test_the_column_of_text_is_found_among_ids_dates_labels_and_paths(tmp_path, rows, column):
    assert column_of(tmp_path, rows).column == column


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (table(question=SENTENCES, answer=SENTENCES), "its columns question and answer read as text; choose one"),
        (table(a=SENTENCES, b=SENTENCES, c=SENTENCES), "its columns a, b and c read as text"),
        (table(prompt=CHAT, chosen=CHAT, rejected=CHAT), "its columns prompt, chosen and rejected hold conversations"),
        (table(id=IDS, model=["gpt-4"] * 5), r"among id \(ids or hashes\), model \(ids or hashes\); name one"),
        (table(url=["www.example.org/a"] * 5, day=["1.2.2024"] * 5), r"among url \(URLs\), day \(dates\); name one"),
        (table(words=[["a", "b", "c", "d"]] * 5), "no column of text or token ids among words"),
        (table(n=[1, 2, 3, 4, 5]), "no column of text or token ids among n; name one by --text_column"),
    ],
)  # fmt: skip
def test_in_doubt_and_without_text_the_columns_are_named(tmp_path, rows, says):
    with pytest.raises(UserError, match=says):
        column_of(tmp_path, rows)


def test_a_column_that_is_named_is_read_and_what_is_hardly_text_is_warned_of(tmp_path, caplog):
    rows = table(
        id=IDS, text=SENTENCES, translation=[{"en": s, "de": s.upper()} for s in SENTENCES], words=[["a", "b"]] * 5
    )
    assert list(column_of(tmp_path, rows, "id").documents()) == IDS
    assert "its column id seems to hold ids or hashes, which is hardly text" in caplog.text
    caplog.clear()
    assert list(column_of(tmp_path, rows, "translation.de").documents()) == [s.upper() for s in SENTENCES]
    assert list(column_of(tmp_path, rows, "words").documents()) == ["a b"] * 5
    assert caplog.text == ""
    for column, says in (
        ("translation", "it holds dict, .*; name a field of it, such as translation.en"),
        ("translation.fr", "--text_column translation.fr: .* has the columns id, text, translation, words"),
    ):
        with pytest.raises(UserError, match=says):
            column_of(tmp_path, rows, column)


def test_lists_of_sentences_are_joined_by_line_breaks(tmp_path):
    source = column_of(tmp_path, table(paragraphs=[SENTENCES[:2], [*SENTENCES[2:4], None], SENTENCES[4:]]))
    assert list(source.documents()) == ["\n".join(SENTENCES[:2]), SENTENCES[4]]  # one record is bad
    assert source.described() == "column paragraphs, lists joined by line breaks"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_what_is_read_and_how_it_begins_is_said(tmp_path, kind):
    data = datasets.Dataset.from_dict({"conversation_id": IDS, "messages": CHAT})
    path = tmp_path / f"data.{kind}"
    {"jsonl": data.to_json, "parquet": data.to_parquet, "saved": data.save_to_disk}[kind](path)
    source = open_text(str(path), flag="--dataset_path")
    assert source.is_chat
    begins = f"user: {SENTENCES[0]} assistant: {SENTENCES[0][::-1]}"[:60]
    assert source.described(with_sample=True) == f"column messages, by the chat template, which begins {begins!r}"
