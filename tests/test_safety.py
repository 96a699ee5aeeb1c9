"""Files of others run no code and lead nowhere else, secrets stay off the record, and a person's umask holds."""

import json
import logging
import os
import shutil
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import xxhash
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import load_file

from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import find_model, load_language_model
from sae_toolkit.reports.results import _write_whole
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes
from sae_toolkit.terminal.console import run_script, set_up_logging
from sae_toolkit.terminal.redaction import redact
from support.hostile_files import TouchesFile, edit_json, edit_metadata, edit_tensors, model_with_code
from support.sae_files import random_dictionary, save_dictionary

HOOK = "blocks.1.hook_resid_post"
SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "HUGGING_FACE_HUB_TOKEN": "a-token-of-another-form",
    "WANDB_API_KEY": "5ec2e7" * 6 + "5ec2",
    "OPENAI_API_KEY": "the-key-of-a-judge",
    "WANDB_BASE_URL": "http://somebody:pass-word@127.0.0.1:9",
}


def refuses(outcome, *says):
    assert outcome.status == 2, outcome.stderr
    assert len(outcome.error_lines) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    for text in says:
        assert text in outcome.error_lines[0]


@pytest.fixture
def sae(tmp_path):
    """A directory of an SAE that fits the tiny model."""
    StandardSAE(StandardSAEConfig(d_in=32, d_sae=64)).save_model(tmp_path / "sae")
    edit_metadata(tmp_path / "sae", hook_name=HOOK)
    return tmp_path / "sae"


@pytest.fixture
def evaluate(script, tiny_model, text_file):
    """Runs a small evaluation of an SAE; flags given replace its own."""

    def run(sae, *switches, **flags):
        right = {"model_name": tiny_model, "dataset": text_file, "context_length": 32, "num_samples": 4}
        flags = {"sae_path": sae, "device": "cpu", "lm_dtype": "float32"} | right | flags
        given = [part for name, value in flags.items() if value is not None for part in (f"--{name}", value)]
        return script("evaluate_sae_real_activations.py", *given, *switches)

    return run


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is there once code of somebody else ran."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "code_ran"


def test_code_of_a_model_runs_only_where_the_flag_allows_it(
    script, tiny_run, tiny_model, tmp_path, sae, marker, evaluate
):
    model = model_with_code(tiny_model, tmp_path / "own", marker)
    needs = f"--model_name {model}: comes with code of its own and needs to run it; read the code, and allow it"
    refuses(script("sae_lens_train.py", *tiny_run, "--model_name", model), needs)
    refuses(evaluate(sae, model_name=model), needs)
    edit_metadata(sae, model_name=str(model), model_from_pretrained_kwargs={"trust_remote_code": True})
    refuses(evaluate(sae, model_name=None), f"--sae_path sae: {needs}")
    assert not marker.exists()
    done = script("sae_lens_train.py", *tiny_run, "--model_name", model, "--trust_remote_code", "--n_checkpoints", 1)
    assert done.status == 0, done.stderr
    assert marker.exists()

    # The flag is a person's word for one run: what a run wrote down does not give it again.
    marker.unlink()
    final = Path(done.stdout.strip())
    checkpoint = shutil.copytree(final.parent, tmp_path / "run") / "2048"
    shutil.rmtree(checkpoint.with_name(final.name))
    assert json.loads((checkpoint.parent / "training_flags.json").read_text())["trust_remote_code"] is True
    for module in [name for name in os.sys.modules if name.startswith("transformers_modules")]:
        del os.sys.modules[module]
    refuses(script("sae_lens_train.py", "--resume", checkpoint), "allow it with --trust_remote_code")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"trust_remote_code": True}, "use the flag --trust_remote_code"),
        ({"use_kernels": True}, "use_kernels cannot be set; use one of attn_implementation, "),
        ({"weights_only": False}, "weights_only cannot be set"),
        ({"gguf_file": "../model.gguf"}, "gguf_file cannot be set"),
        ({"subfolder": "../elsewhere"}, "subfolder ../elsewhere is not within the model"),
        ({"subfolder": "/etc"}, "subfolder /etc is not within the model"),
        ({"revision": 3}, "revision is 3, and must be str"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation owner/kernel is code of a Hub repository"),
        ({"token": "secret"}, "a token would be saved with the run; set HF_TOKEN or run `hf auth login`"),
    ],
)
def test_arguments_of_from_pretrained_are_a_short_list(script, tiny_run, tmp_path, kwargs, says):
    flag = f"model_from_pretrained_kwargs={json.dumps(kwargs)}"
    refuses(script("sae_lens_train.py", *tiny_run, "--set", flag), "--set model_from_pretrained_kwargs: ", says)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_chooses_its_models_revision_and_nothing_else_of_its_loading(tiny_model, tmp_path, sae, evaluate):
    model = tmp_path / "models" / "step7"
    shutil.copytree(tiny_model, model)
    kwargs = {"subfolder": "step7", "cache_dir": str(tmp_path / "cache"), "token": "x", "center_unembed": False}
    edit_metadata(sae, model_name=str(model.parent), model_from_pretrained_kwargs=kwargs)
    (model.parent / "config.json").write_bytes((model / "config.json").read_bytes())
    shutil.copy(model / "tokenizer.json", model.parent)
    done = evaluate(sae, model_name=None)
    assert done.status == 0, done.stderr
    assert "cache_dir, token, center_unembed in its model_from_pretrained_kwargs are ignored" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_configuration_that_asks_for_a_kernel_of_the_hub_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    edit_json(model / "config.json", attn_implementation="owner/kernel")
    with pytest.raises(UserError, match="allow it with --trust_remote_code"):
        find_model(str(model))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/absolute.safetensors", "a/../../outside.safetensors"])
