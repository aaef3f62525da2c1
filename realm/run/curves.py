"""Draws `curves.png`: a run's losses, retrieval figures and staleness."""

from pathlib import Path
from typing import Any

import numpy as np

from realm.run.folder import STAGES
from realm.runtime.telemetry import read_metrics

_SMOOTH = 10
"""Steps of the running mean."""
_RETRIEVAL = {
    "candidate_hit_rate": "candidates that contain the span",
    "null_mass": "p(null|x)",
    "accuracy": "span predicted correctly",
    "span_accuracy": "span found correctly",
}
_FINETUNING = {"accuracy": "answer correct", "retriever_rows": "answer retrieved"}
_STATEMENTS = {"known": "fact in a passage", "unsupported": "fact in no passage"}


def draw_curves(folder: Path, null_masses: dict[str, list[float]]) -> None:
    """Draw losses, retrieval and staleness during REALM, finetuning, and p(null|x).

    `null_masses`: p(null|x) of statements whose fact is in a passage (`known`) or in none
    (`unsupported`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(folder / "metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    for stage in (stage for stage in STAGES if stage in metrics):
        axes[0, 0].plot(*_series(metrics[stage], "loss", relative=True), label=STAGES[stage].title)
    axes[0, 0].set(title="Loss by stage", xlabel="fraction of the stage's steps", ylabel="loss (nats)", yscale="log")
    axes[0, 0].legend()
    if steps := metrics.get("pretrain", []):
        _draw_fractions(axes[0, 1], steps, _RETRIEVAL, "REALM: retrieval")
        axes[0, 2].plot(*_series(steps, "utility"), color="tab:green")
        axes[0, 2].axhline(0, color="grey", linewidth=0.5)
        axes[0, 2].set(title="REALM: retrieval utility", xlabel="step", ylabel="log p(y|z,x) − log p(y|null,x)")
        axes[1, 0].plot(*_points(steps, "steps_behind"), drawstyle="steps-post")
        axes[1, 0].set(title="Index: steps behind the trainer", xlabel="step", ylabel="steps")
    if "finetune" in metrics:
        _draw_fractions(axes[1, 1], metrics["finetune"], _FINETUNING, "Finetuning")
    _draw_null_masses(axes[1, 2], null_masses)
    figure.savefig(folder / "curves.png", dpi=80)
    plt.close(figure)


def _draw_fractions(axis: Any, steps: list[dict], names: dict[str, str], title: str) -> None:
    """Plot figures between 0 and 1 by step."""
    for name, label in names.items():
        if name in steps[0]:
            axis.plot(*_series(steps, name), label=label)
    axis.set(title=title, xlabel="step", ylim=(0, 1))
    axis.legend()


def _draw_null_masses(axis: Any, null_masses: dict[str, list[float]]) -> None:
    """Plot histograms of p(null|x)."""
    for name, label in _STATEMENTS.items():
        if values := null_masses.get(name):
            clipped, weights = np.clip(values, 1e-5, 1.0), np.full(len(values), 1 / len(values))
            legend = f"{label} (mean {np.mean(values):.3f})"
            axis.hist(clipped, np.geomspace(1e-5, 1, 26), weights=weights, alpha=0.6, label=legend)
    xlabel = "p(null|x); the first bar includes all values below 1e-5"
    axis.set(title="Probability of the null passage", xlabel=xlabel, ylabel="fraction of statements", xscale="log")
    if null_masses:
        axis.legend()


def _series(steps: list[dict], name: str, relative: bool = False) -> tuple[list[float], list[float]]:
    """Steps (`relative`: as fractions of the last) and running means of a figure."""
    places, values = _points(steps, name)
    if relative:
        places = [place / steps[-1]["step"] for place in places]
    means = [float(np.mean(values[max(0, i - _SMOOTH + 1) : i + 1])) for i in range(len(values))]
    return places, means


def _points(steps: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure, where it was logged."""
    points = [(float(row["step"]), row[name]) for row in steps if isinstance(row.get(name), int | float)]
    return [step for step, _ in points], [value for _, value in points]
