"""Up to 150 cases of every fuzz target; `make fuzz` runs 100,000."""

import pytest

from tests.fuzz.runner import run_target
from tests.fuzz.targets import TARGETS, load_targets

CASES = 80


@pytest.mark.parametrize("name", load_targets())
def test_damaged_input_is_refused_or_skipped(name: str) -> None:
    cases = round(CASES * TARGETS[name].share)
    *_, (_, report) = run_target(TARGETS[name], seed=0, numbers=range(cases), shrink=False)
    assert not report.failures, report.failures[0]
    assert report.refused + report.accepted == report.cases == cases