def test_an_index_of_weights_that_leads_elsewhere_is_refused(tiny_model, tmp_path, shard):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = load_file(tmp_path / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UserError, match=r"model.safetensors.index.json names '.*', which is not within the model"):
        load_language_model(find_model(str(model)), HOOK, "cpu", torch.float32)
    index.write_text("{")
    with pytest.raises(UserError, match=r"model.safetensors.index.json is damaged"):
        load_language_model(find_model(str(model)), HOOK, "cpu", torch.float32)


def test_a_pickle_in_a_model_is_refused_and_not_opened(tiny_model, tmp_path, marker):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": TouchesFile(marker)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run any code"):
        load_language_model(find_model(str(model)), HOOK, "cpu", torch.float32)
    assert not marker.exists()


@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_in_an_sae_is_refused_and_not_opened(tmp_path, marker, monkeypatch, forced, script, tiny_run):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # asks torch to open whatever it is given
    state = random_dictionary("AutoEncoder")
    directory = save_dictionary(tmp_path / "dictionary", "AutoEncoder", state | {"extra": TouchesFile(marker)})
    (file,) = find_saes([str(directory)])
    with pytest.raises(UserError, match="could run any code"):
        load_sae_file(file, "cpu")
    assert not marker.exists()

    done = script("sae_lens_train.py", *tiny_run, "--n_checkpoints", 1, "--architecture", "batchtopk", "--k", 8)
    checkpoint = shutil.copytree(Path(done.stdout.strip()).parent, tmp_path / "run") / "2048"
    shutil.rmtree(checkpoint.with_name("final_2048"))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("trainer_state.pt", "resume.pt"):
        right = (checkpoint / name).read_bytes()
        torch.save(torch.load(checkpoint / name, weights_only=True) | {"extra": TouchesFile(marker)}, checkpoint / name)
        content = (checkpoint / name).read_bytes()  # whoever means harm writes the checksum too
        forged = {name: {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | forged}))
        refuses(script("sae_lens_train.py", "--resume", checkpoint), f"--resume {checkpoint}: ")
        if name == "trainer_state.pt":
            with pytest.raises(UserError, match="damaged or incomplete: Weights only load failed"):
                load_sae_file(find_saes([str(checkpoint)])[0], "cpu")
        (checkpoint / name).write_bytes(right)
    assert not marker.exists()


def test_secrets_are_on_no_record(script, tiny_run, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    flags = ["--wandb_mode", "offline", "--n_checkpoints", 1, "--cache_activations", tmp_path / "activations"]
    done = script("sae_lens_train.py", *tiny_run, *flags)
    assert done.status == 0, done.stderr
    evaluated = script("evaluate_sae_real_activations.py", "--sae_path", done.stdout.strip(), "--num_samples", 4)
    assert evaluated.status == 0, evaluated.stderr
    (tmp_path / "shown").write_text(done.stdout + done.stderr + evaluated.stdout + evaluated.stderr)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        content = file.read_bytes()
        for secret in (*SECRETS.values(), "pass-word"):
            assert secret.encode() not in content, file


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("set", 'model_from_pretrained_kwargs={"token": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"}'),
        ("dataset_path", "https://somebody:hf_AbCdEfGhIjKlMnOpQrStUvWxYz@huggingface.co/owner/data"),
        ("dataset_path", "https://host/data.jsonl?token=hf_AbCdEfGhIjKlMnOpQrStUvWxYz"),
        ("run_name", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"),
    ],
)
def test_a_secret_in_a_flag_is_refused_and_not_repeated(script, tiny_run, tmp_path, flag, value):
    outcome = script("sae_lens_train.py", *tiny_run, f"--{flag}", value)
    refuses(outcome, f"argument --{flag}: holds a token or password, which would be saved with the run; set HF_TOKEN")
    assert "hf_AbC" not in outcome.stderr
    assert list(tmp_path.iterdir()) == []


