"""Questions in the batches of reader pretraining and REALM."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from index.fusion import Fusion
from pretrain.candidates import Candidates, Found
from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence, SpanSampler, substitute
from pretrain.pseudo_questions import ExampleSampler, PseudoQuestions
from pretrain.reader_pretraining import MAX_DRAWS, STEPS_PER_RETRIEVAL, ReaderPretrainingBatches
from pretrain.realm import FixedIndex
from pretrain.selection import find_supporting_passage
from realm.corpus.substitution import span_pool
from realm.errors import UserError
from realm.models.batches import Batch
from realm.run.folder import Run
from realm.text.inputs import epoch_rows
from realm.training.pseudo_question_section import PseudoQuestionConfig
from realm.training.sections import PretrainConfig, ReaderPretrainingConfig
from realm.training.streams import RunStream, StepStream, run_seed, step_generator
from tests.tiny import NoIndex, prepared_run, tiny_tree

SIZE = 4
EASY = PseudoQuestionConfig(
    forms={"noisy": 1.0, "template": 1.0}, clause_words=0, min_words=2, min_frequent_share=0.0, phrase_prob=0.2
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose sentences are those of the passages."""
    return prepared_run(tmp_path_factory.mktemp("own"), corpus={"statements": None})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("tiny"))


class Search:
    """Finds the same passages for every query."""

    def __init__(self, run: Run, rows: Sequence[int]) -> None:
        self.collator, self.rows = MaskedCollator(run.collator, 2), np.array(rows)

    def __call__(self, examples: Sequence[MaskedSentence], k: int) -> np.ndarray:
        return np.tile(self.rows[:k], (len(examples), 1))


def sampler(run: Run, question_prob: float, config: PseudoQuestionConfig = EASY) -> ExampleSampler:
    spans = SpanSampler(run.statements, 10, run.collator.limits.query - 2)
    return ExampleSampler(spans, PseudoQuestions(config, run.tokenizer, run.statements, 30, 10), question_prob)


def batches(
    run: Run,
    rows: Sequence[int],
    config: PseudoQuestionConfig = EASY,
    **changes: float,
) -> ReaderPretrainingBatches:
    stage = replace(ReaderPretrainingConfig(retrieve=len(rows)), **changes)  # type: ignore[arg-type]
    return ReaderPretrainingBatches(
        sampler(run, stage.question_prob, config),
        Search(run, rows),
        stage,
        10,
        seed=3,  # type: ignore[arg-type]
    )


def same(one: Batch, other: Batch) -> bool:
    def tensors(value: object) -> list[torch.Tensor]:
        parts = vars(value).values() if isinstance(value, Batch) else value if isinstance(value, list) else []
        return [value] if isinstance(value, torch.Tensor) else [tensor for part in parts for tensor in tensors(part)]

    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_without_questions_batches_of_reader_pretraining_are_those_of_masked_sentences(run: Run) -> None:
    """Compared with a plain loop over the same random streams."""
    rows = list(range(12))
    config = ReaderPretrainingConfig(title_span_prob=0.5, null_prob=0.2, substitution_prob=0.5)
    made = batches(run, rows, title_span_prob=0.5, null_prob=0.2, substitution_prob=0.5)
    search, spans = Search(run, rows), SpanSampler(run.statements, 10, run.collator.limits.query - 2)
    pool = span_pool([run.statements, run.passages], 10)
    needed = STEPS_PER_RETRIEVAL * SIZE
    for block in range(2):
        rng = step_generator(3, StepStream.SUPPORTING_PASSAGES, block)
        order = epoch_rows(len(spans.rows), MAX_DRAWS * needed, block, run_seed(3, RunStream.READER_PRETRAINING))
        found: list[tuple[MaskedSentence, int]] = []
        for start in range(0, len(order), needed):
            if len(found) >= needed:
                break
            examples = [spans.draw(int(row), rng) for row in spans.rows[order][start : start + needed]]
            for example, retrieved in zip(examples, search(examples, 12), strict=True):
                row = find_supporting_passage(retrieved, example, run.statements, run.collator)
                if row is not None:
                    keep = rng.random() < config.title_span_prob
                    title = run.passages.title_ids(row)
                    if keep or not run.wordpieces.find(title, example.span_ids):
                        found.append((example, row))
        for step in (50 * block, 50 * block + 49):
            at = step % STEPS_PER_RETRIEVAL * SIZE
            rng = step_generator(3, StepStream.READER_PRETRAINING_EXAMPLES, step)
            read, passages = [], []
            for example, row in [found[:needed][i % len(found[:needed])] for i in range(at, at + SIZE)]:
                parts = run.collator.in_context(row)
                if rng.random() < config.null_prob:
                    parts = run.collator.passage(-1)
                if rng.random() < config.substitution_prob:
                    example, (title, text) = substitute(example, parts, pool, run.wordpieces, rng)
                    parts = title, text
                read.append(example)
                passages.append(parts)
            assert same(made(step, SIZE), search.collator.masked(read, [[parts] for parts in passages]))


