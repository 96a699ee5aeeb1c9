"""The commands that README.md and docs/ show are accepted, their links lead somewhere, and the README is short.

A command is a line in a ```bash block, a line after `$ ` in a ```console block, or a code span that starts with
`python` or `./run_`. Each one runs in a directory that has the files that the pages name: a run, SAEs, a model,
a text. Training commands run with --dry_run on a tiny model.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.inspection import parse_inspection_flags
from support.processes import ROOT, Outcome

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "BENCHMARKS.md", *sorted(ROOT.glob("docs/*.md"))]

# Commands of other programs, and why they are not run.
OTHER_PROGRAMS = {
    "source": "changes the shell that the reader types into",
    "pip": "installs packages; the files that it names are looked for",
    "pipx": "installs packages; the files that it names are looked for",
    "tensorboard": "serves pages until it is stopped",
    "ray": "starts a cluster",
}

# Commands whose words hold one of these are parsed and not run: they need the Hub, another environment, or minutes.
_NOT_HERE = re.compile(
    r"llama|HuggingFaceFW|EleutherAI|wikitext|--push_to_hub|--saebench|sparsify/|embedded:tasks|synthetic"
)

# What the pages write where the reader puts a value.
_PLACEHOLDERS = {
    "N": "2",
    "GPU_IDS": "0,1",
    "DIR": ".",
    "RUN": "checkpoints/demo_1a2b3c4d/k3j2h1g0",
    "MODEL": "my_model",
    "HOOK": "blocks.1.hook_mlp_out",
}

_SMALL_RUN = (
    "--context_size 32 --training_tokens 4096 --train_batch_size_tokens 32 --n_batches_in_buffer 16 --eval_every 0"
    " --lr_warm_up_steps 0 --lr_decay_steps 0 --device cpu --lm_dtype float32 --set n_batches_for_norm_estimate=1"
).split()


def commands_in(page: str) -> Iterator[str]:
    """Yields the commands of a page, continued lines joined and comments left out."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif language != "bash":
            continue
        yield from (line for line in lines if shlex.split(line, comments=True))
    yield from (" ".join(span.split()) for span in re.findall(r"`((?:python |\./run_)[^`]+)`", _without_blocks(page)))


def _without_blocks(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


COMMANDS = sorted({command for page in PAGES for command in commands_in(page.read_text())})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, text_file: Path) -> Path:
    """Directory with the files that the pages name; its model has 30 layers, as the embedded model, of width 32."""
    directory = tmp_path_factory.mktemp("workplace")
    for name in ("presets", "requirements", "constraints.txt", "examples"):
        (directory / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "my_model")
    tokenizer.save_pretrained(directory / "my_model")
    paragraphs = text_file.read_text().split("\n\n")
    chats = [[{"role": r, "content": f"{text} {r}"} for r in ("user", "assistant")] for text in paragraphs]
    (directory / "my_chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    labelled = [f"{json.dumps(text)},{i % 2}\n" for i, text in enumerate(paragraphs[:200])]
    (directory / "my_labels.csv").write_text("".join(["text,topic\n", *labelled]))
    (directory / "my_text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))

    flags = "@presets/demo.args --checkpoint_path runs --wandb_mode disabled --n_checkpoints 1".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["sae_lens_train.py", *flags, *_small_run([])])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / "sae_lens_train.py"), run_name="__main__")
    assert exit_info.value.code == 0
    (final,) = directory.glob("runs/*/*/final_*")
    shutil.copytree(final.parent, directory / "unfinished", ignore=shutil.ignore_patterns("final_*"))
    for other in ("checkpoints/demo_5e6f7a8b/z9y8x7w6/final_500224", "seed_43", "seed_44"):
        shutil.copytree(final, directory / other)
    (final.parent / "final_500224").symlink_to(final.name)
    _link(directory / "my_sae", final)
    _link(directory / "checkpoints/demo_1a2b3c4d/k3j2h1g0", final.parent)
    _link(directory / "sweeps/demo/trials/4e5f6a7b/demo_1a2b3c4d/k3j2h1g0", final.parent)
    return directory


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _small_run(words: list[str]) -> list[str]:
    """Flags that make a training command one of a second, on the model and text of the workplace."""
    own = {"--model_name": "my_model", "--dataset_path": "my_text.jsonl"}
    return [*_SMALL_RUN, *(part for flag, value in own.items() if flag not in words for part in (flag, value))]


def _check_training(words: list[str], script: Callable[..., Outcome]) -> None:
    if "--help" in words:
        assert script("sae_lens_train.py", *words).status == 0
    elif _NOT_HERE.search(" ".join(words)):
        parse_training_flags(words)
    else:
        of_a_run = {"--like", "--resume"} & set(words[:-1])
        done = script("sae_lens_train.py", *words, *([] if of_a_run else _small_run(words)), "--dry_run")
        assert done.status == 0, done.stderr


def _check_launcher(words: list[str], script: Callable[..., Outcome]) -> None:
    """./run_saelens_training.sh [PRESET] [flags of sae_lens_train.py]"""
    if not words or words[0].startswith("-"):
        words = ["demo", *words] if "--like" not in words else ["", *words]
    preset, *flags = words
    _check_training([*([f"@presets/{preset}.args"] if preset else []), *flags], script)


def _check_ranks(words: list[str], _: Callable[..., Outcome]) -> None:
    """./run_simple.sh NUM_GPUS GPU_IDS [flags of sae_lens_train.py]"""
    n_ranks, ids, *flags = words
    assert ids == "cpu" or len(ids.split(",")) == int(n_ranks)
    check_world_size(parse_training_flags(flags), int(n_ranks))


