"""A bad record is skipped and counted, wherever it stands; a data set that is mostly bad is refused in one line."""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
import sys

import datasets
import numpy as np
import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_training_rows
from sae_toolkit.text.sources import HeldOutSplit, open_text
from support.loopback_hub import LoopbackHub
from support.processes import run_process

pytestmark = pytest.mark.faults

GOOD = [
    f"Document {i} tells of {' '.join(str(i * j) for j in range(9))}, \u00e9\u4e2d\u2028\U0001f600\ufffd."
    for i in range(900)
]

BAD_LINES = {
    "half a line": lambda line, rng: line[: rng.randrange(1, len(line) - 3)],
    "two objects run together": lambda line, rng: line + line,
    "no JSON at all": lambda line, rng: b"<html>502 Bad Gateway</html>",
    "not UTF-8": lambda line, rng: line.replace(b"tells", b"\xff\xfe\x80"),
    "half a surrogate pair": lambda line, rng: json.dumps({"text": "a \ud83d"}).encode(),
    "null text": lambda line, rng: b'{"text": null}',
    "text that is a number": lambda line, rng: b'{"text": 17}',
    "text that is a list": lambda line, rng: b'{"text": ["a", "b"]}',
    "no text": lambda line, rng: b'{"title": "a"}',
    "an array for an object": lambda line, rng: b'["a"]',
    "zero bytes": lambda line, rng: bytes(50),
    "an endless nesting": lambda line, rng: b'{"text": ' + b"[" * 5_000,
    "a number of 5,000 digits": lambda line, rng: b'{"text": ' + b"9" * 5_000 + b"}",
}


READ = """
import json, sys
from sae_toolkit.terminal.console import set_up_logging
from sae_toolkit.text.sources import open_text
set_up_logging()
print(json.dumps(list(open_text(sys.argv[1], flag="--dataset_path").documents())))
"""


