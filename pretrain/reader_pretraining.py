"""Reader pretraining: predict masked salient spans from retrieved passages that contain them.

It uses no questions or answers: the spans come from the tagger, the passages from the retriever.
Entity substitution prevents the reader from memorizing facts, so that it learns to copy.
"""

from typing import Any

import numpy as np

from index.fusion import Fusion
from index.interface import Index
from pretrain.collate import MaskedCollator
from pretrain.masking import MaskedSentence, substitute
from pretrain.pseudo_questions import ExampleSampler
from pretrain.search import FrozenSearch
from pretrain.selection import find_supporting_passage
from realm.corpus.collate import NULL, Parts
from realm.corpus.substitution import SpanPool, span_pool
from realm.errors import UserError
from realm.models.batches import MaskedBatch
from realm.models.modules import ReaderPretrainingModel
from realm.models.reader import Reader, build_reader
from realm.models.retriever import build_retriever
from realm.run.folder import Run
from realm.run.initial import initial_reader, initial_retriever
from realm.runtime.distributed import local_device, rank, world_size
from realm.text.inputs import IntArray, epoch_rows
from realm.training.sections import ReaderPretrainingConfig
from realm.training.stage import Stage
from realm.training.streams import RunStream, StepStream, run_seed, step_generator

STEPS_PER_RETRIEVAL = 50
"""Number of steps whose passages are retrieved at once."""
MAX_DRAWS = 3
"""Maximum number of sentences drawn per example; some have no supporting passage."""


class ReaderPretraining(Stage):
    """The reader learns to copy spans from passages, with both of its heads."""

    name = "reader_pretraining"
    config: ReaderPretrainingConfig

    def __init__(self, reader: Reader, batches: "ReaderPretrainingBatches", config: ReaderPretrainingConfig) -> None:
        super().__init__(ReaderPretrainingModel(reader, config.span_loss), config, reader=reader)
        self.batches = batches
        if config.span_loss:
            reader.span_softmax = "passage"

    @classmethod
    def open(cls, run: Run) -> "ReaderPretraining":
        """Open the stage for training in `run`."""
        reader = initial_reader(run, cls.name)
        collator = MaskedCollator(run.collator, run.config.pretrain.reader_buckets)
        return cls._build(run, reader, FrozenSearch.open(run, initial_retriever(run, cls.name), collator))

    @classmethod
    def open_for_timing(cls, run: Run, index: Index) -> "ReaderPretraining":
        """Open the stage for timing."""
        retriever = build_retriever(run.config.retriever, run.tokenizer).to(local_device())
        collator = MaskedCollator(run.collator, run.config.pretrain.reader_buckets)
        precision = run.config.engine.precision
        search = FrozenSearch(retriever, index, collator, precision, Fusion.of(run), run.statements)
        return cls._build(run, build_reader(run.config.reader, run.tokenizer)[0], search)

    @classmethod
    def _build(cls, run: Run, reader: Reader, search: FrozenSearch) -> "ReaderPretraining":
        config, longest = run.config.reader_pretraining, run.config.pretrain.max_span_tokens
        sampler = ExampleSampler.open(run, config.question_prob)
        return cls(reader, ReaderPretrainingBatches(sampler, search, config, longest, run.config.seed), config)

    def draw(self, step: int, size: int) -> MaskedBatch:
        return self.batches(step, size)

    def sample_batch(self, step: int, size: int) -> MaskedBatch:
        return self.batches.sample(step, size)

    def progress_line(self, values: dict[str, Any]) -> str:
        loss, right, located = values["loss"], values["accuracy"], values["span_accuracy"]
        return f"loss {loss:.2f}  accuracy {right:.2f}  span accuracy {located:.2f}"

    def close(self) -> None:
        self.batches.search.index.close()


