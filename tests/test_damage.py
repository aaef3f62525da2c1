"""Every command after every kind of damage to every file of a run and of its prepared folder: one
sentence and exit status 2, or the result of the undamaged run."""

import random

import pytest

from tests.damage import Workplace
from tests.damage_commands import COMMANDS, EXCLUDED, command_names

SAMPLE = 25
"""Cases that the suite runs; the marker `slow` runs all of them."""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("damage"))


def test_no_command_is_left_out() -> None:
    tried = {name.partition(" --")[0] for name in COMMANDS}
    assert tried == {name for name in command_names() if name.split()[0] not in EXCLUDED}


def test_a_sample_of_all_damage(workplace: Workplace) -> None:
    quick = [name for name, command in COMMANDS.items() if command.seconds < 1]
    cases = [case for name in quick for case in workplace.cases(name)]
    chosen = random.Random(0).sample(cases, SAMPLE)
    problems = [f"{case}: {problem}" for case in chosen if (problem := workplace.problem(case))]
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(7200, method="thread")
@pytest.mark.parametrize("command", COMMANDS)
def test_all_damage(workplace: Workplace, command: str) -> None:
    problems = [f"{case}: {problem}" for case in workplace.cases(command) if (problem := workplace.problem(case))]
    assert not problems, "\n\n".join(problems)
