"""The commands that meet damage: how each is called, and what its result is."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm.app.cli import _parser
from realm.run.folder import STAGES
from tests.tiny import TOWNS


@dataclass(frozen=True)
class Command:
    """A command line, the state of the run it starts from, and its result."""

    arguments: tuple[str, ...]
    """`{folder}` is replaced by the folder that contains the run."""
    result: Callable[[Path, str], Any]
    """What a run of the command must reproduce: a function of the folder and the standard
    output."""
    stopped: str | None = None
    """The stage in which the run was stopped; None: the run is finished."""
    may_report: str = ""
    """Pattern of lines by which the output may report the damage instead."""
    paths: str = ""
    """Pattern of the beginnings of the paths that the command may read; all by default."""
    seconds: float = 0.2
    """About how long the command takes."""


def _output(folder: Path, output: str) -> str:
    """The output without its indented notes."""
    return "\n".join(line for line in output.splitlines() if not line.startswith("  "))


def listing(folder: Path, output: str) -> list[str]:
    """The versions that the output names."""
    return re.findall(r"(?:frozen/\w+/)?indexes/[\w-]+", output)


def _manifest(folder: Path, output: str) -> Any:
    return {name: value for name, value in json.loads(output).items() if name != "bytes"}


def _answer(folder: Path, output: str) -> str:
    return output[output.index("Who founded") :]


def _figures(folder: Path, output: str) -> Any:
    report = json.loads((folder / "run/evaluations/test.json").read_bytes())
    return (
        report["figures"],
        report["intervals"],
        (folder / "run/evaluations/test.finetune.predictions.jsonl").read_text(),
    )


def _summary(folder: Path, output: str) -> Any:
    summary = json.loads((folder / "run/summary.json").read_bytes())
    return {name: value for name, value in summary.items() if "seconds" not in name}, _answers(output)


def _answers(output: str) -> str:
    return output[output.index("Sample answers") : output.index("curves:")]


def _models(stage: str) -> Callable[[Path, str], Any]:
    def weights(folder: Path, output: str) -> Any:
        model = folder / "run" / stage / "model"
        return {file.relative_to(model).as_posix(): file.read_bytes() for file in sorted(model.rglob("*.safetensors"))}

    return weights


def _prepared(folder: Path, output: str) -> Any:
    return {kind: _corpus(folder / "prepared" / kind) for kind in ("passages", "statements")}, (
        folder / "prepared/tokenizer/tokenizer.json"
    ).read_bytes()


def _corpus(path: Path) -> Any:
    from realm.corpus.prepared import PreparedCorpus

    corpus = PreparedCorpus.open(path)
    rows = corpus.rows.tolist()
    return corpus.fingerprint, [
        (corpus.ids[row], corpus.title(row), corpus.text(row), corpus.text_ids(row).tolist()) for row in rows
    ]


def _index(folder: Path, output: str) -> Any:
    """The embeddings of the newest index of the run."""
    from index.search import PassageIndex
    from realm.corpus.prepared import PreparedCorpus
    from realm.runtime.versions import versions_in

    corpus = PreparedCorpus.open(folder / "prepared/passages")
    version = versions_in(folder / "run/indexes")[-1]
    index = PassageIndex.open(folder / "run/indexes" / version.name, corpus.fingerprint)
    found = version.encoder.name, np.round(index.embeddings(corpus.rows), 5).tolist(), corpus.fingerprint
    index.close()
    return found


def versions(folder: Path, output: str) -> list[str]:
    kinds = ("encoders", "indexes", "frozen/*/encoders", "frozen/*/indexes")
    found = (path for kind in kinds for path in sorted((folder / "run").glob(f"{kind}/a*")) if path.is_dir())
    return [path.relative_to(folder / "run").as_posix() for path in found]


def _nothing(folder: Path, output: str) -> None:
    return None


_QUESTION = f"Who founded {TOWNS[3]}?"
_RUN, _CONFIG = ("--run", "{folder}/run"), ("--config", "{folder}/config.yaml")
COMMANDS: dict[str, Command] = {
    "ask": Command(("ask", *_RUN, _QUESTION), _answer),
    "ask --stage pretrain": Command(("ask", *_RUN, "--stage", "pretrain", _QUESTION), _answer),
    "evaluate": Command(("evaluate", *_RUN), _figures),
    "compare": Command(
        ("compare", *(f"{{folder}}/run/evaluations/{name}.finetune.predictions.jsonl" for name in ("test", "again"))),
        _output,
    ),
    "prepare": Command(("prepare", *_CONFIG), _prepared),
    "plan": Command(("plan", *_CONFIG), _nothing, paths=r"prepared|run/[\w.]+$", seconds=5.0),
    "run": Command(("run", *_CONFIG, "--resume"), _summary),
    "refresh": Command(("refresh", *_RUN, "--once"), _index),
    "index ls": Command(("index", "ls", *_RUN), listing),
    "index show": Command(("index", "show", *_RUN, "a01-step-000008-e1"), _manifest),
    "index verify": Command(("index", "verify", *_RUN), listing),
    "index gc": Command(("index", "gc", *_RUN, "--grace", "0"), versions),
    "index add": Command(("index", "add", *_RUN, "{folder}/more.jsonl"), _index),
    "verify": Command(("verify", "{folder}/run"), _nothing, may_report="no checksums"),
    **{
        name.replace("_", "-"): Command(
            (name.replace("_", "-"), *(_RUN if name.startswith("finetune") else _CONFIG), "--resume"),
            _models(name),
            stopped=name,
        )
        for name in STAGES
    },
}
"""By name; a test checks that no command is left out."""
EXCLUDED = {"bench"}


def command_names(part: argparse.ArgumentParser | None = None, prefix: str = "") -> Iterator[str]:
    """The names of all commands of the command line, from its parser."""
    part = part or _parser()
    groups = [action for action in part._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield prefix.strip()
    for group in groups:
        for name, child in group.choices.items():
            yield from command_names(child, f"{prefix}{name} ")
