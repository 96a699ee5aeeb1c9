"""An SAE is found by each kind of name, and the refusal of a wrong name says which names there are."""

import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import load_file, save_file

from sae_toolkit.errors import UserError
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes
from support.sae_files import (
    ACTS,
    D,
    F,
    assert_agree,
    load,
    random_dictionary,
    random_sparse_coder,
    save_dictionary,
    save_saelens,
)


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


def save_finetuned(directory: Path, factor_F: torch.Tensor, name: str, **cfg: object) -> StandardSAE:
    """An SAE as SAELens 5 saved it after it had fine-tuned a factor for each feature. Returns it without the factor."""
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=F))
    directory.mkdir()
    save_file(sae.state_dict() | {name: factor_F}, directory / "sae_weights.safetensors")
    version_5 = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": "blocks.1.hook_resid_pre",
        "hook_layer": 1,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "finetuning_scaling_factor": True,
        "sae_lens_training_version": "5.10.0",
    }
    (directory / "cfg.json").write_text(json.dumps(version_5 | cfg))
    return sae


def test_a_factor_that_saelens_5_fine_tuned_is_folded_in(tmp_path):
    factor_F = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(0))
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        without = save_finetuned(tmp_path / name, factor_F, name)
        sae, features = load(tmp_path / name), without.encode(ACTS)
        assert_agree(sae.encode(ACTS), features)
        assert_agree(sae(ACTS), (factor_F * features) @ without.W_dec + without.b_dec)  # SAELens 5's decode
        assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
    without = save_finetuned(tmp_path / "ones", torch.ones(F), "scaling_factor", finetuning_scaling_factor=False)
    assert_agree(load(tmp_path / "ones")(ACTS), without(ACTS))


def test_an_activation_function_that_saelens_dropped_is_refused(tmp_path):
    """SAELens 6 would compute a relu."""
    save_finetuned(tmp_path / "sae", torch.ones(F), "scaling_factor", activation_fn_str="tanh-relu")
    with pytest.raises(UserError, match=r"activation_fn_str in cfg.json is tanh-relu, which SAELens dropped"):
        load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("size", "is_finetuned", "says"),
    [
        (F, False, r"the weights hold a factor for each feature \(scaling_factor\), and finetuning_scaling_factor in"),
        (1, True, rf"damaged: finetuning_scaling_factor has shape \[1\], and must have \[{F}\]"),
    ],
)
def test_a_factor_that_contradicts_its_cfg_is_refused(tmp_path, size, is_finetuned, says):
    save_finetuned(tmp_path / "sae", torch.full([size], 2.0), "scaling_factor", finetuning_scaling_factor=is_finetuned)
    with pytest.raises(UserError, match=f"^--sae_path {tmp_path / 'sae'}: {says}"):
        load(tmp_path / "sae")


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
    """A hub on loopback with one repository of SAEs, owner/saes, and an empty cache.

    Two SAEs are sparsify's. The files of one in Llama Scope's layout and of one in Goodfire's are empty.
    """
    root = tmp_path / "repository"
    for layer in (1, 2):
        random_sparse_coder(sparsify, root / f"layers.{layer}")
    (root / "config.json").write_text(json.dumps({"model": "owner/model", "dataset": "owner/text"}))
    (root / "optimizer_0.pt").write_bytes(b"not to be fetched")
    (root / "layer_3/checkpoints").mkdir(parents=True)
    (root / "layer_3/hyperparams.json").write_text('{"act_fn": "jumprelu"}')
    (root / "layer_3/checkpoints/final.safetensors").write_bytes(b"")
    (root / "Llama-SAE-l5.pth").write_bytes(b"")
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
    with pytest.raises(UserError, match=r"owner/saes: holds 4 SAEs: Llama.*, layer_3, layers\.1, layers\.2; name one"):
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


@pytest.mark.parametrize(
    ("part", "library", "files"),
    [
        ("layer_3", "Llama Scope", {"layer_3/hyperparams.json", "layer_3/checkpoints/final.safetensors"}),
        ("Llama-SAE-l5.pth", "Goodfire", {"Llama-SAE-l5.pth"}),
    ],
)
def test_a_published_sae_of_a_hub_repository_is_downloaded_alone(hub, part, library, files):
    (file,) = find_saes([f"owner/saes:{part}"])
    assert (file.name, file.library, file.is_download) == (f"owner/saes:{part}", library, True)
    assert set(hub[1]) - {"config.json"} == files
    hub[2].shutdown()
    hub[2].server_close()
    assert find_saes([f"owner/saes:{part}"]) == [file]  # from the cache


def test_a_release_of_saelens_that_cannot_be_reached_says_so(hub):
    hub[2].shutdown()
    hub[2].server_close()
    with pytest.raises(UserError, match="^--sae_path gpt2-small-res-jb:blocks.5.hook_resid_pre, of jbloom/GPT2-Small"):
        find_saes(["gpt2-small-res-jb:blocks.5.hook_resid_pre"])
