"""The hooked model computes what transformer-lens computes, and computes nothing that is not used."""

import copy
import shutil
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sae_toolkit.errors import UserError
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import find_model, load_language_model

HOOKS = [
    "blocks.12.hook_resid_pre",
    "blocks.12.hook_resid_mid",
    "blocks.12.hook_resid_post",
    "blocks.12.hook_attn_out",
    "blocks.12.hook_mlp_out",
    "blocks.12.attn.hook_z",
    "blocks.29.hook_resid_post",
]
TOKENS = torch.tensor([[1, 504, 3575, 282, 4649, 314, 7042, 30], [1, 28120, 905, 28, 253, 905, 282, 2]])

_LLAMA_LIKE = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "qwen2": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "phi": {"intermediate_size": 64, "num_attention_heads": 4},
    "opt": {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "gpt2": {"num_attention_heads": 4},
    "gpt_neox": {"intermediate_size": 64, "num_attention_heads": 4},
    # These layers return a tuple.
    "bloom": {"num_attention_heads": 4},
    "falcon": {"num_attention_heads": 4},
    "gptj": {"num_attention_heads": 4, "rotary_dim": 4},
    "gpt_neo": {"num_attention_heads": 4, "attention_types": [[["global"], 3]]},
    "mpt": {"num_attention_heads": 4},
}
LLAMA_LAYERS = ["llama", "mistral", "mixtral", "qwen2"]
TINY_TOKENS = torch.tensor([[1, 50, 35, 28, 46, 31, 70, 30], [1, 28, 90, 28, 25, 95, 82, 2]])


