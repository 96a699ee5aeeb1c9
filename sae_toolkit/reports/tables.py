"""Formats evaluations as tables for the terminal, and as rows for the reports and the record of the training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_toolkit.evaluation.feature_browser import Context, Feature
from sae_toolkit.evaluation.health import LEAST_REPLACED_SHARE, STANDARDS, Standard
from sae_toolkit.evaluation.saebench.reliability import reliability_note
from sae_toolkit.reports.further import render_further
from sae_toolkit.text.positions import PositionFilter

MARKS = {"healthy": "✔", "borderline": "~", "unhealthy": "✘", "unsettled": "?"}
_STYLES = {"healthy": "green", "borderline": "yellow", "unhealthy": "red", "unsettled": "yellow"}
_PERCENTAGES = {"loss_recovered", "dead_features", "replaced_share"}
BESIDE = {
    "explained_variance": "Explained variance",
    "cosine_similarity": "Cosine similarity",
    "l2_ratio": "L2 norm, reconstruction / activation",
    "ce_clean": "Cross-entropy, model alone (nats)",
    "ce_sae": "Cross-entropy, with the SAE",
    "ce_zero": "Cross-entropy, hook zeroed",
    "kl_sae": "KL(model || with the SAE) (nats)",
    "replaced_share": "Tokens where the SAE stood in",
}


def format_value(metric: str, value: float | None) -> str:
    """Returns a metric's value as the tables print it."""
    if value is None:
        return "no number"
    if metric in _PERCENTAGES:
        return f"{value:.2%}"
    return f"{value:.1f}" if metric == "l0" else f"{value:.3f}"


def format_interval(metric: str, summary: Mapping[str, Any]) -> str:
    """Returns a metric's 95% interval, `exact` for a metric that needs no sample, or "" if it has no interval."""
    if metric in summary["intervals"]:
        return " to ".join(format_value(metric, end) for end in summary["intervals"][metric])
    return "exact" if metric == "decoder_absorption" else ""


def format_range(standard: Standard, bounds: tuple[float, float]) -> str:
    """Returns a range of a standard as the tables print it."""
    low, high = bounds
    if math.isinf(high):
        return f">= {low:.0%}"
    if standard.metric in _PERCENTAGES:
        return f"<= {high:.0%}" if low == 0 else f"{low:.0%} to {high:.0%}"
    return f"{low:g} to {high:g}" if low > 0 else f"<= {high:g}"


def verdict(summary: Mapping[str, Any]) -> str:
    """Returns a sentence that says how many metrics are healthy."""
    health = summary["health"]
    if health["healthy"] is None:
        return (
            f"no verdict (unsettled): the SAE stood in for less than {LEAST_REPLACED_SHARE:.0%} of the tokens,"
            " so the numbers say too little about it"
        )
    unsettled = list(health.values()).count("unsettled")
    more = f", {unsettled} unsettled: the sample cannot tell" if unsettled else ""
    where = " with the massive first position" if summary["massive_first_position"] else ""
    return f"{health['healthy']}/{health['of']} metrics healthy{where}{more}"


def first_position_note(summary: Mapping[str, Any]) -> str:
    """Returns what the first position does to the metrics, if it is massive and the SAE's record says nothing of it.

    Otherwise returns "".
    """
    massive = summary["massive_first_position"]
    if not massive:
        return ""
    with_it, without = (
        " and ".join(
            f"{title} is {format_value(metric, metrics[metric])}"
            for metric, title in (("loss_recovered", "loss recovered"), ("explained_variance", "explained variance"))
        )
        if metrics
        else "nothing was measured"
        for metrics in (summary["metrics"], massive["metrics_without"])
    )
    return (
        f"The norm at the first position of a context is {massive['ratio']:.0f} times the"
        f" median of the others, and the SAE's record does not say whether it was trained there. With that position,"
        f" {with_it}; without it, {without}. The verdict rests on the former; {massive['flag']} leaves the"
        " position out."
    )


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Returns what is to be kept in mind about the numbers: of a massive first position, and of sae-bench's evals."""
    notes = (first_position_note(summary), reliability_note(summary.get("saebench", ())))
    return [note for note in notes if note]


