"""What all stages but REALM share: training from the newest checkpoint to the end, and
publishing the result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from realm.models.reader import Reader, save_reader
from realm.models.retriever import Retriever, save_retriever
from realm.run.folder import Run
from realm.runtime.distributed import is_rank_zero
from realm.runtime.publish import published
from realm.runtime.telemetry import Metrics
from realm.training.engine import Engine, Loop


def train_stage(
    run: Run, stage: str, engine: Engine, batches: Callable[[int], Any], note: Callable[[dict[str, float]], str]
) -> float:
    """Train a stage whose batches are a function of the step; returns the seconds it has trained,
    earlier attempts included.

    `note(values)` is the progress line's account of a step. Raises Interrupted after Ctrl-C, the
    checkpoint being written.
    """
    config = getattr(run.config, stage)
    loop = Loop(
        engine, run.stage(stage), stage, config.steps, config.checkpoint_every, run.config.engine, run.config.seed
    )
    start, state, _ = loop.resume()
    metrics = Metrics(run.folder, stage, is_rank_zero())
    seconds = loop.run(
        start, lambda step: batches(step).to(engine.device), metrics, note, seconds_before=state.get("seconds", 0.0)
    )
    metrics.close()
    return seconds


def save_models(
    run: Run, stage: str, seconds: float, retriever: Retriever | None = None, reader: Reader | None = None
) -> None:
    """Publish the stage's result, all at once: the stage has ended."""
    if not is_rank_zero():
        return
    with published(run.model(stage)) as folder:
        if retriever is not None:
            export_retriever(run, retriever, folder / "retriever")
        if reader is not None:
            save_reader(reader, run.tokenizer, folder / "reader")
        (folder / "seconds.txt").write_text(f"{seconds:.3f}\n")


def export_retriever(run: Run, retriever: Retriever, folder: Path) -> None:
    """Write a retriever with the run's tokenizer and lengths."""
    save_retriever(
        retriever, run.tokenizer, folder, run.config.retriever.max_query_tokens, run.config.retriever.max_passage_tokens
    )
