"""Fuzz targets of the readers of JSON and tables."""

from pathlib import Path
from random import Random

from realm.corpus.text_files import read_json
from tests.fuzz.mutate import mutated_json
from tests.fuzz.targets import Case, Target, register


def _generate(rng: Random) -> Case:
    return Case(mutated_json(rng, {"a": [1, 2.5, "text", None], "b": {"c": True}}))


def _run(case: Case, folder: Path) -> int:
    path = folder / "a.json"
    path.write_bytes(case.content)
    read_json(path, "an object")
    return 0


register(Target("json", _generate, _run))
