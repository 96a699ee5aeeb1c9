"""--chat_tokens assistant: a run, its resumption, its readings and its evaluation are at what the assistant says alone.

Where the assistant speaks is found here in the token ids, by the headers of the embedded model's chat template.
"""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.evaluation.run import measure_saes
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.files.embedded import EMBEDDED_TEXT
from sae_toolkit.model.loading import load_language_model
from sae_toolkit.reports.summary import summarize
from sae_toolkit.settings.evaluation import parse_evaluation_flags
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.sources import open_text
from support.trainings import assert_same, run_flags

START, END = 1, 2  # <|im_start|>, which is also the BOS, and <|im_end|>
SPECIAL = range(17)
FILES = [("tokens", "assistant", True), ("held_out", "held_out_assistant", False)]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    """300 conversations of a question and an answer, of sentences of Wikipedia, as in public data of chats."""
    documents = islice(open_text(EMBEDDED_TEXT, flag="--dataset_path").documents(), 12)
    sentences = [s.strip() + "." for text in documents for s in text.split(". ") if 20 < len(s) < 400]
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    with path.open("w") as file:
        for i in range(300):
            messages = [{"role": r, "content": sentences[2 * i + j]} for j, r in enumerate(("user", "assistant"))]
            file.write(json.dumps({"conversation_id": f"{i:032x}", "model": "m-4", "conversation": messages}) + "\n")
    return path


@pytest.fixture(scope="module")
def sae(trainings, tiny_model, chat_file, tmp_path_factory):
    """The SAE of a run on what the assistant says."""
    flags = run_flags(tiny_model, chat_file, tmp_path_factory.mktemp("run"))
    own = "--chat_tokens assistant --training_tokens 6144 --held_out_fraction 0.3 --eval_every 6144 --n_checkpoints 1"
    status, _ = trainings.run([*flags, *own.split(), "--checkpoint_every", "0"])
    assert status == 0, trainings.shown()
    assert "conversation, by the chat template, which begins 'user: " in trainings.shown()
    assert "without what others than the assistant say, special tokens" in trainings.shown()
    return trainings.finished_sae()


def spoken(rows_NT, tokenizer, in_order):
    """Booleans [N, T]: where the assistant speaks, and where that is known: without order, from a header on."""
    headers = {role: tokenizer(f"{role}\n")["input_ids"] for role in ("system", "user", "assistant")}
    says, known = np.zeros(rows_NT.shape, bool), np.zeros(rows_NT.shape, bool)
    for block in [np.arange(len(rows_NT))] if in_order else np.arange(len(rows_NT))[:, None]:
        starts_text = [
            any(rows_NT[n, 1:].tolist()[: len(h)] == h for h in headers.values()) for n in range(len(rows_NT))
        ]
        places = [(n, t) for n in block for t in range(rows_NT.shape[1]) if t > 0 or starts_text[n]]  # no added BOS
        tokens = [int(rows_NT[place]) for place in places]
        speaker = None
        for i, (place, token) in enumerate(zip(places, tokens, strict=True)):
            if token == START:
                speaker = next((role for role, h in headers.items() if tokens[i + 1 : i + 1 + len(h)] == h), None)
                first = i + 1 + len(headers.get(speaker, ()))
            elif token == END:
                speaker = speaker and "nobody"
            known[place] = speaker is not None
            says[place] = speaker == "assistant" and i >= first
    return says, known


@pytest.mark.parametrize(("rows", "assistant", "in_order"), FILES)
def test_a_run_keeps_where_the_assistant_speaks(sae, tokenizer, rows, assistant, in_order):
    rows_NT, assistant_NT = (np.load(sae.parent / f"{name}.npy") for name in (rows, assistant))
    says, known = spoken(rows_NT, tokenizer, in_order)
    assert known.mean() > 0.6
    assert 0.2 < says[known].mean() < 0.6
    assert (assistant_NT[known] == says[known]).all()


