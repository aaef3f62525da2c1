"""Model inputs: special tokens, padding, batches of bounded size.

Shape legend: B rows, L wordpieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

IntArray = np.ndarray
"""One-dimensional array of wordpiece ids."""


@dataclass(frozen=True)
class Wordpieces:
    """The ids of a tokenizer that are needed to build model inputs."""

    cls: int
    sep: int
    mask: int
    pad: int
    continuation: np.ndarray
    """Whether each id of the vocabulary continues a word (`##…`)."""

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "Wordpieces":
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        continuation = np.array([name.startswith("##") for name in names])
        return cls(
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token_id,
            tokenizer.pad_token_id,
            continuation,
        )

    def query(self, text_ids: IntArray, max_tokens: int) -> IntArray:
        """`[CLS] text [SEP]`; the text is truncated so that the input has at most `max_tokens`."""
        return np.concatenate(([self.cls], text_ids[: max_tokens - 2], [self.sep])).astype(np.int32)

    def passage(self, title_ids: IntArray, text_ids: IntArray, max_tokens: int) -> IntArray:
        """`[CLS] title [SEP] text [SEP]` of at most `max_tokens`; both empty: the null passage.

        A long title is truncated to half of the available tokens, so that some text is always read.
        """
        title_ids, text_ids = _fit(title_ids, text_ids, max_tokens - 3)
        return np.concatenate(([self.cls], title_ids, [self.sep], text_ids, [self.sep])).astype(np.int32)

    def joint(
        self, query_ids: IntArray, title_ids: IntArray, text_ids: IntArray, max_tokens: int
    ) -> tuple[IntArray, int, int]:
        """`[CLS] x [SEP] title [SEP] text [SEP]`; the text is truncated to fit `max_tokens`.

        Returns the ids, the length of the first segment (`[CLS] x [SEP]`) and the position of the
        first wordpiece of the text.
        """
        first = len(query_ids) + 2
        title_ids, text_ids = _fit(title_ids, text_ids, max_tokens - first - 2)
        ids = np.concatenate(([self.cls], query_ids, [self.sep], title_ids, [self.sep], text_ids, [self.sep]))
        return ids.astype(np.int32), first, first + len(title_ids) + 1

    def find(self, text_ids: IntArray, span_ids: IntArray, whole_words: bool = True) -> list[int]:
        """Start positions of the non-overlapping occurrences of `span_ids` in `text_ids`.

        With `whole_words`, occurrences that begin or end within a word are skipped.
        """
        text_ids, span_ids = np.ascontiguousarray(text_ids, np.int32), np.ascontiguousarray(span_ids, np.int32)
        text, span, found, at = text_ids.tobytes(), span_ids.tobytes(), [], 0
        while (at := text.find(span, at)) >= 0:
            start, end = at // 4, at // 4 + len(span_ids)
            whole = not self.continuation[text_ids[start]] and (
                end == len(text_ids) or not self.continuation[text_ids[end]]
            )
            if at % 4 == 0 and (whole or not whole_words):
                found.append(start)
                at += len(span)
            else:
                at += 1
        return found


def _fit(title_ids: IntArray, text_ids: IntArray, room: int) -> tuple[IntArray, IntArray]:
    """Truncate title and text to `room` in total: the title to half, or to the room that the text
    leaves."""
    title_ids = title_ids[: max(room // 2, room - len(text_ids))]
    return title_ids, text_ids[: room - len(title_ids)]


def pad_batch(
    sequences: Sequence[IntArray], pad_id: int, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad B sequences to `width`, or to the longest.

    Returns `ids_BL` and `mask_BL` (1 = real token), both int64.
    """
    longest = width or max(len(sequence) for sequence in sequences)
    ids_BL = np.full((len(sequences), longest), pad_id, dtype=np.int64)
    mask_BL = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids_BL[row, : len(sequence)] = sequence
        mask_BL[row, : len(sequence)] = 1
    return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)


def token_budget_batches(lengths: Sequence[int] | IntArray, token_budget: int) -> list[np.ndarray]:
    """Group rows by length into batches of at most `token_budget` padded tokens, or one row.

    The longest rows come first, so that an out-of-memory error occurs at the start.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, token_budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def epoch_rows(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Rows of the batch of `step`, (batch_size,): `count` rows in a new random order every epoch.

    The result depends only on the arguments, so a resumed stage needs only the step. A batch may
    span two epochs.
    """
    at = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(count, int(i // count), seed)[i % count] for i in at])


@lru_cache(maxsize=8)
def _epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