def documents(summary: Mapping[str, Any]) -> str:
    """Returns a phrase that says which documents of the data set were used."""
    held_out, seen = summary["held_out"], summary["text_may_be_trained_on"]
    if not held_out:
        not_known = "; whether this SAE was trained on it is not known"
        said = {True: ", on which this SAE may have been trained", None: not_known, False: ""}
        return f"split {summary['dataset_split']}{said[seen]}"
    half = f"{part} half of the " if (part := held_out.get("part")) else ""
    of_one = f"{half}documents held out of one training"
    if seen:
        return f"{of_one}; in another this SAE may have been trained on them"
    if seen is None:
        return f"{of_one}; whether this SAE was trained on them in another is not known"
    return f"{half}documents held out of training"


def shape(summary: Mapping[str, Any]) -> str:
    """Returns the architecture and the size of the SAE."""
    sae = summary["sae"]
    return f"{sae['architecture']}, {sae['d_sae']:,} features on {sae['d_in']:,} dimensions"


def heading(summary: Mapping[str, Any]) -> str:
    """Returns three lines: the model and hook, the text, and the positions, with where hook and positions are from."""
    fallback = f", in place of {summary['fallback_from']}" if summary["fallback_from"] else ""
    protocol = "" if summary["protocol"] == "health" else ", SAEBench's protocol: the SAE at every position"
    return "\n".join(
        [
            f"{summary['model']}, {place(summary)}{protocol}",
            f"{summary['dataset']}{fallback}, {documents(summary)}",
            f"positions: {positions(summary)}",
        ]
    )


def place(summary: Mapping[str, Any]) -> str:
    """Returns the hook, and where its name comes from."""
    return f"{summary['hook_name']} ({summary['sources']['hook_name']})"


def positions(summary: Mapping[str, Any]) -> str:
    """Returns a phrase that says at which positions the SAE was applied, and where that comes from."""
    if summary["positions"] is None:
        return "all (SAEBench's protocol)"
    return PositionFilter(**summary["positions"]).described(summary["sources"])


def health_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the four health metrics with their standards, as columns and rows."""
    return ["Metric", "Value", "95% interval", "Healthy", "Borderline", "Status"], [
        [
            standard.title,
            format_value(standard.metric, summary["metrics"][standard.metric]),
            format_interval(standard.metric, summary),
            format_range(standard, standard.healthy),
            format_range(standard, standard.borderline),
            f"{MARKS[summary['health'][standard.metric]]} {summary['health'][standard.metric]}",
        ]
        for standard in STANDARDS
    ]


def diagnosis_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the causes of the diagnosis as columns and rows, the one to fix first at the top."""
    return ["Cause", "What the measurements say", "What to change"], [
        [finding["cause"], finding["says"], finding["command"]] for finding in summary["diagnosis"]
    ]


def feature_table(features: Sequence[Feature]) -> tuple[list[str], list[list[Any]]]:
    """Returns features and the text that activates them, as columns and rows."""
    columns = ["feature", "firing rate", "max activation", "top contexts", "raises", "lowers"]
    return columns, [
        [
            feature.index,
            feature.firing_rate,
            feature.max_activation,
            "\n".join(_marked(context) for context in feature.contexts[:3]),
            ", ".join(repr(token) for token, _ in feature.raised[:5]),
            ", ".join(repr(token) for token, _ in feature.lowered[:5]),
        ]
        for feature in features
    ]


def _marked(context: Context) -> str:
    """Returns a context in one line, with the token of the largest activation in brackets."""
    tokens = [f"[{token}]" if i == context.peak else token for i, token in enumerate(context.tokens)]
    return " ".join("".join(tokens).split())


def render(summary: Mapping[str, Any]) -> RenderableType:
    """Returns what the terminal shows of one evaluation: health metrics, verdict, other measurements and diagnosis."""
    health = summary["health"]
    columns, rows = health_table(summary)
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in ("Metric", "Status") else "right")
    for standard, row in zip(STANDARDS, rows, strict=True):
        if standard.metric == "dead_features":
            row[0] += f"\n(over {summary['dead_feature_estimates']['tokens']:,} tokens)"
        table.add_row(*row[:-1], Text(row[-1], _STYLES[health[standard.metric]]))
    beside = Table(show_header=False, box=None)
    beside.add_column()
    beside.add_column(justify="right")
    beside.add_column()
    for cells in beside_rows(summary):
        beside.add_row(*cells)
    parts: list[RenderableType] = [Text(heading(summary)), table, Text(verdict(summary), "bold")]
    parts += [*map(Text, _notes(summary)), Text(), beside]
    return Group(*parts, *_diagnosis(summary), *render_further([summary]))


