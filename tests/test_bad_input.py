"""Every mistake a person can make ends in one clear line, exit status 2, no traceback, and nothing written."""

import http.server
import json
import shutil
import threading

import huggingface_hub
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file

from sae_toolkit.errors import UserError
from sae_toolkit.files.hub import check_repository, download_small_files
from support.processes import run_process

TRAINING_MISTAKES = {
    "no such model": ({"model_name": "./nowhere"}, "--model_name ./nowhere: neither a file or directory"),
    "no such GGUF file": ({"model_name": "nowhere.gguf"}, "--model_name nowhere.gguf: no such file"),
    "no such embedded model": ({"model_name": "embedded:gpt5"}, "--model_name embedded:gpt5: the only embedded"),
    "a model that cannot be reached": ({"model_name": "owner/model"}, "--model_name owner/model: the Hugging Face Hub"),
    "no such data": ({"dataset_path": "nowhere.jsonl"}, "--dataset_path nowhere.jsonl: "),
    "no such embedded text": ({"dataset_path": "embedded:news"}, "--dataset_path embedded:news: the only embedded"),
    "data that cannot be reached": ({"dataset_path": "owner/data"}, "--dataset_path owner/data: the Hugging Face Hub"),
    "no such layer": ({"layer": 4}, "--layer 4: the model has 4 layers, 0 to 3"),
    "no such hook": ({"hook_name": "blocks.1.hook_x"}, "--hook_name blocks.1.hook_x: known within a block are"),
    "no such column": ({"text_column": "story"}, "--text_column story: "),
    "no such split": ({"dataset_split": "dev"}, "--dataset_split dev: "),
    "too little text": ({"training_tokens": 10**7}, "too small: "),
    "too little text for the passes": ({"training_tokens": 10**7, "epochs": 3}, " in --epochs 3; lower"),
    "a context longer than the model's": ({"context_size": 256}, "--context_size 256: "),
    "k above the features": ({"architecture": "topk", "k": 129}, "--k 129: more than the 128 features"),
    "k zero": ({"architecture": "topk", "k": 0}, "argument --k: 0: must be a whole number of 1 or more"),
    "a negative size": ({"train_batch_size_tokens": -5}, "argument --train_batch_size_tokens: -5: must be"),
    "a size that is no number": ({"context_size": "long"}, "argument --context_size: long: must be"),
    "a learning rate of nan": ({"lr": "nan"}, "argument --lr: nan: must be a number above 0"),
    "all held out": ({"held_out_fraction": 1}, "argument --held_out_fraction: 1: must be"),
    "less than a batch": ({"training_tokens": 100}, "--training_tokens 100: less than one batch"),
    "a schedule longer than the run": ({"lr_warm_up_steps": 3}, "--lr_warm_up_steps 3 and --lr_decay_steps 0"),
    "nothing left of a context": ({"skip_positions": 64}, "--skip_positions 64: leaves nothing"),
    "no conversations": (
        {"chat_tokens": "assistant"},
        "paragraphs.txt holds no conversations in its column text; leave",
    ),
    "chat by --set": (
        {"set": "use_chat_formatting=true"},
        "--set use_chat_formatting: use --text_column with a column",
    ),
    "no CUDA": ({"device": "cuda"}, "--device cuda: torch "),
    "no such device": ({"device": "tpu"}, "--device tpu: must be cpu, cuda, cuda:N, mps or auto"),
    "an unwritable output": ({"checkpoint_path": "/proc/nothing"}, "--checkpoint_path /proc/nothing: cannot be"),
    "a path for a name": ({"output_name": "../elsewhere"}, "--output_name '../elsewhere': must be a plain name"),
    "a mode SAELens has not": ({"normalize_activations": "expected_average_only_out"}, "use expected_average_only_in"),
    "a normalization TopK has not": (
        {"architecture": "topk", "k": 8, "normalize_activations": "layer_norm"},
        "--normalize_activations layer_norm: ",
    ),
    "widths that do not ascend": (
        {"architecture": "matryoshka_batchtopk", "k": 8, "matryoshka_widths": 0},
        "argument --matryoshka_widths: 0: must be",
    ),
    "an L0 to aim at where k is one": (
        {"architecture": "topk", "k": 8, "target_l0": 8},
        "--target_l0 8: topk has no sparsity weight; --k is its L0",
    ),
    "an L0 above the width": ({"target_l0": 129}, "--target_l0 129: more than the 128 features"),
    "a sparsity weight that cannot grow": ({"target_l0": 8, "l1_coefficient": 0}, "--l1_coefficient 0: nothing to"),
    "a flag of another architecture": ({"matryoshka_widths": 64}, "--matryoshka_widths: only for"),
    "a norm limit below the median": (
        {"max_activation_norm_multiple": 0.5},
        "argument --max_activation_norm_multiple: 0.5: must be 0 or more than 1",
    ),
    "a share to fine-tune without a loss": (
        {"finetune_fraction": 0.5},
        "--finetune_fraction 0.5: nothing to do without --finetune_loss",
    ),
    "a share above one": (
        {"finetune_loss": "kl", "finetune_fraction": 1.5},
        "argument --finetune_fraction: 1.5: must be a number above 0 and at most 1",
    ),
    "fine-tuning on contexts above a batch": (
        {"finetune_loss": "ce", "train_batch_size_tokens": 32},
        "--finetune_loss ce: takes whole contexts, and --context_size 64 is more than --train_batch_size_tokens 32",
    ),
    "fine-tuning with a compiled step": (
        {"finetune_loss": "kl", "set": "compile_sae=true"},
        "--finetune_loss kl, --set compile_sae=true: fine-tuning is not compiled",
    ),
    "fine-tuning with several GPUs for the model": (
        {"finetune_loss": "kl", "n_devices": 2},
        "--finetune_loss kl, --n_devices 2: fine-tuning needs the language model on one device",
    ),
    "norms of more batches than there are before the fine-tuning": (
        {"finetune_loss": "kl", "finetune_fraction": 0.5, "set": "n_batches_for_norm_estimate=2"},
        "--set n_batches_for_norm_estimate=2: more than the 1 steps before the fine-tuning",
    ),
    "an unknown flag": ({"learning_rate": 1}, "unrecognized arguments: --learning_rate 1 (see --help)"),
    "a run that is not there": ({"resume": "nowhere/1024"}, "--resume nowhere/1024: neither a training run"),
    "no run to resume": ({"resume": ""}, "--resume"),
    "--set without a value": ({"set": "adam_beta1"}, "--set adam_beta1: must be KEY=VALUE"),
    "--set of no field": ({"set": "sae.nonsense=1"}, "--set sae.nonsense: StandardTrainingSAEConfig has no such field"),
    "--set of a flag's field": ({"set": "sae.d_sae=64"}, "--set sae.d_sae: use --d_sae"),
    "--set of a field not honoured": ({"set": "use_cached_activations=true"}, "--set use_cached_activations: a field"),
    "--set of where to begin": ({"set": "from_pretrained_path=x"}, "--set from_pretrained_path: use --init_from"),
    "nothing to begin with": ({"init_from": "nowhere"}, "--init_from nowhere: no such directory"),
    "a repository to begin with": ({"init_from": "owner/sae"}, "--init_from owner/sae: the Hugging Face Hub"),
    "--set of random weights that are not": (
        {"init_from": "nowhere", "set": "sae.decoder_init_norm=0.5"},
        "--set sae.decoder_init_norm: for random weights, and --init_from gives others",
    ),
    "--set of the wrong type": ({"set": "adam_beta1=fast"}, "--set adam_beta1=fast: Input should be a valid number"),
    "--set of what SAELens refuses": ({"set": "lr_scheduler_name=steep"}, "SAELens refuses this configuration: "),
    "--set of a fraction above one": ({"set": "activations_mixing_fraction=2"}, "--set activations_mixing_fraction=2"),
}