def candidates(run: Run, question_prob: float) -> Candidates:
    config = PretrainConfig(batch_size=SIZE, question_prob=question_prob)
    collator = MaskedCollator(run.collator, 2)
    index = FixedIndex(NoIndex())  # type: ignore[arg-type]
    return Candidates(config, 3, collator, sampler(run, question_prob), "fp32", index, torch.nn.Module, Fusion())


def same_example(one: MaskedSentence, other: MaskedSentence) -> bool:
    arrays = [
        (made.sentence_ids[made.start : made.end], made.sentence_ids, made.query_ids(0), *made.others)
        for made in (one, other)
    ]
    return (one.row, one.kind) == (other.row, other.kind) and all(map(np.array_equal, *arrays))


def test_without_questions_examples_of_realm_are_masked_sentences(run: Run) -> None:
    spans = SpanSampler(run.statements, 10, run.collator.limits.query - 2)
    for step in range(9):
        order = epoch_rows(len(spans.rows), SIZE, step, run_seed(3, RunStream.PRETRAIN))
        rng = step_generator(3, StepStream.MASKED_SENTENCES, step)
        expected = [spans.draw(int(spans.rows[place]), rng) for place in order]
        found = candidates(run, 0.0).examples(step, SIZE)
        assert all(map(same_example, found, expected)) and not any(example.question is not None for example in found)


def test_a_share_of_realms_examples_are_questions_as_a_function_of_the_step(own: Run) -> None:
    """Whatever was drawn before: a resumed stage restores candidates with these examples."""
    first, second = candidates(own, 0.5), candidates(own, 0.5)
    drawn = {step: first.examples(step, SIZE) for step in range(60)}
    assert all(all(map(same_example, second.examples(step, SIZE), drawn[step])) for step in (59, 3, 30, 4))
    share = np.mean([example.question is not None for examples in drawn.values() for example in examples])
    assert 0.35 < share < 0.65
    asked = [example for example in candidates(own, 1.0).examples(0, 24)]
    assert all(example.question is not None for example in asked)


def test_pending_candidates_are_restored_with_their_questions(own: Run, tmp_path: Path) -> None:
    before, after = candidates(own, 0.5), candidates(own, 0.5)
    done: Future[Found] = Future()
    done.set_result((np.arange(SIZE * 7).reshape(SIZE, 7) % 12, np.zeros((SIZE, 7), np.float32)))
    before._pending = (5, before.examples(5, SIZE), done)
    before.save(tmp_path)
    after.restore(tmp_path, 5)
    assert after._pending is not None and after._pending[0] == 5
    assert all(map(same_example, after._pending[1], before._pending[1]))
    assert all(map(np.array_equal, after._pending[2].result(), done.result()))


def test_a_block_without_a_sentence_for_a_question_gives_a_masked_sentence(own: Run) -> None:
    made = sampler(own, 1.0, replace(EASY, min_words=100))
    assert made.draw(int(made.rows[0]), np.random.default_rng(0)).question is None


def test_the_share_of_questions_does_not_depend_on_how_often_passages_are_found(run: Run) -> None:
    """No passage contains phrases of the statements such as `founder`."""
    made = batches(run, range(12), replace(EASY, phrase_prob=0.5), question_prob=0.25)
    found = made._retrieve(0, SIZE)
    asked = [example.question is not None for example, _ in found]
    assert len(found) == STEPS_PER_RETRIEVAL * SIZE
    assert sum(asked) == round(0.25 * STEPS_PER_RETRIEVAL * SIZE)
    early, late = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert abs(np.mean(early) - np.mean(late)) < 0.3, "mixed"


