"""Contexts: neighbouring blocks, contexts shared by candidates, and excluded documents."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.answer import NO_ANSWER, Answerer
from finetune.collate import QuestionCollator
from finetune.questions import Question
from pretrain.collate import MaskedCollator
from pretrain.masked_span_eval import MaskedSpanItem, retrieval_recall
from pretrain.masking import SpanSampler
from pretrain.selection import choose_candidates
from realm.app.corpus import prepare
from realm.corpus.collate import EMPTY
from realm.corpus.context import Contexts
from realm.errors import UserError
from realm.models.modules import OpenQaModel, RealmModel
from realm.models.predictions import predict_masked, read_joint
from realm.models.retriever import build_retriever
from realm.run.config_file import load_config
from realm.run.folder import Run
from realm.run.initial import initial_reader
from realm.text.tokenizer import tokenize
from tests.tiny import FOUNDERS, RIVERS, TOWNS, NoIndex, write_config, write_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Documents about six towns each, with several blocks; the statements are the passages."""
    folder = tmp_path_factory.mktemp("long")
    write_sources(folder)
    records = []
    for first in range(0, len(TOWNS), 6):
        towns = zip(TOWNS[first : first + 6], RIVERS[first : first + 6], FOUNDERS[first : first + 6], strict=True)
        text = " ".join(
            f"{town} is a town on the river {river}. It was founded by {founder} long ago."
            for town, river, founder in towns
        )
        records.append({"id": f"d{first}", "title": f"Towns {first}", "text": text})
    (folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = {
        "bert": {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64},
        "mlm_head": "tied",
        "max_tokens": 200,
    }
    config = load_config(
        write_config(
            folder,
            corpus={"block_tokens": 48, "context_tokens": 120, "statements": None},
            reader=reader,
            data={"masked_spans": None, "train": None},
        )
    )
    prepare(config)
    run = Run.create(config)
    assert [run.passages.place(row) for row in range(len(run.passages))].count(0) == 2 and len(run.passages) > 6
    return run


class Documents:
    """Blocks of given lengths by document; the wordpieces are consecutive numbers."""

    def __init__(self, lengths: list[list[int]]) -> None:
        self.documents = [number for number, blocks in enumerate(lengths) for _ in blocks]
        ends = np.cumsum([0, *(length for blocks in lengths for length in blocks)])
        self.texts = [np.arange(start, end) for start, end in pairwise(ends.tolist())]

    def __len__(self) -> int:
        return len(self.texts)

    def document(self, row: int) -> int:
        return self.documents[row]

    def title_ids(self, row: int) -> np.ndarray:
        return np.arange(2)

    def text_ids(self, row: int) -> np.ndarray:
        return self.texts[row]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(14, 60))
def test_context_is_the_block_and_as_many_neighbours_as_fit(lengths, context_tokens):
    corpus = Documents(lengths)
    contexts = Contexts(corpus, context_tokens)  # type: ignore[arg-type]
    for row in range(len(corpus)):
        context = contexts.around(row)
        assert row in context.rows
        assert list(context.rows) == list(range(context.rows[0], context.rows[-1] + 1)), "consecutive"
        assert {corpus.document(other) for other in context.rows} == {corpus.document(row)}
        assert context.text_ids.tolist() == [piece for other in context.rows for piece in corpus.texts[other]]
        assert [int(context.text_ids[start]) for start in context.starts] == [
            int(corpus.texts[other][0]) for other in context.rows
        ]
        room = context_tokens - 5 - len(context.text_ids)
        assert room >= 0
        for other in (context.rows[0] - 1, context.rows[-1] + 1):
            if 0 <= other < len(corpus) and corpus.document(other) == corpus.document(row):
                assert len(corpus.texts[other]) > room, "a neighbour that fits is part of the context"


def test_without_context_tokens_the_context_is_the_block():
    contexts = Contexts(Documents([[3, 4, 5]]), 0)  # type: ignore[arg-type]
    assert contexts.around(1).rows == (1,) and contexts.around(1).starts == (0,)
    assert contexts.read_slots([1, 0, -1, 1]) == [0, 1, -1, 0]


def test_blocks_in_the_context_of_a_better_one_are_read_with_it():
    contexts = Contexts(Documents([[5, 5, 5, 5], [5, 5]]), 15)  # type: ignore[arg-type]  # fits two blocks
    assert contexts.around(1).rows == (1, 2)
    assert contexts.read_slots([1, 4, 2, 0, 5, -1]) == [0, 1, 0, 3, 1, -1]


def test_masked_sentence_is_never_in_a_context(run):
    sampler = SpanSampler(run.passages, 10, 30)
    rng = np.random.default_rng(0)
    every = np.arange(len(run.passages))
    for row in sampler.rows.tolist():
        example = sampler.draw(row, rng)
        chosen = choose_candidates(every, example, len(every), run.contexts, run.statements, run.wordpieces)
        others = [other for other in every.tolist() if run.passages.document(other) != run.passages.document(row)]
        assert [other for other in chosen if other != EMPTY] == others, "the whole document is excluded"
        assert not any(
            run.wordpieces.find(run.contexts.around(other).text_ids, example.sentence_ids) for other in others
        )


