"""SAEs of SAELens, sparsify and dictionary_learning are found by name and compute what their own libraries compute."""

import http.server
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, run_process
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.foreign_saes import hook_of_hookpoint
from sae_toolkit.sae_formats import find_saes, load_sae_file

D, F, K = 16, 48, 6
ACTS = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(0)) + 1


def load(*names: object, layer: int | None = None) -> SAE:
    (file,) = find_saes([str(name) for name in names], layer=layer)
    return load_sae_file(file, "cpu")


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-5 of the largest value."""
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < 1e-5, error


def save_saelens(directory: Path) -> Path:
    StandardSAE(StandardSAEConfig(d_in=D, d_sae=F)).save_model(directory)
    return directory


# sparsify


@pytest.fixture(scope="session")
def sparsify():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # triton without a GPU fails
        import sparsify

    return sparsify


def random_sparse_coder(sparsify, directory: Path, **config):
    torch.manual_seed(1)
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K, **config))
    with torch.no_grad():
        coder.encoder.bias.normal_()
        coder.b_dec.normal_()
        coder.W_dec.normal_()
    coder.save_to_disk(directory)
    return coder


def assert_agrees_with_sparsify(sae: SAE, coder, acts: torch.Tensor) -> None:
    with torch.no_grad():
        theirs = coder(acts)
        features = torch.zeros(len(acts), coder.num_latents).scatter(1, theirs.latent_indices, theirs.latent_acts)
        assert_agree(sae.encode(acts), features)
        assert_agree(sae(acts), theirs.sae_out)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_a_sparsify_sae_computes_what_sparsify_computes(sparsify, tmp_path, activation):
    coder = random_sparse_coder(sparsify, tmp_path / "layers.3", activation=activation)
    (file,) = find_saes([str(tmp_path / "layers.3")])
    assert (file.name, file.library, file.form) == ("layers.3", "sparsify", f"SparseCoder, {activation}")
    sae = load_sae_file(file, "cpu")
    assert_agrees_with_sparsify(sae, coder, ACTS)
    assert (sae.encode(ACTS) > 0).sum(1).max() == K
    assert torch.equal(sae.W_dec, coder.W_dec)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_a_sparsify_sae_in_bfloat16_loads_in_float32(sparsify, tmp_path):
    coder = random_sparse_coder(sparsify, tmp_path).bfloat16()
    coder.save_to_disk(tmp_path)
    sae = load(tmp_path)
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    assert_agrees_with_sparsify(sae, coder.float(), ACTS)


@pytest.fixture(scope="session")
def sparsify_run(sparsify, tiny_model, tmp_path_factory) -> Path:
    """Two SAEs of the tiny model, trained by sparsify's own Trainer for 8 steps."""
    from sparsify.__main__ import RunConfig

    save_dir = tmp_path_factory.mktemp("sparsify")
    tokens = torch.randint(3, 1000, (32, 32), generator=torch.Generator().manual_seed(0))
    config = RunConfig(
        sparsify.SparseCoderConfig(expansion_factor=4, k=8),
        model=str(tiny_model),
        dataset="owner/text",
        ctx_len=32,
        batch_size=4,
        hookpoints=["layers.1", "layers.2.mlp"],
        exclude_tokens=[0, 1],
        optimizer="adam",
        lr=1e-3,
        lr_warmup_steps=1,
        log_to_wandb=False,
        save_dir=str(save_dir),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sparsify.Trainer(config, Dataset.from_dict({"input_ids": tokens}).with_format("torch"), model).fit()
    return save_dir / "unnamed"


def test_what_sparsify_trains_is_found_by_its_hookpoint_and_says_what_it_is_of(sparsify, sparsify_run, tiny_model):
    acts = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    at_layer = load(sparsify_run, layer=1)
    at_mlp = load(f"{sparsify_run}:layers.2.mlp")
    for sae, hookpoint in ((at_layer, "layers.1"), (at_mlp, "layers.2.mlp")):
        coder = sparsify.SparseCoder.load_from_disk(sparsify_run / hookpoint)
        assert not torch.equal(coder.W_dec, coder.encoder.weight)  # it did train
        assert_agrees_with_sparsify(sae, coder, acts)
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.dataset_path) == (str(tiny_model), "owner/text")
        assert (metadata.context_size, metadata.exclude_special_tokens) == (32, [0, 1])
    assert at_layer.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert at_mlp.cfg.metadata.hook_name == "blocks.2.hook_mlp_out"