def tiny_family(family: str) -> PreTrainedModel:
    """Three layers of width 32, with weights and biases large enough that every one of them shows in the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 100, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, bos_token_id=1, eos_token_id=2, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def residual_hooks(family: str) -> list[str]:
    names = ["hook_resid_pre", "hook_resid_post", *(["hook_resid_mid"] if family in LLAMA_LAYERS else [])]
    return [f"blocks.{layer}.{name}" for layer in range(3) for name in names]


@torch.no_grad()
def logits_with_plain_hooks(hooked: LanguageModel, replaced_BTD: torch.Tensor, old_BTD: torch.Tensor) -> torch.Tensor:
    """Logits of a whole forward pass in which PyTorch hooks replace the residual stream."""
    layer = hooked.layers[hooked.hook.layer]

    def new_input(_module, args):
        return (replaced_BTD, *args[1:])

    def new_output(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + (replaced_BTD - old_BTD)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        if not hooked.hook.name.endswith("post"):
            stack.callback(hooked.hook.module.register_forward_pre_hook(new_input).remove)
        if not hooked.hook.name.endswith("pre"):
            stack.callback(layer.register_forward_hook(new_output).remove)
        return hooked.model(TINY_TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def transformer_lens_cache(language_model, tokenizer):
    bridge = TransformerBridge.boot_transformers(
        "embedded", hf_model=copy.deepcopy(language_model.model), tokenizer=tokenizer, dtype=torch.float32
    )
    return bridge.run_with_cache(TOKENS, names_filter=HOOKS, prepend_bos=False)[1]


@pytest.mark.parametrize("hook_name", HOOKS)
def test_activations_equal_those_of_transformer_lens(language_model, transformer_lens_cache, hook_name):
    ours = LanguageModel(language_model.model, hook_name).activations(TOKENS)
    theirs = transformer_lens_cache[hook_name].flatten(2)
    assert ours.shape[-1] == hook_width(language_model.config, hook_name)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * theirs.abs().median().item())


@pytest.mark.parametrize("hook_name", [*HOOKS, "blocks.0.hook_resid_pre", "model.layers.12.mlp", "model.norm"])
def test_a_pass_that_starts_at_the_hook_ends_where_the_whole_pass_does(language_model, hook_name):
    hooked = LanguageModel(language_model.model, hook_name)
    logits, state = hooked.logits(TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TOKENS, state, state.acts_BTD), logits)
    zeroed = hooked.logits_from_hook(TOKENS, state, torch.zeros_like(state.acts_BTD))
    assert not torch.allclose(zeroed, logits, atol=1.0)
    torch.testing.assert_close(hooked.logits(TOKENS)[0], logits)  # no hook is left behind


@pytest.mark.parametrize(("family", "hook_name"), [(f, hook) for f in FAMILIES for hook in residual_hooks(f)])
def test_every_family_runs_from_its_residual_stream(family, hook_name):
    hooked = LanguageModel(tiny_family(family), hook_name)
    logits, state = hooked.logits(TINY_TOKENS)
    torch.testing.assert_close(hooked.logits_from_hook(TINY_TOKENS, state, state.acts_BTD), logits)

    replaced_BTD = state.acts_BTD + torch.randn_like(state.acts_BTD) * state.acts_BTD.std()
    expected = logits_with_plain_hooks(hooked, replaced_BTD, state.acts_BTD)
    assert (expected - logits).abs().max() > 0.1 * logits.std()
    ours = hooked.logits_from_hook(TINY_TOKENS, state, replaced_BTD)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_resid_mid_replaces_what_the_skip_connection_carries():
    model = tiny_family("llama")
    hooked = LanguageModel(model, "blocks.2.hook_resid_mid")
    _, state = hooked.logits(TINY_TOKENS)
    x = torch.randn_like(state.acts_BTD)
    weight = {name: parameter.double() for name, parameter in model.named_parameters()}

    def norm(hidden, name):
        scale = (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        return hidden * scale * weight[name]

    normed = norm(x.double(), "model.layers.2.post_attention_layernorm.weight")
    gate, up, down = (weight[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    after = x.double() + (nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    expected = norm(after, "model.norm.weight") @ weight["lm_head.weight"].T
    ours = hooked.logits_from_hook(TINY_TOKENS, state, x)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def zero_ablated(hooked: LanguageModel) -> torch.Tensor:
    _, state = hooked.logits(TINY_TOKENS)
    return hooked.logits_from_hook(TINY_TOKENS, state, torch.zeros_like(state.acts_BTD))


@pytest.mark.parametrize(
    ("family", "hook_name"),
    [*((f, hook) for f in FAMILIES for hook in residual_hooks(f)), ("llama", "model.layers.1")],
)
def test_zeros_in_the_residual_stream_leave_nothing_of_the_text(family, hook_name):
    hooked = LanguageModel(tiny_family(family), hook_name)
    assert hooked.ablation_is_shared
    assert not hooked.sequences_run
    ablated = zero_ablated(hooked)
    torch.testing.assert_close(ablated[0], ablated[1])


@pytest.mark.parametrize("name", ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "model.layers.1.mlp"])
def test_zeros_beside_the_residual_stream_leave_the_text(name):
    hooked = LanguageModel(tiny_family("llama"), name)
    assert not hooked.ablation_is_shared
    ablated = zero_ablated(hooked)
    assert not torch.allclose(ablated[0], ablated[1], atol=0.1)


def test_ablation_is_not_shared_where_a_later_layer_is_given_the_tokens_again():
    model = tiny_family("llama")
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: embedded.append(output))
    model.model.layers[2].register_forward_pre_hook(lambda _module, args: (args[0] + embedded[-1], *args[1:]))
    assert not LanguageModel(model, "blocks.1.hook_resid_post").ablation_is_shared
    assert LanguageModel(model, "blocks.2.hook_resid_post").ablation_is_shared


def test_activations_run_the_layers_up_to_the_hook_and_no_more(language_model):
    calls = []
    modules = [*language_model.layers, language_model.model.lm_head]
    handles = [m.register_forward_pre_hook(lambda m, _: calls.append(modules.index(m))) for m in modules]
    with torch.profiler.profile() as profile:
        language_model.activations(TOKENS)
    for handle in handles:
        handle.remove()
    assert calls == list(range(13))
    operations = {event.key: event.count for event in profile.key_averages()}
    assert operations["aten::scaled_dot_product_attention"] == 13


def test_a_pass_from_the_hook_runs_only_the_layers_after_it(language_model):
    _, state = language_model.logits(TOKENS)
    computed = []
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: computed.append(1)) for layer in language_model.layers]
    language_model.logits_from_hook(TOKENS, state, state.acts_BTD)
    for handle in handles:
        handle.remove()
    assert len(computed) == 17


def test_a_model_cut_after_its_hook_gives_the_same_activations(tiny_model):
    source = find_model(str(tiny_model))
    model = load_language_model(source, "blocks.1.hook_resid_post", "cpu", torch.float32)
    whole = model.activations(TOKENS)
    model.keep_only_up_to_hook()
    assert len(model.layers) == 2
    torch.testing.assert_close(model.activations(TOKENS), whole, rtol=0, atol=0)


@pytest.mark.cuda_shapes  # half a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_layers_compute_the_same_and_can_be_replaced(tiny_model):
    model = load_language_model(find_model(str(tiny_model)), "blocks.1.mlp.hook_post", "cpu", torch.float32)
    logits_BTV, state = model.logits(TOKENS)
    captured = torch._dynamo.utils.counters["stats"]
    before = captured["calls_captured"]
    model.compile_layers()
    torch.testing.assert_close(model.activations(TOKENS), state.acts_BTD, rtol=1e-4, atol=1e-5)
    assert captured["calls_captured"] > before
    for _ in range(2):  # the layer before the hook is replaced, and then itself again
        replaced_BTV = model.logits_from_hook(TOKENS, state, state.acts_BTD)
        torch.testing.assert_close(replaced_BTV, logits_BTV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(TOKENS)[0], logits_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hook_name", "says"),
    [
        ("blocks.30.hook_resid_post", "--layer 30: the model has 30 layers, 0 to 29"),
        ("blocks.3.hook_nonsense", "--hook_name blocks.3.hook_nonsense: known within a block"),
        ("model.layers.3.nonsense", "--hook_name model.layers.3.nonsense: not of the form"),
    ],
)
def test_an_unknown_hook_is_said_before_any_weights_are_loaded(embedded_source, hook_name, says):
    with pytest.raises(UserError, match=says):
        hook_width(embedded_source.config, hook_name)