def test_questions_without_another_passage_read_their_own_block(own: Run) -> None:
    made = batches(own, [0], question_prob=1.0)
    cut = whole = 0
    for example, row in made._retrieve(0, SIZE):
        assert example.question is not None
        title, text, starts = made._read(row, example)
        sentences = [ids.tobytes() for ids in np.split(text, starts[1:])]
        assert own.collator.contains((title, text), example.span_ids), "the answer can be found"
        if row != example.row:
            continue
        if example.sentence_ids.tobytes() in sentences:
            whole += 1
            assert np.array_equal(text, own.passages.text_ids(row)) and len(sentences) == 3
            others = [ids for ids in sentences if ids != example.sentence_ids.tobytes()]
            rest = np.frombuffer(b"".join(others), np.int32)
            assert not own.collator.contains((title, rest), example.span_ids), "nothing to cut to"
        else:
            cut += 1
            assert len(sentences) == 2 and len(text) == len(own.passages.text_ids(row)) - len(example.sentence_ids)
    assert cut > 10 and whole > 10


def test_questions_about_their_whole_block_are_noisier(own: Run) -> None:
    """With a noise that drops all words there is no such question left."""
    config = replace(EASY, phrase_prob=0.0, drop_prob=0.5, min_words=1, source_noise=2.0)
    made = batches(own, [0], config, question_prob=1.0)
    for example, row in made._retrieve(0, SIZE):
        assert row != example.row or len(made._read(row, example)[1]) < len(own.passages.text_ids(row))


@pytest.mark.parametrize("source_prob", [0.0, 0.5])
def test_source_prob_is_the_probability_of_reading_the_own_block(own: Run, source_prob: float) -> None:
    made = batches(own, [0], replace(EASY, source_prob=source_prob), question_prob=1.0)
    rng = np.random.default_rng(0)
    drawn = [made.sampler.draw(int(row), rng) for row in np.tile(made.sampler.rows, 30)]
    allowed = [made._from_source(example, rng) is not None for example in drawn]
    assert abs(np.mean(allowed) - source_prob) < 0.08
    masked = replace(drawn[0], question=None)
    assert all(made._from_source(masked, rng) is None for _ in range(20)), "masked sentences never"


def test_statements_are_not_read_as_passages(run: Run) -> None:
    """The rows of statements are not rows of passages."""
    with pytest.raises(UserError, match="no retrieved passage contains"):
        batches(run, [-1], question_prob=1.0)(0, SIZE)


def test_a_question_is_supported_only_by_a_passage_with_another_span_of_its_sentence(run: Run) -> None:
    def ids(text: str) -> np.ndarray:
        return np.array(run.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    sentence, span = ids("It lies on the Quill."), ids("Quill")
    (start, *_) = run.wordpieces.find(sentence, span)
    alone = MaskedSentence(0, sentence, start, start + len(span), 0, (), question=ids("where it lies on the?"))
    rows = np.arange(12)
    assert find_supporting_passage(rows, alone, run.statements, run.collator) is None
    named = replace(alone, others=(ids("Holm"),))
    assert find_supporting_passage(rows, named, run.statements, run.collator) == 7


def test_batches_with_questions_show_questions_and_read_sentences_first(run: Run) -> None:
    made, again = (batches(run, range(12), question_prob=0.5, sentence_steps=3) for _ in range(2))
    asked = []
    for step in (52, 0, 1):
        batch = made(step, SIZE)
        assert same(batch, again(step, SIZE)), "a function of the step"
        for joint, spans in zip(batch.joint, batch.spans, strict=True):
            for ids, kind, mask, answers, row in zip(
                joint.ids_RL, joint.type_RL, joint.mask_RL, spans.is_answer_RLW, joint.row_R, strict=True
            ):
                masks = (ids == run.tokenizer.mask_token_id).sum()
                assert masks == batch.token_mask_BM[row].sum()
                asked.append(bool(masks == 0))
                assert answers.any(), "the answer is marked in what is read"
                if step < 3:
                    passage = run.tokenizer.decode(ids[(kind == 0) & (mask == 1)])
                    assert passage.count(".") <= 1, "one sentence"
    assert len(asked) == 12 and 0 < sum(asked) < 12, "masked sentences and questions, which have no masks"


def test_the_questions_settings_belong_to_the_stages_that_use_them(own: Run) -> None:
    tree = tiny_tree(own.folder.parent)
    assert "question_prob" not in tree["pretrain"] and "pseudo_questions" not in own.settings("pretrain")
    config = replace(own.config, pretrain=replace(own.config.pretrain, question_prob=0.5))
    settings = Run(own.folder, config).settings("pretrain")
    assert settings["pseudo_questions"]["forms"] == {"noisy": 1.0}
    assert settings["pseudo_questions"]["question_words"]["person"] == ["who"]
