"""Whether a trained retriever is better than the one that its stage started from, without
labels."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.held_out import MIN_QUESTIONS, criterion, measure_retriever, reciprocal
from realm.run.folder import STAGES, Run
from realm.runtime.bootstrap import bootstrap_interval
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import console

VERDICT = "verdict.json"
"""File beside the models of a stage."""


def give_verdict(run: Run, stage: str, folder: Path, start: Path) -> None:
    """Replace the trained retriever in `folder / "retriever"` by the one in `start`, unless it is
    better; write `verdict.json` and print the verdict in one sentence.

    Better: the mean reciprocal rank of what the held-out questions ask for (`held_out.criterion`)
    is higher, and the 95 % interval of the paired difference excludes 0; by fused retrieval if
    `fusion` is configured. With too few held-out questions the trained retriever stays. To be
    called on one rank.
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
    verdict = compare(before, after, "dense" if run.config.fusion.method == "none" else "fused")
    first, second, (low, high) = verdict["before"], verdict["after"], verdict["interval"]
    found = (
        f"of {verdict['questions']:,} held-out questions the {verdict['target']} passages are found with mean "
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


def compare(before: dict[str, Any], after: dict[str, Any], way: str) -> dict[str, Any]:
    """Compare two measurements by a way of scoring: mean reciprocal ranks in percent, the interval
    of their difference, and whether the second is better."""
    target = criterion(before["ranks"])
    pairs = [
        (one, other)
        for one, other in zip(before["ranks"][target][way], after["ranks"][target][way], strict=True)
        if one is not None
    ]
    mrr_B2 = 100.0 * reciprocal(np.array(pairs))
    low, high = bootstrap_interval(mrr_B2[:, 1] - mrr_B2[:, 0])
    return {
        "target": target,
        "way": way,
        "questions": len(pairs),
        "before": float(mrr_B2[:, 0].mean()),
        "after": float(mrr_B2[:, 1].mean()),
        "interval": [low, high],
        "better": low > 0,
    }
