"""A hub that fails in the middle costs time and nothing else; one that refuses is believed at once."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.loopback_hub import LoopbackHub
from support.processes import Outcome, run_process

pytestmark = pytest.mark.faults

MODEL, DATA, BIG = "tests/tiny", "tests/text", "tests/big"
TEXTS = [f"Document {i}: " + " ".join(str(i * j) for j in range(12)) for i in range(1500)]
N_FILES = 12


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """A directory for the hub: the tiny model, and its text as twelve JSON Lines files and as twelve of parquet."""
    directory = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_model, directory / "models" / MODEL)
    per_file = len(TEXTS) // N_FILES
    for kind in ("jsonl", "parquet"):
        data = directory / "datasets" / f"{DATA}-{kind}" / "data"
        data.mkdir(parents=True)
        (data.parent / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.{kind}\n---\n"
        )
        for i in range(N_FILES):
            part = datasets.Dataset.from_dict({"text": TEXTS[i * per_file : (i + 1) * per_file]})
            getattr(part, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(data / f"part{i:02}.{kind}")
    return directory


@pytest.fixture
def hub(served):
    hub = LoopbackHub(served)
    yield hub
    hub.close()


def train(hub: LoopbackHub, home: Path, data: str = f"{DATA}-jsonl", model: str = MODEL, **environment: str) -> Outcome:
    """A real run of the script that takes its model and its text from the hub, with an empty cache."""
    flags = {
        "model_name": model,
        "layer": 1,
        "dataset_path": data,
        "context_size": 64,
        "expansion_factor": 4,
        "training_tokens": 16_384,
        "n_batches_in_buffer": 16,
        "checkpoint_path": home / "checkpoints",
        "wandb_mode": "disabled",
        "device": "cpu",
        "lm_dtype": "float32",
        "set": "n_batches_for_norm_estimate=1",
    }
    command = [sys.executable, "sae_lens_train.py", *(p for name, value in flags.items() for p in (f"--{name}", value))]
    waits = {"SAE_TOOLKIT_RETRY_WAIT": "0.1"}
    return run_process(*command, **(waits | hub.environment(home / "home") | environment))


def trained(done: Outcome) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """What a run trained on, and what came out."""
    assert done.status == 0, done.stderr
    final = Path(done.stdout.strip())
    return np.load(final.parent / "tokens.npy"), load_file(final / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def undisturbed(served, tmp_path_factory):
    hub = LoopbackHub(served)
    tokens, weights = trained(train(hub, tmp_path_factory.mktemp("undisturbed")))
    read = {match[1] for request in hub.requests if (match := re.search(r"GET .*/data/(part\d\d)", request))}
    assert len(read) >= 3  # the text is read from several files
    hub.close()
    return tokens, weights


TRANSIENT = {
    "answers 500 twice": (500, {"times": 2}),
    "answers 429 with Retry-After twice": (429, {"times": 2, "headers": {"Retry-After": "1"}}),
    "cuts a body in half": ("cut", {}),
    "resets the connection in the middle of a body": ("reset", {}),
    "never answers": ("stall", {}),
    "falls silent in the middle of a body": ("stall in the middle", {}),
    "refuses connections for 3 s": ("outage", {"seconds": 3.0}),
}

READ_ALL = """
import hashlib, sys
from sae_toolkit.terminal.console import set_up_logging
from sae_toolkit.text.sources import open_text
set_up_logging()
digest, n = hashlib.sha256(), 0
for document in open_text(sys.argv[1], flag="--dataset_path").documents():
    digest.update(document.encode()); n += 1
