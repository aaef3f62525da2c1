"""Train a stage of a run from start to finish, and publish its models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from realm.models.reader import save_reader
from realm.models.retriever import Retriever
from realm.models.retriever_files import save_retriever
from realm.run.folder import Run
from realm.runtime.distributed import on_rank_zero
from realm.runtime.publish import published
from realm.runtime.threads import cpu_threads
from realm.training.loop import train
from realm.training.stage import Stage
from realm.training.streams import RunStream, run_seed


def train_stage(run: Run, name: str, open_stage: Callable[[Run], Stage], resume: bool = False) -> None:
    """Train the stage `name`, opened by `open_stage(run)`, and publish its models.

    They are published in `NAME/model`. A finished stage is not changed. Raises UserError if the
    stage was already started, unless `resume`, and if another process is training the run. Raises
    Interrupted after Ctrl-C, once a checkpoint is written.
    """
    with run.train_lock():
        if not run.begin(name, resume):
            return
        torch.manual_seed(run_seed(run.config.seed, RunStream[name.upper()]))
        config = replace(run.config.engine, threads=run.config.threads(name))
        with cpu_threads(config.threads), open_stage(run) as stage:
            stage.started_from, stage.settings = run.starting_models(name), run.settings(name)
            seconds = train(stage, run.folder, config, run.config.seed)
            _publish_models(run, stage, seconds)
            stage.finish()


def _publish_models(run: Run, stage: Stage, seconds: float) -> None:
    """Publish the stage's models atomically, which marks the stage as finished."""
    assert stage.engine is not None
    models = [model for model in (stage.retriever, stage.reader) if model is not None]

    def publish() -> None:
        stage.before_saving()
        with published(run.model(stage.name)) as folder:
            if stage.retriever is not None:
                export_retriever(run, stage.retriever, folder / "retriever")
            if stage.reader is not None:
                save_reader(stage.reader, run.tokenizer, folder / "reader")
            (folder / "seconds.txt").write_text(f"{seconds:.3f}\n")
            stage.after_saving(folder)

    with stage.engine.gathered(*models):
        on_rank_zero(publish)


def export_retriever(run: Run, retriever: Retriever, folder: Path) -> None:
    """Save a retriever with the run's tokenizer and maximum lengths."""
    config = run.config.retriever
    save_retriever(retriever, run.tokenizer, folder, config.max_query_tokens, config.max_passage_tokens)
