"""A LoRA adapter is merged into its base: what is trained and measured is what peft's own model computes."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.files.embedded import EMBEDDED_TEXT
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.loading import LanguageModels, find_model, load_language_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.text.rows import ContextFormat, token_rows
from sae_toolkit.text.sources import open_text
from support.hostile_files import TouchesFile

HOOK = "blocks.1.hook_resid_post"
TOKENS = torch.tensor([[1, 50, 35, 28, 46, 31], [1, 28, 90, 28, 25, 95]])


def save_adapter(base: Path, directory: Path, std: float = 0.02, **config: Any) -> peft.PeftModel:
    """Saves an adapter of random weights as peft saves it, and returns peft's own model, whose base is unchanged."""
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config})
    adapted = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std, generator=generator)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    adapted.save_pretrained(directory)
    return adapted.eval()


def merged(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_language_model(find_model(str(directory)), HOOK, "cpu", dtype)


@torch.no_grad()
def assert_computes_what_peft_does(directory: Path, adapted: peft.PeftModel, tokens_BT: torch.Tensor) -> None:
    expected_BTV = adapted(tokens_BT).logits
    logits_BTV = merged(directory).logits(tokens_BT)[0]
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=0, atol=1e-5 * expected_BTV.abs().max().item())
    with adapted.disable_adapter():
        assert (adapted(tokens_BT).logits - expected_BTV).abs().max() > 0.01 * expected_BTV.std()


