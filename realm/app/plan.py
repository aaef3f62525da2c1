"""`realm plan`: what a run will take on this machine, from a short measured calibration, before
anything is paid for."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from realm.app.pipeline import prepare
from realm.app.step_timing import StagePlan, time_encoding, time_stage
from realm.errors import UserError
from realm.run.config import RealmConfig
from realm.run.folder import STAGES, Run
from realm.runtime.telemetry import console, format_seconds, print_table
from realm.runtime.threads import cores

SAMPLE_DOCUMENTS = 1000
"""Documents of each source that are prepared to calibrate on where the corpus is not prepared yet."""


@dataclass(frozen=True)
class Plan:
    """Times in seconds, sizes in bytes."""

    passages: int
    stages: dict[str, StagePlan]
    encode_seconds: float
    """All passages, by a refresher with `refresh.threads`."""
    build_seconds: float
    dim: int
    index_bytes: int
    prepared_bytes: int
    refresh_period_seconds: float
    """Seconds of training between two exports."""

    @property
    def refresh_seconds(self) -> float:
        return self.encode_seconds + self.build_seconds


def plan(config: RealmConfig, passages: int | None = None) -> Plan:
    """Calibrate and print; `passages` is the size of the corpus where only a sample of it is at
    hand.

    Raises UserError where nothing is prepared and `passages` is not given, and for everything that
    would stop the run itself.
    """
    if passages is not None and passages < 1:
        raise UserError(f"--passages must be at least 1, got {passages}.")
    with tempfile.TemporaryDirectory(prefix="realm-plan-") as folder:
        prepared = (Path(config.corpus.prepared) / "passages" / "manifest.json").exists()
        if not prepared:
            if passages is None:
                raise UserError(
                    "nothing is prepared yet, so the size of the corpus is not known; give it with --passages N, or run realm prepare."
                )
            limit = min(SAMPLE_DOCUMENTS, config.corpus.limit or SAMPLE_DOCUMENTS)
            console.print(f"calibrating on a sample of {limit:,} documents of each source")
            sample = replace(config.corpus, prepared=folder, limit=limit)
            config = replace(config, corpus=sample)
            prepare(config)
        run = Run(Path(folder), config)
        count = passages or len(run.passages)
        stages = {stage: time_stage(run, stage) for stage in STAGES if getattr(config, stage).steps}
        rate = time_encoding(run)
        manifest = run.passages.manifest
        result = Plan(
            passages=count,
            stages=stages,
            encode_seconds=rate.start_s + count / rate.encoded_per_s,
            build_seconds=count / rate.added_per_s,
            dim=rate.dim,
            index_bytes=int(rate.fixed_bytes + count * rate.vector_bytes),
            prepared_bytes=int(count * manifest["bytes"] / manifest["blocks"]),
            refresh_period_seconds=_period(stages["pretrain"].seconds_per_step, config)
            if "pretrain" in stages
            else float("inf"),
        )
    result = _with_refresher(result, config)
    print_plan(result, config)
    return result


def _with_refresher(result: Plan, config: RealmConfig) -> Plan:
    """On a CPU the refresher takes cores from the trainer for as long as it encodes; on a GPU of
    its own it takes nothing."""
    if "pretrain" not in result.stages or torch.cuda.is_available():
        return result
    trainer = config.threads("pretrain") or torch.get_num_threads()
    left = min(1.0, max(0.5, cores() - config.refresh.threads) / trainer)
    stage = result.stages["pretrain"]
    busy = min(1.0, result.refresh_seconds / result.refresh_period_seconds)
    # While it encodes, the trainer's step takes 1/left as long, and the period with it.
    slower = stage.seconds_per_step * (1 - busy + busy / left)
    stages = result.stages | {"pretrain": replace(stage, seconds_per_step=slower)}
    return replace(result, stages=stages, refresh_period_seconds=_period(slower, config))


def _steps_between(config: RealmConfig) -> int:
    """Steps between two exports; where drift alone decides, nobody knows before, and the looks
    at it are what a plan can count on."""
    return config.refresh.period or config.refresh.drift_every


def _period(seconds_per_step: float, config: RealmConfig) -> float:
    return seconds_per_step * _steps_between(config)


def print_plan(result: Plan, config: RealmConfig) -> None:
    """Tables of times and sizes, and a warning for each thing that will not go well."""
    rows: list[list[object]] = [
        [stage, f"{entry.steps:,}", f"{1 / entry.seconds_per_step:.2f}" if entry.seconds_per_step < 1 else f"1 / {entry.seconds_per_step:.1f} s",
         format_seconds(entry.seconds)] for stage, entry in result.stages.items()
    ]  # fmt: skip
    rows.append(["all stages", "", "", format_seconds(sum(entry.seconds for entry in result.stages.values()))])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
    print_table(f"Training on one process, {device}", ["stage", "steps", "steps a second", "time"], rows)
    lag = result.refresh_seconds / result.refresh_period_seconds * _steps_between(config)
    print_table(
        f"Refreshing an index of {result.passages:,} passages, {result.dim} dimensions, {config.refresh.threads} threads",
        ["what", "value"],
        [
            ["passages encoded a second", f"{result.passages / result.encode_seconds:,.0f}"],
            ["one refresh", format_seconds(result.refresh_seconds)],
            ["training between two exports", format_seconds(result.refresh_period_seconds)],
            ["the index is behind by", f"{lag:,.0f} to {lag + max(lag, _steps_between(config)):,.0f} steps"],
        ],
    )
    biggest = max(
        result.stages.values(), key=lambda entry: entry.parameters * 16 + entry.activation_bytes, default=None
    )
    if biggest is not None:
        model = biggest.parameters * 4
        checkpoints = config.engine.keep_checkpoints * model * 3
        exports = config.pretrain.steps // _steps_between(config) * model // 2
        sizes: list[tuple[str, int, int]] = [
            ("parameters", model, 0),
            ("gradients", model, 0),
            ("optimiser", 2 * model, 0),
            ("activations", biggest.activation_bytes, 0),
            ("index", result.index_bytes, (config.refresh.keep_last + 1) * result.index_bytes),
            ("embeddings being built", 0, result.passages * result.dim * 4),
            ("prepared corpus", 0, result.prepared_bytes),
            ("checkpoints of a stage", 0, checkpoints),
            ("exported encoders", 0, exports),
        ]
        total = ("in all", sum(size[1] for size in sizes), sum(size[2] for size in sizes))
        table: list[list[object]] = [[name, _size(memory), _size(disk)] for name, memory, disk in (*sizes, total)]
        print_table("Memory of the largest stage, and disk", ["part", "memory", "disk"], table)
    for line in warnings(result, config):
        console.print(f"[bold]warning:[/bold] {line}")


def warnings(result: Plan, config: RealmConfig) -> list[str]:
    """What will not go well, each with a remedy."""
    found = []
    if result.refresh_seconds > result.refresh_period_seconds:
        enough = int(np.ceil(_steps_between(config) * result.refresh_seconds / result.refresh_period_seconds / 10) * 10)
        found.append(
            f"a refresh takes {format_seconds(result.refresh_seconds)}, longer than the {format_seconds(result.refresh_period_seconds)} between two "
            f"exports: some exports get no index; set refresh.export_every to {enough} or more, or give the refresher more threads or a GPU."
        )
    limit = config.refresh.max_stale_steps
    lag = _steps_between(config) * result.refresh_seconds / result.refresh_period_seconds
    if limit is not None and lag > limit:
        found.append(
            f"the index will be more than refresh.max_stale_steps = {limit} steps behind; policy: {config.refresh.stale_policy}."
        )
    return found


def _size(number: int) -> str:
    if not number:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.1f} TiB"
