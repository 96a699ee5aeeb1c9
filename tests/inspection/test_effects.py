"""--effects measures what turning a feature does, on a real model, against passes with changed activations."""

import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import JumpReLUSAE

from sae_toolkit.inspection.effects import summary
from sae_toolkit.model.language_model import LanguageModel
from support.inspection import save_sae

WORD = " banana"
CONTEXT = 24  # so short that windows around examples hold whole contexts


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "fruit.txt"
    file.write_text(
        "\n\n".join(f"In the year {1900 + i} they sold a banana and an apple for {i} pence." for i in range(40))
    )
    return file


def measured(script, sae, text, tmp_path, *flags):
    done = script(
        *("inspect_sae_features.py", "--sae_path", sae, "--dataset", text, "--tokens", 500, "--output", tmp_path),
        *("--device", "cpu", "--lm_dtype", "float32", "--skip_positions", 1, "--max_activation_norm_multiple", 0),
        *("--effects", 10, "--no_page", *flags),
    )
    assert done.status == 0, done.stderr
    assert done.stdout.split()[-1] == str(tmp_path / "effects.parquet")
    return pq.read_table(tmp_path / "effects.parquet").to_pylist(), done.stderr


def test_a_feature_made_for_a_word_promotes_it(script, language_model, tokenizer, text, tmp_path):
    """After the last layer nothing but the norm comes after the vector, so what it promotes by the logit lens gains."""
    (word,) = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    unembedding = language_model.unembedding(576)
    head_VD, norm_D = unembedding.weight_VD, unembedding.norm_factors_D
    direction_D = torch.nn.functional.normalize((head_VD[word] - head_VD.mean(0)) / norm_D, dim=0).float()
    W_dec_FD = torch.stack((direction_D, torch.nn.functional.normalize(torch.ones(576), dim=0)))
    sae = save_sae(tmp_path / "word", "blocks.29.hook_resid_post", W_dec_FD, 0.5, context_size=CONTEXT)
    effects, shown = measured(script, sae, text, tmp_path, "--promoted", 3)
    of_word = effects[0]
    assert of_word["feature"] == 0
    assert of_word["firings"] > 10
    assert of_word["promoted_gains"] == 1
    assert of_word["clamped_promoted"] - of_word["clamped_vocabulary"] > 0.1
    assert of_word["ablated_promoted"] < of_word["ablated_vocabulary"]
    assert "held at its maximum: loss changes by" in shown


def test_changes_are_those_of_passes_with_changed_activations(script, language_model, text, tmp_path):
    W_dec_FD = torch.nn.functional.normalize(torch.randn(16, 576, generator=torch.Generator().manual_seed(0)), dim=1)
    sae_path = save_sae(tmp_path / "middle", "blocks.12.hook_resid_post", W_dec_FD, 1.0, context_size=CONTEXT)
    effects, _ = measured(script, sae_path, text, tmp_path, "--examples", 1, "--drawn_examples", 0)
    sae, model = JumpReLUSAE.load_from_disk(sae_path), LanguageModel(language_model.model, "blocks.12.hook_resid_post")
    features = pq.read_table(tmp_path / "features.parquet").to_pylist()
    compared = 0
    assert [effect["contexts"] for effect in effects] == [1] * len(effects)
    rows = {}
    for feature in features:
        for example in feature["examples"]:
            rows.setdefault(example["row"], {}).update(
                {example["first_position"] + i: token for i, token in enumerate(example["token_ids"])}
            )
    whole = {row: torch.tensor([[at[i] for i in range(CONTEXT)]]) for row, at in rows.items() if len(at) == CONTEXT}
    for effect in effects:
        feature = features[effect["feature"]]
        (example,) = feature["examples"]
        if example["row"] not in whole:
            continue
        tokens_1T = whole[example["row"]]
        clean_1TV, state = model.logits(tokens_1T)
        old_T = sae.encode(state.acts_BTD)[0, :, effect["feature"]].detach()
        new_T = torch.full_like(old_T, example["activation"])
        change_TD = (new_T - old_T)[:, None] * sae.W_dec[effect["feature"]].detach()
        change_TD[0] = 0  # the skipped position
        turned_1TV = model.logits_from_hook(tokens_1T, state, state.acts_BTD + change_TD)
        losses = [
            torch.nn.functional.cross_entropy(logits[0, 1:-1], tokens_1T[0, 2:]) for logits in (clean_1TV, turned_1TV)
        ]
        assert effect["clamped_loss"] == pytest.approx((losses[1] - losses[0]).item(), rel=1e-3, abs=1e-5)
        compared += 1
    assert compared > 3


def test_effects_without_examples_are_refused(script, tmp_path):
    done = script(
        *("inspect_sae_features.py", "--sae_path", tmp_path, "--effects", 3, "--examples", 0, "--drawn_examples", 0)
    )
    assert (done.status, len(done.error_lines)) == (2, 1)
    assert "--effects 3: turns features in their examples" in done.error_lines[0]


def test_a_summary_of_nothing_is_short():
    assert summary([]).count("\n") == 0
