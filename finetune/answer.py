"""Answer questions with the models of a run: retrieve passages, and extract the best span."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from finetune.collate import QuestionCollator
from finetune.questions import Question
from finetune.train_reader import Finetuning
from index.frozen import frozen_index
from index.fusion import Fusion
from realm.errors import UserError
from realm.models.batches import QuestionBatch
from realm.models.modules import OpenQaModel
from realm.models.objectives import MASKED_SCORE, span_log_probs
from realm.models.precision import autocast
from realm.models.reader import Reader, load_reader
from realm.models.retriever import Retriever, embed_no_grad
from realm.models.retriever_files import load_retriever
from realm.run.folder import STAGES, Run
from realm.run.initial import build_initial_reader, build_initial_retriever, initial_retriever
from realm.runtime.distributed import local_device
from realm.runtime.telemetry import log_line
from realm.text.inputs import token_budget_batches
from realm.text.tokenizer import tokenize

INITIAL = "initial"
"""Stage name of the retriever before any training in the run, such as a pretrained encoder."""


@dataclass(frozen=True)
class Answer:
    """One answered question."""

    text: str
    """The answer as it appears in the passage."""
    passage: int | None
    """Row of the passage it was read from; None if no passage was retrieved."""
    start: int
    """Character offset of the answer in the passage's text; -1 if it was read from the title."""
    probability: float
    """p(z|x) of that passage among those read."""


NO_ANSWER = Answer("", None, -1, 0.0)
"""The answer if nothing was retrieved, which can happen with inverted lists."""


