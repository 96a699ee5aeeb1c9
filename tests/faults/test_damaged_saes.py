"""Whatever stands in an SAE's files, it is loaded or refused in one line: no traceback, no hang, no huge allocation."""

import json
import math
import random
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.errors import UserError
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.metadata import check_metadata
from sae_toolkit.saes.search import find_saes
from support.hostile_files import edit_json, edit_metadata, edit_tensors, join_safetensors, split_safetensors
from support.sae_files import random_dictionary, random_sparse_coder, save_dictionary

pytestmark = pytest.mark.faults

D, F = 32, 64
HOOK = "blocks.1.hook_resid_post"
LONGEST = 20.0  # seconds for one file; a load takes milliseconds
MOST_MEMORY = 2 << 30  # bytes above what the process had at the start
N_POSITIONS = 400  # bytes flipped in each file


@pytest.fixture
def saes(tmp_path, sparsify) -> dict[str, Path]:
    """One SAE of each kind, by name."""
    record = {
        "model_name": "owner/model",
        "hook_name": HOOK,
        "context_size": 64,
        "dataset_path": "owner/text",
        "dataset_split": "train",
        "seqpos_slice": [1, None],
        "exclude_special_tokens": True,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
        "held_out_fraction": 0.1,
        "held_out_seed": 3,
        "max_activation_norm": 10.0,
    }
    sizes = {"d_in": D, "d_sae": F, "metadata": SAEMetadata(**record)}
    models = {
        "standard": StandardSAE(StandardSAEConfig(**sizes)),
        "topk": TopKSAE(TopKSAEConfig(**sizes, k=4)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**sizes)),
        "gated": GatedSAE(GatedSAEConfig(**sizes)),
        "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes, k=4)),
    }
    for name, model in models.items():
        model.save_model(tmp_path / name)
    random_sparse_coder(sparsify, tmp_path / "sparsify")
    save_dictionary(tmp_path / "dictionary", "BatchTopKSAE", random_dictionary("BatchTopKSAE"))
    return {name: tmp_path / name for name in (*models, "sparsify", "dictionary")}


def load_or_refuse(directory: Path, outcomes: Counter[str]) -> str | None:
    """Counts how one SAE ended, and returns the line that refused it."""
    started = time.monotonic()
    line = None
    try:
        (file,) = find_saes([str(directory)])
        check_metadata(load_sae_file(file, "cpu"), "--sae_path")
    except UserError as error:
        line = str(error)
        assert line.startswith("--sae_path")
        assert "\n" not in line
    assert time.monotonic() - started < LONGEST
    outcomes["loaded" if line is None else "refused"] += 1
    return line


def told(outcomes: Counter[str]) -> str:
    loaded = f", {n:,} loaded" if (n := outcomes["loaded"]) else ""
    return f"{outcomes['refused']:,} refused in one line{loaded}"


def lost(outcomes: Counter[str]) -> str:
    return "of those that load nothing is noticed: the file has no checksum" if outcomes["loaded"] else "nothing"