def _diagnosis(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yields the causes. The command that fixes a cause follows on lines of its own, so that it can be copied."""
    if "diagnosis" not in summary:
        return
    yield Text()
    if not summary["diagnosis"]:
        yield Text("Why: the measurements show none of the causes that the diagnosis knows", "bold")
        return
    yield Text("Why, and what to change first", "bold")
    for number, finding in enumerate(summary["diagnosis"], 1):
        yield Text.assemble((f"{number}. {finding['cause']}", "bold"), f": {finding['says']}", overflow="fold")
        yield Text(f"   {finding['command']}", overflow="fold", no_wrap=False)


def beside_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the measurements other than the four health metrics: title, value, and 95% interval or a note."""
    metrics, dead, cosines = summary["metrics"], summary["dead_feature_estimates"], summary["decoder_cosines"]
    rows = [
        (title, format_value(metric, metrics[metric]), format_interval(metric, summary))
        for metric, title in BESIDE.items()
    ]
    rows += [
        ("Tokens for the cross-entropies and KL", f"{summary['loss_tokens']:,}", ""),
        ("Dead features, expected after as many tokens again", f"{dead['expected_at_twice_the_tokens']:.2%}", ""),
        ("Dead features, expected in the long run", f"{dead['expected_in_the_long_run']:.2%}", "estimate"),
        (
            "Firing rate seen with 95% confidence",
            f"1 in {1 / dead['largest_missed_rate']:,.0f}",
            "tokens, each feature",
        ),
        ("Firings that belong to features not seen yet", f"{dead['unseen_firing_share']:.2%}", "estimate"),
    ]
    if summary["health"]["dead_features"] == "unsettled" and dead["tokens"] < dead["tokens_to_settle"]:
        rows.append(("Tokens that would settle dead features", f"{dead['tokens_to_settle']:,}", "--dead_tokens"))
    if training := dead["training_run"]:
        rows += [
            ("Dead in the training run's last window", f"{training['dead']:.2%}", ""),
            ("Silent here, alive there", f"{training['dead_here_alive_there']:.2%}", ""),
        ]
    sampled = "exact" if cosines["exact"] else f"from {cosines['rows']:,} features"
    rows.append(("Decoder absorption of random directions", f"{cosines['random_directions']:.3f}", "theory"))
    if cosines["p95"] is not None:  # there are two features or more
        rows.append(("Decoder absorption, 95th percentile", f"{cosines['p95']:.3f}", sampled))
    rows.append(("Decoder pairs with a cosine above 0.9", f"{cosines['near_duplicate_pairs']:,.0f}", sampled))
    if cosines["alive_mean"] is not None:
        rows.append(("Decoder absorption among features that fire", f"{cosines['alive_mean']:.3f}", sampled))
    return rows


def render_several(summaries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Returns what the terminal shows of several evaluations: one table with a row for each SAE."""
    table = Table()
    table.add_column("SAE", overflow="fold")
    for standard in STANDARDS:
        table.add_column(standard.title, justify="right")
    for title in ("Explained variance", "Healthy"):
        table.add_column(title, justify="right")
    for summary in summaries:
        metrics, health = summary["metrics"], summary["health"]
        table.add_row(
            summary["sae"]["name"],
            *(f"{format_value(s.metric, metrics[s.metric])} {MARKS[health[s.metric]]}" for s in STANDARDS),
            format_value("explained_variance", metrics["explained_variance"]),
            "?" if health["healthy"] is None else f"{health['healthy']}/{health['of']}",
        )
    headings = list(dict.fromkeys(heading(summary) for summary in summaries))
    marks = ", ".join(f"{mark} {status}" for status, mark in MARKS.items())
    first_causes = [
        Text(f"{summary['sae']['name']}: {summary['diagnosis'][0]['cause']}: {summary['diagnosis'][0]['command']}")
        for summary in summaries
        if summary.get("diagnosis")
    ]
    notes = [Text(f"{summary['sae']['name']}: {note}") for summary in summaries for note in _notes(summary)]
    return Group(Text("\n".join(headings)), table, Text(marks), *notes, *first_causes, *render_further(summaries))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown, with the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(in_markdown(cell) for cell in row)} |" for row in (header, rule, *rows)]


def in_markdown(text: str) -> str:
    """Returns text with Markdown's special characters escaped."""
    return re.sub(r"([|*`\[\]]|<(?=[\w/!?]))", r"\\\1", text)