def test_which_of_several_hookpoints_must_be_said(sparsify_run):
    holds = r"holds 2 SAEs: layers\.1, layers\.2\.mlp; "
    with pytest.raises(UserError, match=holds + "name one, as in .*unnamed:layers.1$"):
        find_saes([str(sparsify_run)])
    with pytest.raises(UserError, match=holds + r"no layers\.7 among them; "):
        find_saes([f"{sparsify_run}:layers.7"])
    with pytest.raises(UserError, match=holds + r"not one of them for layers\.2; "):
        find_saes([str(sparsify_run)], layer=2)


def test_hookpoints_are_named_as_transformerlens_names_them():
    hooks = {
        "layers.12": "blocks.12.hook_resid_post",
        "layers.12.mlp": "blocks.12.hook_mlp_out",
        "layers.12.self_attn": "blocks.12.hook_attn_out",
        "h.3.attn": "blocks.3.hook_attn_out",
        "model.layers.5": "blocks.5.hook_resid_post",
        "layers.12.mlp.down_proj": "layers.12.mlp.down_proj",
        "embed_tokens": "embed_tokens",
    }
    assert {hookpoint: hook_of_hookpoint(hookpoint) for hookpoint in hooks} == hooks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transcode": True}, r"a transcoder \(transcode in cfg.json\)"),
        ({"skip_connection": True}, r"a transcoder \(skip_connection in cfg.json\)"),
        ({"signed": True}, "a signed SAE of an old sparsify"),
        ({"activation": "gelu"}, "activation 'gelu' in cfg.json; known are topk and groupmax"),
        ({"k": F + 1}, f"k is {F + 1}, and must be 1 to the {F} features"),
        ({"k": 5, "activation": "groupmax"}, f"groupmax of k 5 .* does not divide the {F} features"),
        ({"a_field_of_another_version": 1, "signed": False}, None),
    ],
)
def test_of_sparsify_configurations_what_is_no_autoencoder_is_refused(sparsify, tmp_path, changes, says):
    coder = random_sparse_coder(sparsify, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | changes))
    if says is None:
        assert_agrees_with_sparsify(load(tmp_path), coder, ACTS)
    else:
        with pytest.raises(UserError, match=f"^--sae_path {tmp_path}: {says}"):
            load(tmp_path)


# dictionary_learning


def random_dictionary(dict_class: str) -> dict[str, torch.Tensor]:
    """A state dict as dictionary_learning 0.1.0 saves it, of random weights."""
    shapes = {
        "AutoEncoder": {"bias": [D], "encoder.weight": [F, D], "encoder.bias": [F], "decoder.weight": [D, F]},
        "AutoEncoderNew": {
            "encoder.weight": [F, D],
            "encoder.bias": [F],
            "decoder.weight": [D, F],
            "decoder.bias": [D],
        },
        "GatedAutoEncoder": {
            "decoder_bias": [D],
            "r_mag": [F],
            "gate_bias": [F],
            "mag_bias": [F],
            "encoder.weight": [F, D],
            "decoder.weight": [D, F],
        },
        "AutoEncoderTopK": {"b_dec": [D], "decoder.weight": [D, F], "encoder.weight": [F, D], "encoder.bias": [F]},
        "MatryoshkaBatchTopKSAE": {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]},
        "JumpReluAutoEncoder": {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D], "threshold": [F]},
    }
    shapes["BatchTopKSAE"] = shapes["AutoEncoderTopK"]
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes[dict_class].items()}
    if "TopK" in dict_class:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(2.5)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([F // 4, F - F // 4])
    return state


def by_formula(dict_class: str, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction in float64, written down from the library's definitions."""
    s = {name: tensor.double() for name, tensor in state.items()}
    x = ACTS.double()
    W_enc = s["encoder.weight"].T if "encoder.weight" in s else s["W_enc"]
    W_dec = s["decoder.weight"].T if "decoder.weight" in s else s["W_dec"]
    if dict_class == "AutoEncoder":
        f = ((x - s["bias"]) @ W_enc + s["encoder.bias"]).relu()
        return f * W_dec.norm(dim=1), f @ W_dec + s["bias"]  # load_dictionary makes the decoder's norms 1
    if dict_class == "AutoEncoderNew":
        f = (x @ W_enc + s["encoder.bias"]).relu()
        return f, f @ W_dec + s["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        pre = (x - s["decoder_bias"]) @ W_enc
        f = (pre + s["gate_bias"] > 0) * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
        return f, f @ W_dec + s["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":
        pre = x @ W_enc + s["b_enc"]
        f = (pre * (pre > s["threshold"])).relu()
        return f, f @ W_dec + s["b_dec"]
    b_enc = s["encoder.bias"] if "encoder.bias" in s else s["b_enc"]
    f = ((x - s["b_dec"]) @ W_enc + b_enc).relu()
    if dict_class == "AutoEncoderTopK":
        top = f.topk(K)
        f = torch.zeros_like(f).scatter(1, top.indices, top.values)
    else:
        f = f * (f > s["threshold"])
    return f, f @ W_dec + s["b_dec"]


def save_dictionary(directory: Path, kind: str, state: object, **trainer: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "ae.pt")
    trainer = {"dict_class": kind, "k": K, "layer": 4, "lm_name": "owner/model"} | trainer
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "ctx_len": 64}}))
    return directory


DICT_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


@pytest.mark.parametrize("dict_class", DICT_CLASSES)
def test_a_dictionary_computes_its_formula(tmp_path, dict_class):
    state = random_dictionary(dict_class)
    (file,) = find_saes([str(save_dictionary(tmp_path, dict_class, state))])
    assert (file.library, file.form) == ("dictionary_learning", dict_class)
    sae = load_sae_file(file, "cpu")
    features, reconstruction = by_formula(dict_class, state)
    assert 0 < (features > 0).double().mean() < 1
    assert_agree(sae.encode(ACTS), features)
    assert_agree(sae(ACTS), reconstruction)
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size) == (
        "owner/model",
        "blocks.4.hook_resid_post",
        64,
    )


