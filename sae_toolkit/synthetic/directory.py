"""Finds a synthetic model by name: one of those that are made here, a directory, or a repository on the Hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from sae_lens.synthetic import (
    FeatureDictionary,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.synthetic_model import (
    SYNTHETIC_MODEL_CONFIG_FILENAME,
    SYNTHETIC_MODEL_HIERARCHY_FILENAME,
    SYNTHETIC_MODEL_WEIGHTS_FILENAME,
)

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.assets import assets
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.hub import check_repository
from sae_toolkit.files.whole_directory import NotSaved, check_manifest, whole_directory
from sae_toolkit.synthetic.orthogonal import orthogonalize

PREFIX = "synthetic:"

_16K = SyntheticModelConfig(
    num_features=16_384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        mutually_exclusive_min_depth=0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
assert _16K.hierarchy is not None

# The first is SynthSAEBench's, by the configuration in SAELens's documentation (arXiv 2602.14687). The other is for a
# CPU: a quarter of its features in a third of its dimensions, with a flatter hierarchy, so that about as many are
# active.
MADE_HERE = {
    "synth-sae-bench-16k": _16K,
    "small": replace(
        _16K,
        num_features=4096,
        hidden_dim=256,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.4, max_prob=0.4, min_prob=5e-4),
        hierarchy=replace(_16K.hierarchy, max_depth=2),
        orthogonalization=OrthogonalizationConfig(num_steps=20, lr=1.5e-3),
    ),
}


def is_synthetic(name: str | None) -> bool:
    """Returns whether a name of a model or a text is that of a synthetic model."""
    return name is not None and name.startswith(PREFIX)


def synthetic_directory(name: str, flag: str) -> Path:
    """Returns the directory of a synthetic model. One of `MADE_HERE` is made when it is first asked for.

    Args:
        name: `synthetic:` and a name of `MADE_HERE`, a directory that SAELens's `SyntheticModel.save` wrote, or the id
            of a repository on the Hub that holds one.
        flag: the flag that named it, for messages.

    Raises:
        UserError: there is no such model, it cannot be downloaded, or it cannot be kept.
    """
    wanted = name.removeprefix(PREFIX)
    if wanted in MADE_HERE:
        return _made_here(wanted, f"{flag} {name}")
    if (directory := Path(wanted)).is_dir():
        if missing := [file for file in _FILES if not (directory / file).is_file()]:
            raise UserError(
                f"{flag} {name}: the directory has no {missing[0]}; give one that SyntheticModel.save wrote"
            )
        return directory
    if "/" not in wanted:
        raise UserError(f"{flag} {name}: made here are {', '.join(MADE_HERE)}; name one, a directory or a repository")
    repository = check_repository(wanted, "model", flag)
    patterns = [*_FILES, SYNTHETIC_MODEL_HIERARCHY_FILENAME]
    where = f"{flag} {name}"
    downloaded = Path(retrying(where, lambda: snapshot_download(repository, allow_patterns=patterns)))
    if missing := [file for file in _FILES if not (downloaded / file).is_file()]:
        raise UserError(f"{where}: the repository has no {missing[0]}; name that of a synthetic model of SAELens")
    return downloaded


_FILES = (SYNTHETIC_MODEL_CONFIG_FILENAME, SYNTHETIC_MODEL_WEIGHTS_FILENAME)


def _made_here(name: str, where: str) -> Path:
    cfg = MADE_HERE[name]
    digest = hashlib.sha256(json.dumps(cfg.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    directory = assets("synthetic", "models", f"{name}-{digest}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if directory.exists():
                check_manifest(directory, where)
                return directory
            with whole_directory(directory) as partial:
                make_model(cfg).save(partial)
    except (NotSaved, OSError) as error:
        raise UserError(f"{where}: cannot be kept in {directory.parent} ({one_line(error)}); set HF_HOME") from error
    return directory


def make_model(cfg: SyntheticModelConfig) -> SyntheticModel:
    """Makes the synthetic model that SAELens makes by a configuration with orthogonalization, and sooner."""
    steps = cfg.orthogonalization
    assert steps is not None

    def orthogonal(made: FeatureDictionary) -> None:
        made.feature_vectors.data = orthogonalize(made.feature_vectors, steps.num_steps, steps.lr)

    features = FeatureDictionary(cfg.num_features, cfg.hidden_dim, bias=cfg.bias, initializer=orthogonal, seed=cfg.seed)
    return SyntheticModel(cfg, feature_dict=features)
