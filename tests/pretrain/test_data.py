"""Masked sentences, substitution and candidates: what may be masked, what may be read, what never comes back."""

import numpy as np
import pytest

from pretrain.data import EMPTY, BatchMaker, MaskedSentence, SpanSampler, choose_candidates, substitute
from realm.config_file import load_config
from realm.run import Run
from realm.substitution import replace_span, span_pool
from tests.tiny import write_config, write_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from realm.pipeline import prepare

    folder = tmp_path_factory.mktemp("tiny")
    write_sources(folder)
    config = load_config(write_config(folder))
    prepare(config)
    return Run.create(config)


@pytest.fixture(scope="module")
def maker(run: Run) -> BatchMaker:
    return BatchMaker(run.passages, run.wordpieces, 32, 80, 96, 2)


def test_drawn_spans_are_tagged_spans_of_their_sentence(run: Run) -> None:
    sampler = SpanSampler(run.passages, 10, 30)
    rng = np.random.default_rng(0)
    for row in sampler.rows:
        example = sampler.draw(int(row), rng)
        starts, ends, _ = run.passages.spans(int(row))
        tagged = {run.passages.text_ids(int(row))[s:e].tobytes() for s, e in zip(starts, ends, strict=True)}
        assert example.span_ids.tobytes() in tagged
        masked = example.masked_ids(run.wordpieces.mask)
        assert (masked[example.start : example.end] == run.wordpieces.mask).all()
        assert (masked == run.wordpieces.mask).sum() == example.end - example.start
        sentence = run.tokenizer.decode(example.sentence_ids)
        assert sentence.count(".") == 1 and sentence.endswith("."), "one sentence and no more"


def test_spans_longer_than_the_limit_are_never_drawn(run: Run) -> None:
    sampler = SpanSampler(run.passages, 1, 30)
    rng = np.random.default_rng(0)
    assert all(len(sampler.draw(int(row), rng).span_ids) == 1 for row in sampler.rows)


def test_the_passage_a_sentence_comes_from_is_never_its_candidate(run: Run) -> None:
    sampler = SpanSampler(run.passages, 10, 30)
    example = sampler.draw(3, np.random.default_rng(0))
    chosen = choose_candidates([3, 1, 2], example, 3, run.passages, run.passages, run.wordpieces)
    assert chosen == [1, 2, EMPTY], "dropped, and not put back to fill up"


class Copies:
    """Passages in which rows 0 and 1 are copies and row 2 contains the sentence of the statement."""

    fingerprint = "passages"

    def __init__(self, texts: list[list[int]], hashes: list[int]) -> None:
        self.texts, self.hashes = texts, hashes

    def text_ids(self, row: int) -> np.ndarray:
        return np.array(self.texts[row], np.int32)

    def text_hash(self, row: int) -> int:
        return self.hashes[row]


class Statements:
    fingerprint = "statements"

    def text_hash(self, row: int) -> int:
        return 99


def test_copies_and_passages_that_hold_the_whole_sentence_are_dropped(run: Run) -> None:
    a, b, c, d, e = (int(i) for i in np.flatnonzero(~run.wordpieces.continuation)[-5:])
    sentence = np.array([a, b, c], np.int32)
    passages = Copies([[d, e], [d, e], [d, a, b, c, e], [e], [a, b, c]], [1, 1, 2, 3, 99])
    example = MaskedSentence(0, sentence, 1, 2, 0)
    chosen = choose_candidates([4, 2, 0, 1, 3], example, 4, passages, Statements(), run.wordpieces)  # type: ignore[arg-type]
    assert chosen == [0, 3, EMPTY, EMPTY]


def test_candidates_are_cut_at_the_count_in_order(run: Run) -> None:
    example = MaskedSentence(0, np.array([7], np.int32), 0, 1, 0)
    passages = Copies([[60], [61], [62]], [1, 2, 3])
    assert choose_candidates([2, 0, 1], example, 2, passages, Statements(), run.wordpieces) == [2, 0]  # type: ignore[arg-type]


def test_substitution_changes_target_and_passage_alike(run: Run) -> None:
    pool = span_pool([run.statements, run.passages], 10)
    sampler = SpanSampler(run.statements, 10, 30)
    rng = np.random.default_rng(1)
    changed = 0
    for row in sampler.rows:
        example = sampler.draw(int(row), rng)
        passage = run.passages.text_ids(int(row) // 2)
        other, (text,) = substitute(example, [passage], pool, run.wordpieces, rng)
        count = len(run.wordpieces.find(passage, example.span_ids))
        assert other.kind == example.kind
        assert len(other.sentence_ids) == len(example.sentence_ids) + len(other.span_ids) - len(example.span_ids)
        if count and other.span_ids.tobytes() != example.span_ids.tobytes():
            changed += 1
            assert not run.wordpieces.find(text, example.span_ids)
            assert len(run.wordpieces.find(text, other.span_ids)) >= count
    assert changed > 5


def test_replace_span_leaves_parts_of_words_alone(run: Run) -> None:
    words = run.wordpieces
    continuation = int(np.flatnonzero(words.continuation)[0])
    plain = int(np.flatnonzero(~words.continuation)[-1])
    text = np.array([plain, continuation, plain], np.int32)
    replaced = replace_span(text, np.array([plain], np.int32), np.array([8, 9], np.int32), words)
    assert replaced.tolist() == [plain, continuation, 8, 9]


def test_null_passage_stands_first_and_empty_slots_are_invalid(run: Run, maker: BatchMaker) -> None:
    sampler = SpanSampler(run.statements, 10, 30)
    rng = np.random.default_rng(2)
    examples = [sampler.draw(0, rng), sampler.draw(1, rng)]
    batch = maker.realm(examples, np.array([[0, 5], [0, EMPTY]]), None, 0.0, rng)
    assert batch.candidate_BN[:, 0].tolist() == [0, 0]
    null = batch.passage_ids_UL[0][batch.passage_mask_UL[0].bool()]
    assert null.tolist() == [run.wordpieces.cls, run.wordpieces.sep, run.wordpieces.sep]
    assert batch.valid_BN.tolist() == [[True, True, True], [True, True, False]]
    assert batch.candidate_BN[0, 1] == batch.candidate_BN[1, 1], "a passage shared by two queries is embedded once"
    rows = torch_rows(batch)
    assert rows == list(range(6)), "every joint input stands in exactly one bucket"


def torch_rows(batch: object) -> list[int]:
    return sorted(int(row) for joint in batch.masked.joint for row in joint.row_R)  # type: ignore[attr-defined]


def test_masks_stand_where_the_batch_says(run: Run, maker: BatchMaker) -> None:
    sampler = SpanSampler(run.statements, 10, 30)
    rng = np.random.default_rng(3)
    examples = [sampler.draw(int(row), rng) for row in sampler.rows[:4]]
    batch = maker.realm(examples, np.arange(8).reshape(4, 2), None, 0.0, rng)
    for joint in batch.masked.joint:
        for ids, row in zip(joint.ids_RL, joint.row_R, strict=True):
            query = int(row) // 3
            at = batch.masked.position_BM[query][batch.masked.token_BM[query]]
            assert (ids[at] == run.wordpieces.mask).all()
            assert (ids == run.wordpieces.mask).sum() == len(at)
            assert batch.masked.target_BM[query][batch.masked.token_BM[query]].tolist() == examples[query].span_ids.tolist()
