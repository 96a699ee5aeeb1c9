"""Every class of language model that Transformers builds: each hook works and agrees, or is refused in one line.

The whole matrix takes ten minutes (`./run_tests.sh --models`) and writes docs/models.md.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from models.all_classes import classes
from models.page import failures, page
from models.trial import small_tokenizer, try_class
from support.processes import ROOT

PAGE = ROOT / "docs/models.md"
LEAST_TRIED = 150  # classes; Transformers does not build or run the others at a small size


@pytest.mark.models
def test_no_class_ends_in_a_traceback_or_differs_from_transformer_lens(text_file, tmp_path):
    out = tmp_path / "results.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests/models/all_classes.py"), str(out), str(text_file)]
    subprocess.run(command, env=environment, check=True)
    results = json.loads(out.read_text())
    assert not failures(results)
    assert sum(result["not_tried"] is None for result in results) >= LEAST_TRIED
    PAGE.write_text(page(results))


@pytest.mark.parametrize(
    ("config", "n_refused"),
    [
        ("GPTNeoConfig", 0),  # its width inside the MLP is None, which stands for four times the hidden states'
        ("BartConfig", 5),  # its base model does not say which its embeddings are
        ("DeepseekV4Config", 5),  # its residual stream has an axis more
    ],
)
def test_all_hooks_of_a_class_work_and_agree_or_are_refused(text_file, config, n_refused):
    trial = try_class(config, classes()[config], small_tokenizer(text_file), text_file).to_dict()
    assert trial["not_tried"] is None
    assert not failures([trial])
    (row,) = trial["rows"]
    assert sum(cell["refused"] is not None for cell in row["cells"].values()) == n_refused
    for cell in row["cells"].values():
        assert cell["refused"] or (cell["trains"] == cell["evaluates"] == cell["opens"] == "yes")


def test_the_page_names_all_classes_of_the_installed_transformers():
    text = PAGE.read_text()
    if f"Transformers {version('transformers')}," not in text:
        pytest.skip("the page is of another version of Transformers")
    named = {line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| \w+Config \|", line)}
    assert named == classes().keys()
