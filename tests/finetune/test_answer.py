"""Answers of readers before and after finetuning, compared with a plain loop over spans."""

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.answer import Answerer
from finetune.collate import QuestionCollator
from finetune.questions import Question
from realm.models.modules import OpenQaModel
from realm.models.reader import build_reader, pad_joint
from realm.models.retriever import build_retriever
from realm.run.folder import Run
from realm.text.tokenizer import tokenize
from tests.tiny import TOWNS, NoIndex, prepared_run

ROWS = np.array([[0, 3, 7], [5, -1, 2], [9, 1, -1]] * 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(Path(tmp_path_factory.mktemp("towns")))


class RandomIndex(NoIndex):
    """Random embeddings, so short that the spans decide between the passages."""

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        return 0.01 * np.random.default_rng(0).standard_normal((len(TOWNS), 32), np.float32)[rows]


@pytest.fixture
def answerer(run: Run) -> Answerer:
    torch.manual_seed(0)
    answerer = Answerer.__new__(Answerer)
    answerer.run, answerer.device = run, torch.device("cpu")
    answerer.retriever = build_retriever(run.config.retriever, run.tokenizer).eval()
    reader = build_reader(run.config.reader, run.tokenizer)[0].eval()
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        torch.nn.init.normal_(reader.span_absent.weight, std=3.0)
    answerer.model = OpenQaModel(answerer.retriever, reader).eval()
    width = run.config.reader.max_span_tokens
    answerer.collator = QuestionCollator(run.collator, run.tokenizer, RandomIndex(), width)
    return answerer


def best_by_loop(answerer: Answerer, question: Question, rows: list[int], scoring: str) -> tuple[str, int]:
    """Text and passage of the best span.

    `scoring`: "passage" for log p(z|x) p(s|z,x), "passages" for the sum of the scores of span and
    passage.
    """
    run, model = answerer.run, answerer.model
    assert model is not None
    reader, words = model.reader, run.wordpieces
    query_emb_BD = answerer.retriever.embed_queries(*answerer.collator.queries([question]))
    best: tuple[float, str, int] = (-1e9, "", -1)
    for row in filter(lambda row: row >= 0, rows):
        ids, first, _ = run.collator.joint(question.ids, run.collator.passage(row))
        hidden = reader(*pad_joint([ids], [first], words.pad))
        relevance = answerer.retriever.score(query_emb_BD, answerer.collator.embeddings(np.array([[row]]))).item()
        scores = {}
        for start in range(first, len(ids) - 1):
            for end in range(start + 1, min(start + reader.config.max_span_tokens, len(ids) - 1) + 1):
                cut = words.continuation[ids[start]] or words.continuation[ids[end]]
                if words.sep not in ids[start:end] and not cut:
                    pair = (reader.span_start(hidden[0, start]) + reader.span_end(hidden[0, end - 1])).clamp(min=0)
                    scores[start, end] = reader.span_score(reader.span_norm(pair)).item()
        absent = reader.span_absent(hidden[0, 0]).item()
        normalizer = np.log(sum(map(np.exp, [absent, *scores.values()]))) if scoring == "passage" else 0.0
        for (start, end), score in scores.items():
            best = max(best, (relevance + score - normalizer, run.tokenizer.decode(ids[start:end]), row))
    return best[1:]


@pytest.mark.parametrize("scoring", ["passage", "passages"])
def test_spans_are_scored_as_the_reader_was_trained(scoring: str, answerer: Answerer) -> None:
    texts = [f"Who founded {town}?" for town in TOWNS]
    questions = [Question("", text, (), tokenize(answerer.run.tokenizer, [text])[0][0]) for text in texts]
    assert answerer.model is not None
    answerer.model.reader.span_softmax = scoring  # type: ignore[assignment]
    with torch.no_grad():
        answers = answerer.read(questions, ROWS)
        loops = {
            name: [best_by_loop(answerer, *pair, name) for pair in zip(questions, ROWS.tolist(), strict=True)]
            for name in ("passage", "passages")
        }
    found = [answer.passage for answer in answers]
    assert found == [passage for _, passage in loops[scoring]]
    ours = [tokenize(answerer.run.tokenizer, [answer.text])[0][0].tolist() for answer in answers]
    assert ours == [tokenize(answerer.run.tokenizer, [text])[0][0].tolist() for text, _ in loops[scoring]]
    assert loops["passage"] != loops["passages"], "the two scorings have different answers to these questions"
