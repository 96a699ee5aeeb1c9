"""Rows of token ids are cut into contexts of the asked size, and what is in no context is said with its share."""

import logging

import datasets
import numpy as np
import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows, collect_training_rows, token_rows
from sae_toolkit.text.sources import HeldOutSplit, open_text
from sae_toolkit.text.tokenized_rows import LeftOut

BOS = 1
NOTHING_HELD_OUT = HeldOutSplit(0.0, seed=0)


def random_rows(n_rows, length, *, begin_with_bos):
    rows = np.random.default_rng(0).integers(3, 40_000, (n_rows, length))
    if begin_with_bos:
        rows[:, 0] = BOS
    return rows


def contexts(rows, tokenizer, size, **changes):
    """The contexts of each row, as lists."""
    found = {}
    for i, context_T in token_rows(rows, tokenizer, ContextFormat(size, **changes), tokenized=True):
        found.setdefault(i, []).append(context_T.tolist())
    return found


def saved(rows, path):
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(path)
    return open_text(str(path), flag="--dataset_path")


def training_rows(source, tokenizer, size, training_tokens, **more):
    positions = PositionFilter((BOS,), 1)
    return collect_training_rows(
        source, tokenizer, ContextFormat(size), positions, NOTHING_HELD_OUT, training_tokens=training_tokens, **more
    )


def test_a_long_row_without_bos_is_cut_into_consecutive_contexts(tokenizer):
    rows = random_rows(3, 200, begin_with_bos=False)
    for i, found in contexts(rows, tokenizer, 64).items():
        assert found == rows[i, :192].reshape(3, 64).tolist()


def test_each_context_of_a_row_that_begins_with_bos_begins_with_exactly_one(tokenizer):
    rows = random_rows(3, 200, begin_with_bos=True)
    rows[0, 64] = BOS  # as between packed documents: here it already begins the second context
    found = contexts(rows, tokenizer, 64)
    assert found[0] == [rows[0, :64].tolist(), rows[0, 64:128].tolist(), [BOS, *rows[0, 128:191]]]
    assert found[1] == [rows[1, :64].tolist(), [BOS, *rows[1, 64:127]], [BOS, *rows[1, 127:190]]]
    assert contexts(rows, tokenizer, 64, prepend_bos=False)[1] == rows[1, :192].reshape(3, 64).tolist()


def test_a_row_of_one_context_is_used_as_it_is(tokenizer):
    for begins_with_bos in (True, False):
        rows = random_rows(4, 64, begin_with_bos=begins_with_bos)
        assert contexts(rows, tokenizer, 64) == {i: [row.tolist()] for i, row in enumerate(rows)}


def test_without_concatenation_a_row_gives_its_first_context_alone(tokenizer):
    rows = random_rows(2, 200, begin_with_bos=False)
    found = contexts(rows, tokenizer, 64, disable_concat_sequences=True)
    assert found == {i: [row[:64].tolist()] for i, row in enumerate(rows)}


def test_data_packed_for_a_longer_context_train_whole(tmp_path, tokenizer, caplog):
    """76 rows of 2,048 tokens at a context of 64: 32 contexts a row, and 63 of 64 positions are trained on."""
    source = saved(random_rows(76, 2048, begin_with_bos=False), tmp_path / "packed.parquet")
    with caplog.at_level(logging.INFO, "sae_toolkit"):
        rows = training_rows(source, tokenizer, 64, training_tokens=76 * 32 * 63)
    assert rows.shape == (76 * 32, 64)
    assert "left out" not in caplog.text


