"""sae-bench's evals are chosen by name, refused in one line if they cannot run here, and run unchanged."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.saebench.run import (
    ENVIRONMENT,
    EVALS,
    check_evals,
    parse_evals,
    refuse_what_cannot_run,
    run_saebench,
)
from sae_toolkit.files.embedded import EMBEDDED_MODEL
from sae_toolkit.model.language_model import LanguageModel
from support.processes import HOOK, ROOT, run_process

KEYS = {
    "model_behavior_preservation": {"kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"},
    "model_performance_preservation": {
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    },
    "reconstruction_quality": {"explained_variance", "explained_variance_legacy", "mse", "cossim"},
    "shrinkage": {"l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"},
    "sparsity": {"l0", "l1"},
    "token_stats": {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"},
    "misc_metrics": {
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
    },
}
SPECIAL_TOKENS = (1, 2)  # <|im_start|> is BOS, <|im_end|> EOS and pad


def test_evals_are_named_in_a_list():
    assert parse_evals("core, absorption,core") == ("core", "absorption")
    assert parse_evals(",".join(EVALS)) == tuple(EVALS)


@pytest.mark.parametrize("text", ["core,spelling", "", ","])
def test_an_unknown_eval_is_answered_with_the_known_ones(text):
    with pytest.raises(UserError, match=r"^--saebench .*: no eval .*; choose from core, .*unlearning$"):
        parse_evals(text)


def refusal(evals: str, model: str, n_parameters: int, hook_name: str = HOOK) -> str:
    with pytest.raises(UserError) as error:
        refuse_what_cannot_run(parse_evals(evals), model_name=model, n_parameters=n_parameters, hook_name=hook_name)
    return str(error.value)


def test_core_and_meta_structure_run_on_any_model_without_a_network():
    refuse_what_cannot_run(
        ("core", "meta_structure"), model_name=EMBEDDED_MODEL, n_parameters=134_515_008, hook_name=HOOK
    )


def test_what_cannot_run_is_said_in_one_line_with_each_reason(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said = refusal("core,absorption,autointerp,ravel", EMBEDDED_MODEL, 134_515_008)
    assert "\n" not in said
    assert said.startswith("--saebench: cannot run here: absorption: HookedTransformer does not know the model embed")
    assert "absorption: " in said and "135 M parameters, under 1 B; autointerp: " in said
    assert "OPENAI_API_KEY" in said
    assert "cannot read" not in said  # its data set was not looked up, as it could not run with it either
    assert f"ravel: it supports only google/gemma-2-2b and EleutherAI/pythia-160m-deduped, not {EMBEDDED_MODEL}" in said
    assert "core:" not in said


def test_a_data_set_that_cannot_be_read_is_named_with_the_cause_and_asked_for_once(caplog):
    said = refusal("scr,tpp", "gpt2", 124_000_000)
    cause = "cannot read LabHC/bias_in_bios: the Hugging Face Hub cannot be reached ("
    assert said.startswith(f"--saebench: cannot run here: scr: {cause}")
    assert f"; tpp: {cause}" in said and said.count("(") == said.count(")")
    assert len(caplog.messages) == len(set(caplog.messages))


def test_an_eval_is_refused_only_for_what_it_lacks():
    assert "absorption" not in refusal("absorption,unlearning", "google/gemma-2-2b-it", 2_600_000_000)
    assert "bio-forget-corpus.jsonl" in refusal("unlearning", "google/gemma-2-2b-it", 2_600_000_000)
    assert "cannot read LabHC/bias_in_bios" in refusal("scr", "gpt2", 124_000_000)
    refuse_what_cannot_run(
        ("sparse_probing_sae_probes",), model_name="gpt2", n_parameters=124_000_000, hook_name="blocks.6.hook_resid_pre"
    )


def test_a_hook_by_its_module_name_is_refused():
    said = refusal("core", EMBEDDED_MODEL, 134_515_008, "model.layers.12")
    assert "the SAE's hook model.layers.12 is not one of TransformerLens" in said


def test_a_package_that_cannot_be_installed_is_said_and_leaves_no_environment_that_counts(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements/saebench.txt"
    requirements.parent.mkdir()
    requirements.write_text("sae-bench==0.0.0\ntorch==2.13.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for _ in range(2):
        with pytest.raises(UserError, match=r"^--saebench: cannot make .*venv-saebench: .*sae-bench==0\.0\.0"):
            replace(ENVIRONMENT, root=tmp_path).python()


@pytest.mark.parametrize(("evals", "named"), [("scr,core,tpp", "scr and tpp were"), ("tpp", "tpp was"), ("core", None)])
def test_evals_that_were_found_unreliable_are_warned_of_once_before_anything_starts(monkeypatch, caplog, evals, named):
    said_by_then = []
    environment = SimpleNamespace(python=lambda: said_by_then.extend(caplog.messages))
    monkeypatch.setattr("sae_toolkit.evaluation.saebench.run.ENVIRONMENT", environment)
    check_evals(parse_evals(evals), [])
    assert said_by_then == caplog.messages
    if named is None:
        assert said_by_then == []
    else:
        (said,) = said_by_then
        assert caplog.records[0].levelno == logging.WARNING
        assert said.startswith(f"--saebench: {named} found to fail several tests of reliability")
        assert "should not be used to evaluate SAEs" in said
        assert said.endswith("(Chanin 2026, arXiv:2605.18229)")


@pytest.fixture(scope="module")
def rows_NT(tokenizer) -> np.ndarray:
    """16 rows of 64 tokens that begin with a BOS; two of them have an EOS inside, and one row is there twice."""
    rng = np.random.default_rng(0)
    rows = rng.integers(3, len(tokenizer), (16, 64), dtype=np.uint32)
    rows[:, 0] = 1
    rows[3, 20] = rows[7, 40] = 2
    rows[9] = rows[2]
    return rows


def random_sae(architecture: str) -> SAE:
    """An SAE of 512 features in 576 dimensions that fire on real activations."""
    generator = torch.Generator().manual_seed(0)
    W_FD = torch.randn(512, 576, generator=generator)
    common = {"d_in": 576, "d_sae": 512, "dtype": "float32", "device": "cpu"}
    state = {
        "W_enc": W_FD.T / 24,
        "W_dec": W_FD / W_FD.norm(dim=1, keepdim=True),
        "b_enc": torch.zeros(512),
        "b_dec": torch.zeros(576),
    }
    if architecture == "topk":
        sae = TopKSAE(TopKSAEConfig(k=16, **common))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        state["threshold"] = torch.full((512,), 5.0)
    sae.load_state_dict(state)
    sae.cfg.metadata.model_name = EMBEDDED_MODEL
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_core_measures_the_rows_given(architecture, rows_NT, language_model, capfd):
    sae = random_sae(architecture)
    arguments = {"model": EMBEDDED_MODEL, "hook_name": HOOK, "batch_size": 4, "device": "cpu", "dtype": "float32"}
    result = run_saebench(("core",), sae=sae, rows_NT=rows_NT, **arguments)["core"]
    assert {category: set(metrics) for category, metrics in result.items()} == KEYS
    assert set(result["token_stats"].values()) == {rows_NT.size}
    assert "core: both passes read the 16 rows given, in their order" in capfd.readouterr().err

    tokens_NT = torch.from_numpy(rows_NT.astype(np.int64))
    acts_ND = LanguageModel(language_model.model, HOOK).activations(tokens_NT).flatten(0, 1).double()
    scored_N = ~torch.isin(tokens_NT.flatten(), torch.tensor(SPECIAL_TOKENS))
    features_NF = torch.relu(acts_ND[scored_N] @ sae.W_enc.double())
    if architecture == "topk":
        kept = features_NF.topk(16)
        features_NF = torch.zeros_like(features_NF).scatter(1, kept.indices, kept.values)
    else:
        features_NF = features_NF * (features_NF > sae.threshold.double())
    assert result["sparsity"]["l0"] == pytest.approx((features_NF != 0).sum(1).double().mean().item(), rel=1e-4)
    assert result["sparsity"]["l1"] == pytest.approx(features_NF.sum(1).mean().item(), rel=1e-4)
    assert result["misc_metrics"]["frac_alive"] == pytest.approx((features_NF > 0).any(0).double().mean().item())


@pytest.mark.parity
def test_a_store_that_serves_other_rows_is_caught():
    program = """
