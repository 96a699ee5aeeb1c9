"""--export delphi is read by delphi's own code, and --explain reports what its judge said.

Most judges here answer by a rule, so that scores are known. The tiny model's weights are random: that it judges shows
the mechanics alone.
"""

import asyncio
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from playwright.sync_api import expect
from sae_lens import SAE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sae_toolkit import ROOT
from sae_toolkit.files.embedded import EMBEDDED_MODEL
from support.browser import open_chromium
from support.loopback_judge import EXPLANATION, FEW, LoopbackJudge, by_rule, is_about_tests, is_capital
from support.processes import run_process

HOOK = "blocks.1.hook_resid_post"
WINDOW = 32
FLAGS = ("--tokens", "8000", "--lm_dtype", "float32", "--device", "cpu", "--no_page")


@pytest.fixture
def explain(script, trained):
    """Runs the script with a few features and flags, and checks that it succeeds or is refused in one line."""

    def run(directory, *flags, status=0):
        done = script("inspect_sae_features.py", "--sae_path", trained, "--output", directory, *FLAGS, *FEW, *flags)
        assert done.status == status, done.stderr
        assert status == 0 or len(done.error_lines) == 1
        return done

    return run


@pytest.fixture
def of_delphi(script, trained, tmp_path, tokenizer):
    """By feature, the activations that delphi's own loader reads of an export; the tokens; and features.parquet."""
    from sae_toolkit.inspection.explanations.delphi import ConstructorConfig, SamplerConfig

    directory = tmp_path / "exported"
    done = script("inspect_sae_features.py", "--sae_path", trained, "--output", directory, *FLAGS, "--export", "delphi")
    assert done.status == 0, done.stderr
    assert done.stdout.split() == [str(directory / "features.parquet"), str(directory / f"delphi/latents/{HOOK}")]
    LatentDataset = importlib.import_module("delphi.latents").LatentDataset
    dataset = LatentDataset(directory / "delphi/latents", SamplerConfig(), ConstructorConfig(), tokenizer, [HOOK])
    found = {data.latent.latent_index: data.activation_data for buffer in dataset.buffers for data in buffer}
    return found, dataset.tokens, pq.read_table(directory / "features.parquet")


@pytest.fixture
def judge():
    judges = []

    def start(reply):
        judges.append(LoopbackJudge(reply))
        return judges[-1]

    yield start
    for each in judges:
        each.close()


def test_delphis_own_loader_reads_every_activation(of_delphi, trained, tiny_model, tokenizer):
    """They are those of unmodified SAELens and Transformers, at the tokens that the SAE was trained on."""
    found, tokens, table = of_delphi
    sae = SAE.load_from_disk(str(trained))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        acts_BTD = model(tokens, output_hidden_states=True).hidden_states[2]
        features_BTF = sae.encode(acts_BTD.flatten(0, 1)).unflatten(0, tokens.shape)
    features_BTF[torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))] = 0
    read_BTF = torch.zeros_like(features_BTF)
    for feature, data in found.items():
        read_BTF[data.locations[:, 0], data.locations[:, 1], feature] = data.activations.float()
    assert torch.allclose(read_BTF, features_BTF, rtol=2e-3, atol=1e-4)
    n_firings = [len(found[f].activations) if f in found else 0 for f in range(len(table))]
    assert n_firings == table["n_firings"].to_pylist()


