import sys
from pathlib import Path

import pytest

# fake_refresher.py is both imported by the tests and run as a program.
sys.path.insert(0, str(Path(__file__).parent))

from fake_refresher import FakeCorpus, export

from realm.runtime.versions import start_attempt


@pytest.fixture
def corpus() -> FakeCorpus:
    return FakeCorpus()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose first attempt has exported step 500."""
    folder = tmp_path / "run"
    folder.mkdir()
    start_attempt(folder)
    export(folder, 1, 500)
    return folder