class Answerer:
    """Retriever, index and reader after a stage; if no reader is trained, `read` fails."""

    def __init__(self, run: Run, stage: str = Finetuning.name) -> None:
        """Raises UserError if the stage is not finished."""
        self.run, self.stage, self.device = run, stage, local_device()
        retriever, indexed = self._retriever()
        self.retriever = retriever.to(self.device)
        fusion = Fusion.of(run, indexed)
        self.index = frozen_index(run.folder, indexed, run.passages, run.config.refresh, log_line, fusion)
        reader = self._reader()
        self.model = None if reader is None else OpenQaModel(self.retriever, reader).eval().to(self.device)
        max_span_tokens = run.config.reader.max_span_tokens
        self.collator = QuestionCollator(run.collator, run.tokenizer, self.index, max_span_tokens, fusion=fusion)

    def _retriever(self) -> tuple[Retriever, Path]:
        """The stage's retriever, and the folder of the retriever that the index is built from."""
        run = self.run
        if self.stage == INITIAL:
            initial = build_initial_retriever(run)
            return load_retriever(initial)[0], initial
        if self.stage not in STAGES:
            raise UserError(f"unknown stage {self.stage!r}; use {INITIAL}, {', '.join(STAGES)}.")
        if not run.finished(self.stage):
            command = self.stage.replace("_", "-")
            raise UserError(f"run {run.folder} has not finished stage {self.stage} yet; run `realm {command}` first.")
        folder = run.latest("retriever", until=self.stage) or build_initial_retriever(run)
        indexed = initial_retriever(run, self.stage) if self.stage == Finetuning.name else folder
        return load_retriever(folder)[0], indexed

    def _reader(self) -> Reader | None:
        """The stage's reader; None if none is trained yet, here or in the run of `init_from`."""
        path = self.run.latest("reader", until=self.stage) if self.stage in STAGES else None
        if path is not None:
            return load_reader(path, self.run.config.reader)
        return build_initial_reader(self.run) if self.run.config.init_from.reader else None

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        """Rows of the `k` best passages per question, (B, k)."""
        precision = self.run.config.engine.precision
        embeddings = embed_no_grad(self.retriever.query_tower, *self.collator.queries(questions), precision)
        return self.collator.retrieve(questions, embeddings, k)

    def read(self, questions: Sequence[Question], rows: np.ndarray) -> list[Answer]:
        """The best span in the given passages, (B, N) rows; negative rows are empty slots."""
        assert self.model is not None
        if (rows < 0).all():
            return [NO_ANSWER] * len(questions)
        batch = self.collator.batch(questions, self.collator.queries(questions), rows, rows).to(self.device)
        with torch.inference_mode(), autocast(self.device, self.run.config.engine.precision):
            query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
            span_score_QLW = self._span_scores(self.model.reader, batch)
            score_BNS, read_score_BN = self.model.score_spans(batch, span_score_QLW, query_emb_BD)
        return self._best(batch, score_BNS.cpu(), read_score_BN.softmax(-1).cpu(), rows)

    def _span_scores(self, reader: Reader, batch: QuestionBatch) -> torch.Tensor:
        """Scores of all spans as the reader was trained, computed in batches of similar length.

        Added to the passage's relevance score, they rank spans as in finetuning (Lee et al. 2019,
        section 5); of a reader without finetuning, they are log p(s|z,x), so that the sum is
        log p(z|x) p(s|z,x), up to a constant of the question.
        """
        span_score_QLW = torch.full(batch.allowed_QLW.shape, MASKED_SCORE, device=self.device)
        lengths = batch.mask_QL.sum(1)
        for part in token_budget_batches(lengths.cpu().numpy(), self.run.config.evaluate.token_budget):
            at = torch.from_numpy(part).to(self.device)
            longest = int(lengths[at].max())
            hidden = reader(batch.ids_QL[at, :longest], batch.mask_QL[at, :longest], batch.type_QL[at, :longest])
            score_PLW = reader.span_scores(hidden, batch.allowed_QLW[at, :longest])
            if reader.span_softmax == "passage":
                log_p_PS, _ = span_log_probs(score_PLW.flatten(1), reader.absent_scores(hidden))
                score_PLW = log_p_PS.view_as(score_PLW)
            span_score_QLW[at, :longest] = score_PLW
        return span_score_QLW

    def _best(
        self, batch: QuestionBatch, score_BNS: torch.Tensor, p_z_BN: torch.Tensor, rows: np.ndarray
    ) -> list[Answer]:
        """The best span of each question, as text of its passage."""
        B, N, S = score_BNS.shape
        number_of = {row: q for q, row in enumerate(batch.row_Q.tolist())}
        answers = []
        for b, best in enumerate(score_BNS.view(B, -1).argmax(-1).tolist()):
            if (rows[b] < 0).all():
                answers.append(NO_ANSWER)
                continue
            n, span = divmod(best, S)
            start, width = divmod(span, self.collator.max_span_tokens)
            q = number_of[b * N + n]
            ids_L, type_L = batch.ids_QL[q].cpu(), batch.type_QL[q].cpu()
            text, row, character = self._span_text(ids_L, type_L, int(rows[b, n]), start, start + width)
            answers.append(Answer(text, row, character, float(p_z_BN[b, n])))
        return answers

    def _span_text(
        self, ids_L: torch.Tensor, type_L: torch.Tensor, row: int, start: int, end: int
    ) -> tuple[str, int, int]:
        """Wordpieces `start` to `end` (inclusive) of a passage's joint input as text.

        Returns the text, the row of the block in which it begins, and its first character there (-1
        in the title).
        """
        passages, tokenizer = self.run.passages, self.run.tokenizer
        text_at = int((ids_L == self.run.wordpieces.sep).nonzero()[1]) + 1  # after the second [SEP]
        if start < text_at:
            title, title_at = passages.title(row), int((type_L == 0).int().cumprod(0).sum())
            offsets = tokenize(tokenizer, [title])[0][1]
            return title[offsets[start - title_at, 0] : offsets[end - title_at, 1]], row, -1
        context = self.run.contexts.around(row)
        texts = [passages.text(other) for other in context.rows]
        block_starts = [0, *accumulate(map(len, texts))]
        parts = zip(tokenize(tokenizer, texts), block_starts, strict=False)
        offsets = np.concatenate([block_offsets + at for (_, block_offsets), at in parts])
        first, last = int(offsets[start - text_at, 0]), int(offsets[end - text_at, 1])
        block = bisect_right(block_starts, first) - 1
        return "".join(texts)[first:last], context.rows[block], first - block_starts[block]
