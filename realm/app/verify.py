"""`realm verify`: check every part of a run, and say how to rebuild what is damaged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.compare import read_predictions
from index.admin import index_stores, list_versions, verify
from index.measurements import HELD_OUT
from pretrain.verdict import VERDICT
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.models.reader import load_reader
from realm.models.retriever_files import load_retriever
from realm.run.folder import STAGES, Run
from realm.runtime.publish import MANIFEST, read_json, read_manifest
from realm.runtime.telemetry import METRIC_FIELDS, console, print_table, read_log
from realm.runtime.versions import Lineage, versions_in
from realm.training.checkpoints import check_checkpoint, checkpoints

WHOLE, UNKNOWN, DAMAGED, MISSING = "whole", "readable, no checksums", "damaged", "missing"


@dataclass(frozen=True)
class Part:
    """One part of a run, and its state."""

    name: str
    """Path relative to the run folder, or of the prepared corpus."""
    state: str
    problem: str = ""
    """What is wrong, and the remedy."""

    @property
    def is_sound(self) -> bool:
        return self.state in (WHOLE, UNKNOWN)


def verify_run(folder: Path) -> list[Part]:
    """Read every file of a run and of its prepared corpus, and print a table of their states.

    Files are compared with the checksums that were recorded when they were written; parts of
    earlier versions without checksums are opened. Raises UserError if a part is damaged or missing,
    after the table.
    """
    parts = list(_parts(Run.open(folder)))
    print_table(f"Parts of {folder}", ["part", "state"], [[part.name, part.state] for part in parts])
    unsound = [part for part in parts if not part.is_sound]
    for part in unsound:
        console.print(f"  {part.name}: {part.problem}", markup=False)
    if unsound:
        verb = "part is" if len(unsound) == 1 else "parts are"
        raise UserError(f"{len(unsound)} {verb} damaged or missing in {folder}; the lines above name each remedy.")
    return parts


def _parts(run: Run) -> Iterator[Part]:
    yield Part("config.yaml", WHOLE)
    yield from _misplaced(run.folder)
    yield from _prepared(run)
    for path in (run.folder / "initial/retriever", *(run.folder / "encoders" / name for name in _encoders(run.folder))):
        if path.exists():
            yield _model(run, path, "retriever", "remove it, and the next command that needs it writes it again")
    for name in STAGES:
        yield from _stage(run, name)
    yield from _indexes(run)
    yield from _records(run)


def _misplaced(folder: Path) -> Iterator[Part]:
    """Files where a run has folders."""
    inside = (path for name in STAGES for path in (name, f"{name}/model", f"{name}/checkpoints"))
    parts = ("initial", "encoders", "indexes", "refresher", "frozen", "evaluations", HELD_OUT)
    for name in (*parts, *inside):
        if (folder / name).is_file():
            yield Part(name, DAMAGED, f"{folder / name} is a file instead of a folder; remove it")


def _encoders(store: Path) -> list[str]:
    return [version.name for version in versions_in(store / "encoders")]


def _check(name: str, check: Callable[[], bool | None], remedy: str = "") -> Part:
    """The part `name`; `check()` raises UserError if it is damaged, and returns False if it has no
    checksums."""
    try:
        has_checksums = check()
    except UserError as error:
        return Part(name, DAMAGED, f"{error}{remedy}")
    except OSError as error:
        return Part(name, DAMAGED, f"{error.filename or name} cannot be read ({error.strerror}){remedy}")
    return Part(name, UNKNOWN if has_checksums is False else WHOLE)


def _read(read: Callable[[Any], object], source: object) -> None:
    """Read a part that has no checksums; `read(source)` raises UserError if it is damaged."""
    read(source)


def _prepared(run: Run) -> Iterator[Part]:
    kinds = ("passages",) if run.config.corpus.statements is None else ("passages", "statements")
    for kind in kinds:

        def check(path: Path = run.prepared / kind) -> bool:
            corpus = PreparedCorpus.open(path)
            corpus.check()
            return corpus.has_checksums

        yield _check(f"{run.prepared / kind}", check)
    folder = run.prepared / "tokenizer"
    yield _check(f"{folder}", lambda: bool(run.tokenizer) and (folder / MANIFEST).exists())


def _model(run: Run, path: Path, part: str, remedy: str) -> Part:
    def check() -> bool:
        load_retriever(path) if part == "retriever" else load_reader(path)
        return (path / MANIFEST).exists()

    return _check(path.relative_to(run.folder).as_posix(), check, f"; {remedy}")


def _stage(run: Run, name: str) -> Iterator[Part]:
    stage, models = run.stage(name), run.model(name)
    again = f"to train the stage again, remove {stage}"
    names = list(STAGES)
    later = any(run.finished(other) for other in names[names.index(name) + 1 :])
    if run.finished(name):
        for part in STAGES[name].models:
            yield _model(run, models / part, part, again)
        yield _check(f"{name}/model/seconds.txt", partial(_read, run.seconds, name))
        if (verdict := models / VERDICT).exists():
            yield _check(f"{name}/model/{VERDICT}", partial(_read, partial(read_json, remedy="remove it"), verdict))
    elif stage.exists() and later:
        yield Part(f"{name}/model", MISSING, f"{models} is missing; restore it from a copy, or {again}")
    remedy = "remove it, or resume: an older whole checkpoint is used if there is one"
    for folder in checkpoints(stage):
        yield _check(folder.relative_to(run.folder).as_posix(), partial(check_checkpoint, folder, remedy))


def _indexes(run: Run) -> Iterator[Part]:
    for store in index_stores(run.folder):
        if store != run.folder:
            for name in _encoders(store):
                yield _model(run, store / "encoders" / name, "retriever", f"remove {store}, which is built again")
        path = store / "lineage.json"
        yield _check(path.relative_to(run.folder).as_posix(), partial(_read, Lineage.load, store))
    try:
        versions = list_versions(run.folder)
    except UserError as error:
        if any(True for _ in index_stores(run.folder)):
            yield Part("indexes", MISSING, str(error))
        return
    for info in versions:
        problem = verify(info, lambda line: None)
        name = info.path.relative_to(run.folder).as_posix()
        remedy = f"{problem}; remove {info.path}, and `realm refresh --run {run.folder} --once` or the next command "
        yield Part(name, WHOLE) if problem is None else Part(name, DAMAGED, f"{remedy}that needs it builds it again")


def _records(run: Run) -> Iterator[Part]:
    """The metrics, the summary and the evaluations."""
    metrics, summary = run.folder / "metrics.jsonl", run.folder / "summary.json"
    if metrics.exists():
        yield _check("metrics.jsonl", partial(_check_metrics, metrics))
    if summary.exists():
        again = "remove it, and `realm run --resume` writes it again"
        yield _check("summary.json", partial(_read, partial(read_json, remedy=again), summary))
    for folder in sorted((run.folder / HELD_OUT).glob("*/")):
        again = f"remove {folder}, to measure the retriever again"
        yield _check(f"{HELD_OUT}/{folder.name}", partial(_read, partial(read_manifest, remedy=again), folder))
    evaluations = run.folder / "evaluations"
    for path in sorted(evaluations.glob("*.json")):
        yield _check(f"evaluations/{path.name}", partial(_check_report, path))


def _check_metrics(path: Path) -> None:
    """Raise UserError if lines cannot be read; the last one may be incomplete after a kill."""
    _, skipped = read_log(path, METRIC_FIELDS)
    if skipped:
        raise UserError(f"{skipped} lines of {path} cannot be read; curves and summary leave them out.")


def _check_report(path: Path) -> None:
    """Check the figures of an evaluation, and that each of its predictions can be read."""
    again = "remove it and evaluate again"
    report = read_json(path, again)
    if not isinstance(report, dict):
        raise UserError(f"{path} contains no figures; {again}.")
    for label in report.get("figures", ()):
        predictions = path.with_name(f"{path.stem}.{label}.predictions.jsonl")
        count = len(read_predictions(predictions))
        if count != report["count"]:
            raise UserError(f"{predictions} has {count} predictions, but {path} says {report['count']}; {again}.")