@pytest.fixture(autouse=True)
def memory_stays_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def test_any_byte_damaged(saes, record_fault):
    draw = random.Random(0)
    of_kind: dict[str, Counter[str]] = {"configuration": Counter(), "weights": Counter()}
    for directory in saes.values():
        for file in sorted(path for path in directory.iterdir() if path.is_file()):
            outcomes = of_kind["configuration" if file.suffix == ".json" else "weights"]
            whole = file.read_bytes()
            n = min(N_POSITIONS, len(whole))
            for i in range(n):  # spread over the whole file, the header's bytes among them
                at = min(len(whole) - 1, (i * len(whole)) // n + draw.randrange(max(1, len(whole) // n)))
                at = i if i < n // 4 else at
                damaged = bytearray(whole)
                damaged[at] ^= draw.choice((1, 2, 8, 16, 64, 128, 255))
                file.write_bytes(damaged)
                load_or_refuse(directory, outcomes)
            file.write_bytes(whole)
    for kind, outcomes in of_kind.items():
        record_fault(f"one byte changed in an SAE's {kind}", outcomes.total(), told(outcomes), lost(outcomes))


def test_any_file_cut_short_or_missing(saes, record_fault):
    outcomes: Counter[str] = Counter()
    for directory in saes.values():
        for file in sorted(path for path in directory.iterdir() if path.is_file()):
            whole = file.read_bytes()
            for length in {0, 1, 7, 8, 9, *(len(whole) * part // 20 for part in range(20)), len(whole) - 1}:
                file.write_bytes(whole[:length])
                assert load_or_refuse(directory, outcomes) is not None, (file, length)
            file.unlink()
            assert load_or_refuse(directory, outcomes) is not None
            file.write_bytes(whole)
    record_fault("a file of an SAE cut short or missing", outcomes.total(), told(outcomes), lost(outcomes))


def lying_headers(header: dict, data: bytes) -> dict[str, tuple]:
    """Headers of safetensors that do not say the truth: name -> arguments of `join_safetensors`."""
    w_dec = header["W_dec"]
    start, end = w_dec["data_offsets"]

    def with_w_dec(**fields):
        return header | {"W_dec": w_dec | fields}, data

    return {
        "length 2^63": (header, data, 2**63),
        "length 2^64 - 1": (header, data, 2**64 - 1),
        "length of a terabyte": (header, data, 2**40),
        "length 0": (header, data, 0),
        "header of 200 MB": (b'{"a":"' + b"x" * 200_000_000 + b'"}', data),
        "header nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, data),
        "header that is no JSON": (b"\xff" * 100, data),
        "offsets past the end": with_w_dec(data_offsets=[start, end + 10**9]),
        "offsets reversed": with_w_dec(data_offsets=[end, start]),
        "offsets negative": with_w_dec(data_offsets=[-4, end]),
        "offsets of 2^64": with_w_dec(data_offsets=[start, 2**64]),
        "offsets that overlap": with_w_dec(data_offsets=header["W_enc"]["data_offsets"]),
        "shape too large": with_w_dec(shape=[F, D * 2]),
        "shape that overflows": with_w_dec(shape=[2**32, 2**32]),
        "shape that overflows to the right size": with_w_dec(shape=[2**62, 4, F * D]),
        "shape negative": with_w_dec(shape=[-F, -D]),
        "shape of floats": with_w_dec(shape=[float(F), float(D)]),
        "shape of a million axes": with_w_dec(shape=[F, D, *[1] * 10**6]),
        "dtype of half the width": with_w_dec(dtype="F16"),
        "dtype unknown": with_w_dec(dtype="F1"),
        "dtype of integers": with_w_dec(dtype="I32"),
        "a tensor missing": ({k: v for k, v in header.items() if k != "W_dec"}, data),
        "a tensor under another name": ({("W_x" if k == "W_dec" else k): v for k, v in header.items()}, data),
        "data missing": (header, b""),
        "data doubled": (header, data + data),
    }


@pytest.mark.parametrize("name", ["standard", "sparsify"])
def test_headers_of_safetensors_that_lie(saes, name, record_fault):
    outcomes: Counter[str] = Counter()
    directory = saes[name]
    file = directory / ("sae.safetensors" if name == "sparsify" else "sae_weights.safetensors")
    if name == "sparsify":
        edit_tensors(file, lambda tensors: tensors.update(W_enc=torch.zeros_like(tensors["W_dec"])))
    header, data = split_safetensors(file)
    for fault, arguments in lying_headers(header, data).items():
        join_safetensors(file, *arguments)
        assert load_or_refuse(directory, outcomes) is not None, fault
    record_fault(f"a lying header of safetensors ({name})", outcomes.total(), told(outcomes), lost(outcomes))


_VALUES = ["x", "", 0, -1, 1.5, 10**30, 1e308, True, False, None, [], [1], {}, {"a": 1}, math.nan, math.inf, "../x"]


def test_values_of_another_kind_in_the_configuration(saes, record_fault):
    outcomes: Counter[str] = Counter()
    for name, directory in saes.items():
        file = directory / ("config.json" if name == "dictionary" else "cfg.json")
        right = json.loads(file.read_text())
        places = [(right, key) for key in right]
        places += [(part, key) for part in right.values() if isinstance(part, dict) for key in part]
        for part, key in places:
            before = part[key]
            for value in (*_VALUES, [[[]]]):
                part[key] = value
                file.write_text(json.dumps(right))
                load_or_refuse(directory, outcomes)
            part[key] = before
        for text in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[]", "null", '"x"', ""):
            file.write_text(text)
            assert load_or_refuse(directory, outcomes) is not None
    record_fault("a configuration of other types or sizes", outcomes.total(), told(outcomes), lost(outcomes))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e30, -3e38])
def test_weights_no_training_leaves(saes, number, record_fault):
    outcomes: Counter[str] = Counter()
    for name in ("standard", "topk", "jumprelu", "gated", "sparsify"):
        file = saes[name] / ("sae.safetensors" if name == "sparsify" else "sae_weights.safetensors")
        whole = file.read_bytes()
        for tensor in split_safetensors(file)[0].keys() - {"__metadata__", "threshold"}:
            edit_tensors(file, lambda tensors, tensor=tensor: tensors[tensor].view(-1)[-1:].fill_(number))
            line = load_or_refuse(saes[name], outcomes)
            assert line is not None, (name, tensor)
            assert "NaN or infinite" in line or "too large for a trained SAE" in line
            file.write_bytes(whole)
    record_fault(f"a weight of {number}", outcomes.total(), told(outcomes), lost(outcomes))


def test_weights_of_integers(saes, record_fault):
    outcomes: Counter[str] = Counter()
    for name in ("standard", "sparsify"):
        file = saes[name] / ("sae.safetensors" if name == "sparsify" else "sae_weights.safetensors")
        for dtype in (torch.int32, torch.int8, torch.bool):
            edit_tensors(file, lambda t, dtype=dtype: t.update(W_dec=t["W_dec"].to(dtype)))
            assert "must be of floats" in (load_or_refuse(saes[name], outcomes) or "")
    record_fault("weights of integers", outcomes.total(), told(outcomes), lost(outcomes))


def test_configurations_swapped_between_saes(saes, record_fault):
    outcomes: Counter[str] = Counter()
    StandardSAE(StandardSAEConfig(d_in=D, d_sae=2 * F)).save_model(saes["standard"].with_name("wide"))
    StandardSAE(StandardSAEConfig(d_in=F, d_sae=D)).save_model(saes["standard"].with_name("turned"))
    names = ["standard", "jumprelu", "gated", "batchtopk", "wide", "turned"]
    directories = {name: saes["standard"].with_name(name) for name in names}
    right = {name: (directory / "cfg.json").read_bytes() for name, directory in directories.items()}
    for name, directory in directories.items():
        for other in names:
            if other != name:
                (directory / "cfg.json").write_bytes(right[other])
                assert load_or_refuse(directory, outcomes) is not None, (name, other)
        (directory / "cfg.json").write_bytes(right[name])
    record_fault("cfg.json of an SAE of another kind or size", outcomes.total(), told(outcomes), lost(outcomes))


# Values that load, since another SAE could have them, and then meet a model and a text that they do not fit.
_UNFITTING = {
    "a context of one token": {"context_size": 1},
    "a context longer than the model's": {"context_size": 10**7},
    "a hook that is none": {"hook_name": "x"},
    "a layer that is none": {"hook_name": "blocks.99.hook_resid_post"},
    "a hook of no name": {"hook_name": ""},
    "a module of another width": {"hook_name": "model.layers.1.mlp.up_proj"},
    "the whole model for a hook": {"hook_name": "model"},
    "a model that is none": {"model_name": "./nowhere"},
    "a model of no name": {"model_name": ""},
    "a directory for a model": {"model_name": "/proc"},
    "a separator that is no token": {"sequence_separator_token": 10**9},
    "a separator of another name": {"sequence_separator_token": "\ud800"},
    "special tokens that are none": {"exclude_special_tokens": [10**30]},
    "all positions skipped": {"seqpos_slice": [10**6, None]},
    "a norm limit below all": {"max_activation_norm": 1e-30},
    "a data set that is none": {"dataset_path": "./nowhere.txt"},
    "a device for a data set": {"dataset_path": "/dev/zero"},
    "another column": {"text_column": "nothing"},
    "another split": {"dataset_split": "nothing"},
    "everything held out elsewhere": {"held_out_seed": 10**30},
    "names of control characters": {"model_name": "\x00\n\x1b[31m"},
}


def test_records_that_fit_neither_model_nor_text(script, tiny_model, text_file, tmp_path, record_fault):
    outcomes: Counter[str] = Counter()
    sae = tmp_path / "sae"
    StandardSAE(StandardSAEConfig(d_in=D, d_sae=F)).save_model(sae)
    right = {"model_name": str(tiny_model), "hook_name": HOOK, "dataset_path": str(text_file), "context_size": 32}
    right |= {"dataset_split": "train", "held_out_fraction": 0.2, "held_out_seed": 1, "text_column": "text"}
    original = (sae / "cfg.json").read_bytes()
    wrong = {}
    for fault, values in _UNFITTING.items():
        (sae / "cfg.json").write_bytes(original)
        edit_metadata(sae, **(right | values))
        flags = ("--sae_path", sae, "--num_samples", 4, "--device", "cpu")
        done = script("evaluate_sae_real_activations.py", *flags)
        names_it = len(done.error_lines) == 1 and "sae" in done.error_lines[0].removeprefix("error:")
        refused_well = done.status == 2 and names_it
        if "Traceback" in done.stderr or not (done.status == 0 or refused_well):
            wrong[fault] = done.stderr[-500:]
        outcomes["evaluated" if done.status == 0 else "refused"] += 1
    assert wrong == {}
    happened = f"{outcomes['refused']} refused in one line that names the SAE, {outcomes['evaluated']} evaluated"
    record_fault("a record that fits neither model nor text", outcomes.total(), happened, "nothing")


def test_logits_of_nan_are_named(script, tiny_model, text_file, tmp_path, record_fault):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit_tensors(model / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(math.nan))
    sae = tmp_path / "sae"
    StandardSAE(StandardSAEConfig(d_in=D, d_sae=F)).save_model(sae)
    edit_metadata(sae, model_name=str(model), hook_name=HOOK, context_size=32)
    done = script(
        *("evaluate_sae_real_activations.py", "--sae_path", sae, "--dataset", text_file),
        *("--num_samples", 4, "--device", "cpu"),
    )
    assert done.status == 2, done.stderr
    assert done.error_lines[0].startswith(f"error: --model_name {model}: its own losses are not finite")
    assert not list(sae.glob("*evaluation*"))
    record_fault("a model whose logits are NaN", 1, "refused in one line", "nothing")


def test_an_activation_scaler_that_is_none(saes, record_fault):
    outcomes: Counter[str] = Counter()
    for text in ("{", "[]", "null", '{"scaling_factor": "x"}', '{"scaling_factor": NaN}', '{"scaling_factor": 0}'):
        (saes["standard"] / "activation_scaler.json").write_text(text)
        load_or_refuse(saes["standard"], outcomes)
    for factor in (1e-300, 1e300, -1.0, [1.0]):
        edit_json_or_write(saes["standard"] / "activation_scaler.json", scaling_factor=factor)
        load_or_refuse(saes["standard"], outcomes)
    record_fault("a damaged activation_scaler.json", outcomes.total(), told(outcomes), lost(outcomes))


def edit_json_or_write(file: Path, **values: object) -> None:
    file.write_text("{}")
    edit_json(file, **values)
