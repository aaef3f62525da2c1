"""The end of a run as people see it: one table, a picture of the curves, questions answered,
what to type next."""

import json
from pathlib import Path

from realm.run.folder import STAGES, Run
from realm.runtime.publish import versions_in
from realm.runtime.telemetry import console, format_seconds, print_table, read_metrics

_STAGE_TITLES = {
    "prepare": "prepare",
    "ict": "inverse cloze",
    "reader_pretraining": "reader pretraining",
    "pretrain": "REALM",
    "finetune_retriever": "finetune the retriever",
    "finetune": "finetune",
    "evaluate": "evaluate",
}
_PROBE_COLUMNS = ("accuracy_null", "accuracy_random", "accuracy_gold", "accuracy_retrieved", "recall@1", "recall@5")


def print_summary(
    run: Run,
    stage_times: dict[str, float],
    probes: dict[str, dict[str, float]],
    figures: dict[str, float],
    summary: dict[str, float],
) -> None:
    """Print the table, the index versions, the summary and what to do next."""
    rows = []
    for stage, seconds in stage_times.items():
        probe = probes.get(stage, {})
        row: list[object] = [
            _STAGE_TITLES[stage],
            format_seconds(seconds),
            *(probe.get(column) for column in _PROBE_COLUMNS),
        ]
        row += [figures.get(name) if stage == "evaluate" else None for name in ("recall@1", "recall@5", "em")]
        rows.append(row)
    console.print()
    columns = [
        "stage",
        "time",
        "null",
        "random",
        "gold",
        "retrieved",
        "R@1",
        "R@5",
        "question R@1",
        "question R@5",
        "EM",
    ]
    print_table(
        "Masked spans right (%) from the null / a random / the gold / retrieved passages; masked-span recall; questions",
        columns,
        rows,
    )
    rows_by_version: dict[str, list[dict]] = {}
    for row_ in read_metrics(run.folder / "metrics.jsonl").get("pretrain", []):
        rows_by_version.setdefault(row_["index"], []).append(row_)
    if rows_by_version:
        kept = {version.name for version in versions_in(run.folder / "indexes")}
        refreshes = _refreshes(run.folder)
        table = []
        for name, used in rows_by_version.items():
            refresh = refreshes.get(name, {})
            drift, took = refresh.get("drift", {}), sum(refresh.get("seconds", {}).values())
            moved, common = drift.get("cosine_change"), drift.get("overlap@8")
            behind = max(row_["steps_behind"] for row_ in used)
            row = [name, f"{used[0]['step']}–{used[-1]['step']}", behind, format_seconds(took) if took else None]
            table.append(
                [
                    *row,
                    moved and f"{moved:.4f}",
                    common and f"{100 * common:.0f}",
                    "kept" if name in kept else "collected",
                ]
            )
        columns = [
            "version",
            "steps",
            "most steps behind",
            "refresh took",
            "moved (1 − cosine)",
            "top 8 in common, %",
            "now",
        ]
        print_table("Index versions the trainer used", columns, table)
    console.print("  " + "  ".join(f"{name} {value}" for name, value in summary.items()))


def _refreshes(folder: Path) -> dict[str, dict]:
    """What the refresher logged of each version."""
    path = folder / "refresher" / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["version"]: entry for entry in map(json.loads, lines)}


def print_next(run: Run) -> None:
    """Where everything lies, and what to type next."""
    console.print(
        f"\ncurves: {run.folder}/curves.png   figures: {run.folder}/summary.json   tensorboard --logdir {run.folder}/tensorboard"
    )
    console.print("next:")
    console.print(f'  realm ask --run {run.folder} "your question"')
    console.print(f"  realm evaluate --run {run.folder} --split validation")
    console.print("  configs/demo-bert.yaml starts from a real BERT; the README tells how to use documents of your own")


def draw_curves(folder: Path, null: dict[str, list[float]]) -> None:
    """`curves.png`: loss of each stage, what retrieval does during REALM, staleness, and the
    null passage's mass where it is and is not needed."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(folder / "metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    stages = [stage for stage in STAGES if stage in metrics]
    for stage in stages:
        axes[0, 0].plot(*_series(metrics[stage], "loss", share=True), label=_STAGE_TITLES[stage])
    axes[0, 0].set(title="Loss by stage", xlabel="share of the stage's steps", ylabel="loss (nats)", yscale="log")
    axes[0, 0].legend()
    realm = metrics.get("pretrain", [])
    if realm:
        for name, label in (
            ("candidate_hit_rate", "candidates holding the span"),
            ("null_mass", "p(null|x)"),
            ("accuracy", "span right"),
        ):
            axes[0, 1].plot(*_series(realm, name), label=label)
        axes[0, 1].set(title="REALM: retrieval", xlabel="step", ylim=(0, 1))
        axes[0, 1].legend()
        axes[0, 2].plot(*_series(realm, "utility"), color="tab:green")
        axes[0, 2].axhline(0, color="grey", linewidth=0.5)
        axes[0, 2].set(title="REALM: retrieval utility", xlabel="step", ylabel="log p(y|z,x) − log p(y|null,x)")
        axes[1, 0].plot([row["step"] for row in realm], [row["steps_behind"] for row in realm], drawstyle="steps-post")
        axes[1, 0].set(title="Index: steps behind the trainer", xlabel="step", ylabel="steps")
    if "finetune" in metrics:
        for name, label in (("accuracy", "span right"), ("retriever_rows", "answer retrieved")):
            axes[1, 1].plot(*_series(metrics["finetune"], name), label=label)
        axes[1, 1].set(title="Finetuning", xlabel="step", ylim=(0, 1))
        axes[1, 1].legend()
    for name, label in (("known", "fact stands in a passage"), ("unsupported", "fact appears in no passage")):
        if null.get(name):
            masses = np.clip(null[name], 1e-5, 1.0)
            share = np.full(len(masses), 1 / len(masses))
            axes[1, 2].hist(
                masses,
                np.geomspace(1e-5, 1, 26),
                weights=share,
                alpha=0.6,
                label=f"{label} (mean {np.mean(null[name]):.3f})",
            )
    axes[1, 2].set(
        title="Mass of the null passage",
        xlabel="p(null|x), all below 1e-5 in the first bar",
        ylabel="share of statements",
        xscale="log",
    )
    if null:
        axes[1, 2].legend()
    figure.savefig(folder / "curves.png", dpi=80)
    plt.close(figure)


def _series(rows: list[dict], name: str, share: bool = False, smooth: int = 10) -> tuple[list[float], list[float]]:
    """Steps and running means over `smooth` rows."""
    last = rows[-1]["step"]
    steps = [row["step"] / last if share else float(row["step"]) for row in rows]
    values = [row[name] for row in rows]
    means = [sum(values[max(0, i - smooth + 1) : i + 1]) / (i + 1 - max(0, i - smooth + 1)) for i in range(len(values))]
    return steps, means