@pytest.mark.parametrize(
    ("submodule_name", "hook"),
    [
        ("resid_post_layer_4", "blocks.4.hook_resid_post"),
        ("model.layers.4.mlp", "blocks.4.hook_mlp_out"),
        ("attn_out_layer_4", "blocks.4.hook_attn_out"),
        ("something else", "something else"),
    ],
)
def test_the_submodule_of_a_dictionary_is_its_hook(tmp_path, submodule_name, hook):
    state = random_dictionary("AutoEncoder")
    sae = load(save_dictionary(tmp_path, "AutoEncoder", state, submodule_name=submodule_name))
    assert sae.cfg.metadata.hook_name == hook


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path):
    opened = tmp_path / "opened"

    class Payload:
        def __reduce__(self):
            return Path.touch, (opened,)

    save_dictionary(tmp_path, "AutoEncoder", random_dictionary("AutoEncoder") | {"payload": Payload()})
    with pytest.raises(UserError, match=r"ae\.pt is a pickle of more than tensors, which could run any code"):
        load(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(UserError, match=r"ae\.pt is a pickle of more than tensors"):
        load(tmp_path)
    assert not opened.exists()


@pytest.mark.parametrize(
    ("dict_class", "changes", "trainer", "says"),
    [
        (
            "BatchTopKSAE",
            {"threshold": torch.tensor(-1.0)},
            {"threshold_start_step": 1000},
            "the threshold of this BatchTopKSAE was never set: its training ended before threshold_start_step 1000",
        ),
        ("AutoEncoderTopK", {"k": torch.tensor(F + 1)}, {}, f"k is {F + 1}, and must be 1 to the {F} features"),
        ("AutoEncoder", {}, {"dict_class": "IdentityDict"}, "dict_class 'IdentityDict' in config.json; known are Auto"),
        ("AutoEncoder", {"bias": torch.zeros(D + 1)}, {}, rf"b_dec has shape \[{D + 1}\], and must have \[{D}\]"),
        ("GatedAutoEncoder", {"decoder.weight": torch.zeros(D)}, {}, "W_dec has shape"),
        ("JumpReluAutoEncoder", {"W_enc": torch.zeros(F, D)}, {}, "W_enc has shape"),
        ("AutoEncoder", {"encoder.bias": torch.full([F], torch.nan)}, {}, f"{F} of the {F} numbers of b_enc are NaN"),
        ("AutoEncoderTopK", {"b_dec": "text"}, {}, "is no state dict of tensors"),
    ],
)
def test_a_dictionary_that_cannot_be_used_is_refused(tmp_path, dict_class, changes, trainer, says):
    save_dictionary(tmp_path, dict_class, random_dictionary(dict_class) | changes, **trainer)
    with pytest.raises(UserError, match=says):
        load(tmp_path)


# any library


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_damaged_files_are_refused_in_one_line(sparsify, tmp_path):
    saelens = save_saelens(tmp_path / "saelens")
    random_sparse_coder(sparsify, tmp_path / "sparsify")
    dictionary = save_dictionary(tmp_path / "dictionary", "AutoEncoder", random_dictionary("AutoEncoder"))
    for weights in (saelens / "sae_weights.safetensors", tmp_path / "sparsify/sae.safetensors", dictionary / "ae.pt"):
        truncate(weights)
        with pytest.raises(UserError, match=f"^--sae_path {weights.parent}: .*damaged") as error:
            load(weights.parent)
        assert "\n" not in str(error.value)
    for config in (saelens / "cfg.json", tmp_path / "sparsify/cfg.json", dictionary / "config.json"):
        truncate(config)
        with pytest.raises(UserError, match=f"{config.name} cannot be read"):
            find_saes([str(config.parent)])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=F))
    sae.W_dec.data[3, 4] = torch.inf
    sae.save_model(tmp_path)
    with pytest.raises(UserError, match=f"1 of the {D * F} numbers of W_dec are NaN or infinite"):
        load(tmp_path)


