"""The registry of fuzz targets, and how one is written.

A file `NAME_targets.py` in this folder registers its targets when it is imported:

    def _generate(rng: Random) -> Case:
        return Case(mutated_bytes(rng, rng.choice(VALID)))

    def _run(case: Case, folder: Path) -> int:
        path = folder / "config.yaml"
        path.write_bytes(case.content)
        load_config(path)
        return 0

    register(Target("config", _generate, _run))

`python -m tests.fuzz` runs all targets; a small number of cases of each runs in the suite.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any


@dataclass(frozen=True)
class Case:
    """One input."""

    content: bytes
    """What is read. A failing case is minimized by removing parts of it; a list of arguments is
    best joined by NUL or line feeds."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Everything else that the target needs, such as the name of the file; not minimized."""


@dataclass(frozen=True)
class Target:
    """A function under test and the inputs for it."""

    name: str
    generate: Callable[[Random], Case]
    """Make a case that depends only on the random numbers."""
    run: Callable[[Case, Path], int]
    """Read the case; files go to the given empty folder. Returns the number of records that were
    skipped and counted. Raises UserError if the input is refused, AssertionError if a property does
    not hold; every exception but UserError is a failure."""
    share: float = 1.0
    """Number of cases in relation to other targets; less for slow ones."""


TARGETS: dict[str, Target] = {}
"""All registered targets by name, see `load_targets`."""


def register(target: Target) -> None:
    """Add a target."""
    assert target.name not in TARGETS, target.name
    TARGETS[target.name] = target


def load_targets() -> dict[str, Target]:
    """Import all files `*_targets.py` of this folder, and return the registered targets."""
    for file in sorted(Path(__file__).parent.glob("*_targets.py")):
        import_module(f"tests.fuzz.{file.stem}")
    return TARGETS
