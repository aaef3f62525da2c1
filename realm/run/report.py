"""The printed report of a finished run: stages, index versions, and next steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realm.run.folder import STAGES, Run
from realm.runtime.telemetry import console, format_seconds, print_table, read_log, read_metrics
from realm.runtime.versions import versions_in

_MASKED_SPAN_FIGURES = {
    "accuracy_null": "null",
    "accuracy_random": "random",
    "accuracy_gold": "gold",
    "accuracy_retrieved": "retrieved",
    "span_accuracy_gold": "span gold",
    "span_accuracy_retrieved": "span retrieved",
    "recall@1": "R@1",
    "recall@5": "R@5",
}
_HELD_OUT_COLUMNS = {
    "source R@1": ("source_recall@1", "dense"),
    "R@5": ("source_recall@5", "dense"),
    "R@20": ("source_recall@20", "dense"),
    "fused R@1": ("source_recall@1", "fused"),
    "fused R@5": ("source_recall@5", "fused"),
    "fused R@20": ("source_recall@20", "fused"),
    "supporting R@5": ("supporting_recall@5", "dense"),
    "fused": ("supporting_recall@5", "fused"),
    "source EM": ("source_em", "reader"),
    "EM": ("em", "reader"),
}
"""Columns of the table of held-out questions: figure, and way of scoring."""
_QUESTION_FIGURES = {"recall@1": "question R@1", "recall@5": "question R@5", "em": "EM"}


def print_summary(
    run: Run,
    stage_times: dict[str, float],
    masked_spans: dict[str, dict[str, float]],
    questions: dict[str, float],
    summary: dict[str, float],
) -> None:
    """Print a table of stages, a table of index versions, and the summary.

    `masked_spans`: figures of masked-span evaluation by stage; `questions`: figures of the
    evaluation.
    """
    rows: list[list[object]] = []
    for stage, seconds in stage_times.items():
        spans, asked = masked_spans.get(stage, {}), questions if stage == "evaluate" else {}
        cells = [*(spans.get(name) for name in _MASKED_SPAN_FIGURES), *(asked.get(name) for name in _QUESTION_FIGURES)]
        rows.append([STAGES[stage].title if stage in STAGES else stage, format_seconds(seconds), *cells])
    title = "Masked-span accuracy (%) from null, random, gold and retrieved passages; masked-span recall; questions"
    console.print()
    print_table(title, ["stage", "time", *_MASKED_SPAN_FIGURES.values(), *_QUESTION_FIGURES.values()], rows)
    _print_versions(run.folder)
    console.print("  " + "  ".join(f"{name} {value}" for name, value in summary.items()))


def print_held_out(before: Mapping[str, Any], held_out: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of the figures on held-out questions: of BM25, of the retriever before
    training, and of each stage. Nothing is printed if nothing was measured."""
    stages = {STAGES[name].title: measured["means"] for name, measured in held_out.items() if measured}
    if not stages:
        return
    bm25 = next(iter(stages.values()))["bm25"]
    rows = {"BM25": {"dense": bm25}, **({"before training": before} if before else {}), **stages}
    cells = [
        [title, *(figures.get(way, {}).get(name) for name, way in _HELD_OUT_COLUMNS.values())]
        for title, figures in rows.items()
    ]
    (count, *_) = [measured["counts"]["questions"] for measured in held_out.values() if measured]
    title = f"{count:,} questions made from held-out documents, without labels, percent"
    console.print()
    print_table(title, ["", *_HELD_OUT_COLUMNS], cells)


def _print_versions(folder: Path) -> None:
    """Print a table of the index versions that the trainer searched, if there are any."""
    steps_of: dict[str, list[dict]] = {}
    for step in read_metrics(folder / "metrics.jsonl").get("pretrain", []):
        if {"index", "steps_behind"} <= step.keys():
            steps_of.setdefault(step["index"], []).append(step)
    if not steps_of:
        return
    kept = {version.name for version in versions_in(folder / "indexes")}
    refreshes = _refreshes(folder)
    rows: list[list[object]] = []
    for name, steps in steps_of.items():
        refresh = refreshes.get(name, {})
        drift, seconds = refresh.get("drift", {}), sum(refresh.get("seconds", {}).values())
        change, overlap = drift.get("cosine_change"), drift.get("overlap@8")
        rows.append(
            [
                name,
                f"{steps[0]['step']}–{steps[-1]['step']}",
                max(step["steps_behind"] for step in steps),
                format_seconds(seconds) if seconds else None,
                change and f"{change:.4f}",
                overlap and f"{100 * overlap:.0f}",
                "kept" if name in kept else "collected",
            ]
        )
    columns = [
        "version",
        "steps",
        "max. steps behind",
        "refresh time",
        "drift (1 − cosine)",
        "top-8 overlap, %",
        "state",
    ]
    print_table("Index versions that the trainer used", columns, rows)


def _refreshes(folder: Path) -> dict[str, dict]:
    """The refresher's log entry of each version."""
    path = folder / "refresher" / "log.jsonl"
    entries = read_log(path, {"version": str, "seconds": dict, "drift": dict})[0] if path.exists() else []
    return {entry["version"]: entry for entry in entries}


def print_next(run: Run) -> None:
    """Print the names of the result files, and commands to try next."""
    folder = run.folder
    console.print(
        f"\ncurves: {folder}/curves.png   figures: {folder}/summary.json   tensorboard --logdir {folder}/tensorboard"
    )
    console.print("next:")
    console.print(f'  realm ask --run {folder} "your question"')
    console.print(f"  realm evaluate --run {folder} --split validation")
    console.print(
        "  configs/demo-bert.yaml starts from a pretrained BERT; the README explains how to use your own documents"
    )
