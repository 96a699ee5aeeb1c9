"""The results of an evaluation: evaluation.json, report.html and report.md beside the SAE, and the record in wandb."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sae_toolkit.diagnosis.diagnose import as_records, diagnose
from sae_toolkit.diagnosis.evidence import METADATA, Evidence
from sae_toolkit.diagnosis.history import load_history
from sae_toolkit.diagnosis.probes import probe
from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.measurement import Evaluation
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.files.names import FLAGS_FILENAME, METRICS_FILENAME
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.reports.further import further_tables
from sae_toolkit.reports.page import render_html, render_markdown
from sae_toolkit.reports.summary import summarize, without_nan
from sae_toolkit.reports.tables import diagnosis_table, feature_table, health_table
from sae_toolkit.saes.formats import SAEFile
from sae_toolkit.settings.evaluation import EvaluationSettings
from sae_toolkit.training.record.start import record_of_training

log = logging.getLogger(__name__)

_NOT_RESULTS = {"cfg.json", "runner_cfg.json", "config.json", "activation_scaler.json", "training_flags.json"}


def choose_outputs(output_json: Path | None, groups: Sequence[PreparedEvaluation]) -> list[list[Path]]:
    """Returns the path of each SAE's evaluation.json, for each group.

    The file goes beside the weights. If the SAE is a download, or its directory cannot be written to, the file goes
    below ./evaluations.

    Args:
        output_json: path to use instead, if only one SAE is evaluated.
        groups: evaluations that are ready to start.

    Raises:
        UserError: a result cannot be written, or two results would go to the same path.
    """
    files = [evaluated.file for group in groups for evaluated in group.saes]
    if output_json is not None:
        if len(files) > 1:
            raise UserError(f"--output_json {output_json}: is one file for {len(files)} SAEs; leave it out")
        if output_json.suffix != ".json" or output_json.name in _NOT_RESULTS:
            raise UserError(
                f"--output_json {output_json}: must be a .json file that does not belong to an SAE; name another one"
            )
        outputs = [output_json]
    else:
        outputs = [directory_of_results(file) / "evaluation.json" for file in files]
        for output, file in zip(outputs, files, strict=True):
            if outputs.count(output) > 1:
                raise UserError(
                    f"--sae_path {file.name}: the results of two SAEs would go to {output}; evaluate only one of them"
                )
    for output in outputs:
        for path in (output, *_report_paths(output)):
            _check_writable(path)
        if output.exists():
            log.info("%s is from an earlier evaluation, and will be replaced", output)
    remaining = iter(outputs)
    return [list(islice(remaining, len(group.saes))) for group in groups]


def directory_of_results(file: SAEFile) -> Path:
    """Returns the directory for an SAE's results, and creates it if it does not exist."""
    if not file.is_download and file.path.is_dir() and os.access(file.path, os.W_OK):
        return file.path
    directory = Path("evaluations") / (re.sub(r"[^\w.-]+", "_", file.name).lstrip(".") or "sae")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output_json: {directory} cannot be made ({error.strerror}); name a file for the results"
        ) from None
    return directory


def _report_paths(output_json: Path) -> tuple[Path, Path]:
    """Returns the paths of the two reports: report.* beside evaluation.json, NAME.report.* beside NAME.json."""
    stem = "report" if output_json.name == "evaluation.json" else f"{output_json.stem}.report"
    return output_json.with_name(f"{stem}.html"), output_json.with_name(f"{stem}.md")


def _check_writable(path: Path) -> None:
    """Raises a UserError if a result cannot be written to a path."""
    try:
        for file in (path, _partial(path)):
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise UserError(f"--output_json {file}: is not a file that can be replaced; name another path")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--output_json {path}: cannot be written there ({error.strerror}); name another path"
        ) from None