def test_scores_are_what_the_replies_make_of_the_truth(of_delphi, explain, tmp_path, judge, tokenizer, monkeypatch):
    """The truth is counted here from the activations: in which windows of 32 tokens a feature fires."""
    server = judge(by_rule)
    monkeypatch.setenv("OPENAI_API_KEY", "of a test")
    done = explain(tmp_path, "--explain", "ruler", "--explain_url", server.url)
    assert "3 features, 27 requests" in done.stderr  # an explanation and 2 x 20 / 5 tests of each
    assert server.keys == {"Bearer of a test"}
    found, tokens, _ = of_delphi
    windows = tokens.reshape(-1, WINDOW)
    texts = ["".join(tokenizer.batch_decode(window)) for window in windows]
    rows = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["explanation"] == EXPLANATION
        assert row["detection_answered"] == row["fuzz_answered"] == 1
        at_N2 = found[row["feature"]].locations[:, :2]
        fires = set(((at_N2[:, 0] * tokens.shape[1] + at_N2[:, 1]) // WINDOW).tolist())
        (outputs,) = tmp_path.glob(f"explanations/ruler_*/scores/detection/*latent{row['feature']}.txt")
        tested = json.loads(outputs.read_text())
        assert len(tested) == 20
        hits = {True: [], False: []}
        for each in tested:
            text = "".join(each["str_tokens"])
            is_firing = any(i in fires for i, other in enumerate(texts) if other == text)
            assert each["activating"] == is_firing
            hits[is_firing].append(is_capital(text) == is_firing)
        assert row["detection_accuracy"] == pytest.approx(np.mean([np.mean(hits[True]), np.mean(hits[False])]))


def test_what_was_shown_is_not_tested(explain, tmp_path, judge):
    server = judge(by_rule)
    explain(tmp_path, "--explain", "ruler", "--explain_url", server.url, "--explained_features", "1")
    shown = [each[-1]["content"] for each in server.conversations if not is_about_tests(each)]
    assert len(shown) == 1
    texts = {line.replace("<<", "").replace(">>", "") for line in shown[0].split("\nActivations:")}
    (outputs,) = tmp_path.glob("explanations/*/scores/detection/*.txt")
    tested = {"".join(each["str_tokens"]) for each in json.loads(outputs.read_text()) if each["activating"]}
    assert len(tested) == 10 and not any(text in seen for text in tested for seen in texts)


def test_replies_that_cannot_be_read_do_not_count(explain, tmp_path, judge):
    server = judge(lambda messages: "I would rather not say.")
    done = explain(tmp_path, "--explain", "mute", "--explain_url", server.url)
    assert "100.0% of the examples have no answer that could be read" in done.stderr
    assert "3 explanations could not be read" in done.stderr
    for row in pq.read_table(tmp_path / "explanations.parquet").to_pylist():
        assert row["detection_accuracy"] is row["fuzz_accuracy"] is None
        assert row["detection_answered"] == row["fuzz_answered"] == 0


def test_more_features_go_on_from_those_that_are_done(explain, tmp_path, judge):
    server = judge(by_rule)
    flags = ("--explain", "ruler", "--explain_url", server.url)
    explain(tmp_path, *flags, "--explained_features", "2")
    before = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    assert len(server.conversations) == 18
    explain(tmp_path, *flags, "--explained_features", "3")
    assert len(server.conversations) == 27
    after = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    assert len(after) == 3 and all(row in after for row in before)


def test_the_page_shows_and_finds_explanations(script, trained, tmp_path, judge):
    server = judge(by_rule)
    flags = ("--sae_path", trained, "--output", tmp_path, *FLAGS[:-1], *FEW, "--explained_features", "1")
    done = script("inspect_sae_features.py", *flags, "--explain", "ruler", "--explain_url", server.url)
    assert done.status == 0, done.stderr
    (row,) = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    with open_chromium() as chromium:
        page = chromium.new_page(offline=True)
        page.goto((tmp_path / "features.html").as_uri())
        expect(page.locator("#about")).to_contain_text("Explained by ruler")
        page.locator("#query").fill("begin with a capital")
        expect(page.locator("#count")).to_contain_text("1 of 128 features")
        page.locator(".row").click()
        expect(page.locator("#name")).to_contain_text(f"Feature {row['feature']} ")
        expect(page.locator("#explanation")).to_have_text(EXPLANATION)
        accuracy = int(100 * row["detection_accuracy"] + 0.5)
        expect(page.locator("#feature")).to_contain_text(f"accuracy of {accuracy}% (detection)")


@pytest.mark.faults
def test_a_killed_run_asks_only_what_was_not_answered(trained, tmp_path, judge):
    """The process is killed by SIGKILL while the 13th of 27 questions waits for its answer."""

    def command(directory, server):
        flags = ("--explain", "ruler", "--explain_requests", 1, "--explain_url", server.url)
        program = (sys.executable, "inspect_sae_features.py", "--sae_path", trained, "--output", directory)
        return [str(each) for each in (*program, *FLAGS, *FEW, *flags)]

    whole = judge(by_rule)
    assert run_process(*command(tmp_path / "whole", whole)).status == 0
    processes = []

    def until_killed(messages):
        if len(server.conversations) > 12:
            os.kill(processes[0].pid, signal.SIGKILL)
        return by_rule(messages)

    server = judge(until_killed)
    with subprocess.Popen(command(tmp_path / "killed", server), cwd=ROOT, stderr=subprocess.PIPE) as process:
        processes.append(process)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = judge(by_rule)
    done = run_process(*command(tmp_path / "killed", again))
    assert done.status == 0, done.stderr
    assert "going on after" in done.stderr  # the text was read before, and is not read again
    assert len(whole.conversations) == 27 and len(again.conversations) <= 27 - 9  # the first feature's are kept
    tables = [pq.read_table(tmp_path / name / "explanations.parquet") for name in ("whole", "killed")]
    assert tables[0].equals(tables[1])


def test_a_model_judges_the_same_here_and_behind_an_address(explain, tmp_path, judge, tokenizer):
    """The judge is a Llama of random weights with long contexts, in the script and in a server."""
    from sae_toolkit.inspection.explanations.judge import LocalJudge

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    served = LocalJudge.load(str(tmp_path / "model"), "cpu", "float32")
    server = judge(lambda messages: served.answer(messages, 8))
    flags = ("--explained_features", "1", "--explain_new_tokens", "8", "--explain")
    explain(tmp_path / "here", *flags, tmp_path / "model")
    explain(tmp_path / "there", *flags, "a name", "--explain_url", server.url)
    texts = [sorted(path.read_text() for path in (tmp_path / name).rglob("*.txt")) for name in ("here", "there")]
    assert len(texts[0]) == 3 and texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--explain_tests", "20"), "--explain_tests 20: is about --explain; give that too, or leave it out"),
        (("--explain", "x", "--explain_tests", "15"), "--explain_tests 15: as many come from each tenth"),
        (("--explain", "x", "--explain_min_windows", "50"), "--explain_min_windows 50: fewer than --explain_examples"),
        (("--explain", "x", "--explain_requests", "2"), "--explain_requests 2: is about --explain_url; leave it out"),
        (("--explain", "x", "--explain_url", "localhost"), "--explain_url localhost: is no address"),
        (("--explain", "x", "--steer", "1=2", "--prompt", "a"), "--explain x: --steer reads no text"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(script, trained, flags, message):
    done = script("inspect_sae_features.py", "--sae_path", trained, *flags)
    assert done.status == 2 and len(done.error_lines) == 1
    assert message in done.stderr


def test_a_judge_that_cannot_judge_is_refused(explain, tiny_model, tmp_path, judge, monkeypatch):
    """Nothing is asked beyond the budget; a dead or broken server and a model without room or template say so."""
    import sae_toolkit.inspection.explanations.judge as judges

    monkeypatch.setattr(judges, "_RETRIES", 1)  # of 5, between which it waits for 15 seconds
    server = judge(by_rule)
    at_server = ("--explain", "x", "--explain_url", server.url)
    done = explain(tmp_path, *at_server, "--explain_budget", "1000", status=2)
    assert "--explain_budget 1000: 3 features take up to" in done.stderr and not server.conversations
    server.reply = lambda messages: 400
    assert f"--explain_url {server.url}: --explain x:" in explain(tmp_path, *at_server, status=2).stderr
    done = explain(tmp_path, "--explain", "x", "--explain_url", "http://127.0.0.1:9/v1", status=2)
    assert "--explain_url http://127.0.0.1:9/v1: cannot be reached" in done.stderr
    done = explain(tmp_path, "--explain", tiny_model, status=2)
    assert "than the 128 that it was made for" in done.stderr
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain, ignore=shutil.ignore_patterns("chat*"))
    done = explain(tmp_path / "none", "--explain", plain, status=2)
    assert f"--explain {plain}: has no chat template" in done.stderr and not (tmp_path / "none").exists()
    done = explain(tmp_path, *at_server, "--explain_min_windows", "100000", status=2)
    assert "--explain_min_windows 100000: no feature fires so often" in done.stderr
    assert not (tmp_path / "explanations.parquet").exists()


@pytest.mark.parity
def test_delphis_own_pipeline_explains_alike(script, trained, tmp_path, judge, tokenizer):
    """delphi's loader, pipeline and client ask the same judge: the embedded model of 135 M parameters, on loopback.

    It is a small model: that its words are the same says nothing about their quality.
    """
    from sae_toolkit.inspection.explanations.delphi import ConstructorConfig, DefaultExplainer, SamplerConfig
    from sae_toolkit.inspection.explanations.judge import LocalJudge

    served = LocalJudge.load(EMBEDDED_MODEL, "cpu", "auto")
    server = judge(lambda messages: served.answer(messages, 40))
    done = script(
        *("inspect_sae_features.py", "--sae_path", trained, "--output", tmp_path, *FLAGS, *FEW),
        *("--explained_features", "2", "--explain_new_tokens", "40", "--explain", "small", "--explain_url", server.url),
    )
    assert done.status == 0, done.stderr
    rows = pq.read_table(tmp_path / "explanations.parquet").to_pylist()
    (latents,) = tmp_path.glob("explanations/*/activations/latents")
    own = importlib.import_module("delphi.latents").LatentDataset(
        latents,
        SamplerConfig(n_examples_train=10, n_examples_test=10),
        ConstructorConfig(min_examples=30, n_non_activating=10),
        tokenizer,
        [HOOK],
        {HOOK: torch.tensor([row["feature"] for row in rows])},
    )
    client = importlib.import_module("delphi.clients.openrouter").OpenRouter(
        "small", base_url=f"{server.url}/chat/completions", max_tokens=40, temperature=0.0
    )
    explanations = {}
    pipeline = importlib.import_module("delphi.pipeline")

    def keep(result):
        explanations[result.record.latent.latent_index] = result.explanation
        return result

    explainer = pipeline.process_wrapper(DefaultExplainer(client), postprocess=keep)
    asyncio.run(pipeline.Pipeline(own, pipeline.Pipe(explainer)).run(1))
    assert explanations == {row["feature"]: row["explanation"] for row in rows}
