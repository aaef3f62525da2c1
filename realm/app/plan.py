"""`realm plan`: forecast a run's time, memory and disk on this machine from short measurements."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from realm.app.corpus import prepare
from realm.app.step_timing import Contention, StagePlan, random_index, time_contention, time_encoding, time_stage
from realm.errors import UserError
from realm.run.config import RealmConfig
from realm.run.folder import STAGES, Run
from realm.runtime.telemetry import console, format_seconds, print_table, styled
from realm.runtime.threads import cores

SAMPLE_DOCUMENTS = 1000
"""Documents per source that are prepared for the measurement, if the corpus is not prepared."""


@dataclass(frozen=True)
class Plan:
    """A forecast; times in seconds, sizes in bytes."""

    passages: int
    stages: dict[str, StagePlan]
    encode_seconds: float
    """Time to encode all passages, with `refresh.threads`."""
    build_seconds: float
    dim: int
    index_bytes: int
    prepared_bytes: int
    refresh_period_seconds: float
    """Seconds of training between exports."""

    @property
    def refresh_seconds(self) -> float:
        """Seconds of one refresh."""
        return self.encode_seconds + self.build_seconds

    @property
    def lag(self) -> float:
        """Refresh time as a multiple of the time between exports."""
        return self.refresh_seconds / self.refresh_period_seconds


def plan(config: RealmConfig, passages: int | None = None) -> Plan:
    """Measure and print a forecast; `passages` is the size of a corpus that is not prepared yet.

    Raises UserError if the size of the corpus is unknown, and for every problem that would stop the
    run.
    """
    if passages is not None and passages < 1:
        raise UserError(f"--passages must be at least 1, got {passages}.")
    with tempfile.TemporaryDirectory(prefix="realm-plan-") as folder:
        if not (Path(config.corpus.prepared) / "passages" / "manifest.json").exists():
            if passages is None:
                raise UserError(
                    "the corpus is not prepared yet, so its size is unknown; add --passages N, "
                    "or run `realm prepare` first."
                )
            config = _sample(config, Path(folder))
        run = Run(Path(folder), config)
        count = passages or len(run.passages)
        index = random_index(run, count)
        stages = {name: time_stage(run, name, index) for name in STAGES if getattr(config, name).steps}
        rate = time_encoding(run)
        contention = Contention(1.0, 1.0)
        if "pretrain" in stages and not torch.cuda.is_available():
            contention = time_contention(run, index, rate.encoded_per_s)
        manifest = run.passages.manifest
        result = Plan(
            passages=count,
            stages=stages,
            encode_seconds=rate.start_s + count / rate.encoded_per_s,
            build_seconds=rate.build.seconds(count),
            dim=rate.dim,
            index_bytes=rate.build.size(count),
            prepared_bytes=int(count * manifest["bytes"] / manifest["blocks"]),
            refresh_period_seconds=float("inf"),
        )
    result = with_contention(result, contention, export_period(config))
    print_plan(result, config)
    return result


def _sample(config: RealmConfig, folder: Path) -> RealmConfig:
    """The config with a corpus prepared from the first documents of each source."""
    limit = min(SAMPLE_DOCUMENTS, config.corpus.limit or SAMPLE_DOCUMENTS)
    console.print(f"measuring on the first {limit:,} documents of each source")
    # The questions' passages may not be in the sample, so steps are timed without them.
    data, corpus = replace(config.data, train=None), replace(config.corpus, prepared=str(folder), limit=limit)
    config = replace(config, corpus=corpus, data=data)
    prepare(config)
    return config


def export_period(config: RealmConfig) -> int:
    """Steps between exports; for exports on drift only, steps between drift measurements."""
    return config.refresh.export_period or config.refresh.drift_every


def with_contention(result: Plan, contention: Contention, period_steps: int) -> Plan:
    """The plan with the REALM stage and the refresher running at the same time.

    Between two exports, the refresher is busy for R = `encoding_factor` × encoding + building
    seconds, during which steps take `step_factor` times as long.
    """
    if "pretrain" not in result.stages:
        return result
    stage = result.stages["pretrain"]
    encode_seconds = result.encode_seconds * contention.encoding_factor
    busy = encode_seconds + result.build_seconds
    alone = period_steps * stage.seconds_per_step
    period = min(alone + busy * (1 - 1 / contention.step_factor), alone * contention.step_factor)
    stages = result.stages | {"pretrain": replace(stage, seconds_per_step=period / period_steps)}
    return replace(result, stages=stages, encode_seconds=encode_seconds, refresh_period_seconds=period)


def print_plan(result: Plan, config: RealmConfig) -> None:
    """Print tables of times and sizes, and a warning for each expected problem."""
    _print_training(result)
    _print_refreshing(result, config)
    _print_sizes(result, config)
    for line in warnings(result, config):
        console.print(styled(("warning: ", "bold"), line))


def _print_training(result: Plan) -> None:
    rows: list[list[object]] = []
    for name, stage in result.stages.items():
        seconds = stage.seconds_per_step
        rate = f"{1 / seconds:.2f}" if seconds < 1 else f"1 / {seconds:.1f} s"
        rows.append([name, f"{stage.steps:,}", rate, format_seconds(stage.seconds)])
    rows.append(["all stages", "", "", format_seconds(sum(stage.seconds for stage in result.stages.values()))])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores()} CPU cores"
    print_table(f"Training with one process, {device}", ["stage", "steps", "steps per second", "time"], rows)


def _print_refreshing(result: Plan, config: RealmConfig) -> None:
    steps = export_period(config)
    behind = result.lag * steps
    print_table(
        f"Refreshing an index of {result.passages:,} passages, {result.dim} dimensions, "
        f"{config.refresh.threads} threads",
        ["figure", "value"],
        [
            ["passages encoded per second", f"{result.passages / result.encode_seconds:,.0f}"],
            ["one refresh", format_seconds(result.refresh_seconds)],
            ["training between exports", format_seconds(result.refresh_period_seconds)],
            ["steps that the index is behind", f"{behind:,.0f} to {behind + max(behind, steps):,.0f}"],
        ],
    )


def _print_sizes(result: Plan, config: RealmConfig) -> None:
    if not result.stages:
        return
    biggest = max(result.stages.values(), key=lambda stage: stage.parameters * 16 + stage.activation_bytes)
    model = biggest.parameters * 4
    exports = config.pretrain.steps // export_period(config) * model // 2
    sizes: list[tuple[str, int, int]] = [
        ("parameters", model, 0),
        ("gradients", model, 0),
        ("optimizer", 2 * model, 0),
        ("activations", biggest.activation_bytes, 0),
        ("index", result.index_bytes, (config.refresh.keep_last + 1) * result.index_bytes),
        ("embeddings being built", 0, result.passages * result.dim * 4),
        ("prepared corpus", 0, result.prepared_bytes),
        ("checkpoints of a stage", 0, config.engine.keep_checkpoints * model * 3),
        ("exported encoders", 0, exports),
    ]
    sizes.append(("total", sum(memory for _, memory, _ in sizes), sum(disk for *_, disk in sizes)))
    rows: list[list[object]] = [[name, _size(memory), _size(disk)] for name, memory, disk in sizes]
    print_table("Memory of the largest stage, and disk", ["part", "memory", "disk"], rows)


def warnings(result: Plan, config: RealmConfig) -> list[str]:
    """Expected problems, each with a remedy."""
    found = []
    steps = export_period(config)
    if result.lag > 1:
        enough = int(np.ceil(steps * result.lag / 10) * 10)
        found.append(
            f"a refresh takes {format_seconds(result.refresh_seconds)}, longer than the "
            f"{format_seconds(result.refresh_period_seconds)} between two exports, so some exports are not indexed; "
            f"set refresh.export_every to {enough} or more, or run the refresher with more threads or on a GPU."
        )
    limit = config.refresh.max_stale_steps
    if limit is not None and steps * result.lag > limit:
        found.append(
            f"the index will be more than refresh.max_stale_steps = {limit} steps behind "
            f"(refresh.stale_policy: {config.refresh.stale_policy}); raise the limit, or refresh faster."
        )
    return found


def _size(number: int) -> str:
    """Bytes in a readable unit; a dash for 0."""
    if not number:
        return "–"
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
