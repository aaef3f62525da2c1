"""The training loop of all stages: step, log, checkpoint, resume, interrupt."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from realm.errors import UserError
from realm.runtime.distributed import any_rank, is_rank_zero, mean_over_ranks, on_rank_zero
from realm.runtime.signals import Interrupted, stop_signals
from realm.runtime.telemetry import Metrics, peak_memory, progress
from realm.training.checkpoints import checkpoint_folder, checkpoints, newest_checkpoint
from realm.training.engine import Engine
from realm.training.sections import EngineConfig
from realm.training.stage import Stage
from realm.training.streams import seed_step


def train(stage: Stage, run_folder: Path, config: EngineConfig, seed: int) -> float:
    """Train `stage` to its last step, starting from its newest checkpoint in `run_folder`.

    Returns the seconds of training, including those before the checkpoint. After Ctrl-C or SIGTERM,
    finishes the current step, writes a checkpoint, and raises Interrupted. Raises UserError if a
    loss or weight is not finite; nothing of that step is saved or exported.
    """
    engine = Engine(stage.module, stage.config, config, stage.modules_called_between_steps())
    folder = run_folder / stage.name
    start, seconds_before = 0, 0.0
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        state = engine.load(checkpoint)
        start, seconds_before = state["step"], state.get("seconds", 0.0)
    stage.begin(engine)
    if checkpoint is not None:
        stage.restore(checkpoint, start)
    began = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    metrics = Metrics(run_folder, stage.name, is_rank_zero())
    steps, every_s = stage.config.steps, config.log_every_s
    with stop_signals() as stop, progress(stage.name, steps, start, every_s=every_s) as ticker:
        for step in range(start, steps):
            values = _step(stage, engine, step, seed, folder)
            done = step + 1
            metrics.log(done, values)
            ticker.update(done, stage.progress_line(values))
            interrupted = any_rank(stop.is_set())
            due = stage.checkpoint_at_end if done == steps else done % stage.config.checkpoint_every == 0
            if interrupted or due:
                state = {"step": done, "seconds": seconds(), "started_from": stage.started_from}
                state |= {"settings": stage.settings, **stage.state()}
                engine.save(checkpoint_folder(folder, done), state, stage.save)
                on_rank_zero(lambda: _remove_old_checkpoints(folder, config.keep_checkpoints))
            if interrupted:
                raise Interrupted(
                    f"{stage.name} was interrupted at step {done} of {steps}; rerun with --resume to continue."
                )
    metrics.close()
    return seconds()


def _step(stage: Stage, engine: Engine, step: int, seed: int, folder: Path) -> dict[str, Any]:
    """Train one step; returns its figures. Raises UserError if training has diverged."""
    seed_step(seed, step)
    began = time.monotonic()
    batch = stage.batch(step).to(engine.device)
    drawn = time.monotonic()
    values: dict[str, Any] = mean_over_ranks(engine.step(batch))
    if any_rank(not (math.isfinite(values["loss"]) and engine.weights_are_finite())):
        raise UserError(_diverged(stage, step + 1, values["loss"], folder))
    values |= {"seconds/batch": drawn - began, "seconds/update": time.monotonic() - drawn}
    values |= stage.after_step(step + 1)
    return values | {"seconds/step": time.monotonic() - began} | peak_memory()


def _diverged(stage: Stage, step: int, loss: float, folder: Path) -> str:
    """The message for a step whose loss or weights are not finite."""
    checkpoint = newest_checkpoint(folder)
    saved = f"the last valid checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"
    return (
        f"{stage.name} diverged at step {step}: the loss is {loss}, or a weight is not finite; {saved}; train in a "
        f"new run (--run) with a lower {stage.name}.optim.lr or more {stage.name}.optim.warmup_steps."
    )


def _remove_old_checkpoints(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