def check(outcome, says):
    assert outcome.status == 2, outcome.stderr
    assert len(outcome.error_lines) == 1, outcome.stderr
    assert says in outcome.error_lines[0]
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize("mistake", TRAINING_MISTAKES)
def test_a_training_that_cannot_work_is_refused(script, tiny_run, tmp_path, mistake):
    changes, says = TRAINING_MISTAKES[mistake]
    flags = [*tiny_run, *(part for name, value in changes.items() for part in (f"--{name}", value))]
    check(script("sae_lens_train.py", *flags), says)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sae_path(tmp_path):
    """A SAELens directory that fits the tiny model and says so little that everything must be given."""
    path = tmp_path / "sae"
    StandardSAE(StandardSAEConfig(d_in=32, d_sae=64)).save_model(path)
    return path


def test_an_evaluation_that_cannot_work_is_refused(script, tmp_path, tiny_model, text_file, sae_path):
    right = {
        "sae_path": sae_path,
        "model_name": tiny_model,
        "layer": 1,
        "dataset": text_file,
        "context_length": 32,
        "num_samples": 4,
        "device": "cpu",
    }
    narrow = tmp_path / "narrow"
    StandardSAE(StandardSAEConfig(d_in=16, d_sae=64)).save_model(narrow)
    in_no_layer = tmp_path / "in_no_layer"
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    sae.cfg.metadata.hook_name = "model.embed_tokens"
    sae.save_model(in_no_layer)
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    (incomplete / "cfg.json").write_text(json.dumps({"architecture": "standard"}))
    directory = tmp_path / "directory.json"
    directory.mkdir()
    holes = shutil.copytree(tiny_model, tmp_path / "holes")
    weights = load_file(holes / "model.safetensors")
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, holes / "model.safetensors", metadata={"format": "pt"})
    not_finite = tmp_path / "not_finite"
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    sae.b_dec.data[3] = torch.nan
    sae.save_model(not_finite)
    truncated = tmp_path / "truncated"
    StandardSAE(StandardSAEConfig(d_in=32, d_sae=64)).save_model(truncated)
    weights = truncated / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    mistakes = [
        ({"sae_path": tmp_path / "nowhere"}, "nowhere: no such directory"),
        ({"sae_path": incomplete}, "no SAE in it; looked for cfg.json + sae_weights.safetensors (SAELens)"),
        ({"sae_path": not_finite}, "1 of the 32 numbers of b_dec are NaN or infinite"),
        ({"sae_path": truncated}, "damaged or incomplete"),
        ({"sae_path": narrow}, "an SAE of width 16, and"),
        ({"model_name": None}, "--model_name: the SAE sae does not say which model"),
        ({"layer": None}, "--layer: the SAE's cfg.json does not say"),
        ({"layer": 9}, "--layer 9: the model has 4 layers"),
        ({"sae_path": in_no_layer}, "--layer 1: the SAE was trained at model.embed_tokens, which is in no layer"),
        ({"hook_name": "blocks.1.hook_resid_pre"}, "--layer 1 and --hook_name blocks.1.hook_resid_pre: only one"),
        ({"layer": None, "hook_name": "blocks.9.hook_resid_pre"}, "--hook_name blocks.9.hook_resid_pre: the model has"),
        ({"layer": None, "hook_name": "model.layers.1.mlp.up"}, "--hook_name model.layers.1.mlp.up: not of the form"),
        ({"layer": None, "hook_name": "model.layers.1.mlp.up_proj"}, "has the width 64 there, and the SAE sae has the"),
        ({"skip_positions": 31}, "--skip_positions 31: leaves no next token to predict in a context of 32"),
        ({"max_activation_norm_multiple": 1}, "--max_activation_norm_multiple: 1: must be 0 or more than 1"),
        ({"exclude_special_tokens": "no"}, "--exclude_special_tokens: no: must be true, false, or token ids"),
        ({"exclude_special_tokens": 99999999}, "--exclude_special_tokens 99999999: the tokenizer has the ids 0 to"),
        ({"skip_positions": 1, "protocol": "saebench"}, "--skip_positions 1: with --protocol saebench the SAE stands"),
        ({"dataset": None}, "--dataset: the SAE's cfg.json does not say"),
        ({"dataset": empty}, "is empty (0 documents)"),
        ({"dataset": "owner/data"}, "--dataset owner/data: the Hugging Face Hub cannot be reached"),
        ({"context_length": 4096}, "--context_length 4096: "),
        ({"num_samples": 0}, "argument --num_samples: 0: must be a whole number of 1 or more"),
        ({"batch_size": -1}, "argument --batch_size: -1: must be a whole number of 1 or more"),
        ({"dead_tokens": 0}, "argument --dead_tokens: 0: must be a whole number of 1 or more"),
        ({"seed": -1}, "argument --seed: -1: must be a whole number of 0 or more"),
        ({"layer": -1}, "argument --layer: -1: must be a whole number of 0 or more"),
        ({"sae_path": "nodir/x--y"}, "nodir/x--y: neither a file or directory here nor a Hugging Face id"),
        ({"dataset_config": "en"}, "--dataset_config en: "),
        ({"saebench": ""}, "argument --saebench: is empty; give a value or leave it out"),
        ({"dataset": ""}, "argument --dataset: is empty"),
        ({"features": 64}, "--features 64: sae has the features 0 to 63"),
        ({"chat_tokens": "assistant"}, f"--chat_tokens assistant: {text_file} holds no conversations in its column"),
        ({"protocol": "core"}, "argument --protocol: invalid choice: 'core'"),
        ({"saebench": "speed"}, "--saebench speed: no eval speed; choose from core"),
        ({"saebench": "core,absorption"}, "its results mean nothing for a model of"),
        ({"device": "cuda:7"}, "--device cuda:7: torch "),
        ({"output_json": "/proc/nothing/results.json"}, "--output_json /proc/nothing/results.json: cannot be written"),
        ({"output_json": "/dev/full"}, "--output_json /dev/full: must be a .json file"),
        ({"output_json": sae_path / "cfg.json"}, "does not belong to an SAE"),
        ({"output_json": directory}, "is not a file that can be replaced"),
        ({"output_json": tmp_path / f"{'x' * 300}.json"}, "cannot be written there (File name too long)"),
        ({"num_samples": 10**20}, "must be at most"),
        ({"seed": 10**30}, "must be at most"),
        ({"model_name": holes}, "1 weights are missing, model.layers.2.mlp.down_proj.weight among them"),
    ]
    for changes, says in mistakes:
        flags = [p for name, value in (right | changes).items() if value is not None for p in (f"--{name}", value)]
        check(script("evaluate_sae_real_activations.py", *flags), says)
    assert not list(tmp_path.glob("**/*.partial"))
    assert not [*tmp_path.glob("**/evaluation.json"), *tmp_path.glob("**/report.*")]