def _check_tests(words: list[str], _: Callable[..., Outcome]) -> None:
    """./run_tests.sh [--PART]"""
    assert all(f"\n{word})" in (ROOT / "run_tests.sh").read_text() for word in words)


def _check_evaluation(words: list[str], script: Callable[..., Outcome]) -> None:
    if _NOT_HERE.search(" ".join(words)):
        _check_parses("evaluate_sae_real_activations.py", words)
    else:
        less = ("--num_samples", 12, "--n_features", 2, "--no_diagnosis")
        done = script("evaluate_sae_real_activations.py", *words, *less)
        assert done.status == 0, done.stderr


def _check_inspection(words: list[str], script: Callable[..., Outcome]) -> None:
    if "--explain" in words:  # the models that are shown as judges are not here
        parse_inspection_flags("", words)
        return
    less: tuple[object, ...] = ("--new_tokens", 2) if "--steer" in words else ("--tokens", 500)
    if "--effects" in words:
        less += ("--effects", 1)
    done = script("inspect_sae_features.py", *words, *less)
    assert done.status == 0, done.stderr


def _check_many_runs(name: str) -> Callable[[list[str], Callable[..., Outcome]], None]:
    def check(words: list[str], script: Callable[..., Outcome]) -> None:
        done = script(name, *words, "--dry_run")
        assert done.status == 0, done.stderr
        assert done.stdout.startswith("1: ")

    return check


def _check_parses(name: str, words: list[str]) -> None:
    """Runs a script to the point where it has parsed its flags."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args: object, **kwargs: object) -> None:
        parse(*args, **kwargs)  # type: ignore[arg-type]
        sys.exit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [name, *words])
        patch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert exit_info.value.code == 0


def _check_module(words: list[str], _: Callable[..., Outcome]) -> None:
    """python -m MODULE > FILE"""
    module, *_redirection = words
    runpy.run_module(module, run_name="__main__")


RULES: dict[str, Callable[[list[str], Callable[..., Outcome]], None]] = {
    "./run_saelens_training.sh": _check_launcher,
    "./run_simple.sh": _check_ranks,
    "./run_tests.sh": _check_tests,
    "sae_lens_train.py": _check_training,
    "evaluate_sae_real_activations.py": _check_evaluation,
    "inspect_sae_features.py": _check_inspection,
    "sweep_saes.py": _check_many_runs("sweep_saes.py"),
    "compare_sae_libraries.py": _check_many_runs("compare_sae_libraries.py"),
    "docs/make_pictures.py": lambda words, _: _check_parses("docs/make_pictures.py", words),
    "-m": _check_module,
    # It takes a directory and seeds, and runs for hours.
    "tests/diagnosis/test_advice.py": lambda words, _: [int(seed) for seed in words[1:]],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_accepted(command, workplace, script, monkeypatch):
    monkeypatch.chdir(workplace)
    words = [_PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    while re.match(r"[A-Z_]+=", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    for flag, value in pairwise(words):
        if flag == "--resume":
            words[words.index(value)] = "unfinished"
        elif flag in ("--like", "--sae_path") and re.fullmatch(r"checkpoints/[\w/]+", value):
            run = workplace / value.split("/final_")[0]
            if not run.exists():
                _link(run, workplace / "checkpoints/demo_1a2b3c4d/k3j2h1g0")

    program = words.pop(0)
    if Path(program).name in OTHER_PROGRAMS:
        files = [word for flag, word in pairwise(words) if flag in ("-r", "-c")]
        assert all(Path(file).is_file() for file in files)
        return
    if program == "python":
        program = words.pop(0)
    if program.startswith("benchmarks/"):
        _check_parses(program, words)
    elif program in RULES:
        RULES[program](words, script)
    else:
        pytest.fail(f"no rule says how to check {command!r}: add one to RULES or OTHER_PROGRAMS")


def test_the_shown_python_loads_a_finished_sae(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/training.md").read_text(), re.DOTALL | re.MULTILINE)
    names = {"activations": torch.randn(3, 32)}
    exec(code, names)
    assert names["features"].shape == (3, 128)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _without_blocks(page.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        n = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor) is not None for anchor in anchors)
        anchors.add(f"{slug}-{n}" if n else slug)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", _without_blocks(page.read_text()))
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_tree_of_the_code_is_that_of_the_package():
    (block,) = re.findall(r"^```text\n(.*?)^```", (ROOT / "docs/code.md").read_text(), re.DOTALL | re.MULTILINE)
    shown: set[Path] = set()
    folders: list[str] = []
    for line in block[block.index("sae_toolkit/\n") :].split("\n\n")[0].splitlines()[1:]:
        branches, names = re.match(r"([│├└─ ]+)((?:[\w.]+/?(?:, )?)+)", line).groups()
        folders = folders[: len(branches) // 4 - 1]
        if names.endswith("/"):
            folders.append(names.rstrip("/"))
        else:
            shown |= {Path("sae_toolkit", *folders, name) for name in names.split(", ")}
    files = {path for kind in ("py", "html") for path in (ROOT / "sae_toolkit").rglob(f"*.{kind}")}
    assert shown == {path.relative_to(ROOT) for path in files if path.name != "__init__.py"}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("picture", ["report.png", "training.png"])
def test_pictures_are_small(picture):
    assert (ROOT / "docs" / picture).stat().st_size < 300_000
