"""Hooks outside of blocks: that of the embedding, and modules that are named from the base model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sae_lens.load_model import load_model
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sae_toolkit.errors import UserError
from sae_toolkit.model.hook_width import full_hook_name, hook_width
from sae_toolkit.model.language_model import LanguageModel

TOKENS = torch.tensor([[11, 50, 35, 28, 46, 31], [11, 28, 90, 28, 25, 95]])
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = {"intermediate_size": 128, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "gpt2": {},  # its position embeddings are added after the hook
    "gemma2": {**_GATED, "head_dim": 16},  # its embedding is multiplied by the root of its width
    "bloom": {},  # its embedding is normed
}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_embed_is_that_of_transformer_lens(family, tokenizer):
    config = AutoConfig.for_model(family, vocab_size=100, **_SIZES, **FAMILIES[family])
    model = random_model(config)
    assert hook_width(config, "hook_embed") == 64
    hooked = LanguageModel(model, "hook_embed")
    ours = hooked.activations(TOKENS)
    if family in ("llama", "gpt2", "gemma2"):
        table_VD = model.get_input_embeddings().weight
        torch.testing.assert_close(ours, table_VD[TOKENS] * (8 if family == "gemma2" else 1))
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(model), tokenizer=tokenizer, dtype=torch.float32
    )
    theirs = bridge.run_with_cache(TOKENS, names_filter="hook_embed", prepend_bos=False)[1]["hook_embed"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    logits, state = hooked.logits(TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)


def test_hook_embed_of_a_family_that_transformer_lens_does_not_know_is_refused():
    with pytest.raises(UserError, match="hook_embed: TransformerLens does not say where it is in DogeForCausalLM"):
        hook_width(AutoConfig.for_model("doge", vocab_size=100, **_SIZES, **_GATED), "hook_embed")


def saved(directory: Path, tokenizer, family: str) -> Path:
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **_SIZES, **FAMILIES[family])
    random_model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_gemma_scopes_embedding_saes_are_evaluated_there(tmp_path, script):
    model = random_model(AutoConfig.for_model("gemma2", vocab_size=100, **_SIZES, **FAMILIES["gemma2"]))
    model.save_pretrained(tmp_path / "model")
    rows = np.random.default_rng(0).integers(3, 100, (16, 32)).tolist()
    datasets.Dataset.from_dict({"tokens": rows}).to_parquet(tmp_path / "rows.parquet")
    directory = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    directory.mkdir(parents=True)
    # Returns what it is given, at any scale.
    both_FD = np.concatenate([np.eye(64), -np.eye(64)]).astype(np.float32)
    biases = {"b_enc": np.zeros(128, np.float32), "threshold": np.zeros(128, np.float32)}
    np.savez(directory / "params.npz", W_enc=both_FD.T, W_dec=both_FD, b_dec=np.zeros(64, np.float32), **biases)
    flags = ["--model_name", tmp_path / "model", "--dataset", tmp_path / "rows.parquet", "--lm_dtype", "float32"]
    evaluated = script("evaluate_sae_real_activations.py", "--sae_path", directory, *flags)
    assert evaluated.status in (0, 1), evaluated.stderr
    result = json.loads((directory / "evaluation.json").read_text())
    assert result["hook_name"] == "hook_embed"
    assert result["metrics"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    refused = script("evaluate_sae_real_activations.py", "--sae_path", directory, *flags, "--layer", 1)
    assert refused.status == 2
    assert "--layer 1: the SAE was trained at hook_embed, which is in no layer" in refused.stderr


@pytest.mark.parametrize(
    ("family", "given", "full"),
    [
        ("llama", "layers.1.mlp", "model.layers.1.mlp"),
        ("gpt2", "h.1.mlp.act", "transformer.h.1.mlp.act"),
        ("gpt2", "wte", "transformer.wte"),
        ("gpt2", "transformer.h.1", "transformer.h.1"),
        ("gpt2", "hook_embed", "hook_embed"),
        ("llama", "blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
    ],
)
def test_a_module_that_is_named_from_the_base_model_has_its_full_name(family, given, full):
    config = AutoConfig.for_model(family, vocab_size=100, **_SIZES, **FAMILIES[family])
    assert full_hook_name(config, given) == full


@pytest.mark.parametrize(("family", "hook_name"), [("llama", "layers.1.mlp"), ("gpt2", "h.1.mlp.act")])
def test_saelens_finds_the_hook_of_an_sae_that_was_named_from_the_base_model(
    family, hook_name, tokenizer, tiny_run, tmp_path, script
):
    model = saved(tmp_path / "model", tokenizer, family)
    trained = script("sae_lens_train.py", *tiny_run, "--model_name", model, "--hook_name", hook_name)
    assert trained.status == 0, trained.stderr
    sae = Path(trained.stdout.strip().splitlines()[-1])
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    theirs = load_model(metadata["model_class_name"], metadata["model_name"], device="cpu")
    _, cache = theirs.run_with_cache(TOKENS, names_filter=[metadata["hook_name"]])
    ours = LanguageModel(AutoModelForCausalLM.from_pretrained(model), hook_name).activations(TOKENS)
    torch.testing.assert_close(cache[metadata["hook_name"]], ours)
    evaluated = script("evaluate_sae_real_activations.py", "--sae_path", sae, "--num_samples", 4)
    assert evaluated.status in (0, 1), evaluated.stderr


def test_a_hook_under_two_names_is_refused(tiny_run, script):
    refused = script("sae_lens_train.py", *tiny_run, "--hook_names", "layers.1.mlp", "model.layers.1.mlp")
    assert refused.status == 2
    assert "--hook_names model.layers.1.mlp: names model.layers.1.mlp a second time" in refused.stderr
