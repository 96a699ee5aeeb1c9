"""features.html: a page of all features, which opens without a network or a server and loads its data as needed.

The page is made from features.parquet. Its data are scripts in the directory features_data, since a page that is opened
as a file may load scripts and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_toolkit.evaluation.decoder_cosines import NEAR_DUPLICATE
from sae_toolkit.evaluation.feature_browser import decode_tokens
from sae_toolkit.inspection.features_file import read_description
from sae_toolkit.terminal.progress import Progress

FILENAME, DATA = "features.html", "features_data"
DENSE_ABOVE = 0.1  # firing rate of a feature that is called dense
EXAMPLES_OF_A_KIND = 10  # on the page; features.parquet has all
_FEATURES_OF_A_PART, _FEATURES_OF_WORDS = 128, 8192
_PEAKS, _SEARCHED_CONTEXTS = 8, 3
_COLUMNS = ("rate", "max", "cosine", "agreement", "again", "detection")
_LEVELS = 9  # of the colour behind a token


def write_page(features_file: Path, tokenizer: Any, explanations_file: Path | None = None) -> Path:
    """Writes features.html and its data beside a features.parquet, and replaces earlier ones.

    Args:
        features_file: what `write_features` wrote.
        tokenizer: tokenizer of the language model, which gives the tokens' texts.
        explanations_file: what `write_explanations` wrote, to be shown too.

    Returns:
        The path of the page.
    """
    directory = features_file.parent
    partial, data = directory / f"{DATA}.partial", directory / DATA
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write_data(features_file, tokenizer, explanations_file, partial)
        shutil.rmtree(data, ignore_errors=True)
        partial.rename(data)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    page = directory / FILENAME
    shutil.copyfile(Path(__file__).with_name(FILENAME), page)
    return page


def _write_data(features_file: Path, tokenizer: Any, explanations_file: Path | None, directory: Path) -> None:
    explained: dict[int, dict[str, Any]] = {}
    if explanations_file is not None:
        explained = {each["feature"]: each for each in pq.read_table(explanations_file).to_pylist()}
    about = read_description(features_file) | {
        "explained_by": read_description(explanations_file)["explain"] if explanations_file else None,
        "dense_above": DENSE_ABOVE,
        "twin_above": NEAR_DUPLICATE,
        "features_of_part": _FEATURES_OF_A_PART,
        "features_of_words": _FEATURES_OF_WORDS,
        "searched_contexts": _SEARCHED_CONTEXTS,
    }
    columns: dict[str, list[float | None]] = {name: [] for name in _COLUMNS}
    words: list[list[str]] = []
    n_words = 0
    with Progress(f"writing {FILENAME}", about["d_sae"], unit="features") as progress:
        for i, part in enumerate(_parts(features_file)):
            shown = _Part(part, tokenizer, explained)
            _write(directory, f"{i:04}", {"tokens": shown.tokens, "features": shown.features()})
            words += shown.words()
            for name, numbers in shown.columns().items():
                columns[name] += numbers
            while len(words) >= _FEATURES_OF_WORDS:
                _write(directory, f"words_{n_words:04}", words[:_FEATURES_OF_WORDS])
                del words[:_FEATURES_OF_WORDS]
                n_words += 1
            progress.advance(len(part))
        if words:
            _write(directory, f"words_{n_words:04}", words)
    _write(directory, "index", {"about": about, **columns})


def _parts(features_file: Path) -> Iterator[pa.RecordBatch]:
    """Yields features.parquet in batches of as many features as a part of the page has; the last may have fewer."""
    with pq.ParquetFile(features_file) as file:
        rest: pa.Table | None = None
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            table = table if rest is None else pa.concat_tables((rest, table))
            n = len(table) - len(table) % _FEATURES_OF_A_PART
            for start in range(0, n, _FEATURES_OF_A_PART):
                yield table.slice(start, _FEATURES_OF_A_PART).combine_chunks().to_batches()[0]
            rest = table.slice(n)
        if rest is not None and len(rest):
            yield rest.combine_chunks().to_batches()[0]


def _write(directory: Path, name: str, value: Any) -> None:
    packed = gzip.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), 6, mtime=0)
    (directory / f"{name}.js").write_text(f'part("{name}","{base64.b64encode(packed).decode()}")\n')


class _Part:
    """A part of the features as the page shows them."""

    def __init__(self, part: pa.RecordBatch, tokenizer: Any, explained: dict[int, dict[str, Any]]) -> None:
        self._columns = {name: part.column(name) for name in part.schema.names}
        self._explained = [explained.get(feature) for feature in self._columns["feature"].to_pylist()]
        examples = self._columns["examples"]
        # A batch that is cut out of a table may begin inside of its arrays, so that offsets do not begin at 0.
        self._first_F = np.asarray(examples.offsets) - examples.offsets[0].as_py()
        fields = examples.flatten()
        self._fields = {field.name: fields.field(field.name) for field in fields.type}
        ids = self._fields["token_ids"]
        self._start_N = np.asarray(ids.offsets) - ids.offsets[0].as_py()
        self._unique_V, self._token_of_T = np.unique(np.asarray(ids.flatten()), return_inverse=True)
        self.tokens = decode_tokens(tokenizer, self._unique_V.tolist())
        self._max_F = self._numbers("max_activation")
        feature_N = np.repeat(np.arange(len(part)), np.diff(self._first_F))
        feature_T = np.repeat(feature_N, np.diff(self._start_N))
        strength_T = np.abs(np.asarray(self._fields["activations"].flatten()))
        share_T = strength_T / np.maximum(self._max_F, 1e-30)[feature_T]
        level_T = np.where(strength_T > 0, np.clip(np.ceil(share_T * _LEVELS), 1, _LEVELS), 0)
        self._levels = (level_T + ord("0")).astype(np.uint8).tobytes().decode("ascii")
        self._is_drawn_N = np.asarray(self._fields["kind"].to_numpy(zero_copy_only=False) == "drawn")

    def _numbers(self, name: str) -> np.ndarray:
        return self._columns[name].to_numpy(zero_copy_only=False)

    def columns(self) -> dict[str, list[float | None]]:
        """Returns the numbers that the page sorts and filters by."""
        nearest = [each[0]["cosine"] if each else None for each in self._columns["neighbors"].to_pylist()]
        return {
            "rate": [_rounded(each) for each in self._numbers("firing_rate")],
            "max": [_rounded(each) for each in self._max_F],
            "cosine": [_rounded(each) for each in nearest],
            "agreement": [_rounded(each) for each in self._columns["encoder_cosine"].to_pylist()],
            "again": [_rounded(each) for each in self._columns["found_again"].to_pylist()],
            "detection": [None if each is None else _rounded(each["detection_accuracy"]) for each in self._explained],
        }

    def features(self) -> list[dict[str, Any]]:
        """Returns what the page shows of each feature, by short names.

        n, c, m, d are firings, contexts, mean activation and decoder norm; h the histogram; b neighbors; p and s the
        promoted and the suppressed tokens; e the examples; x the explanation, its detection and its fuzzing accuracy.
        """
        names = ("n_firings", "n_contexts", "mean_activation", "decoder_norm", "promoted", "suppressed", "neighbors")
        columns = [self._columns[name].to_pylist() for name in names]
        histograms = self._columns["histogram"].to_pylist()
        fields = {
            name: self._fields[name].to_pylist()
            for name in ("quantile", "activation", "row", "document", "position", "first_position")
        }
        shown = []
        for f, (n, n_contexts, mean, norm, promoted, suppressed, neighbors) in enumerate(zip(*columns, strict=True)):
            shown.append(
                {
                    **{"n": n, "c": n_contexts, "m": _rounded(mean), "d": _rounded(norm)},
                    "h": _without_ends(histograms[f]),
                    "b": [[each["feature"], round(each["cosine"], 4)] for each in neighbors],
                    "p": [[each["token"], _rounded(each["change"])] for each in promoted],
                    "s": [[each["token"], _rounded(each["change"])] for each in suppressed],
                    "e": [self._example(i, fields) for i in self._shown_examples(f)],
                    "x": self._explanation(f),
                }
            )
        return shown

    def _explanation(self, f: int) -> list[Any] | None:
        row = self._explained[f]
        if row is None:
            return None
        return [row["explanation"], *(_rounded(row[f"{score}_accuracy"]) for score in ("detection", "fuzz"))]

    def _shown_examples(self, f: int) -> list[int]:
        """Returns the numbers of a feature's examples on the page: the strongest, and drawn ones of all strengths."""
        all_N = np.arange(self._first_F[f], self._first_F[f + 1])
        drawn_N, strongest_N = all_N[self._is_drawn_N[all_N]], all_N[~self._is_drawn_N[all_N]]
        even = np.linspace(0, len(drawn_N) - 1, min(EXAMPLES_OF_A_KIND, len(drawn_N))).round().astype(int)
        return [*strongest_N[:EXAMPLES_OF_A_KIND].tolist(), *drawn_N[even].tolist()]

    def _example(self, i: int, fields: dict[str, list[Any]]) -> list[Any]:
        at = slice(self._start_N[i], self._start_N[i + 1])
        quantile = fields["quantile"][i]
        return [
            int(self._is_drawn_N[i]),
            None if quantile is None else round(quantile, 3),
            _rounded(fields["activation"][i]),
            *(fields[name][i] for name in ("row", "document", "position", "first_position")),
            self._token_of_T[at].tolist(),
            self._levels[at],
        ]

    def words(self) -> list[list[str]]:
        """Returns what the page's search looks at: for each feature a label, the tokens and the texts."""
        at_peak_N = np.asarray(self._fields["position"]) - np.asarray(self._fields["first_position"])
        peak_N = self._token_of_T[self._start_N[:-1] + at_peak_N] if len(at_peak_N) else at_peak_N
        promoted = self._columns["promoted"].to_pylist()
        found = []
        for f, raised in enumerate(promoted):
            all_N = range(self._first_F[f], self._first_F[f + 1])
            counts = Counter(self.tokens[peak_N[i]] for i in all_N)
            peaks = [token for token, _ in counts.most_common(_PEAKS)]
            texts = [
                "".join(self.tokens[t] for t in self._token_of_T[self._start_N[i] : self._start_N[i + 1]])
                for i in all_N[:_SEARCHED_CONTEXTS]
                if not self._is_drawn_N[i]
            ]
            label = " ".join(token.strip() or repr(token)[1:-1] for token in peaks)
            if (row := self._explained[f]) is not None:
                label = row["explanation"]
            found.append([label, *peaks, *(each["token"] for each in raised), *texts])
        return found


def _without_ends(counts: list[int]) -> list[Any]:
    """Returns the first bin that is not empty, and the counts from there to the last that is not."""
    filled = [i for i, n in enumerate(counts) if n]
    return [filled[0], counts[filled[0] : filled[-1] + 1]] if filled else [0, []]


def _rounded(value: float | None) -> float | None:
    """Returns a number with four digits, which are enough to be shown."""
    return None if value is None or value != value else float(f"{value:.4g}")
