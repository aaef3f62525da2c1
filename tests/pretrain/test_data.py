"""Masked sentences, substitution and candidates: what may be masked, what may be read, what
never comes back."""

import numpy as np
import pytest
import torch

from pretrain.collate import MaskedCollator
from pretrain.ict import InverseClozeBatches
from pretrain.masking import MaskedSentence, SpanSampler, substitute
from pretrain.selection import choose_candidates, find_supporting_passage
from realm.corpus.collate import EMPTY, NULL, Collator, InputLimits
from realm.corpus.context import Contexts
from realm.corpus.substitution import replace_span, span_pool
from realm.models.batches import PairBatch
from realm.run.folder import Run
from realm.training.sections import IctConfig
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def collator(run: Run) -> MaskedCollator:
    return MaskedCollator(Collator(run.contexts, run.wordpieces, InputLimits(32, 80, 96)), 2)


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
    chosen = choose_candidates([3, 1, 2], example, 3, run.contexts, run.passages, run.wordpieces)
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
    chosen = choose_candidates([4, 2, 0, 1, 3], example, 4, Contexts(passages, 0), Statements(), run.wordpieces)  # type: ignore[arg-type]
    assert chosen == [0, 3, EMPTY, EMPTY]


def test_a_sentence_cut_within_a_word_is_found_in_a_copy(run: Run) -> None:
    plain, continuation = (
        int(i)
        for i in (np.flatnonzero(~run.wordpieces.continuation)[-1], np.flatnonzero(run.wordpieces.continuation)[0])
    )
    passages = Copies([[7, plain, 8, plain, continuation, 9], [8, 9]], [1, 2])
    example = MaskedSentence(0, np.array([plain, 8, plain], np.int32), 0, 1, 0)  # the query had no room for the rest
    assert choose_candidates([0, 1], example, 2, Contexts(passages, 0), Statements(), run.wordpieces) == [1, EMPTY]  # type: ignore[arg-type]


def test_candidates_are_cut_at_the_count_in_order(run: Run) -> None:
    example = MaskedSentence(0, np.array([7], np.int32), 0, 1, 0)
    passages = Copies([[60], [61], [62]], [1, 2, 3])
    assert choose_candidates([2, 0, 1], example, 2, Contexts(passages, 0), Statements(), run.wordpieces) == [2, 0]  # type: ignore[arg-type]


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


def test_null_passage_stands_first_and_empty_slots_are_invalid(run: Run, collator: MaskedCollator) -> None:
    sampler = SpanSampler(run.statements, 10, 30)
    rng = np.random.default_rng(2)
    examples = [sampler.draw(0, rng), sampler.draw(1, rng)]
    batch = collator.realm(examples, np.array([[0, 5], [0, EMPTY]]), None, 0.0, rng)
    assert batch.candidate_BN[:, 0].tolist() == [0, 0]
    null = batch.passage_ids_UL[0][batch.passage_mask_UL[0].bool()]
    assert null.tolist() == [run.wordpieces.cls, run.wordpieces.sep, run.wordpieces.sep]
    assert batch.valid_BN.tolist() == [[True, True, True], [True, True, False]]
    assert batch.candidate_BN[0, 1] == batch.candidate_BN[1, 1], "a passage shared by two queries is embedded once"
    rows = torch_rows(batch)
    assert rows == list(range(5)), (
        "every joint input stands in exactly one bucket, and nothing is read for the empty slot"
    )
    assert batch.masked.read_slot_BN.tolist() == [[0, 1, 2], [0, 1, 0]]


def torch_rows(batch: object) -> list[int]:
    return sorted(int(row) for joint in batch.masked.joint for row in joint.row_R)  # type: ignore[attr-defined]