class ReaderPretrainingBatches:
    """Masked sentences or questions, each with a passage that contains its span, as a function of
    the step.

    Passages are retrieved for 50 steps at once. A sentence without a supporting passage is skipped
    and replaced by the next one, so batches stay full; a question may read the block of its
    sentence instead, if sentences and passages are the same corpus.
    """

    def __init__(
        self,
        sampler: ExampleSampler,
        search: FrozenSearch,
        config: ReaderPretrainingConfig,
        max_span_tokens: int,
        seed: int,
    ) -> None:
        """`max_span_tokens`: longest masked span."""
        self.sampler, self.statements = sampler, sampler.corpus
        self.search, self.collator = search, search.collator
        self.config, self.seed = config, seed
        self.passages = self.collator.inputs.passages
        self.has_sources = self.statements.fingerprint == self.passages.fingerprint
        """Whether the blocks of the sentences are passages."""
        self.pool: SpanPool = span_pool([self.statements, self.passages], max_span_tokens)
        self._block = -1
        self._found: list[tuple[MaskedSentence, int]] = []

    def __call__(self, step: int, size: int) -> MaskedBatch:
        """The batch of step `step` on this rank."""
        if step // STEPS_PER_RETRIEVAL != self._block:
            self._block = step // STEPS_PER_RETRIEVAL
            self._found = self._retrieve(self._block, size)
        at = step % STEPS_PER_RETRIEVAL * size
        return self._batch(step, [self._found[i % len(self._found)] for i in range(at, at + size)])

    def sample(self, step: int, size: int) -> MaskedBatch:
        """A batch as in training, but with a random passage if no passage supports the sentence."""
        rng = step_generator(self.seed, StepStream.SUPPORTING_PASSAGES, step)
        examples = [self.sampler.draw(int(row), rng) for row in rng.choice(self.sampler.rows, size)]
        found = self._supported(examples)
        random_rows = rng.choice(self.passages.rows, size)
        rows = [int(other) if row is None else row for row, other in zip(found, random_rows, strict=True)]
        return self._batch(step, list(zip(examples, rows, strict=True)))

    def _batch(self, step: int, pairs: list[tuple[MaskedSentence, int]]) -> MaskedBatch:
        rng = step_generator(self.seed, StepStream.READER_PRETRAINING_EXAMPLES, step)
        inputs, examples, passages = self.collator.inputs, [], []
        for example, row in pairs:
            parts = self._sentence(row, example) if step < self.config.sentence_steps else self._read(row, example)[:2]
            if rng.random() < self.config.null_prob:
                parts = inputs.passage(NULL)
            if rng.random() < self.config.substitution_prob:
                example, (title, text) = substitute(example, parts, self.pool, inputs.wordpieces, rng)
                parts = title, text
            examples.append(example)
            passages.append([parts])
        return self.collator.masked(examples, passages)

    def _read(self, row: int, example: MaskedSentence) -> tuple[IntArray, IntArray, IntArray]:
        """Title and text that are read for an example, and the places at which sentences begin.

        The block of a question's sentence is read without the sentence if its text still contains
        the span.
        """
        if self.has_sources and row == example.row and (cut := self._without_sentence(example)):
            return cut
        title, text = self.collator.inputs.in_context(row)
        return title, text, self._sentence_starts(row)

    def _without_sentence(self, example: MaskedSentence) -> tuple[IntArray, IntArray, IntArray] | None:
        """The example's own block in its context as in `_read`, without the sentence; None if its
        text does not contain the span then."""
        inputs, sentence = self.collator.inputs, example.sentence_ids
        title, text = inputs.in_context(example.row)
        sentences = np.split(text, self._sentence_starts(example.row)[1:])
        kept = [ids for ids in sentences if not np.array_equal(ids[: len(sentence)], sentence)]
        rest = np.concatenate([text[:0], *kept])
        starts = np.cumsum([0, *map(len, kept)])[:-1]
        return (title, rest, starts) if inputs.wordpieces.find(rest, example.span_ids) else None

    def _sentence_starts(self, row: int) -> IntArray:
        """Places in a passage's context at which sentences begin."""
        context = self.collator.inputs.contexts.around(row)
        return np.concatenate(
            [
                self.passages.sentence_starts(row) + start
                for row, start in zip(context.rows, context.starts, strict=True)
            ]
        )

    def _sentence(self, row: int, example: MaskedSentence) -> Parts:
        """The first sentence in what is read that contains the span, without a title.

        Returns the title as the text if only the title contains the span.
        """
        title, ids, starts = self._read(row, example)
        places = self.collator.inputs.wordpieces.find(ids, example.span_ids)
        if not places:
            return ids[:0], title
        bounds = np.append(starts, len(ids))
        number = np.searchsorted(bounds, places[0], side="right")
        return ids[:0], ids[bounds[number - 1] : bounds[number]]

    def _from_source(self, example: MaskedSentence, rng: np.random.Generator) -> MaskedSentence | None:
        """The question, to be asked about its sentence's block; None if it is not.

        It is noisier if the block contains the answer in the sentence only.
        """
        questions = self.sampler.questions
        if questions is None or example.question is None or not self.has_sources:
            return None
        if rng.random() >= questions.config.source_prob:
            return None
        return example if self._without_sentence(example) else questions.with_noise(example, rng)

    def _supported(self, examples: list[MaskedSentence]) -> list[int | None]:
        """The supporting passage of each masked sentence, or None."""
        return [
            find_supporting_passage(rows, example, self.statements, self.collator.inputs)
            for example, rows in zip(examples, self.search(examples, self.config.retrieve), strict=True)
        ]

    def _retrieve(self, block: int, size: int) -> list[tuple[MaskedSentence, int]]:
        """Examples for 50 steps, each with the row of the passage to read.

        Draws as many sentences as are needed, up to `MAX_DRAWS` times. Raises UserError if no
        sentence has a supporting passage.
        """
        needed = STEPS_PER_RETRIEVAL * size
        missing_questions = round(self.config.question_prob * needed)
        missing = {True: missing_questions, False: needed - missing_questions}
        rng = step_generator(self.seed, StepStream.SUPPORTING_PASSAGES, block)
        order_seed = run_seed(self.seed, RunStream.READER_PRETRAINING)
        count = MAX_DRAWS * needed * world_size()
        rows = self.sampler.rows[epoch_rows(len(self.sampler.rows), count, block, order_seed)][rank() :: world_size()]
        found: list[tuple[MaskedSentence, int]] = []
        for start in range(0, len(rows), needed):
            if len(found) >= needed:
                break
            examples = [self.sampler.draw(int(row), rng) for row in rows[start : start + needed]]
            for example, row in zip(examples, self._supported(examples), strict=True):
                if row is None:
                    if (asked := self._from_source(example, rng)) is None:
                        continue
                    example, row = asked, asked.row
                keep = rng.random() < self.config.title_span_prob
                keep |= not self.collator.inputs.wordpieces.find(self.passages.title_ids(row), example.span_ids)
                asks = example.question is not None
                if keep and missing[asks]:
                    found.append((example, row))
                    missing[asks] -= 1
        if not found:
            raise UserError(
                "no retrieved passage contains any masked span, so the reader has nothing to learn from; "
                "train the retriever first (realm ict)."
            )
        if self.config.question_prob:  # one kind may have been complete before the other
            found = [found[place] for place in rng.permutation(len(found))]
        return found