@pytest.fixture
def messages():
    """The project's log lines."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("sae_toolkit")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def good_lines() -> list[bytes]:
    return [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(GOOD)]


def with_bad_lines(kind: str, n: int, seed: int) -> tuple[bytes, int]:
    """The good documents with `n` bad ones among them; and the line of the first bad one."""
    rng = random.Random(seed)
    good = good_lines()
    lines = list(good)
    for _ in range(n):
        lines.insert(rng.randrange(len(lines)), BAD_LINES[kind](rng.choice(good), rng))
    first = next(i for i, line in enumerate(lines, 1) if line not in good)
    return b"\n".join(lines) + b"\n", first


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_bad_line_is_skipped_and_counted(tmp_path, messages, record_fault, kind, streaming):
    n_bad = 0
    for seed, n in enumerate((1, 3, 200)):
        content, first = with_bad_lines(kind, n, seed)
        for name, data in (("data.jsonl", content), ("data.jsonl.gz", gzip.compress(content))):
            path = tmp_path / f"{seed}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            messages.clear()
            assert list(open_text(str(path), flag="--dataset_path", streaming=streaming).documents()) == GOOD
            (warning,) = messages
            assert (
                f"skipped {n} of {len(GOOD) + n:,} records that could not be used; the first is line {first}: "
                in warning
            )
            n_bad += n
    record_fault(
        f"JSON Lines: {kind} ({'streaming' if streaming else 'read whole'})",
        n_bad,
        "skipped, counted, and the first said with its line",
        "the bad records alone",
    )


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_file_that_is_mostly_bad_is_refused(tmp_path, record_fault, kind):
    content, first = with_bad_lines(kind, 2 * len(GOOD), 0)
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data.jsonl: \d+ of its first 1,000 records .*; the first is line {first}: "):
        list(open_text(str(path), flag="--dataset_path").documents())
    record_fault(f"JSON Lines, two of three: {kind}", 2 * len(GOOD), "refused in one line", "nothing")


def test_bad_bytes_in_a_text_file_cost_their_paragraph(tmp_path, messages, record_fault):
    texts = [text.encode() for text in GOOD]
    for place in (0, 17, len(GOOD) - 1):
        texts[place] = texts[place].replace(b"tells", b"\xc3(")
    (tmp_path / "data.txt").write_bytes(b"\n\n".join(texts))
    found = list(open_text(str(tmp_path / "data.txt"), flag="--dataset_path").documents())
    assert found == [text for i, text in enumerate(GOOD) if i not in (0, 17, len(GOOD) - 1)]
    assert "skipped 3 of 900 records that could not be used; the first is record 1: not UTF-8" in messages[0]
    record_fault(
        "text file: bytes that are not UTF-8", 3, "their paragraphs are skipped and counted", "the bad paragraphs"
    )


def test_null_texts_of_a_table_are_skipped_and_counted(tmp_path, messages, record_fault):
    texts = [None if i % 10 == 3 else text for i, text in enumerate(GOOD)]
    data = datasets.Dataset.from_dict({"text": texts})
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "data.parquet", tmp_path / "saved"):
        messages.clear()
        assert list(open_text(str(path), flag="--dataset_path").documents()) == [text for text in texts if text]
        assert (
            "skipped 90 of 900 records that could not be used; the first is record 4: its 'text' is null" in messages[0]
        )
    record_fault("parquet and saved data: null texts", 180, "skipped and counted", "the bad records alone")


BAD_TOKENS = {
    "an id below 0": [-1],
    "an id of 2^32, which would wrap to 0": [2**32],
    "an id of 2^32 + 5, which would wrap to 5": [2**32 + 5],
    "an id of 2^63": [2**63],
    "an id of 2^70": [2**70],
    "a fraction": [3.7],
    "a word": ["seven"],
    "nothing": [None],
    "a list": [[1, 2]],
    "true": [True],
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_a_row_of_bad_token_ids_is_skipped_and_never_wraps(tmp_path, tokenizer, messages, record_fault, kind):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 1000, size=20).tolist() for _ in range(300)]
    bad_places = sorted({40, *rng.integers(41, 300, size=10).tolist()})
    mixed = []
    for i, row in enumerate(rows):
        if i in bad_places:
            bad = BAD_TOKENS[kind]
            mixed.append(bad * 20 if kind == "true" else row[:10] + bad + row[11:])
        mixed.append(row)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in mixed))
    collected = collect_training_rows(
        open_text(str(path), flag="--dataset_path"),
        tokenizer,
        ContextFormat(16),
        PositionFilter((), 0),
        HeldOutSplit(0.0, seed=0),
        training_tokens=16 * 290,
    )
    assert collected.tolist() == [row[:16] for row in rows][: len(collected)]
    assert len(collected) >= 290
    assert re.search(r"skipped \d+ of \d+ records that could not be used; the first is line 41: ", messages[0])
    record_fault(f"tokenized rows: {kind}", len(bad_places), "skipped and counted; no id wraps", "the bad rows alone")


def test_bad_lines_of_a_hubs_data_set_are_skipped_too(tmp_path, record_fault):
    content, first = with_bad_lines("half a line", 5, 0)
    data = tmp_path / "datasets" / "tests" / "bad"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_bytes(content)
    hub = LoopbackHub(tmp_path)
    environment = {"PYTHONPATH": "."} | hub.environment(tmp_path / "home")
    done = run_process(sys.executable, "-c", READ, "tests/bad", **environment)
    hub.close()
    assert json.loads(done.stdout) == GOOD, done.stderr
    assert f"skipped 5 of 905 records that could not be used; the first is line {first}: not JSON" in done.stderr
    record_fault("a hub's JSON Lines file: half a line", 5, "skipped and counted", "the bad records alone")


def test_a_bad_record_does_not_move_the_others(tmp_path, tokenizer):
    """What is trained on is what a file without the bad records gives."""
    content, _ = with_bad_lines("half a line", 50, 0)
    rows = []
    for name, data in (("clean.jsonl", b"\n".join(good_lines())), ("bad.jsonl", content)):
        (tmp_path / name).write_bytes(data)
        rows.append(
            collect_training_rows(
                open_text(str(tmp_path / name), flag="--dataset_path"),
                tokenizer,
                ContextFormat(32),
                PositionFilter((1,), 1),
                HeldOutSplit(0.2, seed=0),
                training_tokens=10_000,
            )
        )
    assert np.array_equal(*rows)
