"""Masked sentences, entity substitution, candidate selection, and batches."""

from dataclasses import replace

import numpy as np
import pytest

from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence, SpanSampler, substitute
from pretrain.selection import choose_candidates, find_supporting_passage
from realm.corpus.collate import EMPTY, NULL, Collator, InputLimits
from realm.corpus.context import Contexts
from realm.corpus.substitution import replace_span, span_pool
from realm.run.folder import Run
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def collator(run: Run) -> MaskedCollator:
    return MaskedCollator(Collator(run.contexts, run.wordpieces, InputLimits(32, 80, 96, 4)), 2)


def test_drawn_spans_are_salient_spans_of_their_sentence(run: Run) -> None:
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
        assert sentence.count(".") == 1 and sentence.endswith("."), "exactly one sentence"


def test_spans_longer_than_the_limit_are_never_drawn(run: Run) -> None:
    sampler = SpanSampler(run.passages, 1, 30)
    rng = np.random.default_rng(0)
    assert all(len(sampler.draw(int(row), rng).span_ids) == 1 for row in sampler.rows)


def test_the_block_of_a_sentence_is_never_its_candidate(run: Run) -> None:
    sampler = SpanSampler(run.passages, 10, 30)
    example = sampler.draw(3, np.random.default_rng(0))
    chosen = choose_candidates([3, 1, 2], example, 3, run.contexts, run.passages, run.wordpieces)
    assert chosen == [1, 2, EMPTY], "dropped, even if a slot stays empty"


class Passages:
    """A stub corpus with the given texts; passages with the same hash are copies."""

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


def test_copies_and_passages_with_the_whole_sentence_are_dropped(run: Run) -> None:
    a, b, c, d, e = (int(i) for i in np.flatnonzero(~run.wordpieces.continuation)[-5:])
    sentence = np.array([a, b, c], np.int32)
    passages = Passages([[d, e], [d, e], [d, a, b, c, e], [e], [a, b, c]], [1, 1, 2, 3, 99])
    example = MaskedSentence(0, sentence, 1, 2, 0)
    chosen = choose_candidates([4, 2, 0, 1, 3], example, 4, Contexts(passages, 0), Statements(), run.wordpieces)  # type: ignore[arg-type]
    assert chosen == [0, 3, EMPTY, EMPTY]


def test_a_sentence_truncated_inside_a_word_is_found_in_a_copy(run: Run) -> None:
    plain, continuation = (
        int(i)
        for i in (np.flatnonzero(~run.wordpieces.continuation)[-1], np.flatnonzero(run.wordpieces.continuation)[0])
    )
    passages = Passages([[7, plain, 8, plain, continuation, 9], [8, 9]], [1, 2])
    example = MaskedSentence(0, np.array([plain, 8, plain], np.int32), 0, 1, 0)  # truncated to the query length
    assert choose_candidates([0, 1], example, 2, Contexts(passages, 0), Statements(), run.wordpieces) == [1, EMPTY]  # type: ignore[arg-type]


def test_candidates_are_the_first_ones_in_order(run: Run) -> None:
    example = MaskedSentence(0, np.array([7], np.int32), 0, 1, 0)
    passages = Passages([[60], [61], [62]], [1, 2, 3])
    assert choose_candidates([2, 0, 1], example, 2, Contexts(passages, 0), Statements(), run.wordpieces) == [2, 0]  # type: ignore[arg-type]


def test_slots_in_which_a_search_found_nothing_are_not_passages(run: Run, collator: MaskedCollator) -> None:
    example = SpanSampler(run.passages, 10, 30).draw(3, np.random.default_rng(0))
    chosen = choose_candidates([-1, 1, -1], example, 2, run.contexts, run.passages, run.wordpieces)
    assert chosen == [1, EMPTY]
    assert find_supporting_passage(np.array([-1, -1]), example, run.passages, collator.inputs) is None


def test_substitution_changes_target_and_passage(run: Run) -> None:
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


def test_replace_span_does_not_change_parts_of_words(run: Run) -> None:
    words = run.wordpieces
    continuation = int(np.flatnonzero(words.continuation)[0])
    plain = int(np.flatnonzero(~words.continuation)[-1])
    text = np.array([plain, continuation, plain], np.int32)
    replaced = replace_span(text, np.array([plain], np.int32), np.array([8, 9], np.int32), words)
    assert replaced.tolist() == [plain, continuation, 8, 9]


def test_slot_0_is_the_null_passage_and_empty_slots_are_invalid(run: Run, collator: MaskedCollator) -> None:
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
    assert rows == list(range(5)), "every joint input is in exactly one bucket, and the empty slot has none"
    assert batch.masked.read_slot_BN.tolist() == [[0, 1, 2], [0, 1, 0]]


def torch_rows(batch: object) -> list[int]:
    return sorted(int(row) for joint in batch.masked.joint for row in joint.row_R)  # type: ignore[attr-defined]