@dataclass(frozen=True)
class Result:
    """The evaluation of one SAE.

    Args:
        group: SAEs that were evaluated together.
        evaluated: the SAE.
        evaluation: its measurements.
        output_json: path of evaluation.json.
        summary: content of evaluation.json.
        summaries_of_group: the summaries of all SAEs of the group.
        of_features: numbers for each feature [F], which further evaluations measured, by their titles.
    """

    group: PreparedEvaluation
    evaluated: EvaluatedSAE
    evaluation: Evaluation
    output_json: Path
    summary: dict[str, Any]
    summaries_of_group: Sequence[Mapping[str, Any]]
    of_features: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, of_layers: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes evaluation.json and the reports.

        The reports show the checkpoints of the same run as curves.

        Args:
            of_layers: summaries of SAEs of the same checkpoint at several layers, which are shown as curves too.
        """
        html, markdown = _report_paths(self.output_json)
        plots = dict(self.evaluation.plots)
        run = Path(self.summary["sae"]["path"]).parent
        checkpoints = [
            s for s in self.summaries_of_group if Path(s["sae"]["path"]).parent == run and _tokens_trained(s)
        ]
        if len(checkpoints) > 1:
            plots["checkpoints"] = [{"tokens": _tokens_trained(s), "metrics": s["metrics"]} for s in checkpoints]
        if len(of_layers) > 1:
            plots["layers"] = [{"layer": _layer(s), "metrics": s["metrics"]} for s in of_layers]
        texts = {
            self.output_json: json.dumps(self.summary, indent=2, allow_nan=False) + "\n",
            markdown: render_markdown(self.summary),
            html: render_html(self.summary, plots, self.evaluation.features, self.of_features),
        }
        for path, text in texts.items():
            _write_whole(path, text)

    @property
    def is_unhealthy(self) -> bool:
        """Whether at least one health metric is not healthy. False under SAEBench's protocol, which has no verdict."""
        health = self.summary["health"]
        return self.group.protocol == "health" and health["healthy"] != health["of"]

    def diagnose(self, model: LanguageModel, settings: EvaluationSettings) -> None:
        """Finds out why the SAE is unhealthy, adds the causes to the summary, and writes the results again.

        If memory runs out, this logs a warning, and the results stay as they are.

        Args:
            model: language model that the SAE was evaluated on.
            settings: settings of the evaluation.
        """
        batch_size = settings.saes.batch_size
        sae, path = self.evaluated.sae, self.evaluated.file.path
        history = load_history(path, sae)
        if history is None or not history.readings:
            missing = f"no {FLAGS_FILENAME} of a run" if history is None else f"no readings in {METRICS_FILENAME}"
            log.warning("%s: %s: causes that need the course of the training are not looked for", path, missing)
        try:
            with out_of_memory_answered(
                f"--batch_size {batch_size}: the diagnosis", "lower it, or give --no_diagnosis"
            ):
                probes = probe(self.group, self.evaluated, model, batch_size)
        except UserError as error:
            log.warning("%s: %s", path, error)
            sae.to("cpu")
            return
        metadata = {name: sae.cfg.metadata.get(name) for name in METADATA}
        evidence = Evidence(self.summary, probes, metadata, history, self.evaluated.file.given_name, settings)
        self.summary["diagnosis"] = without_nan(as_records(diagnose(evidence), evidence))
        self.write()

    def add(self, name: str, results: Mapping[str, Any], of_features: Mapping[str, torch.Tensor] | None = None) -> None:
        """Adds the results of a further evaluation to the summary, and writes all results again.

        Args:
            name: key of the results in evaluation.json.
            results: values that JSON stores.
            of_features: numbers for each feature [F], for the feature browser, by their titles.
        """
        self.summary[name] = without_nan(results)
        self.of_features.update(of_features or {})
        self.write()

    def record(self) -> None:
        """Adds the numbers and tables to the record of the SAE's training, if there is one.

        For the finished SAE their names start with `evaluation/`. In other cases the prefix is longer: it then has the
        name of the protocol (if it is not `health`), of the checkpoint (if the SAE is not finished), and of the hook
        (if the run has several).
        """
        record = record_of_training(Path(self.summary["sae"]["path"]))
        protocol, path = self.summary["protocol"], Path(self.summary["sae"]["path"])
        prefix = "evaluation" if protocol == "health" else f"evaluation_{protocol}"
        of_hook = re.fullmatch(r"(final_)?\d+", path.parent.name) is not None
        checkpoint = path.parent.name if of_hook else path.name
        if not checkpoint.startswith("final_"):
            prefix = f"{prefix}_{checkpoint}"
        if of_hook:
            prefix = f"{prefix}/{path.name}"
        record.summarize(_flatten(self.summary, prefix))
        record.log_table(f"{prefix}/health_table", *health_table(self.summary))
        record.log_table(f"{prefix}/features", *feature_table(self.evaluation.features))
        if self.summary.get("diagnosis"):
            record.log_table(f"{prefix}/diagnosis", *diagnosis_table(self.summary))
        for shown in further_tables(self.summary):
            record.log_table(f"{prefix}/{shown.title}", list(shown.columns), [list(row) for row in shown.rows])
        record.finish()


def write_results(
    group: PreparedEvaluation, evaluations: Sequence[Evaluation], outputs: Sequence[Path]
) -> list[Result]:
    """Writes the results of SAEs that were evaluated together, and returns them.

    Args:
        group: the SAEs.
        evaluations: one for each SAE.
        outputs: path of evaluation.json for each SAE.
    """
    summaries = [summarize(group, *pair) for pair in zip(group.saes, evaluations, strict=True)]
    results = [
        Result(group, *of_one, summaries) for of_one in zip(group.saes, evaluations, outputs, summaries, strict=True)
    ]
    for result in results:
        result.write()
        log.info("written to %s and %s", result.output_json, _report_paths(result.output_json)[0])
    return results


def write_over_layers(results: Sequence[Result]) -> None:
    """Writes the reports of SAEs of one checkpoint at several layers again, with curves over the layers."""
    for result in results:
        checkpoint = Path(result.summary["sae"]["path"]).parent
        of_layers = [
            other.summary
            for other in results
            if Path(other.summary["sae"]["path"]).parent == checkpoint and _layer(other.summary) is not None
        ]
        layers = {_layer(summary) for summary in of_layers}
        if len(layers) == len(of_layers) > 1 and _layer(result.summary) is not None:
            result.write(of_layers)


def _layer(summary: Mapping[str, Any]) -> int | None:
    found = re.search(r"\d+", summary["hook_name"])
    return int(found[0]) if found else None


def _tokens_trained(summary: Mapping[str, Any]) -> int | None:
    """Returns the number of tokens a checkpoint was trained on, which names its directory; None for other SAEs."""
    name = re.fullmatch(r"(?:final_)?(\d+)", Path(summary["sae"]["path"]).name)
    return int(name[1]) if name else None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _write_whole(path: Path, text: str) -> None:
    """Writes a file completely or not at all."""
    partial = _partial(path)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as file:  # "x": does not follow a link that somebody put there
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _flatten(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns nested mappings as a flat one. Its names are joined by `/`, by which wandb groups them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value
    return flat
