"""The loss of the predictions with an SAE in place: its value and gradient are torch's own, through a plain model."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from transformers import LlamaConfig, LlamaForCausalLM

from sae_toolkit.activations.contexts import split_rows
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.steps import fused_adam
from sae_toolkit.steps.finetune_loss import PredictionLoss, cross_entropy, kl_divergence
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE, sparse_class
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.text.positions import PositionFilter

D_IN, D_SAE, VOCABULARY, SCALE = 16, 128, 100, 3.0
POSITIONS = PositionFilter(special_token_ids=(7,), skip_positions=1)
SETTINGS = {
    "standard": {"l1_coefficient": 0.1},
    "gated": {"l1_coefficient": 0.1},
    "jumprelu": {"l0_coefficient": 0.1},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [32, D_SAE]},
}


@pytest.fixture(scope="module")
def tiny_llama():
    """A Llama of random weights in float64, so that gradients can be compared to many digits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_IN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def tokens_RT():
    return np.random.default_rng(0).integers(0, VOCABULARY, (6, 12))


def trainer_of(architecture, hook_name):
    sae_class, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=D_IN, d_sae=D_SAE, dtype="float64", **copy.deepcopy(SETTINGS[architecture])),
        hook_name=hook_name,
        training_tokens=6400,
        train_batch_size_tokens=64,
        dead_feature_window=1,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(1)
    plain = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    sae = sparse_class(sae_class, plain.cfg)(copy.deepcopy(plain.cfg))
    sae.load_state_dict(plain.state_dict())
    trainer = Trainer(cfg.to_sae_trainer_config(), sae, iter(()))
    trainer.activation_scaler.scaling_factor = SCALE
    trainer.n_forward_passes_since_fired[: D_SAE // 2] = 5  # the loss of dead features takes part
    return trainer, plain


def wanted_gradients(trainer, plain, model, module, tokens_RT, kind):
    """The gradients of SAELens's dense SAE, by autograd through Transformers' forward pass with a PyTorch hook."""
    tokens = torch.from_numpy(tokens_RT)
    kept = torch.from_numpy(POSITIONS.keeps_tokens(tokens_RT))
    seen = {}

    def replace(_module, _args, output):
        acts = output[0] if isinstance(output, tuple) else output
        sae_in = acts[kept] * SCALE
        plain.train()
        out = plain.training_forward_pass(
            TrainStepInput(
                sae_in=sae_in,
                dead_neuron_mask=trainer.dead_neurons,
                coefficients=trainer.get_coefficients(),
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        seen["output"] = out
        new = acts.clone()
        new[kept] = out.sae_out / SCALE
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.no_grad():
        clean = model(tokens).logits
    with module.register_forward_hook(replace):
        logits = model(tokens).logits
    output = seen["output"]
    if kind == "kl":
        loss = F.kl_div(
            logits.log_softmax(-1)[kept], clean.log_softmax(-1)[kept], log_target=True, reduction="batchmean"
        )
    else:
        loss = F.cross_entropy(logits[:, :-1][kept[:, :-1]], tokens[:, 1:][kept[:, :-1]])
    norms = [
        torch.autograd.grad(value, output.sae_out, retain_graph=True)[0].norm()
        for value in (output.losses["mse_loss"], loss)
    ]
    weight = (norms[0] / norms[1]).item()
    (output.loss + weight * loss).backward(inputs=list(plain.parameters()))
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    return {name: parameter.grad for name, parameter in plain.named_parameters()}, loss.item(), weight


@pytest.mark.parametrize(
    ("architecture", "kind", "hook_name"),
    [
        *((architecture, "kl", "blocks.1.hook_resid_post") for architecture in SETTINGS),
        ("topk", "ce", "blocks.1.hook_resid_post"),
        ("standard", "kl", "blocks.1.hook_mlp_out"),
        ("batchtopk", "kl", "blocks.0.hook_attn_out"),
    ],
)
def test_gradients_are_those_of_autograd_through_the_whole_model(
    tiny_llama, tokens_RT, monkeypatch, architecture, kind, hook_name
):
    """Special tokens and first positions keep the model's activations, and nothing in the model changes."""
    layer = tiny_llama.model.layers[int(hook_name.split(".")[1])]
    module = {"hook_resid_post": layer, "hook_mlp_out": layer.mlp, "hook_attn_out": layer.self_attn}[
        hook_name.split(".")[2]
    ]
    before = copy.deepcopy(tiny_llama.state_dict())
    trainer, plain = trainer_of(architecture, hook_name)
    assert isinstance(trainer.sae, SparseTopKTrainingSAE) == (architecture in ("topk", "batchtopk"))
    wanted, loss, weight = wanted_gradients(trainer, plain, tiny_llama, module, tokens_RT, kind)

    prediction_loss = PredictionLoss(LanguageModel(tiny_llama, hook_name), kind, POSITIONS, rows_at_once=4)
    found = {}

    def note(_):  # where the clipped gradients are complete, and before they are laid out for Adam
        found.update({name: parameter.grad.clone() for name, parameter in trainer.sae.named_parameters()})

    monkeypatch.setattr(fused_adam, "_lay_out_gradients", note)
    output = trainer.step(prediction_loss.read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT)), prediction_loss)

    assert output.losses[f"{kind}_loss"].item() == pytest.approx(loss, rel=1e-6)
    assert trainer.finetune_weight.item() == pytest.approx(weight, rel=1e-5)
    assert trainer.n_training_samples == 64
    assert trainer.n_frac_active_samples == POSITIONS.keeps_tokens(tokens_RT).sum()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, before[name])
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_contexts_give_the_same_gradient_together_and_one_by_one(tiny_llama, tokens_RT):
    model = LanguageModel(tiny_llama, "blocks.1.hook_resid_post")
    found = []
    for rows_at_once in (6, 1):
        loss = PredictionLoss(model, "kl", POSITIONS, rows_at_once)
        acts_ND = loss.read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT))
        found.append(loss.gradient(0.8 * acts_ND))
    torch.testing.assert_close(found[0], found[1])


