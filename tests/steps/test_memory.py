"""A dry run predicts the memory that a run takes, and warns if it is too much."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_toolkit.model.hook_width import parameters_up_to_hook
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import find_model
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.steps.memory import plan_memory
from sae_toolkit.training.configuration import build_runner_config


def configuration(model, d_in, *flags, device="cpu"):
    parsed = parse_training_flags(["--model_name", str(model), *map(str, flags)])
    return build_runner_config(parsed, parsed.model.all_hook_names[0], d_in=d_in, device=device, run_id="run")


def planned(cfg, source, dtype=torch.float32, **more):
    n_parameters = source.n_parameters, parameters_up_to_hook(source.config, [cfg.hook_name])
    return plan_memory(cfg, source, dtype, n_parameters=n_parameters, **{"cached": False, **more})


def test_a_dry_run_names_every_item(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, "--dry_run")
    assert done.status == 0
    said = done.stderr[done.stderr.index("memory ") :]
    for item in ("language model", "its forward pass", "buffer", "SAE", "gradients", "Adam", "step", "logits"):
        assert re.search(rf"{item} \d+\.\d\d", said), item


def test_shapes_are_counted_exactly(tiny_model):
    """Llama of width 32: embeddings, and two layers of attention, MLP and norms up to layer 1; the SAE of 4 x 32."""
    source = find_model(str(tiny_model))
    cfg = configuration(tiny_model, 32, "--layer", 1, "--expansion_factor", 4, "--context_size", 64)
    plan = planned(cfg, source)
    layer = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32
    assert plan.model == 4 * (source.config.vocab_size * 32 + 2 * layer + 32)
    assert plan.sae == 4 * (2 * 32 * 128 + 128 + 32)
    assert plan.adam == 2 * plan.gradients == 2 * plan.sae
    assert planned(cfg, source, cached=True).model == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_sae_of_a_run_counts_with_its_own_width(tiny_model, device):
    source = find_model(str(tiny_model))
    narrow, wide = (
        configuration(tiny_model, d_in, "--hook_name", hook_name, device=device)
        for d_in, hook_name in ((32, "blocks.1.hook_resid_post"), (64, "blocks.1.mlp.hook_post"))
    )
    alone = [planned(cfg, source) for cfg in (narrow, wide)]
    both, turned = (planned(cfgs[0], source, cfgs=cfgs) for cfgs in ([narrow, wide], [wide, narrow]))
    assert both == turned
    for item in ("sae", "adam", "sample"):
        assert getattr(both, item) == sum(getattr(plan, item) for plan in alone)
    for item in ("gradients", "step"):
        assert getattr(both, item) == max(getattr(plan, item) for plan in alone)
    seeds = planned(narrow, source, cfgs=[narrow, narrow])
    assert (seeds.sae, seeds.buffer) == (2 * alone[0].sae, alone[0].buffer)  # they share the activations


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"])
def test_what_the_layers_keep_for_fine_tuning_is_what_autograd_saves(tmp_path, hook_name):
    """In bfloat16, whose norms keep copies in float32. The logits, which are small here, are counted apart."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    flags = "--hook_name", hook_name, "--context_size", 64, "--train_batch_size_tokens", 64
    cfg, source = configuration(tmp_path, 128, *flags), find_model(str(tmp_path))
    plan = planned(cfg, source, torch.bfloat16, finetune_loss="kl")
    n_tokens = 128  # a batch and a context, although 8 contexts could go through the model together
    assert plan.finetuning_logits == n_tokens * 8 * 2

    model = LanguageModel(LlamaForCausalLM(config).to(torch.bfloat16), hook_name)
    weights = {weight.untyped_storage().data_ptr() for weight in model.model.parameters()}
    tokens_BT = torch.randint(8, (2, 64))
    _, state = model.logits(tokens_BT)
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _logits = model.logits_from_hook(tokens_BT, state, state.acts_BTD.float().requires_grad_())
    found = sum(storage.nbytes() for storage in saved.values())
    assert 0.9 * found <= plan.finetuning_pass <= 1.3 * found
    whole = planned(cfg, source, torch.bfloat16, evaluates=True).model
    assert plan.model == whole > planned(cfg, source, torch.bfloat16).model


def test_a_run_that_cannot_fit_is_warned_of(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, "--expansion_factor", 10_000_000, "--dry_run")
    assert re.search(r"takes about [\d.]+ GiB, and cpu has [\d.]+ GiB free; it would fit with --", done.stderr)