import numpy as np, torch
from datasets import Dataset
from sae_lens import TopKSAE, TopKSAEConfig
from sae_toolkit.evaluation.saebench.worker import RowStore
sae = TopKSAE(TopKSAEConfig(k=2, d_in=4, d_sae=8))
sae.cfg.metadata.hook_name, sae.cfg.metadata.prepend_bos = "blocks.0.hook_resid_post", False
given = np.arange(24).reshape(4, 6)
store = RowStore.from_sae(None, sae, dataset=Dataset.from_dict({"tokens": given}), context_size=6, streaming=False)
store.rows_NT = torch.from_numpy(given)
passes = [store.get_batch_tokens(2, move_to_model_device=False) for _ in range(4)]
assert torch.equal(torch.cat(passes), store.rows_NT.repeat(2, 1)) and store.n_served == 8
store.rows_NT = store.rows_NT.flip(0)
store.get_batch_tokens(2, move_to_model_device=False)
"""
    outcome = run_process(ENVIRONMENT.python(), "-c", program, PYTHONPATH=str(ROOT))
    assert outcome.status == 1
    assert "RuntimeError: SAELens's store served other tokens than rows 0 to 1" in outcome.stderr


@pytest.mark.parity
def test_a_worker_that_fails_is_one_line_with_its_reason(rows_NT, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "sae_toolkit")
    with pytest.raises(
        UserError, match=r"^--saebench core: sae-bench failed: --model_name \S+: .*config.json"
    ) as error:
        run_saebench(
            ("core",),
            sae=random_sae("topk"),
            model=str(tmp_path),
            hook_name=HOOK,
            rows_NT=rows_NT[:6],
            batch_size=4,
            device="cpu",
            dtype="float32",
        )
    assert "\n" not in str(error.value)
    assert "the last 2 of 6 rows" in caplog.text


@pytest.mark.parity
def test_the_environment_is_sae_benchs_own_and_is_made_once():
    python = ENVIRONMENT.python()
    assert python == ROOT / ".venv-saebench" / "bin" / "python"
    made = python.parent.parent.stat().st_ctime
    assert ENVIRONMENT.python() == python
    assert python.parent.parent.stat().st_ctime == made
    program = (
        "import sae_bench.evals.core.main, numpy, torch; print(numpy.__version__, torch.__version__.split('+')[0])"
    )
    assert run_process(python, "-c", program).stdout.split() == ["1.26.4", "2.13.0"]
