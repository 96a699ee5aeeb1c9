"""--probing: probes on the k best features of each SAE, beside probes on the activations themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.evaluation.probing.activations import last_activations
from sae_toolkit.evaluation.probing.embedded_tasks import embedded_tasks
from sae_toolkit.evaluation.probing.features import feature_columns, rank_features
from sae_toolkit.evaluation.probing.probe import METRICS, fit_probe, resampled_weights, scores, with_intervals
from sae_toolkit.evaluation.probing.split import split
from sae_toolkit.evaluation.probing.tasks import Task, read_task
from sae_toolkit.evaluation.shown import Measured
from sae_toolkit.files.embedded import EMBEDDED_TASKS
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.evaluation import MeasurementSettings
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.token_ids import TokenIds

log = logging.getLogger(__name__)

# Those of sae-probes up to 128. Its 256 and 512 are a good part of all features of a small SAE.
KS = (1, 2, 4, 8, 16, 32, 64, 128)

_LEAST_FOUND = 25  # texts of each class in each half that have a position that the SAEs are measured at

_Draws = dict[str, np.ndarray]  # the scores [R] of each metric in R draws of the bootstrap


@dataclass(frozen=True)
class _Activations:
    """The activations of a task at the hook, and the draws of the bootstrap over its test examples."""

    task: Task
    X_train_ND: torch.Tensor
    y_train_N: np.ndarray
    X_test_MD: torch.Tensor
    y_test_M: np.ndarray
    weight_RM: np.ndarray
    n_trained_on: int  # test examples whose text is among those of the training too
    seed: int

    def scored(self, X_train: np.ndarray, X_test: np.ndarray, penalty: Any) -> tuple[dict[str, float], _Draws]:
        """Returns the scores of a probe on some columns, and the scores in each draw."""
        probability_M = fit_probe(X_train, self.y_train_N, X_test, penalty=penalty, seed=self.seed)
        values = {name: float(value) for name, (value,) in scores(self.y_test_M, probability_M).items()}
        return values, scores(self.y_test_M, probability_M, self.weight_RM)


def read_tasks(settings: MeasurementSettings, groups: Sequence[PreparedEvaluation]) -> list[Task]:
    """Returns the tasks that --probing names, after checking that the models can read them.

    Raises:
        UserError: a task cannot be read or is none, two have the same name, or a model has no tokenizer.
    """
    for group in groups:
        if isinstance(group.tokenizer, TokenIds):
            raise UserError(f"--probing: the model {group.model.name} has no tokenizer, which texts need; leave it out")
    tasks: list[Task] = []
    for name in settings.probing:
        if name == EMBEDDED_TASKS:
            tasks += embedded_tasks()
        elif name.startswith("embedded:"):
            raise UserError(f"--probing {name}: the only embedded tasks are {EMBEDDED_TASKS}")
        else:
            task = read_task(
                name,
                text_column=settings.probing_text_column,
                label_column=settings.probing_label_column,
                most_examples=settings.probing_examples,
                keep_repeated=settings.probing_keep_repeated,
            )
            tasks.append(task)
    names = [task.name for task in tasks]
    if again := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--probing: two tasks are called {again[0]}; leave one out, or rename its file")
    return tasks


def measure_probing(
    tasks: Sequence[Task], group: PreparedEvaluation, model: LanguageModel, batch_size: int
) -> list[Measured]:
    """Probes SAEs at one hook on all tasks.

    Args:
        tasks: tasks with different names.
        group: the SAEs, and the positions that they are measured at.
        model: language model, hooked where the SAEs are.
        batch_size: number of contexts that one forward pass has as many tokens as.

    Returns:
        For each SAE, the scores of each task and their mean over the tasks: those of the probes on the activations
        (`baseline`) and those on the `k` best features (`sae`). A task also has its best features, the best one first.

    Raises:
        UserError: too few texts of a task have a position that the SAEs are measured at, or the memory does not
            suffice.
    """
    seed = group.seed % 2**32  # numpy and scikit-learn take no larger one
    halves = [split(task, seed=seed) for task in tasks]
    n_examples = [len(train) + len(test) for train, test in halves]
    of_saes: list[list[dict[str, Any]]] = [[] for _ in group.saes]
    draws_of_saes: list[list[dict[str, _Draws]]] = [[] for _ in group.saes]
    doing = f"--batch_size {batch_size}: probing {len(group.saes)} SAEs on {group.device}"
    with (
        out_of_memory_answered(doing, "lower --batch_size, or name fewer SAEs"),
        Progress("probing", sum(n_examples) * (1 + len(group.saes)), unit="examples") as progress,
    ):
        for number, (task, half, n) in enumerate(zip(tasks, halves, n_examples, strict=True)):
            activations = _activations(task, half, group, model, batch_size, seed, number, progress)
            train, test = activations.X_train_ND.numpy(), activations.X_test_MD.numpy()
            baseline, baseline_draws = activations.scored(train, test, "l2")
            for i, evaluated in enumerate(group.saes):
                of_k, draws_of_k, features = _probe_sae(evaluated.file.name, evaluated.sae, group.device, activations)
                measured = {
                    **_described(activations),
                    "baseline": with_intervals(baseline, baseline_draws),
                    "sae": of_k,
                    "features": features,
                }
                of_saes[i].append(measured)
                draws_of_saes[i].append({"baseline": baseline_draws, **draws_of_k})
                progress.advance(n)
    both = zip(of_saes, draws_of_saes, strict=True)
    return [Measured({"tasks": of_tasks, "mean": _mean(of_tasks, draws)}) for of_tasks, draws in both]


def _activations(
    task: Task,
    half: tuple[np.ndarray, np.ndarray],
    group: PreparedEvaluation,
    model: LanguageModel,
    batch_size: int,
    seed: int,
    number: int,
    progress: Progress,
) -> _Activations:
    both = np.concatenate(half)
    acts_ND, is_found_N = last_activations(
        group, model, [task.texts[n] for n in both], batch_size=batch_size, progress=progress
    )
    train = np.flatnonzero(is_found_N[: len(half[0])])
    test = np.flatnonzero(is_found_N[len(half[0]) :]) + len(half[0])
    y_N = task.y_N[both]
    n_least = min(np.bincount(y_N[of_half], minlength=2).min() for of_half in (train, test))
    if n_left_out := int((~is_found_N).sum()):
        log.warning("--probing: %s: %d texts have no position that all SAEs are measured at", task.name, n_left_out)
    if n_least < _LEAST_FOUND:
        raise UserError(
            f"--probing: {task.name}: only {n_least} training or test texts of a class have a position that all SAEs"
            " are measured at; use longer texts, or other SAEs"
        )
    texts = [task.texts[n] for n in both]
    in_training = {texts[n] for n in train}
    return _Activations(
        task=task,
        X_train_ND=acts_ND[train],
        y_train_N=y_N[train],
        X_test_MD=acts_ND[test],
        y_test_M=y_N[test],
        weight_RM=resampled_weights(len(test), _units(task, both[test]), seed=seed + number),
        n_trained_on=sum(texts[n] in in_training for n in test),
        seed=seed,
    )


def _units(task: Task, numbers_M: np.ndarray) -> np.ndarray:
    """Returns the number of the unit that each text belongs to: its document, or the text where it occurs again."""
    if task.document_N is not None:
        return task.document_N[numbers_M]
    first: dict[str, int] = {}
    return np.array([first.setdefault(task.texts[n], place) for place, n in enumerate(numbers_M)])


def _probe_sae(
    name: str, sae: SAE[Any], device: str, activations: _Activations
) -> tuple[list[dict[str, Any]], dict[str, _Draws], list[int]]:
    """Returns the scores for each k, those in each draw, and the best features."""
    sae.to(device)
    features_K = rank_features(sae, activations.X_train_ND, activations.y_train_N)[: KS[-1]]
    train_NK, test_MK = (feature_columns(sae, X, features_K) for X in (activations.X_train_ND, activations.X_test_MD))
    sae.to("cpu")
    if not train_NK.any():
        log.warning("--probing: %s: no feature of %s fires at the last tokens", activations.task.name, name)
    of_k, draws_of_k = [], {}
    for k in KS:
        if k <= sae.cfg.d_sae:
            values, draws = activations.scored(train_NK[:, :k], test_MK[:, :k], "l1")
            of_k.append({"k": k, **with_intervals(values, draws)})
            draws_of_k[str(k)] = draws
    return of_k, draws_of_k, features_K.tolist()


def _described(activations: _Activations) -> dict[str, Any]:
    task = activations.task
    described = {
        "task": task.name,
        "source": task.source,
        "classes": list(task.classes),
        "n_train": len(activations.y_train_N),
        "n_test": len(activations.y_test_M),
        "n_test_trained_on": activations.n_trained_on,
    }
    if task.document_N is not None:
        described["n_documents"] = len(np.unique(task.document_N))
    return described


def _mean(of_tasks: Sequence[Mapping[str, Any]], draws: Sequence[Mapping[str, _Draws]]) -> dict[str, Any]:
    """Returns the mean scores over tasks, with intervals that say how they depend on the test examples."""

    def mean(of_each: Sequence[Mapping[str, Any]], draws_of_each: Sequence[_Draws]) -> dict[str, Any]:
        values = {name: float(np.mean([each[name] for each in of_each])) for name in METRICS}
        return with_intervals(values, {name: np.mean([d[name] for d in draws_of_each], axis=0) for name in METRICS})

    n_ks = len(of_tasks[0]["sae"])
    return {
        "baseline": mean([each["baseline"] for each in of_tasks], [d["baseline"] for d in draws]),
        "sae": [
            {"k": k, **mean([each["sae"][i] for each in of_tasks], [d[str(k)] for d in draws])}
            for i, k in enumerate(KS[:n_ks])
        ],
    }