def test_the_embedded_model_with_an_adapter_has_the_logits_of_peft_on_real_text(language_model, tokenizer, tmp_path):
    base = LlamaForCausalLM._from_config(language_model.config, dtype=torch.float32)
    base.load_state_dict(language_model.model.state_dict())
    base.save_pretrained(tmp_path / "base")
    adapted = save_adapter(tmp_path / "base", tmp_path / "adapter")
    documents = open_text(EMBEDDED_TEXT, flag="--dataset_path").documents()
    _, row = next(token_rows(documents, tokenizer, ContextFormat(64), tokenized=False))
    assert_computes_what_peft_does(tmp_path / "adapter", adapted, torch.tensor(row)[None])


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "lora_alpha": 32},
        {"use_dora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}},
        {"lora_bias": True, "target_modules": ["embed_tokens", "o_proj"], "r": 2},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_every_kind_of_lora_has_the_logits_of_peft(config, tiny_model, tmp_path):
    if "embed_tokens" in config.get("target_modules", ()):
        del config["lora_bias"]  # an embedding has none
    adapted = save_adapter(tiny_model, tmp_path, 0.2, **config)
    assert_computes_what_peft_does(tmp_path, adapted, TOKENS)


def test_an_sae_of_an_adapter_is_trained_and_evaluated_on_the_merged_model(tiny_run, tiny_model, tmp_path, script):
    adapted = save_adapter(tiny_model, tmp_path / "adapter", 0.2)
    file = tmp_path / "adapter" / "adapter_config.json"
    relative = os.path.relpath(tiny_model, file.parent)  # from the adapter's directory
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": relative}))
    trained = script("sae_lens_train.py", *tiny_run, "--model_name", file.parent)
    assert trained.status == 0, trained.stderr
    sae = Path(trained.stdout.strip().splitlines()[-1])
    assert json.loads((sae / "cfg.json").read_text())["metadata"]["model_name"] == str(file.parent)
    evaluated = script("evaluate_sae_real_activations.py", "--sae_path", sae, "--num_samples", 4, "--device", "cpu")
    assert evaluated.status in (0, 1), evaluated.stderr
    with torch.no_grad():
        expected_BTD = adapted(TOKENS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(merged(file.parent).activations(TOKENS), expected_BTD, rtol=1e-5, atol=1e-5)
    assert hook_width(find_model(str(file.parent)).config, HOOK) == 32


def test_a_base_and_its_adapter_are_different_models(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path, 0.2)
    models = LanguageModels("cpu", torch.float32)
    base, adapter = find_model(str(tiny_model)), find_model(str(tmp_path))
    alone, with_adapter = models.load(base, HOOK), models.load(adapter, HOOK)
    assert not torch.allclose(alone.activations(TOKENS), with_adapter.activations(TOKENS))
    assert base.files() != adapter.files()
    assert base.is_here() and adapter.is_here()


def test_the_tokenizer_is_that_of_the_adapter_or_else_that_of_the_base(tiny_model, tokenizer, tmp_path):
    save_adapter(tiny_model, tmp_path)
    source = find_model(str(tmp_path))
    assert load_tokenizer(source).get_vocab() == tokenizer.get_vocab()
    own = copy.deepcopy(tokenizer)
    own.pad_token = "<|im_start|>"
    own.save_pretrained(tmp_path)
    assert load_tokenizer(source).pad_token == "<|im_start|>" != tokenizer.pad_token


def edit(**fields: Any) -> Callable[[Path, Path], None]:
    def change(directory: Path, _: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def without_a_weight(directory: Path, _: Path) -> None:
    state = load_file(directory / "adapter_model.safetensors")
    state.popitem()
    save_file(state, directory / "adapter_model.safetensors")


def with_more_tokens(directory: Path, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(directory / "resized")
    save_adapter(directory / "resized", directory, modules_to_save=["embed_tokens", "lm_head"])
    edit(base_model_name_or_path=str(tiny_model))(directory, tiny_model)


def of_another_base(directory: Path, _: Path) -> None:
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
        )
    ).save_pretrained(directory / "other")
    edit(base_model_name_or_path=str(directory / "other"))(directory, directory)


def of_an_adapter(directory: Path, tiny_model: Path) -> None:
    save_adapter(tiny_model, directory / "adapter")
    edit(base_model_name_or_path=str(directory / "adapter"))(directory, tiny_model)


def pickled(directory: Path, _: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    torch.save({"weight": TouchesFile(directory / "ran")}, directory / "adapter_model.bin")


def beside_a_model(directory: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, directory, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d, _: (d / "adapter_model.safetensors").unlink(), "holds adapter_config.json and no adapter_model"),
        (lambda d, _: (d / "adapter_model.safetensors").write_bytes(b"{"), "its weights cannot be read"),
        (lambda d, _: (d / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
        (without_a_weight, "1 weights of the adapter are missing or have no place in its base"),
        (edit(base_model_name_or_path="/no/such/base"), "whose base cannot be used: --model_name /no/such/base"),
        (edit(base_model_name_or_path="x" * 5000), "an adapter, whose base cannot be used"),
        (lambda d, t: edit(base_model_name_or_path=str(d))(d, t), "an adapter itself"),
        (edit(base_model_name_or_path=None), "names no base"),
        (of_an_adapter, "whose base cannot be used: .* an adapter itself"),
        (of_another_base, "size mismatch"),
        (with_more_tokens, "size mismatch"),
        (edit(target_modules=["no_such_proj"]), "Target modules .* not found in the base model"),
        (edit(target_modules=["q_proj", "k_proj", "down_proj"]), "8 weights of the adapter are missing"),
        (edit(peft_type="PROMPT_TUNING"), "of the type 'PROMPT_TUNING', and only LORA"),
        (edit(task_type="SEQ_CLS"), "for 'SEQ_CLS'"),
        (edit(layer_replication=[[0, 4], [2, 4]]), "layer_replication"),
        (edit(megatron_config={}, megatron_core="os", alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (edit(a_later_field=3), "does not know a_later_field"),
        (pickled, "pickle of more than tensors"),
        (beside_a_model, "holds a whole model and adapter_config.json"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(change, says, tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path)
    change(tmp_path, tiny_model)
    with pytest.raises(UserError, match=says) as refused:
        merged(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_a_matrix_that_the_base_uses_twice_is_refused(tiny_model, tmp_path):
    tied = AutoModelForCausalLM.from_pretrained(tiny_model)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    adapted = save_adapter(tmp_path / "tied", tmp_path / "adapter", 0.5, target_modules=["embed_tokens"])
    with pytest.raises(UserError, match="merged into its base it gives other logits than beside it"):
        assert_computes_what_peft_does(tmp_path / "adapter", adapted, TOKENS)


@pytest.mark.parametrize("base", ["/etc", "../model", "C:\\model"])
def test_a_downloaded_adapter_names_no_path_of_this_machine(base, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    of_hub = tmp_path / "models--owner--adapter"
    save_adapter(tiny_model, of_hub / "snapshots" / ("0" * 40))
    edit(base_model_name_or_path=base)(of_hub / "snapshots" / ("0" * 40), tiny_model)
    (of_hub / "refs").mkdir()
    (of_hub / "refs" / "main").write_text("0" * 40)
    with pytest.raises(UserError, match="a downloaded adapter, whose base .* is not a name on the Hub"):
        find_model("owner/adapter")
