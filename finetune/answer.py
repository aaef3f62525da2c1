"""Retriever, index and reader of a run at work: passages for a question, and the best span in them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data import QuestionBatches
from finetune.questions import Question
from finetune.train_reader import STAGE
from index.frozen import frozen_index
from realm.errors import UserError
from realm.models.modules import OpenQaModel, QuestionBatch
from realm.models.objectives import MASKED_SCORE
from realm.models.precision import autocast
from realm.models.reader import Reader, load_reader
from realm.models.retriever import embed_no_grad, load_retriever
from realm.run.folder import STAGES, Run
from realm.run.initial import build_initial_reader, build_initial_retriever, initial_retriever
from realm.runtime.distributed import local_device
from realm.runtime.telemetry import console
from realm.text.inputs import token_budget_batches
from realm.text.tokenizer import tokenize

INITIAL = "initial"
"""Stage name of the retriever as the config builds it, before any training: a checkpoint off the
shelf."""


@dataclass(frozen=True)
class Answer:
    """One answered question."""

    text: str
    """The answer as it stands in the passage."""
    passage: int | None
    """Row of the passage it was read from; None where there was none to read."""
    start: int
    """First character of the answer in the passage's text; -1 where it was read from the title."""
    probability: float
    """p(z|x) of that passage among those read."""


NO_ANSWER = Answer("", None, -1, 0.0)
"""The answer to a question for which nothing was retrieved, as an index of inverted lists may do."""


class Answerer:
    """Retriever, index and reader as a stage left them, ready to answer. Without a reader by
    then, only `retrieve` works."""

    def __init__(self, run: Run, stage: str = STAGE) -> None:
        self.run, self.stage = run, stage
        retriever, source = self._retriever()
        self.device = local_device()
        self.index = frozen_index(
            run.folder, source, run.passages, run.config.refresh, lambda line: console.print(f"  {line}")
        )
        self.retriever = retriever.to(self.device)
        reader = self._reader()
        self.model = None if reader is None else OpenQaModel(self.retriever, reader).eval().to(self.device)
        self.batches = QuestionBatches(run, self.index)

    def _retriever(self) -> tuple[Any, Path]:
        """The stage's retriever, and the folder of the one whose passage embeddings it is
        searched by."""
        run = self.run
        if self.stage == INITIAL:
            start = build_initial_retriever(run)
            return load_retriever(start)[0], start
        if not run.finished(self.stage):
            raise UserError(
                f"run {run.folder} has not finished stage {self.stage} yet; run `realm {self.stage.replace('_', '-')}` first."
            )
        folder = run.latest("retriever", until=self.stage) or build_initial_retriever(run)
        return load_retriever(folder)[0], initial_retriever(run, STAGE) if self.stage == STAGE else folder

    def _reader(self) -> Reader | None:
        """The stage's reader; none before one was trained, in this run or in the one that it
        starts from."""
        path = self.run.latest("reader", until=self.stage) if self.stage in STAGES else None
        if path is not None:
            return load_reader(path, self.run.config.reader)
        return build_initial_reader(self.run) if self.run.config.init_from.reader else None

    def retrieve(self, questions: Sequence[Question], k: int) -> np.ndarray:
        """Rows of the `k` best passages per question, (B, k)."""
        embeddings = embed_no_grad(
            self.retriever.query_tower, *self.batches.queries(questions), self.run.config.engine.precision
        )
        return self.index.search(embeddings, k)[1]

    def read(self, questions: Sequence[Question], rows: np.ndarray) -> list[Answer]:
        """The best span over the given passages, (B, N) rows, -1 where there is none."""
        assert self.model is not None
        if (rows < 0).all():
            return [NO_ANSWER] * len(questions)
        batch = self.batches.batch(questions, self.batches.queries(questions), rows, rows).to(self.device)
        with torch.inference_mode(), autocast(self.device, self.run.config.engine.precision):
            query_emb_BD = self.retriever.embed_queries(batch.query_ids_BL, batch.query_mask_BL)
            span_score_QLW = torch.full(batch.allowed_QLW.shape, MASKED_SCORE, device=self.device)
            lengths = batch.mask_QL.sum(1)
            for part in token_budget_batches(lengths.cpu().numpy(), self.run.config.evaluate.token_budget):
                at = torch.from_numpy(part).to(self.device)
                longest = int(lengths[at].max())
                hidden = self.model.reader(
                    batch.ids_QL[at, :longest], batch.mask_QL[at, :longest], batch.type_QL[at, :longest]
                )
                span_score_QLW[at, :longest] = self.model.reader.span_scores(hidden)
            score_BNS, read_score_BN = self.model.scored(
                batch, span_score_QLW.masked_fill(~batch.allowed_QLW, MASKED_SCORE), query_emb_BD
            )
        return self._best(batch, score_BNS.cpu(), read_score_BN.softmax(-1).cpu(), rows)

    def _best(
        self, batch: QuestionBatch, score_BNS: torch.Tensor, p_z_BN: torch.Tensor, rows: np.ndarray
    ) -> list[Answer]:
        B, N, S = score_BNS.shape
        number_of = {row: q for q, row in enumerate(batch.row_Q.tolist())}
        answers = []
        for b, best in enumerate(score_BNS.view(B, -1).argmax(-1).tolist()):
            if (rows[b] < 0).all():
                answers.append(NO_ANSWER)
                continue
            n, span = divmod(best, S)
            start, width = divmod(span, self.batches.width)
            q = number_of[b * N + n]
            text, row, begin = self._cut_out(
                batch.ids_QL[q].cpu(), batch.type_QL[q].cpu(), int(rows[b, n]), start, start + width
            )
            answers.append(Answer(text, row, begin, float(p_z_BN[b, n])))
        return answers

    def _cut_out(
        self, ids_L: torch.Tensor, type_L: torch.Tensor, row: int, start: int, end: int
    ) -> tuple[str, int, int]:
        """Wordpieces `start` to `end` (inclusive) of the joint input of a passage as they stand
        in its text, the block they begin in, and where."""
        passages = self.run.passages
        text_at = int((ids_L == self.run.wordpieces.sep).nonzero()[1]) + 1  # behind the second [SEP]
        if start < text_at:
            title, title_at = passages.title(row), int((type_L == 0).int().cumprod(0).sum())
            spots = tokenize(self.run.tokenizer, [title])[0][1]
            return title[spots[start - title_at, 0] : spots[end - title_at, 1]], row, -1
        context = self.run.contexts.around(row)
        texts = [passages.text(other) for other in context.rows]
        characters = [0, *accumulate(map(len, texts))]
        spots = np.concatenate(
            [spots + at for (_, spots), at in zip(tokenize(self.run.tokenizer, texts), characters, strict=False)]
        )
        begin, finish = int(spots[start - text_at, 0]), int(spots[end - text_at, 1])
        block = bisect_right(characters, begin) - 1
        return "".join(texts)[begin:finish], context.rows[block], begin - characters[block]
