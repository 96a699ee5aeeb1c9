"""Has a language model explain features, and measures by its detection and fuzzing scores what the explanations tell.

The protocol is that of Paulo et al. (arXiv 2410.13928), by delphi's code.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.metrics import mean_and_interval
from sae_toolkit.inspection.explanations import FILENAME
from sae_toolkit.inspection.explanations.delphi import (
    DefaultExplainer,
    DetectionScorer,
    FuzzingScorer,
    LatentRecord,
    compute_classification_metrics,
    compute_confusion,
)
from sae_toolkit.inspection.explanations.examples import FeatureExamples
from sae_toolkit.inspection.explanations.judge import Counted, Judge, make_judge
from sae_toolkit.inspection.latents import write_latents
from sae_toolkit.inspection.run import InspectedSAE
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.inspection import ExplanationSettings
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

DIRECTORY = "explanations"
SCORES = ("detection", "fuzz")
_TESTS_OF_A_REQUEST = 5  # as delphi's command has it
_COUNTED_FEATURES = 5
_SPARE_FEATURES = 20
_UNPARSED = "Explanation could not be parsed."  # what delphi says

_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("explanation", pa.string()),
        *((f"{score}_{name}", pa.float32()) for score in SCORES for name in ("accuracy", "f1", "answered")),
    ]
)


def write_explanations(
    inspected: InspectedSAE,
    model: LanguageModel,
    features_file: Path,
    settings: ExplanationSettings,
    *,
    batch_size: int,
    lm_dtype: str,
) -> Path:
    """Explains features that are drawn at random, scores the explanations, and writes explanations.parquet.

    Every reply is kept in a directory of this judge and these examples as it comes, so that the same work, or one with
    more features, goes on after a kill.

    Args:
        inspected: the SAE, and the rows of text that it has seen.
        model: the language model, hooked where the SAE is.
        features_file: what `write_features` wrote.
        settings: the judge, and how many features and examples.
        batch_size: rows in one forward pass of the language model.
        lm_dtype: dtype of a judge that runs here.

    Returns:
        The path of explanations.parquet, a row for each feature that was explained.

    Raises:
        UserError: the judge fails or does not fit, the features fire too rarely, or the budget does not suffice.
    """
    logging.getLogger("delphi").setLevel(logging.CRITICAL)  # it reports what it cannot read, which is counted here
    about = _about(features_file, settings)
    directory = features_file.parent / DIRECTORY / _folder(about)
    drawn = _draw(inspected, settings)
    latents = write_latents(
        inspected,
        model,
        drawn,
        directory / "activations",
        about={"features_file": about["features_file"], "features": drawn},
        batch_size=batch_size,
    )
    judge = make_judge(settings, inspected.prepared.device, lm_dtype)
    examples = FeatureExamples(latents, settings, inspected.prepared.tokenizer)
    records, n_left_out = examples.of(drawn, settings.explained_features)
    if not records:
        raise UserError(
            f"--explain_min_windows {settings.explain_min_windows}: none of {len(drawn):,} features fires in so many"
            " windows of text and is silent in enough others; raise --tokens, or lower it"
        )
    (directory / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    replies = _Replies(directory)
    _say_cost([each for each in records if not replies.is_done(each)], judge, inspected.prepared.tokenizer, settings)
    asyncio.run(_ask_all(records, judge, replies, settings))
    rows = [replies.row(record) for record in records]
    path = features_file.with_name(FILENAME)
    partial = path.with_suffix(".partial")
    try:
        described = _SCHEMA.with_metadata({"inspection": json.dumps(about)})
        pq.write_table(pa.Table.from_pylist(rows, schema=described), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    log.info(summary(rows, n_left_out, settings))
    return path


def _about(features_file: Path, settings: ExplanationSettings) -> dict[str, Any]:
    """Returns what explanations and scores depend on."""
    names = ("explain", "explain_examples", "explain_tests", "explain_min_windows", "explain_new_tokens")
    return {
        "features_file": xxhash.xxh3_128(features_file.read_bytes()).hexdigest(),
        **{name: getattr(settings, name) for name in names},
        "delphi": version("eai-delphi"),
    }


def _folder(about: dict[str, Any]) -> str:
    digest = xxhash.xxh3_64(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^A-Za-z0-9.-]+", "_", about["explain"]).strip("_.") + f"_{digest[:8]}"


def _draw(inspected: InspectedSAE, settings: ExplanationSettings) -> list[int]:
    """Returns features drawn at random among those that fire on enough tokens, more than are to be explained.

    A larger draw begins with a smaller one.
    """
    often_N = (inspected.statistics.n_firings_F.cpu().numpy() >= settings.explain_min_windows).nonzero()[0]
    if not len(often_N):
        raise UserError(
            f"--explain_min_windows {settings.explain_min_windows}: no feature fires so often on"
            f" {inspected.statistics.n_tokens:,} tokens; raise --tokens, or lower it"
        )
    n_drawn = settings.explained_features * 2 + _SPARE_FEATURES  # since some fire in too few windows
    return np.random.default_rng(inspected.prepared.seed).permutation(often_N)[:n_drawn].tolist()


class _Replies:
    """What was made of the judge's replies, in the files that delphi's command writes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, record: LatentRecord, kind: str) -> Path:
        below = kind if kind == "explanations" else f"scores/{kind}"
        return self._directory / below / f"{record.latent}.txt"

    def read(self, record: LatentRecord, kind: str) -> Any:
        """Returns what is there: an explanation, or the outputs of a score; None if nothing is."""
        path = self._path(record, kind)
        return orjson.loads(path.read_bytes()) if path.is_file() else None

    def write(self, record: LatentRecord, kind: str, value: Any) -> None:
        path = self._path(record, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(orjson.dumps(value))
        partial.replace(path)

    def has(self, record: LatentRecord, kind: str) -> bool:
        return self._path(record, kind).is_file()

    def is_done(self, record: LatentRecord) -> bool:
        return all(self.has(record, kind) for kind in ("explanations", *SCORES))

    def row(self, record: LatentRecord) -> dict[str, Any]:
        """Returns a feature's row of explanations.parquet."""
        row = {"feature": record.latent.latent_index, "explanation": self.read(record, "explanations")}
        for score in SCORES:
            row |= {f"{score}_{name}": value for name, value in _metrics(self.read(record, score)).items()}
        return row


def _metrics(outputs: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Returns accuracy (mean over the two classes) and F1 by delphi's code, and the share of examples with an answer.

    Accuracy and F1 are None where no example of one class has an answer.
    """
    frame = pd.DataFrame(outputs)
    answered = frame[frame["prediction"].notna()]
    metrics: dict[str, float | None] = {"accuracy": None, "f1": None, "answered": len(answered) / len(frame)}
    if answered["activating"].nunique() == 2:
        measured = compute_classification_metrics(compute_confusion(answered))
        metrics |= {"accuracy": float(measured["accuracy"]), "f1": float(measured["f1_score"])}
    return metrics


def _say_cost(records: Sequence[LatentRecord], judge: Judge, tokenizer: Any, settings: ExplanationSettings) -> None:
    """Says how many requests and tokens the records will take. Raises a UserError if it is more than the budget."""
    if not records:
        return
    counted = Counted(_TESTS_OF_A_REQUEST, judge, tokenizer)
    some = records[:_COUNTED_FEATURES]

    async def count() -> None:
        for record in some:
            record.explanation = (await _explainer(counted, settings)(record)).explanation
            for score in SCORES:
                await _scorer(score, counted, settings)(record)

    asyncio.run(count())
    if counted.failure:
        raise counted.failure
    requests = round(counted.requests / len(some) * len(records))
    read = round(counted.tokens / len(some) * len(records))
    written = requests * settings.explain_new_tokens
    cost = f"{requests:,} requests, about {read:,} tokens to read and at most {written:,} to write"
    log.info("--explain %s: %d features, %s; what is answered is kept", settings.explain, len(records), cost)
    if settings.explain_budget is not None and read + written > settings.explain_budget:
        raise UserError(
            f"--explain_budget {settings.explain_budget}: {len(records):,} features take up to {read + written:,}"
            f" tokens ({read:,} to read, {written:,} to write); raise it, or lower --explained_features,"
            " --explain_tests or --explain_new_tokens"
        )


def _explainer(judge: Judge, settings: ExplanationSettings) -> DefaultExplainer:
    return DefaultExplainer(judge, generation_kwargs={"max_tokens": settings.explain_new_tokens})


def _scorer(score: str, judge: Judge, settings: ExplanationSettings) -> Any:
    """Returns a new scorer: the order that it shuffles examples to depends on the features that it has scored."""
    kind = {"detection": DetectionScorer, "fuzz": FuzzingScorer}[score]
    return kind(judge, n_examples_shown=_TESTS_OF_A_REQUEST, max_tokens=settings.explain_new_tokens)


async def _ask_all(
    records: Sequence[LatentRecord], judge: Judge, replies: _Replies, settings: ExplanationSettings
) -> None:
    # A judge in this process answers one question at a time, and a stop waits for the answers that were asked for.
    at_once = asyncio.Semaphore(settings.explain_requests if settings.explain_url else 1)
    questions = _questions(settings)
    n_done = sum(n for each in records for kind, n in questions.items() if replies.has(each, kind))
    with Progress("explaining", len(records) * sum(questions.values()), done=n_done, unit="questions") as progress:
        judge.on_reply = lambda: progress.advance(1)

        async def ask(record: LatentRecord) -> None:
            async with at_once:
                await _ask(record, judge, replies, settings)

        await asyncio.gather(*(ask(record) for record in records if not replies.is_done(record)))


def _questions(settings: ExplanationSettings) -> dict[str, int]:
    """Returns the number of questions that each kind of file of a feature takes."""
    of_a_score = math.ceil(2 * settings.explain_tests / _TESTS_OF_A_REQUEST)
    return {"explanations": 1, **dict.fromkeys(SCORES, of_a_score)}


async def _ask(record: LatentRecord, judge: Judge, replies: _Replies, settings: ExplanationSettings) -> None:
    """Has one feature explained and its explanation scored, as far as it is not yet."""
    record.explanation = replies.read(record, "explanations")
    if record.explanation is None:
        record.explanation = (await _explainer(judge, settings)(record)).explanation
        replies.write(record, "explanations", record.explanation)
    for score in SCORES:
        if replies.read(record, score) is None:
            outputs = (await _scorer(score, judge, settings)(record)).score
            if judge.failure:
                raise judge.failure
            replies.write(record, score, outputs)


def summary(rows: Sequence[dict[str, Any]], n_left_out: int, settings: ExplanationSettings) -> str:
    """Returns means over features, with 95% intervals, in a few lines."""
    lines = [f"{len(rows):,} features explained by {settings.explain}; means and 95% intervals"]
    for score in SCORES:
        values = [row[f"{score}_accuracy"] for row in rows if row[f"{score}_accuracy"] is not None]
        answered = np.mean([row[f"{score}_answered"] for row in rows])
        if len(values) > 1:
            mean, (low, high) = mean_and_interval(values)
            lines.append(f"  {score} accuracy {mean:.1%} ({low:.1%} to {high:.1%}); 50% is chance")
        else:
            lines.append(f"  {score} accuracy: too few features with answers of both kinds")
        if answered < 1:
            lines.append(f"    {1 - answered:.1%} of the examples have no answer that could be read, and do not count")
    if unparsed := sum(row["explanation"] == _UNPARSED for row in rows):
        lines.append(
            f"  {unparsed:,} explanations could not be read; their scores are those of the words '{_UNPARSED}'"
        )
    if n_left_out:
        lines.append(
            f"  {n_left_out:,} others were drawn and left out: they fire in fewer than {settings.explain_min_windows}"
            " windows of 32 tokens, or in almost all"
        )
    return "\n".join(lines)
