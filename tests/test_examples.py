"""The examples for clusters are well-formed, and start what there is with flags that exist."""

import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.command_line import parse_training_flags
from support.processes import ROOT

EXAMPLES = ROOT / "examples"


def test_the_slurm_script_passes_bash_and_shellcheck():
    script = EXAMPLES / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", script], check=True)


def test_the_kubernetes_manifest_fits_its_schema():
    for document in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()):
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_a_misspelt_field_would_not_fit():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    job["spec"]["complitions"] = job["spec"].pop("completions")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)
    assert service["kind"] == "Service"


def test_what_the_examples_start_is_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    launcher, n_gpus, ids, *flags = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert Path(launcher).is_file() and len(ids.split(",")) == int(n_gpus)
    check_world_size(parse_training_flags(flags), 2 * int(n_gpus))
    (usage,) = [line for line in (EXAMPLES / "slurm.sh").read_text().splitlines() if "sbatch examples/slurm.sh" in line]
    check_world_size(parse_training_flags(shlex.split(usage)[3:]), 2 * 8)
