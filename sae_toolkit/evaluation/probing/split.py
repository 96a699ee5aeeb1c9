"""Divides a task into texts to train probes on, and texts to test them on, as sae-probes does."""

from __future__ import annotations

import math

import numpy as np

from sae_toolkit.evaluation.probing.tasks import Task

_MOST_TRAINING, _LEAST_TEST = 1024, 100


def split(task: Task, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the texts to train on and of those to test on, in random order.

    Both halves have as many texts of one class as of the other. Texts that stand for themselves are drawn as
    sae-probes 0.4.2 draws them in its `normal` setting (sae_probes/utils_data.py, `get_train_test_indices`): all but
    100 texts, and 1,024 at most, to train on, and all but one of the rest to test on. Where class 1 is the rarer, it
    can have one text less for the test than sae-probes asks for. With documents, half of the documents are for training
    and the others for the test.
    """
    random = np.random.RandomState(seed)
    if task.document_N is not None:
        is_test_N = _test_documents(task.y_N, task.document_N, random)
        train = _balanced(task.y_N, ~is_test_N, random)[:_MOST_TRAINING]
        return train, _balanced(task.y_N, is_test_N, random)
    of_class = [np.flatnonzero(task.y_N == label) for label in (0, 1)]
    n = min(len(task.y_N), 2 * min(map(len, of_class)) + 1)
    n_train = min(n - _LEAST_TEST, _MOST_TRAINING)
    n_test = n - n_train - 1
    drawn: list[np.ndarray] = []
    for size, label in ((math.ceil(n_train / 2), 1), (n_train // 2, 0)):
        drawn.append(random.choice(of_class[label], size=size, replace=False))
    left: list[np.ndarray] = []
    for size, label, taken in ((math.ceil(n_test / 2), 1, drawn[0]), (n_test // 2, 0, drawn[1])):
        rest = np.setdiff1d(of_class[label], taken)
        left.append(random.choice(rest, size=min(size, len(rest)), replace=False))
    return random.permutation(np.concatenate(drawn)), random.permutation(np.concatenate(left))


def _test_documents(y_N: np.ndarray, document_N: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Returns [N] booleans, True at the texts of documents for the test.

    Each document goes to the half that has fewer texts of the document's more frequent class, so that both classes are
    in both halves.
    """
    n_of = np.zeros((2, 2), dtype=np.int64)  # texts of each half and class
    is_test_N = np.zeros(len(y_N), dtype=bool)
    for document in random.permutation(np.unique(document_N)):
        in_document_N = document_N == document
        counts = np.bincount(y_N[in_document_N], minlength=2)
        label = int(counts.argmax())
        half = int(n_of[1, label] < n_of[0, label])
        n_of[half] += counts
        is_test_N[in_document_N] = bool(half)
    return is_test_N


def _balanced(y_N: np.ndarray, in_half_N: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Returns the numbers of texts of a half in random order, as many of one class as of the other, by turns."""
    of_class = [random.permutation(np.flatnonzero(in_half_N & (y_N == label))) for label in (0, 1)]
    n = min(map(len, of_class))
    pairs = np.stack([numbers[:n] for numbers in of_class], axis=1)
    return np.concatenate([random.permutation(pair) for pair in pairs])