def example_of(run: Run, sentence: str, span: str, others: tuple[str, ...] = ()) -> MaskedSentence:
    def ids(text: str) -> np.ndarray:
        return np.array(run.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    (start, *_) = run.wordpieces.find(ids(sentence), ids(span))
    return MaskedSentence(0, ids(sentence), start, start + len(ids(span)), 0, tuple(ids(other) for other in others))


def test_evidence_holds_the_span_and_what_else_the_sentence_speaks_of(run: Run, collator: MaskedCollator) -> None:
    holm = example_of(run, "Holm lies on the Quill.", "Quill", ("Holm",))
    assert find_supporting_passage(np.array([0, 3, 7, 1]), holm, run.statements, collator.inputs) == 7
    assert find_supporting_passage(np.array([0, 3, 1]), holm, run.statements, collator.inputs) is None, (
        "no passage holds the span"
    )
    elsewhere = example_of(run, "Garda lies on the Quill.", "Quill", ("Garda",))
    assert find_supporting_passage(np.arange(12), elsewhere, run.statements, collator.inputs) is None, (
        "the one that holds the span tells of another town"
    )
    alone = example_of(run, "It lies on the Quill.", "Quill")
    assert find_supporting_passage(np.array([6, 7]), alone, run.statements, collator.inputs) == 7, (
        "with no other span the first that holds it"
    )
    whole = example_of(run, "Holm is a town on the river Quill.", "Quill", ("Holm",))
    assert find_supporting_passage(np.array([7]), whole, run.statements, collator.inputs) is None, (
        "a passage in which the sentence itself stands is trivial"
    )


def test_titles_count_as_held(run: Run, collator: MaskedCollator) -> None:
    title_only = np.array(run.tokenizer("Dorne", add_special_tokens=False)["input_ids"], np.int32)
    assert collator.inputs.contains(collator.inputs.passage(3), title_only) and not collator.inputs.contains(
        collator.inputs.passage(2), title_only
    )
    absent = replace_span(run.passages.text_ids(3), title_only, np.zeros(1, np.int32), run.wordpieces)
    assert not run.wordpieces.find(absent, title_only) and run.wordpieces.find(run.passages.title_ids(3), title_only)


def test_warm_up_places_are_every_occurrence_in_title_and_text(run: Run, collator: MaskedCollator) -> None:
    examples = [example_of(run, "The river of Holm is the Quill.", span) for span in ("Holm", "Quill")]
    batch = collator.reader_pretraining(examples, [collator.inputs.passage(7), collator.inputs.passage(NULL)], 4)
    found: dict[int, list[list[int]]] = {}
    for joint, spans in zip(batch.masked.joint, batch.spans, strict=True):
        for r, row in enumerate(joint.row_R.tolist()):
            starts, widths = np.nonzero(spans.is_answer_RLW[r].numpy())
            found[row] = [joint.ids_RL[r][s : s + w + 1].tolist() for s, w in zip(starts, widths, strict=True)]
            assert bool((spans.is_answer_RLW[r] & ~spans.allowed_RLW[r]).any()) is False
    assert found[0] == [examples[0].span_ids.tolist()] * 3, "the title and twice in the text, and not in the query"
    assert found[1] == [], "the null passage holds nothing"


def test_inverse_cloze_withholds_a_share_of_blocks_and_then_offers_the_null_passage(
    run: Run, collator: MaskedCollator
) -> None:
    def batches(share: float) -> list[PairBatch]:
        return [
            InverseClozeBatches(run.passages, collator.inputs, IctConfig(null_prob=share), 0)(step, 6)
            for step in range(40)
        ]

    for batch in batches(0.0):
        assert (
            len(batch.passage_ids_CL) == 6 and not batch.excluded_BC.any() and batch.target_B.tolist() == list(range(6))
        )
    withheld = 0
    for batch in batches(0.5):
        assert batch.passage_ids_CL[-1][batch.passage_mask_CL[-1].bool()].tolist() == [
            run.wordpieces.cls,
            run.wordpieces.sep,
            run.wordpieces.sep,
        ]
        assert len(batch.passage_ids_CL) == 7
        away_B = batch.target_B == 6
        assert torch.equal(batch.target_B[~away_B], torch.arange(6)[~away_B])
        assert all(row.tolist() == [*away_B.tolist(), False] for row in batch.excluded_BC)
        withheld += int(away_B.sum())
    assert 0.35 < withheld / 240 < 0.65


def test_masks_stand_where_the_batch_says(run: Run, collator: MaskedCollator) -> None:
    sampler = SpanSampler(run.statements, 10, 30)
    rng = np.random.default_rng(3)
    examples = [sampler.draw(int(row), rng) for row in sampler.rows[:4]]
    batch = collator.realm(examples, np.arange(8).reshape(4, 2), None, 0.0, rng)
    for joint in batch.masked.joint:
        for ids, row in zip(joint.ids_RL, joint.row_R, strict=True):
            query = int(row) // 3
            at = batch.masked.position_BM[query][batch.masked.token_mask_BM[query]]
            assert (ids[at] == run.wordpieces.mask).all()
            assert (ids == run.wordpieces.mask).sum() == len(at)
            assert (
                batch.masked.target_BM[query][batch.masked.token_mask_BM[query]].tolist()
                == examples[query].span_ids.tolist()
            )