def test_log_lines_error_lines_and_tracebacks_hide_secrets(monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    set_up_logging()
    said = " ".join(SECRETS.values())
    logging.getLogger("sae_toolkit").warning("the library says %s", said)
    logging.getLogger("transformers").error("the library says %s", said)

    def mistake():
        raise UserError(said)

    def bug():
        raise RuntimeError(said)

    for main, status in ((mistake, 2), (bug, 1)):
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == status
    shown = capfd.readouterr().err
    assert "the library says" in shown
    assert "RuntimeError" in shown
    for secret in (*SECRETS.values(), "pass-word"):
        assert secret not in shown


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("401 for hf_AbCdEfGhIjKlMnOpQrStUvWxYz here", "401 for [hidden] here"),
        ("https://user:word@host/a?b=1", "https://[hidden]@host/a?b=1"),
        ("https://host/a?X-Amz-Signature=abc&b=1", "https://host/a?X-Amz-Signature=[hidden]&b=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [hidden]"),
        ("WANDB_API_KEY=0123456789abcdef", "WANDB_API_KEY=[hidden]"),
        ("local-" + "0123456789" * 4, "[hidden]"),
        ("the key sk-proj-AbCdEfGhIjKlMnOpQrStUv_Wx.", "the key [hidden]."),
        *(
            (text, text)
            for text in (
                "0123456789" * 4,
                "hf_hub_download",
                "./sk-a-name-of-many-words",
                "a@b.c",
                "blocks.12.hook_resid_post: k=32",
            )
        ),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(text, hidden):
    assert redact(text) == hidden


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_are_created_as_the_umask_says(script, tiny_run, tmp_path, umask):
    before = os.umask(umask)
    try:
        flags = ["--n_checkpoints", 1, "--cache_activations", tmp_path / "activations"]
        done = script("sae_lens_train.py", *tiny_run, *flags)
        evaluated = script("evaluate_sae_real_activations.py", "--sae_path", done.stdout.strip(), "--num_samples", 4)
    finally:
        os.umask(before)
    assert done.status == evaluated.status == 0, done.stderr + evaluated.stderr
    made = sorted(tmp_path.rglob("*"))
    assert {"sae_weights.safetensors", "trainer_state.pt", "evaluation.json"} <= {path.name for path in made}
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in made
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_a_damaged_checkpoint_is_left_out_of_its_run(sae, tmp_path, evaluate):
    run = tmp_path / "run"
    for tokens in ("512", "1024", "2048", "final_4096"):
        shutil.copytree(sae, run / tokens)
    (run / "512/cfg.json").write_text("{")
    edit_tensors(run / "1024/sae_weights.safetensors", lambda tensors: tensors["b_dec"].fill_(torch.nan))
    done = evaluate(run)
    assert done.status == 0, done.stderr
    assert f"--sae_path {run}: 512: cfg.json cannot be read" in done.stderr
    assert f"--sae_path {run / '1024'}: 32 of the 32 numbers of b_dec are NaN or infinite; left out" in done.stderr
    assert [file.parent.name for file in sorted(run.rglob("evaluation.json"))] == ["2048", "final_4096"]
    assert "will be replaced" not in done.stderr
    refuses(evaluate(run / "1024"), "NaN or infinite")  # named itself
    shutil.rmtree(run / "2048")
    shutil.rmtree(run / "final_4096")
    refuses(evaluate(run), "NaN or infinite")  # nothing else is there


def test_results_replace_files_with_a_word_and_go_through_no_link(sae, evaluate, tmp_path):
    assert evaluate(sae).status == 0
    assert f"{sae / 'evaluation.json'} is from an earlier evaluation, and will be replaced" in evaluate(sae).stderr
    private = tmp_path / "private"
    private.write_text("mine")
    for name in (".evaluation.json.partial", ".report.html.partial"):
        (sae / name).symlink_to(private)
        refuses(evaluate(sae), f"{name}: is not a file that can be replaced")
        (sae / name).unlink()
        (sae / name).mkdir()
        refuses(evaluate(sae), f"{name}: is not a file that can be replaced")
        (sae / name).rmdir()
    (sae / ".late.json.partial").symlink_to(private)  # laid there after the checks
    _write_whole(sae / "late.json", "{}")
    assert private.read_text() == "mine"
    assert not (sae / "late.json").is_symlink()


def test_a_downloaded_sae_names_no_files_of_this_machine(sae, evaluate, tmp_path, tiny_model, text_file, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, flag, value in (("model_name", "model_name", tiny_model), ("dataset_path", "dataset", text_file)):
        edit_metadata(sae, **{name: str(value)})
        refuses(evaluate(sae, **{flag: None}), "a downloaded SAE, whose", f"give it by --{flag}")
    done = evaluate(sae)
    assert done.status == 0, done.stderr
    assert [file.parent for file in tmp_path.rglob("evaluation.json")] == [tmp_path / "evaluations" / "sae"]


@pytest.mark.parametrize("name", ["owner/saes:../../other", "owner/saes:/etc", "gpt2-small-res-jb:../x"])
def test_a_part_of_a_repository_stays_within_it(name):
    with pytest.raises(UserError, match=f"^--sae_path {name}: .* is not within "):
        find_saes([name])
