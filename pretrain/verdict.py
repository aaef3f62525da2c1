"""Whether a trained retriever is better than the one that its stage started from, without
labels."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.held_out import MIN_QUESTIONS, measure_retriever
from realm.run.folder import STAGES, Run
from realm.runtime.bootstrap import bootstrap_interval
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console

VERDICT = "verdict.json"
"""File beside the models of a stage."""


def give_verdict(run: Run, stage: str, folder: Path, start: Path) -> None:
    """Replace the trained retriever in `folder / "retriever"` by the one in `start`, unless it is
    better; write `verdict.json` and print the verdict in one sentence.

    Better: the mean reciprocal rank of the held-out questions' supporting passages is higher, and
    the 95 % interval of the paired difference excludes 0; by fused retrieval if `fusion` is
    configured. If too few questions have a supporting passage, they are compared by the inner
    product and the sources; with too few questions the trained retriever stays. To be called on one
    rank.
    """
    trained, title = folder / "retriever", STAGES[stage].title
    before, after = measure_retriever(run, start), measure_retriever(run, trained)
    if before is None or after is None:
        if run.config.held_out.share:
            console.print(
                f"  {title}: no verdict, because the held-out documents give fewer than {MIN_QUESTIONS} questions; "
                "the trained retriever is published"
            )
        return
    known = sum(rank is not None for rank in before["ranks"]["supporting"]["dense"])
    fused = known >= MIN_QUESTIONS and run.config.fusion.method != "none"
    target = "supporting" if known >= MIN_QUESTIONS else "source"
    verdict = compare(before, after, target, "fused" if fused else "dense")
    first, second, (low, high) = verdict["before"], verdict["after"], verdict["interval"]
    found = (
        f"the {target} passages of {verdict['questions']:,} held-out questions are found with mean "
        f"reciprocal rank {first:.1f} before and {second:.1f} after (difference {second - first:+.1f}, 95 % interval "
        f"[{low:+.1f}, {high:+.1f}])"
    )
    if verdict["better"]:
        sentence = f"{title} made the retriever better: {found}; the trained one is published."
    else:
        sentence = f"{title} did not make the retriever better: {found}; the one it started from is published again."
        shutil.rmtree(trained)
        shutil.copytree(start, trained)
    write_json_atomic(folder / VERDICT, verdict | {"sentence": sentence})
    console.print(f"  verdict: {sentence}")


def compare(before: dict[str, Any], after: dict[str, Any], target: str, way: str) -> dict[str, Any]:
    """Compare two measurements by a target and a way of scoring: mean reciprocal ranks in percent,
    the interval of their difference, and whether the second is better."""
    pairs = zip(before["ranks"][target][way], after["ranks"][target][way], strict=True)
    mrr_B2 = 100.0 / np.array([pair for pair in pairs if pair[0] is not None])
    low, high = bootstrap_interval(mrr_B2[:, 1] - mrr_B2[:, 0])
    return {
        "target": target,
        "way": way,
        "questions": len(mrr_B2),
        "before": float(mrr_B2[:, 0].mean()),
        "after": float(mrr_B2[:, 1].mean()),
        "interval": [low, high],
        "better": low > 0,
    }
