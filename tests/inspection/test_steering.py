"""--steer does to the model what the decoder vector says, whatever the cache of keys and values, and nothing else."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from sae_toolkit.inspection.prepare import prepare_inspection
from sae_toolkit.inspection.steering import _token_ids_go_to, _Turn, change_of_turning, write_with_and_without
from sae_toolkit.model.hooks import hooked
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.settings.inspection import Steer, parse_inspection_flags
from sae_toolkit.text.positions import PositionFilter
from support.inspection import save_sae

PROMPT, WORD = "The capital of France is", " banana"


METADATA = {"seqpos_slice": (1, None)}  # no text: --steer reads none


@pytest.fixture(scope="module")
def made_for_a_word(language_model, tokenizer, tmp_path_factory):
    """After the last layer: feature 0 makes one word likely, and no text activates it; feature 1 is random."""
    (word,) = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    unembedding = language_model.unembedding(576)
    head_VD, norm_D = unembedding.weight_VD, unembedding.norm_factors_D
    direction_D = (head_VD[word] - head_VD.mean(0)) / norm_D
    W_dec_FD = torch.nn.functional.normalize(torch.stack((direction_D, torch.randn(576))), dim=1).float()
    return save_sae(tmp_path_factory.mktemp("saes") / "word", "blocks.29.hook_resid_post", W_dec_FD, 1e6, **METADATA)


@pytest.fixture(scope="module")
def of_the_middle(tmp_path_factory):
    """At layer 12: 64 random directions above a low threshold, so that many are active."""
    W_dec_FD = torch.nn.functional.normalize(torch.randn(64, 576, generator=torch.Generator().manual_seed(0)), dim=1)
    return save_sae(tmp_path_factory.mktemp("saes") / "middle", "blocks.12.hook_resid_post", W_dec_FD, 1.0, **METADATA)


def steered(language_model, sae, *flags):
    settings = parse_inspection_flags("", ["--sae_path", str(sae), "--lm_dtype", "float32", "--device", "cpu", *flags])
    (group,) = prepare_inspection(settings)
    at_hook = LanguageModel(language_model.model, group.hook_name)
    return at_hook, group, write_with_and_without(group, at_hook, settings.steering.steers, settings.steering)


def test_a_feature_made_for_a_word_makes_the_model_say_it(language_model, made_for_a_word):
    flags = ("--steer", "0=2000", "--prompt", PROMPT, "--new_tokens", "4")
    _, _, ((prompt, without, turned),) = steered(language_model, made_for_a_word, *flags)
    assert prompt == PROMPT
    assert without.activations == (0,)
    assert WORD not in [token for token, _ in without.next_tokens]
    assert turned.next_tokens[0][0] == WORD
    assert turned.next_tokens[0][1] > 0.99
    assert turned.continuations[0].text == WORD * 4
    assert turned.continuations[0].log_probability == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("steer", ["0=0", "1=+0"])
def test_what_is_not_changed_changes_nothing(language_model, made_for_a_word, steer):
    flags = ("--steer", steer, "--prompt", PROMPT, "--new_tokens", "6")
    _, _, ((_, without, turned),) = steered(language_model, made_for_a_word, *flags)
    assert turned == without


@pytest.mark.parametrize("steer", ["7=40", "7=+25", "3=0"])
def test_turning_is_the_same_as_replacing_activations_in_whole_passes(language_model, of_the_middle, tokenizer, steer):
    """Greedy, token by token without a cache: x + (new - old) W_dec at all positions but the first."""
    flags = ("--steer", steer, "--prompt", PROMPT, "--new_tokens", "4")
    at_hook, group, ((_, without, turned),) = steered(language_model, of_the_middle, *flags)
    sae, feature, value = group.saes[0].sae, int(steer.partition("=")[0]), float(steer.partition("=")[2])
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    n_prompt = len(ids)
    for _ in range(4):
        tokens_1T = torch.tensor([ids])
        _, state = at_hook.logits(tokens_1T)
        old_1T = sae.encode(state.acts_BTD)[..., feature]
        new_1T = old_1T + value if "+" in steer else torch.full_like(old_1T, value)
        change_1TD = (new_1T - old_1T)[..., None] * sae.W_dec[feature]
        change_1TD[:, 0] = 0
        logits_V = at_hook.logits_from_hook(tokens_1T, state, state.acts_BTD + change_1TD)[0, -1]
        if len(ids) == n_prompt:
            probabilities = logits_V.softmax(-1).topk(5).values.tolist()
            assert [p for _, p in turned.next_tokens] == pytest.approx(probabilities, rel=1e-3)
            assert turned.next_tokens != without.next_tokens
            assert without.activations == pytest.approx((old_1T[0, -1].item(),), rel=1e-3)
        ids.append(int(logits_V.argmax()))
    assert turned.continuations[0].text == tokenizer.decode(ids[n_prompt:])


def test_the_models_own_settings_of_generation_are_left_out(language_model, made_for_a_word, monkeypatch):
    own = language_model.model.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 5.0)
    monkeypatch.setattr(own, "no_repeat_ngram_size", 2)
    flags = ("--steer", "0=2000", "--prompt", PROMPT, "--new_tokens", "4")
    _, _, ((_, _, turned),) = steered(language_model, made_for_a_word, *flags)
    assert turned.continuations[0].text == WORD * 4
    assert language_model.model.generation_config is own


def test_special_tokens_that_training_left_out_stay_as_they_are(language_model, of_the_middle):
    sae = load_sae(of_the_middle, "cpu")
    turn = _Turn(sae, [Steer("7=40", 7, 40.0, adds=False)], PositionFilter(special_token_ids=(2,)))
    hooked_model = LanguageModel(language_model.model, "blocks.12.hook_resid_post")
    seen = []

    def turn_and_see(acts_BTD):
        seen.append((acts_BTD.clone(), turn(acts_BTD)))
        return seen[-1][1]

    with _token_ids_go_to(turn, hooked_model.model), hooked(hooked_model.hook.module, "output", turn_and_see):
        hooked_model.model(torch.tensor([[1, 50, 2, 60]]))
    ((before_1TD, after_1TD),) = seen
    assert (before_1TD == after_1TD).all(-1).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("normalized", ["layer_norm", "constant_norm_rescale"])
def test_a_change_is_of_the_size_that_the_sae_divided_an_activation_by(normalized):
    config = StandardSAEConfig(d_in=16, d_sae=24, normalize_activations=normalized, apply_b_dec_to_input=False)
    sae = StandardSAE(config)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.zeros_like(parameter) if "b_" in name else torch.randn_like(parameter)
    acts_ND = 3 + 5 * torch.randn(7, 16)
    size_N = acts_ND.std(1) if normalized == "layer_norm" else acts_ND.norm(dim=1) / 16**0.5
    with torch.no_grad():
        features_NF = sae.encode(acts_ND)
        for _ in range(2):  # the SAE can decode again
            change_ND = change_of_turning(sae, features_NF, [5], torch.full((7, 1), 2.0))
            expected_ND = ((2 - features_NF[:, 5]) * size_N)[:, None] * sae.W_dec[5]
            torch.testing.assert_close(change_ND, expected_ND, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "value", "adds"),
    [("12=8.5", 8.5, False), ("12= +3", 3, True), ("12=+-3", -3, True), ("12=-3", -3, False)],
)
def test_a_plus_sign_adds_and_no_sign_sets(given, value, adds):
    flags = ["--sae_path", "sae", "--prompt", "x", "--steer", given]
    (steer,) = parse_inspection_flags("", flags).steering.steers
    assert (steer.feature, steer.value, steer.adds) == (12, value, adds)


def test_drawn_continuations_have_the_same_seed(language_model, made_for_a_word):
    flags = ("--steer", "0=0", "--prompt", PROMPT, "--new_tokens", "5", "--temperature", "1", "--continuations", "2")
    _, _, ((_, without, turned),) = steered(language_model, made_for_a_word, *flags)
    assert turned == without
    assert len({each.text for each in without.continuations}) == 2
    _, _, ((_, other, _),) = steered(language_model, made_for_a_word, *flags, "--seed", "1")
    assert other.continuations != without.continuations


def test_the_script_prints_both(made_for_a_word, script):
    done = script(
        *("inspect_sae_features.py", "--sae_path", made_for_a_word, "--lm_dtype", "float32", "--device", "cpu"),
        *("--steer", "0=2000", "--prompt", PROMPT, "One", "--new_tokens", 2),
    )
    assert done.status == 0, done.stderr
    assert done.stdout.count("without: next token") == done.stdout.count("with 0=2000: next token ' banana'") == 2
    assert f"prompt: {PROMPT}" in done.stdout
    assert "The SAE's error is kept" in done.stdout
    assert not (made_for_a_word / "features").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--steer", "9=1", "--prompt", "x"), "--steer 9=1: word has the features 0 to 1"),
        (("--steer", "0=much", "--prompt", "x"), "--steer 0=much: must be FEATURE=VALUE"),
        (("--steer", "0", "--prompt", "x"), "--steer 0: must be FEATURE=VALUE"),
        (("--steer", "0=inf", "--prompt", "x"), "--steer 0=inf: must be FEATURE=VALUE"),
        (("--steer", "0=1e39", "--prompt", "x"), "--steer 0=1e39: must be FEATURE=VALUE"),
        (("--steer", "0=1", "--prompt", "x", "--temperature", "1e-42"), "give 0, or at least 0.001"),
        (("--explain", "m", "--explain_url", "http://[::1"), "--explain_url http://[::1: is no address"),
        (("--steer", "-1=2", "--prompt", "x"), "argument --steer: expected at least one argument"),
        (("--steer", "0=1", "0=2", "--prompt", "x"), "--steer 0=2: names feature 0 a second time"),
        (("--steer", "0=1"), "give --prompt TEXT"),
        (("--prompt", "x"), "--prompt x: is about --steer"),
        (("--steer", "0=1", "--prompt", "x", "--tokens", "5"), "--tokens 5: --steer reads no text"),
        (
            ("--steer", "0=1", "--prompt", "x", "--context_length", "7"),
            "--steer reads no text without",
        ),
        (("--steer", "0=1", "--prompt", "x", "--continuations", "2"), "give --temperature too"),
    ],
)
def test_bad_input_is_one_line(made_for_a_word, script, flags, says):
    done = script("inspect_sae_features.py", "--sae_path", made_for_a_word, *flags)
    assert (done.status, len(done.error_lines)) == (2, 1), done.stderr
    assert says in done.error_lines[0]
