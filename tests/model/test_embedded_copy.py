"""The embedded model is unpacked once, and its copy is the model of the GGUF file."""

import logging
from pathlib import Path

import gguf
import pytest
import torch

from sae_toolkit.files.embedded import EMBEDDED_MODEL, embedded_articles, embedded_model_file
from sae_toolkit.model.embedded_copy import embedded_copy
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.model.tokenizer import load_tokenizer
from support.processes import HOOK


@pytest.fixture(scope="module")
def of_file():
    return find_model(str(embedded_model_file()))


def test_the_copy_is_the_model_of_the_file_bit_for_bit(of_file, embedded_source, language_model):
    assert "gguf_file" in of_file.location
    assert "gguf_file" not in embedded_source.location
    weights = load_language_model(of_file, HOOK, "cpu", torch.float32).model.state_dict()
    of_copy = language_model.model.state_dict()
    assert weights.keys() == of_copy.keys()
    assert all(torch.equal(weight, of_copy[name]) for name, weight in weights.items())
    own = {"_name_or_path", "architectures", "dtype"}
    assert {k: v for k, v in of_file.config.to_dict().items() if k not in own} == {
        k: v for k, v in embedded_source.config.to_dict().items() if k not in own
    }


def test_the_copys_tokenizer_is_that_of_the_file(of_file, tokenizer):
    of_the_file = load_tokenizer(of_file)
    text = " ".join(text for _, text in zip(range(3), (text for _, text in embedded_articles()), strict=False))
    assert tokenizer(text)["input_ids"] == of_the_file(text)["input_ids"]
    assert tokenizer.special_tokens_map == of_the_file.special_tokens_map
    assert tokenizer.chat_template == of_the_file.chat_template


def test_what_identifies_the_model_is_its_file_wherever_the_copy_lies(of_file, embedded_source):
    assert embedded_source.name == EMBEDDED_MODEL
    assert embedded_source.files() == of_file.files()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A GGUF file of a Llama of one layer, with random weights and 256 tokens, which takes less time to read."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    width, vocabulary = 32, ["a", "b", "ab", *map(str, range(253))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(vocabulary), width), "output_norm": (width,), "output": (len(vocabulary), width)}
    shapes |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (2 * width, width) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (width, 2 * width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_damaged_copy_is_made_again(tmp_path, small_file):
    copy = embedded_copy(small_file, tmp_path)
    assert copy is not None
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    embedded_copy.cache_clear()
    assert embedded_copy(small_file, tmp_path) == copy
    assert weights.read_bytes() == whole


def test_without_room_for_a_copy_the_file_is_read(disk_of, caplog, small_file):
    disk = disk_of("32k")
    with caplog.at_level(logging.WARNING):
        assert embedded_copy(small_file, disk) is None
    assert f"{disk}: the unpacked model cannot be kept there" in caplog.text
    assert not [file for file in disk.iterdir() if file.suffix != ".lock"]


def test_where_no_directory_can_be_made_the_file_is_read(caplog, small_file):
    with caplog.at_level(logging.WARNING):
        assert embedded_copy(small_file, Path("/proc/cache")) is None
    assert "/proc/cache: the unpacked model cannot be kept there" in caplog.text