def test_a_pass_that_runs_out_of_memory_is_tried_again_with_half_of_the_contexts(tiny_llama, tokens_RT, monkeypatch):
    model = LanguageModel(tiny_llama, "blocks.1.hook_resid_post")
    undisturbed = PredictionLoss(model, "kl", POSITIONS, 6)
    wanted = undisturbed.gradient(0.8 * undisturbed.read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT)))
    whole = model.logits_from_hook

    def with_room_for_two(tokens, *args):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tokens, *args)

    monkeypatch.setattr(model, "logits_from_hook", with_room_for_two)
    loss = PredictionLoss(model, "kl", POSITIONS, 6)
    torch.testing.assert_close(loss.gradient(0.8 * loss.read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT))), wanted)
    assert loss.rows_at_once == 1


def test_massive_activations_keep_the_models_own(tiny_llama, tokens_RT):
    model = LanguageModel(tiny_llama, "blocks.1.hook_resid_post")
    acts_ND = PredictionLoss(model, "kl", POSITIONS, 6).read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT))
    limit = 1.0001 * acts_ND.norm(dim=-1).median().item()
    positions = PositionFilter(POSITIONS.special_token_ids, POSITIONS.skip_positions, limit)
    loss = PredictionLoss(model, "kl", positions, 6)
    kept_ND = loss.read(tokens_RT, POSITIONS.keeps_tokens(tokens_RT))
    assert torch.equal(kept_ND, acts_ND[acts_ND.norm(dim=-1) <= limit])
    assert loss.n_massive == len(acts_ND) - len(kept_ND) > 0
    assert loss.gradient(kept_ND)[0].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_of_logits_are_torchs_in_float64(dtype):
    """On more logits than one chunk holds, some of them not scored."""
    torch.manual_seed(0)
    clean, logits = (3 * torch.randn(60, 40_000)).to(dtype), (3 * torch.randn(60, 40_000)).to(dtype)
    tokens_M = torch.randint(40_000, (60,))
    at_N = torch.arange(3, 59)
    exact = logits.double().requires_grad_()
    wanted_kl = F.kl_div(
        exact[at_N].log_softmax(-1), clean.double()[at_N].log_softmax(-1), log_target=True, reduction="sum"
    )
    wanted_ce = F.cross_entropy(exact[at_N], tokens_M[at_N + 1], reduction="sum")
    for wanted, (found, gradient) in (
        (wanted_kl, kl_divergence(clean, logits, at_N)),
        (wanted_ce, cross_entropy(tokens_M, logits, at_N)),
    ):
        (wanted_gradient,) = torch.autograd.grad(wanted, exact)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("seed", [3, None])
def test_each_row_goes_into_the_stream_or_into_one_batch_of_contexts(seed):
    tokens_NT = np.random.default_rng(0).integers(0, 20, (1000, 16)).astype(np.uint32)
    kept = POSITIONS.keeps_tokens(tokens_NT)
    stream_rows, batches = split_rows(tokens_NT, kept, share=0.2, batch_size=100, seed=seed)
    assert kept[stream_rows].sum() == pytest.approx(0.8 * kept.sum(), rel=0.01)
    assert kept[stream_rows].sum() >= 0.8 * kept.sum()
    n_batches = int(batches.n_kept.sum() // 100)
    read = [batches.batch(n) for n in range(n_batches)]
    assert all(np.array_equal(POSITIONS.keeps_tokens(rows), keeps) for rows, keeps in read)
    sizes = [keeps.sum() for _, keeps in read]
    assert all(abs(size - 100) <= 16 for size in sizes)
    assert sum(sizes) == pytest.approx(100 * n_batches, abs=8)
    assert sorted([*stream_rows, *batches.row_ids]) == list(range(1000))
    used = np.concatenate([rows for rows, _ in read])
    assert np.array_equal(used, tokens_NT[batches.row_ids[: len(used)]])
    assert (seed is None) == (batches.row_ids.min() > stream_rows.max())
    two_passes = np.concatenate([batches.batch(n)[0] for n in range(2 * n_batches)])
    repeated = np.tile(tokens_NT[batches.row_ids], (2, 1))[: len(two_passes)]
    assert np.array_equal(two_passes, repeated) == (seed is None)
    assert np.unique(two_passes, axis=0, return_counts=True)[1].max() == 2
    whole = split_rows(tokens_NT, kept, share=1, batch_size=100, seed=seed)
    assert len(whole[0]) == 0
    assert len(whole[1].row_ids) == 1000