def test_the_stream_serves_what_the_assistant_says(sae):
    """A source whose activations are the token ids shows which positions are served."""

    class Tokens:
        dtype, device = torch.float32, torch.device("cpu")

        def activations(self, tokens_BT):
            return tokens_BT[..., None].float()

    rows_NT, assistant_NT = np.load(sae.parent / "tokens.npy"), np.load(sae.parent / "assistant.npy")
    positions = PositionFilter(tuple(SPECIAL), 1, chat_tokens="assistant")
    kept_NT = assistant_NT & ~np.isin(rows_NT, SPECIAL)
    kept_NT[:, 0] = False
    n = int(kept_NT.sum())
    options = {"batch_size": n, "buffer_size": n, "mix_fraction": 0.0, "rows_per_forward": 8, "total": n, "seed": 0}
    stream = ActivationStream(Tokens(), rows_NT, positions, assistant_NT, dtype=torch.float32, **options)
    assert next(stream).flatten().tolist() == rows_NT[kept_NT].tolist()


def test_l0_is_set_on_many_tokens_where_the_assistant_says_little(trainings, tiny_model, tmp_path):
    """More rows of held-out text are read then."""
    with (tmp_path / "chat.jsonl").open("w") as file:
        for i in range(3000):
            contents = {
                "user": " ".join(str(i * j) for j in range(9)),
                "assistant": f"The number is {i} times {i % 7}.",
            }
            messages = [{"role": role, "content": content} for role, content in contents.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = run_flags(tiny_model, tmp_path / "chat.jsonl", tmp_path)
    own = "--chat_tokens assistant --held_out_fraction 0.5 --epochs 4 --checkpoint_every 0"
    status, _ = trainings.run([*flags, *own.split()])
    assert status == 0, trainings.shown()
    sae = trainings.finished_sae()
    assert np.load(sae.parent / "assistant.npy").mean() < 0.35
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    assert metadata["calibrated_on_text"] == "held-out"
    assert 20480 / 2 * 0.8 < metadata["calibrated_on_tokens"] < 20480 / 2 * 1.25


def test_a_resumed_run_trains_on_the_same(sae, trainings, tmp_path):
    run = shutil.copytree(sae.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("final_*"))
    status, _ = trainings.run(["--resume", str(run)])
    assert status == 0, trainings.shown()
    assert_same(trainings.finished_sae(), sae)


def test_the_evaluation_is_at_the_positions_of_the_training(sae, tiny_model, tokenizer):
    flags = ["--sae_path", str(sae), "--device", "cpu", "--lm_dtype", "float32"]
    flags += ["--n_features", "0", "--max_activation_norm_multiple", "0", "--num_samples", "50"]
    settings = parse_evaluation_flags("", flags)
    (prepared,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    rows_NT, kept_NT = prepared.rows_NT, prepared.assistant_NT.copy()
    says, known = spoken(rows_NT, tokenizer, in_order=False)
    assert (kept_NT[known] == says[known]).all()
    kept_NT &= ~np.isin(rows_NT, SPECIAL)
    kept_NT[:, 0] = False

    model = load_language_model(prepared.model, prepared.hook_name, "cpu", torch.float32)
    (evaluation,) = measure_saes(prepared, model, batch_size=8)
    assert evaluation.tokens == kept_NT.sum()
    assert evaluation.metrics["replaced_share"] > 0.98  # of what the assistant says
    tokens = torch.from_numpy(rows_NT[: prepared.n_loss_rows].astype(np.int64))
    with torch.no_grad():
        log_probs = AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits.log_softmax(-1)
    losses = -log_probs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    expected = losses[torch.from_numpy(kept_NT[: prepared.n_loss_rows, :-1])].mean().item()
    assert evaluation.metrics["ce_clean"] == pytest.approx(expected, rel=1e-5)

    result = summarize(prepared, prepared.saes[0], evaluation)
    assert result["positions"]["chat_tokens"] == "assistant"
    assert result["sources"]["chat_tokens"] == "record"
    assert result["text"] == "column conversation, by the chat template"
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    assert [metadata[name] for name in ("text_column", "use_chat_formatting", "chat_tokens")] == [
        *("conversation", True, "assistant")
    ]

    settings = parse_evaluation_flags("", [*flags, "--chat_tokens", "all"])
    (whole,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    assert (whole.rows_NT == rows_NT).all()
    assert whole.assistant_NT is None
    assert whole.saes[0].sources["chat_tokens"] == "flag"