print(n, digest.hexdigest())
"""


def read_all(hub: LoopbackHub, home: Path, data: str) -> Outcome:
    """A process that reads every document of a data set of the hub, and prints their number and hash."""
    environment = {"SAE_TOOLKIT_RETRY_WAIT": "0.5", "PYTHONPATH": "."} | hub.environment(home)
    return run_process(sys.executable, "-c", READ_ALL, data, **environment)


DATA_PLACES = {
    "the data (jsonl)": ("/data/part02", f"{DATA}-jsonl"),
    "the data (parquet)": ("/data/part02", f"{DATA}-parquet"),
    "the listing of the data": ("/api/datasets/.*/tree/", f"{DATA}-jsonl"),
    "the data set's card": ("/README.md", f"{DATA}-parquet"),
}


@pytest.mark.parametrize("place", DATA_PLACES)
@pytest.mark.parametrize("fault", TRANSIENT)
def test_no_document_is_lost_or_read_twice(hub, tmp_path, record_fault, fault, place):
    kind, how = TRANSIENT[fault]
    path, data = DATA_PLACES[place]
    hub.inject(kind, path, method="GET", **how)
    done = read_all(hub, tmp_path, data)
    assert done.stdout.split() == [str(len(TEXTS)), hashlib.sha256("".join(TEXTS).encode()).hexdigest()], done.stderr
    injected = hub.injected[str(kind)]
    assert injected == how.get("times", 1)
    record_fault(f"hub {fault}: {place}", injected, "retried; every document came, each once", "nothing")


RUN_PLACES = [
    *(("the weights", "model.safetensors", "GET", "jsonl", fault) for fault in TRANSIENT),
    ("the tokenizer's configuration", "tokenizer_config.json", "GET|HEAD", "jsonl", "answers 500 twice"),
    ("the tokenizer's configuration", "tokenizer_config.json", "GET|HEAD", "jsonl", "never answers"),
    ("the model's page", f"/api/models/{MODEL}$", "GET", "jsonl", "answers 500 twice"),
    ("the model's page", f"/api/models/{MODEL}$", "GET", "jsonl", "refuses connections for 3 s"),
    ("the data (jsonl)", "/data/part02", "GET", "jsonl", "cuts a body in half"),
    ("the data (parquet)", "/data/part02", "GET", "parquet", "refuses connections for 3 s"),
]


@pytest.mark.parametrize(("place", "path", "method", "form", "fault"), RUN_PLACES)
def test_a_whole_run_comes_out_the_same(hub, undisturbed, tmp_path, record_fault, place, path, method, form, fault):
    kind, how = TRANSIENT[fault]
    hub.inject(kind, path, method=method, **how)
    tokens, weights = trained(train(hub, tmp_path, f"{DATA}-{form}"))
    injected = hub.injected[str(kind)]
    assert injected == how.get("times", 1)
    assert np.array_equal(tokens, undisturbed[0])
    assert all(torch.equal(weights[name], undisturbed[1][name]) for name in undisturbed[1])
    record_fault(
        f"hub {fault}, in a run: {place}", injected, "retried; the run ended in the same tokens and SAE", "nothing"
    )


@pytest.mark.parametrize("kind", [500, "stall", "outage"])
def test_a_hub_that_stays_away_is_given_up_in_one_line(hub, tmp_path, record_fault, kind):
    hub.inject(kind, "/api/models/", times=10**6, **({"seconds": 600.0} if kind == "outage" else {}))
    done = train(hub, tmp_path)
    assert done.status == 2, done.stderr
    (line,) = done.error_lines
    assert re.search(rf"--model_name {MODEL}: the Hugging Face Hub cannot be reached \(.*; tried 6 times over", line)
    assert "Traceback" not in done.stderr
    assert len(re.findall(r"try \d of 6 in", done.stderr)) == 5
    record_fault(f"hub: {kind}, always", hub.injected[str(kind)], "6 tries, then one line and exit status 2", "nothing")


def test_data_that_stay_away_are_given_up_in_one_line(hub, tmp_path, record_fault):
    hub.inject(500, "/data/part02", times=10**6)
    start = time.monotonic()
    done = train(hub, tmp_path)
    seconds = time.monotonic() - start
    assert seconds < 400
    assert done.status == 2, done.stderr
    (line,) = done.error_lines
    assert re.search(rf"--dataset_path {DATA}-jsonl, after [1-9]\d* records: the connection fails \(.*; tried \d", line)
    record_fault(
        "hub answers 500 for one file of the data, always",
        hub.injected["500"],
        f"tried for {seconds:.0f} s, then one line and exit status 2",
        "nothing",
    )


REFUSALS = {
    "an invalid token (401)": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        "refuses the token",
    ),
    "a gated repository (403)": (403, {}, "is gated; accept its licence"),
    "no such repository (404)": (404, {}, "on the Hugging Face Hub, and no file or directory of that name here"),
}


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_believed_at_once(hub, tmp_path, record_fault, refusal, kind):
    status, headers, says = REFUSALS[refusal]
    code = {"X-Error-Code": ""} if status == 401 else {}
    hub.inject(status, f"/api/{kind}/", times=10**6, headers=headers | code)
    done = train(hub, tmp_path)
    assert done.status == 2
    assert len(done.error_lines) == 1
    assert done.error_lines[0].startswith(
        f"error: --model_name {MODEL}: " if kind == "models" else f"error: --dataset_path {DATA}-jsonl: "
    )
    assert says in done.error_lines[0]
    assert hub.injected[str(status)] == 1  # not asked again
    record_fault(f"hub refuses {kind}: {refusal}", 1, "one line and exit status 2 at once, no retry", "nothing")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_stream_goes_on_at_the_document_where_it_stopped(hub, served, tmp_path, record_fault, form):
    """One file that takes many requests, and an outage longer than huggingface_hub's own patience in the middle."""
    data = served / "datasets" / f"{BIG}-{form}"
    if not data.exists():
        data.mkdir(parents=True)
        rng = np.random.default_rng(0)
        words = [rng.integers(0, 10**9, size=2000) for _ in range(3000)]
        big = datasets.Dataset.from_dict({"text": [f"{i} " + " ".join(map(str, w)) for i, w in enumerate(words)]})
        if form == "jsonl":
            big.to_json(data / "train.jsonl")
        else:
            big.to_parquet(data / "train.parquet", batch_size=100)
    whole = read_all(hub, tmp_path / "a", f"{BIG}-{form}")
    assert whole.status == 0, whole.stderr
    assert whole.stdout.startswith("3000 ")
    n_requests = sum("GET" in request and f"train.{form}" in request for request in hub.requests)
    assert n_requests >= 3
    hub.heal()
    hub.inject("outage", f"train.{form}", method="GET", after=n_requests - 1, seconds=30.0)
    hub.inject("cut", f"train.{form}", method="GET", after=n_requests // 2)
    disturbed = read_all(hub, tmp_path / "b", f"{BIG}-{form}")
    assert disturbed.stdout == whole.stdout, disturbed.stderr
    assert hub.injected == {"outage": 1, "cut": 1}
    assert re.search(r"after \d[\d,]* records: .*; try 2 of 6", disturbed.stderr), disturbed.stderr
    record_fault(
        f"hub refuses connections for 30 s in the middle of a {form} file, after a cut",
        sum(hub.injected.values()),
        "read on at the document where it stopped: the same 3,000 documents, each once",
        "nothing",
    )


def test_a_missing_file_is_not_made_up_from_a_failed_request(hub, undisturbed, tmp_path, record_fault):
    """Transformers takes a tokenizer file that it cannot fetch for one that does not exist."""
    hub.inject(500, "tokenizer_config.json", times=10**6)
    done = train(hub, tmp_path)
    assert done.status == 2, done.stderr
    assert f"--model_name {MODEL}: the connection fails" in done.error_lines[0]
    record_fault(
        "hub answers 500 for the tokenizer's configuration, always",
        hub.injected["500"],
        "one line and exit status 2, rather than another tokenizer",
        "nothing",
    )


def test_what_is_downloaded_is_kept_for_the_next_try(hub, undisturbed, tmp_path):
    hub.inject(404, "model.safetensors", method="GET", headers={"X-Error-Code": "EntryNotFound"})
    assert train(hub, tmp_path).status == 2
    n_before = len(hub.requests)
    tokens, _ = trained(train(hub, tmp_path))
    assert np.array_equal(tokens, undisturbed[0])
    assert not any("GET" in r and "tokenizer.json" in r for r in hub.requests[n_before:])