def test_recall_counts_retrieved_blocks_and_not_their_contexts(run):
    collator, rng = run.collator, np.random.default_rng(0)
    sampler = SpanSampler(run.passages, 10, 30)
    num_only_in_context = 0
    for row in sampler.rows.tolist():
        example = sampler.draw(row, rng)
        for other in run.contexts.around(row).rows:
            in_context = collator.contains(collator.in_context(other), example.span_ids)
            if in_context and not collator.contains(collator.passage(other), example.span_ids):
                num_only_in_context += 1
                assert retrieval_recall(collator, [MaskedSpanItem(example, None)], np.array([[other]]), (1,)) == {
                    "recall@1": 0.0
                }
        assert retrieval_recall(collator, [MaskedSpanItem(example, None)], np.array([[row]]), (1,)) == {
            "recall@1": 100.0
        }
    assert num_only_in_context, "some context contains the span outside its own block"


def test_candidates_in_one_context_are_read_once_and_their_probabilities_are_added(run):
    torch.manual_seed(0)
    collator, rng = MaskedCollator(run.collator, 4), np.random.default_rng(0)
    sampler = SpanSampler(run.passages, 10, 30)
    own = int(sampler.rows[0])
    elsewhere = [row for row in range(len(run.passages)) if run.passages.document(row) != run.passages.document(own)]
    together = [row for row in elsewhere if row in run.contexts.around(elsewhere[0]).rows][:2]
    candidates = np.array([[*together, EMPTY]])
    batch = collator.realm([sampler.draw(own, rng)], candidates, None, 0.0, rng)
    assert batch.masked.read_slot_BN.tolist() == [[0, 1, 1, 0]]
    assert sorted(row for joint in batch.masked.joint for row in joint.row_R.tolist()) == [0, 1], (
        "two joint inputs for four candidates"
    )
    model = RealmModel(
        build_retriever(run.config.retriever, run.tokenizer), initial_reader(run, "reader_pretraining"), "joint", "mlm"
    ).eval()
    query_emb_BD = model.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
    score_N = model.retriever.score(
        query_emb_BD, model.retriever.embed_passages(batch.passage_ids_UL, batch.passage_mask_UL)[batch.candidate_BN]
    )[0]
    prediction = predict_masked(model.reader, batch.masked, read_joint(model.reader, batch.masked))
    log_p_y_N = (prediction.token_log_p_BNM * batch.masked.token_mask_BM[:, None]).sum(-1)[0]
    document = torch.stack((score_N[0], score_N[1:3].logsumexp(0))).log_softmax(
        0
    )  # the document scores log Σ exp of its blocks
    expected = -(document + log_p_y_N[:2]).logsumexp(0)
    assert model(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def question(run: Run, text: str, answer: str) -> Question:
    return Question(
        "q", text, (answer,), tokenize(run.tokenizer, [text])[0][0], (tokenize(run.tokenizer, [answer])[0][0],)
    )


def question_collator(run: Run) -> QuestionCollator:
    return QuestionCollator(run.collator, run.tokenizer, NoIndex(), run.config.reader.max_span_tokens)


def test_answers_in_the_context_are_targets_and_are_returned_as_text(run):
    collator = question_collator(run)
    row = next(row for row in range(len(run.passages)) if run.passages.place(row) == 1)
    context = run.contexts.around(row)
    founder = next(
        name for name in FOUNDERS if name in run.passages.text(context.rows[-1]) and name not in run.passages.text(row)
    )
    asked = question(run, "Who founded it?", founder)
    rows = np.array([[row, context.rows[-1]]])
    batch = collator.batch([asked], collator.queries([asked]), rows, rows)
    assert batch.read_slot_BN.tolist() == [[0, 0]] and batch.row_Q.tolist() == [0], "read once"
    assert batch.by_passage(batch.is_answer_QLW, False).shape[:2] == (1, 2)
    (place,) = (batch.is_answer_QLW[0] & batch.allowed_QLW[0]).nonzero().tolist()
    answerer = Answerer.__new__(Answerer)
    answerer.run = run
    text, block, start = answerer._span_text(batch.ids_QL[0], batch.type_QL[0], row, place[0], place[0] + place[1])
    assert (text, block) == (founder, context.rows[-1])
    assert run.passages.text(block)[start : start + len(text)] == founder


def test_question_without_retrieved_passages_has_no_answer(run):
    """An inverted-file index may return fewer passages than requested, or none.

    The other question of the batch keeps its answer.
    """
    collator = question_collator(run)
    reader = initial_reader(run, "reader_pretraining")
    answerer = Answerer.__new__(Answerer)
    answerer.run, answerer.collator, answerer.device = run, collator, torch.device("cpu")
    answerer.retriever = build_retriever(run.config.retriever, run.tokenizer)
    answerer.model = OpenQaModel(answerer.retriever, reader).eval()
    with_passages, without = question(run, "Who founded it?", FOUNDERS[0]), question(run, "Which river?", RIVERS[0])
    alone = answerer.read([with_passages], np.array([[0, 1]]))
    assert answerer.read([with_passages, without], np.array([[0, 1], [-1, -1]])) == [*alone, NO_ANSWER]
    assert answerer.read([without], np.array([[-1, -1]])) == [NO_ANSWER]


@pytest.mark.parametrize(
    ("context", "joint"), [(30, 200), (180, 200)], ids=["less than a block", "no room in the joint input"]
)
def test_context_sizes_that_do_not_fit_are_refused(tmp_path, context, joint):
    write_sources(Path(tmp_path))
    with pytest.raises(UserError, match=rf"corpus.context_tokens \({context}\)"):
        load_config(write_config(tmp_path, reader={"max_tokens": joint}, corpus={"context_tokens": context}))
