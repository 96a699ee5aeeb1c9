"""A model without a tokenizer is trained and evaluated on rows of token ids, and no text is tokenized by guesswork."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.feature_browser import decode_tokens
from sae_toolkit.model.loading import find_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_training_rows, special_tokens, token_rows
from sae_toolkit.text.sources import HeldOutSplit, open_text
from sae_toolkit.text.token_ids import TokenIds

N_MOVES, N_SQUARES = 59, 61


@pytest.fixture(scope="module")
def othello(tmp_path_factory) -> Path:
    """Directory of a GPT-2 with the vocabulary and contexts of Othello-GPT, of random weights; no tokenizer."""
    path = tmp_path_factory.mktemp("othello")
    config = GPT2Config(vocab_size=N_SQUARES, n_embd=32, n_layer=2, n_head=2, n_positions=N_MOVES)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("games") / "games.parquet"
    moves = np.random.default_rng(0).integers(0, N_SQUARES, (300, N_MOVES))
    datasets.Dataset.from_dict({"tokens": moves.tolist()}).to_parquet(path)
    return path


def test_a_model_without_a_tokenizer_is_trained_and_evaluated_on_rows_of_token_ids(othello, games, tmp_path, script):
    flags = {
        "model_name": othello,
        "layer": 0,
        "dataset_path": games,
        "context_size": N_MOVES,
        "expansion_factor": 4,
        "training_tokens": 4096,
        "n_batches_in_buffer": 16,
        "eval_every": 2048,
        "checkpoint_path": tmp_path,
        "wandb_mode": "disabled",
        "set": "n_batches_for_norm_estimate=1",
    }
    trained = script("sae_lens_train.py", *(part for name, value in flags.items() for part in (f"--{name}", value)))
    assert trained.status == 0, trained.stderr
    assert "has no tokenizer" in trained.stderr
    sae = trained.stdout.strip().splitlines()[-1]
    evaluated = script("evaluate_sae_real_activations.py", "--sae_path", sae, "--num_samples", 16, "--n_features", 4)
    assert evaluated.status in (0, 1), evaluated.stderr
    page = Path(sae, "report.html").read_text()
    features = json.loads(re.search(r'id="data">(.+?)</script>', page, re.DOTALL)[1])["features"]
    shown = {token for feature in features for context in feature["contexts"] for token in context["tokens"]}
    assert shown and shown <= {f" {i}" for i in range(N_SQUARES)}


def test_the_rows_are_the_games_as_they_are(othello, games):
    tokenizer = load_tokenizer(find_model(str(othello)))
    none_held_out = HeldOutSplit(0, 0)
    source = open_text(str(games), flag="--dataset_path")
    positions = PositionFilter(special_tokens(True, tokenizer, is_chat=False), 0)
    rows_NT = collect_training_rows(
        source, tokenizer, ContextFormat(N_MOVES), positions, none_held_out, training_tokens=10 * N_MOVES
    )
    expected_NT = np.random.default_rng(0).integers(0, N_SQUARES, (300, N_MOVES))[: len(rows_NT)]
    np.testing.assert_array_equal(rows_NT, expected_NT)


# Transformers refuses to load a tokenizer for some of them, and for others makes one without a vocabulary.
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "gemma2", "llama", "bloom"])
def test_no_tokenizer_is_made_up_for_a_model_that_has_none(family, tmp_path):
    AutoConfig.for_model(family, vocab_size=100).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(find_model(str(tmp_path)))
    assert isinstance(tokenizer, TokenIds)
    assert decode_tokens(tokenizer, [3, 99]) == (" 3", " 99")
    with pytest.raises(UserError, match="no tokenizer there, and the text is not tokenized") as refused:
        list(token_rows(["Some text."], tokenizer, ContextFormat(8), tokenized=False))
    assert "\n" not in str(refused.value)


def test_special_tokens_are_those_of_the_configuration_that_the_vocabulary_has(tmp_path):
    AutoConfig.for_model("llama", vocab_size=100, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    assert special_tokens(True, load_tokenizer(find_model(str(tmp_path))), is_chat=False) == (1, 2)
    # bos and eos outside of the vocabulary are those of the family's usual tokenizer
    GenerationConfig(bos_token_id=50256, eos_token_id=[7, 8], pad_token_id=0).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(find_model(str(tmp_path)))
    assert special_tokens(True, tokenizer, is_chat=False) == (0, 7)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 7, 0)


def test_a_damaged_tokenizer_is_not_taken_for_none(tiny_model, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer: "):
        load_tokenizer(find_model(str(tmp_path)))


@pytest.fixture(scope="module")
def without_bos(tokenizer, tmp_path_factory):
    """The embedded tokenizer without its BOS, EOS and padding tokens, of a tiny model."""
    path = tmp_path_factory.mktemp("without_bos")
    copy.deepcopy(tokenizer).save_pretrained(path)
    file = path / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("_token")}
    file.write_text(json.dumps(config | {"bos_token": None, "eos_token": None, "unk_token": None, "pad_token": None}))
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return load_tokenizer(find_model(str(path)))


@pytest.mark.parametrize(
    ("context", "flag"),
    [
        (ContextFormat(8), "--set prepend_bos=false"),
        (ContextFormat(8, prepend_bos=False), "--set sequence_separator_token=null"),
        (ContextFormat(8, prepend_bos=False, sequence_separator_token="eos"), "--set sequence_separator_token=null"),
    ],
)
def test_a_tokenizer_without_bos_and_eos_is_refused_where_text_needs_them(without_bos, context, flag):
    with pytest.raises(UserError, match=flag):
        list(token_rows(["Some text."], without_bos, context, tokenized=False))
    rows = [[5] * 8, [6] * 8]
    assert [row.tolist() for _, row in token_rows(rows, without_bos, context, tokenized=True)] == rows


def test_text_is_packed_without_bos_and_eos_if_the_flags_say_so(without_bos, tokenizer):
    texts = ["Anarchism is a political philosophy.", "It is skeptical of authority."]
    context = ContextFormat(4, prepend_bos=False, sequence_separator_token=None)
    ids = [i for text in texts for i in AutoTokenizer.from_pretrained(without_bos.name_or_path).encode(text)]
    rows = np.stack([row for _, row in token_rows(texts, without_bos, context, tokenized=False)])
    assert rows.flatten().tolist() == ids[: rows.size]
    assert len(rows) == len(ids) // 4
