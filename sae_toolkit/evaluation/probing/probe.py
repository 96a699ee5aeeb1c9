"""Logistic regression on activations, as sae-probes trains it, and its scores on test examples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

METRICS = ("test_auc", "test_acc", "test_f1")
_REGULARIZATION = np.logspace(5, -5, 10)  # the values of C that are tried
_FOLDED_BELOW, _FOLDS = 128, 6
_VALIDATION_SHARE, _MOST_VALIDATION = 0.2, 100


def fit_probe(
    X_train: np.ndarray, y_train: np.ndarray, X_test: np.ndarray, *, penalty: Literal["l1", "l2"], seed: int
) -> np.ndarray:
    """Returns the probability of class 1 that a probe gives each test example.

    The probe is scikit-learn's logistic regression with the settings of sae-probes 0.4.2
    (sae_probes/utils_training.py, `find_best_reg`). C is the one of ten values from 1e5 to 1e-5 whose AUC is best on
    the last 20% of the training examples, 100 at most, or in six folds if there are fewer than 128 examples. The solver
    stops after 1,000 passes, whether or not it has converged.

    Args:
        X_train: [N, K] training examples, in random order.
        y_train: [N] their classes, 0 or 1.
        X_test: [M, K] test examples.
        penalty: regularization.
        seed: seed of the folds, the solver and the order of the training examples.
    """
    # They take a second to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    X_train, X_test = X_train.astype(np.float64), X_test.astype(np.float64)  # as scikit-learn does to tensors of torch
    kind: dict[str, Any] = {"l1_ratio": 1.0, "solver": "saga"} if penalty == "l1" else {}

    def fitted(C: float, X: np.ndarray, y: np.ndarray) -> Any:
        return LogisticRegression(C=C, random_state=seed, max_iter=1000, **kind).fit(X, y)

    n = len(X_train)
    if n < _FOLDED_BELOW:
        folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(X_train, y_train))
    else:
        n_fitted = n - min(int(_VALIDATION_SHARE * n), _MOST_VALIDATION)
        folds = [(np.arange(n_fitted), np.arange(n_fitted, n))]

    def auc(C: float, rest: np.ndarray, held: np.ndarray) -> float:
        probability = fitted(C, X_train[rest], y_train[rest]).predict_proba(X_train[held])[:, 1]
        return float(roc_auc_score(y_train[held], probability))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        aucs = [np.mean([auc(C, rest, held) for rest, held in folds]) for C in _REGULARIZATION]
        order = np.random.RandomState(seed).permutation(n)
        probe = fitted(_REGULARIZATION[int(np.argmax(aucs))], X_train[order], y_train[order])
    return probe.predict_proba(X_test)[:, 1]


def scores(y_M: np.ndarray, probability_M: np.ndarray, weight_RM: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns the scores of a probe, each [R], with the names of sae-probes.

    `test_auc` is the area under the ROC curve, `test_acc` the share of correct answers, and `test_f1` the mean of the
    F1 scores of the two classes, weighted by their examples. All are in [0, 1]. The AUC is NaN where a class has no
    weight.

    Args:
        y_M: classes of the test examples, 0 or 1.
        probability_M: the probability of class 1 that the probe gives them.
        weight_RM: R weights of each example, 0 or more; None for a weight of 1, with R = 1.
    """
    weight_RM = np.ones((1, len(y_M))) if weight_RM is None else weight_RM
    order = np.argsort(probability_M, kind="stable")
    _, starts = np.unique(probability_M[order], return_index=True)  # examples with the same probability are a group
    positive_RG = np.add.reduceat(weight_RM[:, order] * y_M[order], starts, axis=1)
    negative_RG = np.add.reduceat(weight_RM[:, order] * (1 - y_M[order]), starts, axis=1)
    n_positive_R, n_negative_R = positive_RG.sum(1), negative_RG.sum(1)
    below_RG = negative_RG.cumsum(1) - negative_RG / 2  # of equals, half are counted as below
    says_positive = probability_M > 0.5
    right_R = {label: weight_RM @ ((y_M == label) & (says_positive == label)) for label in (0, 1)}
    n_R = {0: n_negative_R, 1: n_positive_R}
    total_R = n_positive_R + n_negative_R
    said_R = {1: weight_RM @ says_positive, 0: weight_RM @ ~says_positive}
    with np.errstate(invalid="ignore", divide="ignore"):
        auc_R = (positive_RG * below_RG).sum(1) / (n_positive_R * n_negative_R)
        f1_R = sum(n_R[label] * 2 * right_R[label] / (said_R[label] + n_R[label]) for label in (0, 1)) / total_R
        return {"test_auc": auc_R, "test_acc": (right_R[0] + right_R[1]) / total_R, "test_f1": np.asarray(f1_R)}


def resampled_weights(n: int, unit_M: np.ndarray | None, *, seed: int, resamples: int = 1000) -> np.ndarray:
    """Returns weights [resamples, n] of a bootstrap that draws whole units with replacement, as many as there are.

    Args:
        n: number of examples.
        unit_M: the unit that each example belongs to; None if each is a unit of its own.
        seed: seed of the draws.
        resamples: number of draws.
    """
    unit_M = np.arange(n) if unit_M is None else np.unique(unit_M, return_inverse=True)[1]
    n_units = int(unit_M.max()) + 1
    drawn = torch.randint(n_units, (resamples, n_units), generator=torch.Generator().manual_seed(seed))
    weight_RU = torch.zeros(resamples, n_units, dtype=torch.double)
    weight_RU.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
    return weight_RU.numpy()[:, unit_M]


def interval(draws_R: np.ndarray) -> list[float]:
    """Returns the 95% interval [low, high] of a score over the draws of a bootstrap, without those that are NaN."""
    return np.nanquantile(draws_R, [0.025, 0.975]).tolist()


def with_intervals(values: Mapping[str, float], draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns scores and their intervals, as evaluation.json has them."""
    return {**values, "intervals": {name: interval(draws[name]) for name in values}}