def example_of(run: Run, sentence: str, span: str, others: tuple[str, ...] = ()) -> MaskedSentence:
    def ids(text: str) -> np.ndarray:
        return np.array(run.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    (start, *_) = run.wordpieces.find(ids(sentence), ids(span))
    return MaskedSentence(0, ids(sentence), start, start + len(ids(span)), 0, tuple(ids(other) for other in others))


def test_a_supporting_passage_contains_the_span_and_another_span_of_the_sentence(
    run: Run, collator: MaskedCollator
) -> None:
    holm = example_of(run, "Holm lies on the Quill.", "Quill", ("Holm",))
    assert find_supporting_passage(np.array([0, 3, 7, 1]), holm, run.statements, collator.inputs) == 7
    assert find_supporting_passage(np.array([0, 3, 1]), holm, run.statements, collator.inputs) is None, (
        "no passage contains the span"
    )
    elsewhere = example_of(run, "Garda lies on the Quill.", "Quill", ("Garda",))
    assert find_supporting_passage(np.arange(12), elsewhere, run.statements, collator.inputs) is None, (
        "the only passage with the span is about another town"
    )
    alone = example_of(run, "It lies on the Quill.", "Quill")
    assert find_supporting_passage(np.array([6, 7]), alone, run.statements, collator.inputs) == 7, (
        "without other spans, the first passage that contains it"
    )
    whole = example_of(run, "Holm is a town on the river Quill.", "Quill", ("Holm",))
    assert find_supporting_passage(np.array([7]), whole, run.statements, collator.inputs) is None, (
        "a passage that contains the sentence itself is trivial"
    )


def test_titles_count_as_part_of_the_passage(run: Run, collator: MaskedCollator) -> None:
    title_only = np.array(run.tokenizer("Dorne", add_special_tokens=False)["input_ids"], np.int32)
    assert collator.inputs.contains(collator.inputs.passage(3), title_only) and not collator.inputs.contains(
        collator.inputs.passage(2), title_only
    )
    absent = replace_span(run.passages.text_ids(3), title_only, np.zeros(1, np.int32), run.wordpieces)
    assert not run.wordpieces.find(absent, title_only) and run.wordpieces.find(run.passages.title_ids(3), title_only)


def test_reader_pretraining_targets_are_all_occurrences_in_title_and_text(run: Run, collator: MaskedCollator) -> None:
    examples = [example_of(run, "The river of Holm is the Quill.", span) for span in ("Holm", "Quill")]
    batch = collator.masked(examples, [[collator.inputs.passage(7)], [collator.inputs.passage(NULL)]])
    found: dict[int, list[list[int]]] = {}
    for joint, spans in zip(batch.joint, batch.spans, strict=True):
        for r, row in enumerate(joint.row_R.tolist()):
            starts, widths = np.nonzero(spans.is_answer_RLW[r].numpy())
            found[row] = [joint.ids_RL[r][s : s + w + 1].tolist() for s, w in zip(starts, widths, strict=True)]
            assert bool((spans.is_answer_RLW[r] & ~spans.allowed_RLW[r]).any()) is False
    assert found[0] == [examples[0].span_ids.tolist()] * 3, "in the title and twice in the text, not in the query"
    assert found[1] == [], "the null passage contains no span"


def test_questions_are_read_without_masks_and_all_ranks_have_the_same_buckets(
    run: Run, collator: MaskedCollator
) -> None:
    masked = example_of(run, "The river of Holm is the Quill.", "Quill")
    question = replace(masked, question=np.array(run.tokenizer("Which river?", add_special_tokens=False)["input_ids"]))
    rng, candidates = np.random.default_rng(0), np.array([[7, EMPTY], [1, 2]])
    assert (collator.queries([question])[0] == run.wordpieces.mask).sum() == 0
    for examples, has_masks in (
        ([masked, question], [True, False]),
        ([question, question], [False, False]),
        ([masked, masked], [True, True]),
    ):
        batch = collator.realm(examples, candidates, None, 0.0, rng).masked
        assert batch.has_masks_B.tolist() == has_masks
        assert len(batch.joint) == len(batch.spans) == 2
        for joint in batch.joint:
            masks_R = (joint.ids_RL == run.wordpieces.mask).sum(1)
            expected_R = [len(masked.span_ids) * has_masks[row // 3] for row in joint.row_R.tolist()]
            assert masks_R.tolist() == expected_R
        found = [
            row
            for joint, spans in zip(batch.joint, batch.spans, strict=True)
            for row, answers_LW in zip(joint.row_R.tolist(), spans.is_answer_RLW, strict=True)
            if answers_LW.any()
        ]
        assert found == [1], "the first example's first candidate contains the Quill"


def test_masks_are_at_the_positions_of_the_batch(run: Run, collator: MaskedCollator) -> None:
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