@pytest.fixture
def hub(monkeypatch):
    """A hub on loopback that knows gated repositories, wikitext by its old name, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/api/datasets/wikitext"):  # an old name, as the Hub answers it
                self.send_response(307)
                self.send_header("Location", self.path.replace("wikitext", "Salesforce/wikitext"))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if "wikitext" in self.path:
                status, code, body = 200, None, json.dumps({"id": "Salesforce/wikitext"}).encode()
            elif self.path.endswith("/auth-check"):
                status, code, body = 403, "GatedRepo", b"{}"
            elif "gated" in self.path:
                name = self.path.split("/api/models/")[-1].split("/api/datasets/")[-1].split("?")[0]
                status, code, body = 200, None, json.dumps({"id": name, "gated": "manual"}).encode()
            else:
                status, code, body = 404, "RepoNotFound", b"{}"
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()


@pytest.mark.parametrize(
    ("flag", "name", "says"),
    [
        ("model_name", "owner/unknown", "no such model on the Hugging Face Hub"),
        ("model_name", "owner/gated", "this model is gated; accept its licence"),
        ("dataset_path", "owner/unknown", "no such dataset on the Hugging Face Hub"),
        ("dataset_path", "owner/gated", "this dataset is gated; accept its licence"),
    ],
)
def test_what_the_hub_refuses_is_said(script, tiny_run, hub, flag, name, says):
    check(script("sae_lens_train.py", *tiny_run, f"--{flag}", name), says)


def test_an_old_name_is_followed_to_the_present_one(hub):
    assert check_repository("wikitext", "dataset", "--dataset") == "Salesforce/wikitext"


def test_a_revision_that_is_not_in_the_cache_is_refused_without_a_network():
    refusal = "^--model_name owner/model: the Hugging Face Hub cannot be reached .* revision v2 of the model is not in"
    with pytest.raises(UserError, match=refusal):
        download_small_files("owner/model", "v2", "", "--model_name")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ["./run_saelens_training.sh", "nonsense"],
            "no preset nonsense; the presets are demo llama3-8b",
        ),
        (["./run_simple.sh"], "usage: ./run_simple.sh NUM_GPUS"),
        (["./run_simple.sh", "zero", "0"], "NUM_GPUS zero: must be a whole number"),
        (["./run_simple.sh", "1", "a"], "GPU_IDS a: must be numbers joined by commas"),
        (["./run_simple.sh", "2", "0"], "GPU_IDS 0: 1 ids, and NUM_GPUS is 2"),
        (["./run_simple.sh", "2", "1,1"], "GPU_IDS 1,1: an id appears twice"),
        (["./run_simple.sh", "2", "98,99"], "torch sees "),
        (
            ["./run_simple.sh", "2", "cpu", "@presets/demo.args", "--shard_features", "--architecture", "gated"],
            "--shard_features: for --architecture topk and batchtopk in float32 or float64, not gated",
        ),
        (
            ["./run_simple.sh", "3", "cpu", "@presets/demo.args", "--train_batch_size_tokens", "1024"],
            "--train_batch_size_tokens 1024: 3 processes do not",
        ),
        (["./run_simple.sh", "16", "cpu", "@presets/demo.args"], "--store_batch_size_prompts 8: less than the 16"),
        (["./run_simple.sh", "2", "cpu", "--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
        (["./run_simple.sh", "1", "99", "--layer", "12"], f"torch sees {torch.cuda.device_count()} GPUs"),
    ],
)
def test_the_launchers_refuse_what_they_cannot_do(command, says):
    check(run_process(*command), says)
