import sys
from pathlib import Path

import pytest

sys.path.insert(
    0, str(Path(__file__).parent)
)  # fake_refresher.py is imported by the tests and run by them as a program

from fake_refresher import FakeCorpus, export

from realm.runtime.versions import start_attempt


@pytest.fixture
def corpus() -> FakeCorpus:
    return FakeCorpus()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose first attempt has begun and exported step 500."""
    folder = tmp_path / "run"
    folder.mkdir()
    start_attempt(folder)
    export(folder, 1, 500)
    return folder