def test_a_run_directory_is_all_its_checkpoints_in_order(script, tiny_run, tmp_path):
    done = script("sae_lens_train.py", *tiny_run, "--architecture", "batchtopk", "--k", 8, "--n_checkpoints", 1)
    final = Path(done.stdout.strip())
    files = find_saes([str(final.parent)])
    assert [(file.path.name, file.library, file.form) for file in files] == [
        ("2048", "SAELens", "training form, batchtopk"),
        ("final_2048", "SAELens", "inference form, jumprelu"),
    ]
    training, inference = (load_sae_file(file, "cpu") for file in files)
    acts = torch.randn(50, 32)
    assert_agree(training.encode(acts), inference.encode(acts))
    assert find_saes([str(final.parents[1] / "*" / "final_*")])[0].path == final

    for tokens in ("512", "1024", "10000"):
        save_saelens(tmp_path / "run" / tokens)
    save_saelens(tmp_path / "run/final_9000")
    (tmp_path / "run/64").mkdir()  # without weights
    assert [file.name for file in find_saes([str(tmp_path / "run")])] == ["512", "1024", "10000", "final_9000"]


def test_names_are_short_and_unique_and_duplicates_go(tmp_path, monkeypatch):
    for directory in ("a/run/final_1", "b/run/final_1", "b/run/final_2"):
        save_saelens(tmp_path / directory)
    monkeypatch.chdir(tmp_path)
    files = find_saes(["a/run/final_1", str(tmp_path / "*/run/*"), "./b/run"])
    assert [file.name for file in files] == ["a/run/final_1", "b/run/final_1", "final_2"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "no such directory"),
        ("./no/where", "no such directory"),
        ("empty", r"no SAE in it; looked for cfg\.json \+ sae_weights\.safetensors \(SAELens\); "),
        ("empty:layers.1", "no SAE in it"),
        ("a_file", "a file; name the directory of the SAE"),
        ("empty/*", "the pattern fits no SAE"),
        ("empty/child", "no such directory"),
        ("gpt2-small-res-jb", "has 13 SAEs, and none of that id; give one of them, such as gpt2-small-res-jb:blocks"),
        ("gpt2-small-res-jb:blocks.5.hook_resid", "such as gpt2-small-res-jb:blocks.5.hook_resid_pre"),
        ("gpt2-small-res-bj:blocks.5", "no SAELens release 'gpt2-small-res-bj'; the closest are gpt2-small-res"),
    ],
)
def test_a_name_that_leads_to_no_sae_says_what_there_is(tmp_path, monkeypatch, name, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^--sae_path {name.partition(':')[0].replace('*', '.')}.*{says}") as error:
        find_saes([name])
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(sparsify, tmp_path, monkeypatch):
    """A hub on loopback with one repository, owner/saes, of two sparsify SAEs, and an empty cache."""
    root = tmp_path / "repository"
    for layer in (1, 2):
        random_sparse_coder(sparsify, root / f"layers.{layer}")
    (root / "config.json").write_text(json.dumps({"model": "owner/model", "dataset": "owner/text"}))
    (root / "optimizer_0.pt").write_bytes(b"not to be fetched")
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    commit = "0" * 40
    served: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if path.startswith("/owner/saes/resolve/"):
                name = path.split("/", 5)[5]
                if name in names:
                    served.append(name)
                    body = (root / name).read_bytes()
                    status, headers = 200, {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": commit}
                else:
                    headers = {"X-Error-Code": "EntryNotFound"}
            elif path.startswith("/api/models/owner/saes/tree/"):
                tree = [{"type": "file", "path": n, "size": (root / n).stat().st_size, "oid": n} for n in names]
                status, headers, body = 200, {}, json.dumps(tree).encode()
            elif path.startswith("/api/models/owner/saes"):
                info = {"id": "owner/saes", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
                status, headers, body = 200, {}, json.dumps(info).encode()
            self.send_response(status)
            for header, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    resolve = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield root, served, server
    server.shutdown()


def test_a_hub_repository_of_hookpoints_is_one_sae_of_it(hub):
    root, served, server = hub
    with pytest.raises(UserError, match=r"owner/saes: holds 2 SAEs: layers\.1, layers\.2; name one, as in owner/saes:"):
        find_saes(["owner/saes"])
    with pytest.raises(UserError, match=r"no layers\.9 among them"):
        find_saes(["owner/saes:layers.9"])
    with pytest.raises(UserError, match="owner/nothing: no such model on the Hugging Face Hub"):
        find_saes(["owner/nothing:layers.1"])
    assert served == []
    (file,) = find_saes(["owner/saes:layers.2"])
    assert (file.name, file.library, file.form) == ("owner/saes:layers.2", "sparsify", "SparseCoder, topk")
    assert {"config.json", "layers.2/cfg.json", "layers.2/sae.safetensors"} == set(served)
    sae = load_sae_file(file, "cpu")
    assert torch.equal(sae.W_dec, load_file(root / "layers.2/sae.safetensors")["W_dec"])
    assert sae.cfg.metadata.model_name == "owner/model"
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"

    server.shutdown()
    server.server_close()
    assert [found.path for found in find_saes(["owner/saes"], layer=2)] == [file.path]  # from the cache
    with pytest.raises(UserError, match="the Hugging Face Hub cannot be reached"):
        find_saes(["owner/others:layers.1"])


def test_a_release_of_saelens_that_cannot_be_reached_says_so(hub):
    hub[2].shutdown()
    hub[2].server_close()
    with pytest.raises(UserError, match="^--sae_path gpt2-small-res-jb:blocks.5.hook_resid_pre, of jbloom/GPT2-Small"):
        find_saes(["gpt2-small-res-jb:blocks.5.hook_resid_pre"])


# dictionary_learning itself


@pytest.fixture(scope="session")
def dictionary_learning_python() -> Path:
    """The Python of an environment where dictionary_learning imports, made if it is missing."""
    environment = ROOT / ".venv-dictionary-learning"
    python = environment / "bin" / "python"
    complete = environment / "complete"
    if not complete.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        (environment / ".gitignore").write_text("*\n")
        requirements = ROOT / "requirements-dictionary-learning.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        complete.touch()
    return python


@pytest.mark.parity
def test_what_dictionary_learning_trains_computes_the_same_here(dictionary_learning_python, tmp_path):
    rng = np.random.default_rng(0)
    codes = (rng.random((2048, 40)) < 0.15) * rng.random((2048, 40)) * 4
    acts = (codes @ rng.standard_normal((40, 24)) + 2 * rng.standard_normal(24)).astype(np.float32)
    np.save(tmp_path / "acts.npy", acts)
    script = ROOT / "tests/write_dictionary_learning_saes.py"
    done = run_process(dictionary_learning_python, script, tmp_path / "saes", tmp_path / "acts.npy", timeout=900)
    assert done.status == 0, done.stderr[-2000:]

    files = {file.path.parent.name: file for file in find_saes([str(tmp_path / "saes/*/trainer_0")])}
    assert {kind: file.form for kind, file in files.items()} == {
        "standard": "AutoEncoder",
        "standard_april": "AutoEncoder",
        "gated": "GatedAutoEncoder",
        "jumprelu": "JumpReluAutoEncoder",
        "topk": "AutoEncoderTopK",
        "batchtopk": "BatchTopKSAE",
        "batchtopk_no_threshold": "BatchTopKSAE",
        "matryoshka": "MatryoshkaBatchTopKSAE",
    }
    with pytest.raises(UserError, match="the threshold of this BatchTopKSAE was never set"):
        load_sae_file(files.pop("batchtopk_no_threshold"), "cpu")
    x = torch.from_numpy(acts)
    for file in files.values():
        sae = load_sae_file(file, "cpu")
        expected = load_file(file.path / "expected.safetensors")
        assert_agree(sae.encode(x[:64]), expected["features"])
        assert_agree(sae(x[:64]), expected["reconstruction"])
        theirs = json.loads((file.path / "evaluation.json").read_text())
        with torch.no_grad():
            l0 = (sae.encode(x) > 0).float().sum(1).mean().item()
            explained = 1 - ((x - sae(x)).var(0).sum() / x.var(0).sum()).item()
        assert l0 == pytest.approx(theirs["l0"], rel=1e-5)
        assert explained == pytest.approx(theirs["frac_variance_explained"], abs=1e-5)
