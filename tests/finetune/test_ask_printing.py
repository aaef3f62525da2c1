"""The printed answer: texts of questions and passages are shown as they are."""

from types import SimpleNamespace

import numpy as np
import pytest

from finetune import ask
from finetune.answer import Answer

NASTY = "x[b]\x1b]0;owned\x07\\\\\\"
SHOWN = "x[b]\\x1b]0;owned\\x07\\\\\\"


@pytest.mark.parametrize("start", [-1, 4])
def test_data_is_neither_markup_nor_obeyed(
    start: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = SimpleNamespace(text=lambda row: f"abc {NASTY} def", title=lambda row: f"title {NASTY}", ids=[NASTY] * 2)
    answerer = SimpleNamespace(
        run=SimpleNamespace(tokenizer=None, passages=corpus),
        index=[0, 1],
        retrieve=lambda questions, passages: np.array([[0, 1]]),
        read=lambda questions, rows: [Answer(NASTY, 0, start, 0.5)],
    )
    monkeypatch.setattr(ask, "tokenize", lambda tokenizer, texts: [(np.array([1]), None)])
    ask.print_answer(answerer, f"who {NASTY}", 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"who {SHOWN}" and lines[1].startswith(f"  {SHOWN}   (p(z|x)")
    body = f"abc »{SHOWN}« def" if start >= 0 else f"abc {SHOWN} def"
    assert lines[2] == f"  from title {SHOWN} [{SHOWN}]: {body}"
    assert lines[3] == f"  also read: title {SHOWN}"
