"""Fixtures of all tests.

torch uses one thread: the models are tiny, and test processes share the machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.tiny import realm, write_config, write_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCES = (
    "The river Danube rises in the Black Forest and ends in the Black Sea.",
    "Mask, sep and cls are words here [ as are pad and unk ] .",
    "Zürich lies on a lake; 1234567890 people never lived there, did they?",
    "Ada Lovelace was born in London in 1815 and wrote the first program.",
)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text next to the repository; skips the test if it does not exist."""
    folder = Path(__file__).resolve().parents[1] / "../shared/data"
    if not folder.is_dir():
        pytest.skip(f"no real text: {folder} does not exist")
    return folder.resolve()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run in `run`, trained once; tests add evaluations to it and
    change nothing else."""
    folder = tmp_path_factory.mktemp("finished")
    write_sources(folder)
    result = realm("run", "--config", write_config(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerBase":
    """A WordPiece tokenizer trained on a few sentences; it covers all their characters."""
    from realm.text.tokenizer import TokenizerConfig, train_wordpiece

    return train_wordpiece(SENTENCES * 2, TokenizerConfig(vocab_size=250))


@pytest.fixture
def wordpieces(tokenizer: "PreTrainedTokenizerBase") -> "Callable[[str], np.ndarray]":
    """Function from a text to its wordpiece ids, without special tokens."""
    from realm.text.tokenizer import tokenize

    return lambda text: tokenize(tokenizer, [text])[0][0]