def test_what_is_in_no_context_is_said_with_its_share(tmp_path, tokenizer, caplog):
    rows = [[5] * n for n in [100] * 6 + [30] * 4]
    source = saved(rows, tmp_path / "mixed.parquet")
    with caplog.at_level(logging.INFO, "sae_toolkit"):
        training_rows(source, tokenizer, 64, training_tokens=6 * 63)
    (said,) = [record for record in caplog.records if "left out" in record.message]
    assert said.levelno == logging.WARNING
    share = (6 * 36 + 4 * 30) / (6 * 100 + 4 * 30)
    assert f"{share:.1%} of the tokens are left out: 4 of 10 rows are shorter than a context of 64" in said.message
    with pytest.raises(UserError, match=rf"too small: 378 tokens .*; {share:.1%} of the tokens are left out: 4 of 10"):
        training_rows(source, tokenizer, 64, training_tokens=5_000)


def test_rows_that_are_all_too_short_are_answered_with_the_context_that_fits(tmp_path, tokenizer):
    source = saved(random_rows(5, 48, begin_with_bos=True), tmp_path / "short.parquet")
    with pytest.raises(UserError, match=r"too small: 0 tokens .*\(the longest has 48 tokens\).*; lower --context_size"):
        training_rows(source, tokenizer, 64, training_tokens=100)
    with pytest.raises(UserError, match=r"holds no context of 64 tokens \(100.0% of the .* or a shorter context"):
        collect_evaluation_rows(source, tokenizer, ContextFormat(64), None, n_rows=5, seed=0)


def test_mostly_short_rows_are_said_while_they_are_read(tokenizer, caplog):
    """After 1,000 rows, of a data set that may take hours to read."""

    def rows():
        for i in range(10**9):
            assert i < 1_001, "read on without a word"
            yield [5] * (10 if i != 1_000 else 64)

    left_out = LeftOut(64)
    next(token_rows(rows(), tokenizer, ContextFormat(64), tokenized=True, left_out=left_out))
    assert "of the first 1,000 rows of token ids, 100.0% of the tokens are left out" in caplog.text


def test_a_first_row_that_is_shorter_than_the_others_does_not_set_the_length(tmp_path):
    assert saved([[5] * n for n in (3, 64, 20, 64)], tmp_path / "mixed.parquet").row_length == 64


def test_padding_is_left_out_as_the_attention_mask_says(tmp_path, tokenizer):
    """Also in a field of a column, and where the padding is no special token."""
    row = {"input_ids": [-100] * 40 + list(range(100, 164)), "attention_mask": [0] * 40 + [1] * 64}
    for column, rows in (("input_ids", [row] * 4), ("a.input_ids", [{"a": row}] * 4)):
        path = tmp_path / f"{column}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        source = open_text(str(path), flag="--dataset_path", column=column)
        found = training_rows(source, tokenizer, 64, training_tokens=4 * 63)
        assert found.tolist() == [row["input_ids"][40:]] * 4
    path = tmp_path / "short.parquet"
    datasets.Dataset.from_list([{"input_ids": [5] * 64, "attention_mask": [1] * 63}] * 4).to_parquet(path)
    with pytest.raises(UserError, match="its attention_mask is not a 0 or 1 for each of its 'input_ids'"):
        training_rows(open_text(str(path), flag="--dataset_path"), tokenizer, 64, training_tokens=63)


def test_an_evaluation_draws_contexts_of_several_long_rows(tmp_path, tokenizer):
    rows = random_rows(40, 640, begin_with_bos=False)
    source = saved(rows, tmp_path / "long.parquet")
    found, row_N = collect_evaluation_rows(source, tokenizer, ContextFormat(64), None, n_rows=20, seed=0)
    assert len(set(row_N.tolist())) >= 5  # the first 20 contexts are of two rows
    for context_T, i in zip(found.tolist(), row_N, strict=True):
        assert context_T in rows[i].reshape(10, 64).tolist()
    one_context = saved(rows[:, :64], tmp_path / "one_context.parquet")
    in_order, _ = collect_evaluation_rows(one_context, tokenizer, ContextFormat(64), None, n_rows=20, seed=0)
    assert in_order.tolist() == rows[:20, :64].tolist()
