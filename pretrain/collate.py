"""Batches of masked sentences and passages."""

from collections.abc import Sequence

import numpy as np
import torch

from pretrain.masking import MaskedSentence, substitute
from realm.corpus.collate import NULL, Collator, Parts
from realm.corpus.substitution import SpanPool
from realm.models.batches import JointBatch, MaskedBatch, ReaderPretrainingBatch, RealmBatch, SpanTargets
from realm.models.reader import pad_joint, span_targets
from realm.text.inputs import IntArray, pad_batch


class MaskedCollator:
    """Builds padded batches from masked sentences and passage rows."""

    def __init__(self, collator: Collator, num_buckets: int) -> None:
        """`num_buckets`: groups of similar length into which joint inputs are padded."""
        self.inputs, self.num_buckets = collator, num_buckets

    def queries(self, examples: Sequence[MaskedSentence]) -> tuple[torch.Tensor, torch.Tensor]:
        """Retriever inputs of masked sentences and questions: ids and padding mask, each (B, L)."""
        return self.inputs.queries(self.query_ids(examples))

    def query_ids(self, examples: Sequence[MaskedSentence]) -> list[IntArray]:
        """Wordpieces of the queries, without special tokens except for masks."""
        mask_id = self.inputs.wordpieces.mask
        return [example.query_ids(mask_id) for example in examples]

    def masked(
        self,
        examples: Sequence[MaskedSentence],
        passages: Sequence[Sequence[Parts]],
        read_slot_BN: np.ndarray | None = None,
    ) -> MaskedBatch:
        """Reader inputs of every example with each of its passages, sorted by length into buckets.

        The number of buckets depends only on the number of examples, so it is the same on every
        rank. `read_slot_BN`: for each passage, the slot of the passage with which it is read;
        default: its own.
        """
        words, count = self.inputs.wordpieces, len(passages[0])
        if read_slot_BN is None:
            read_slot_BN = np.tile(np.arange(count), (len(examples), 1))
        joints = {
            b * count + n: self.inputs.joint(example.query_ids(words.mask), parts)
            for b, (example, slots) in enumerate(zip(examples, passages, strict=True))
            for n, parts in enumerate(slots)
            if read_slot_BN[b, n] == n
        }
        order = np.array(sorted(joints, key=lambda row: -len(joints[row][0])), dtype=np.int64)
        buckets = []
        for rows in np.array_split(order, min(self.num_buckets, len(examples))):
            tensors = pad_joint([joints[i][0] for i in rows], [joints[i][1] for i in rows], words.pad)
            buckets.append(JointBatch(*tensors, torch.from_numpy(rows)))
        # A question has no masks.
        targets = [example.span_ids[: None if example.question is None else 0] for example in examples]
        width = max(1, *map(len, targets))
        positions = [np.arange(len(ids)) + example.start + 1 for example, ids in zip(examples, targets, strict=True)]
        position_BM, token_mask_BM = pad_batch(positions, 0, width)
        target_BM, _ = pad_batch(targets, 0, width)
        return MaskedBatch(buckets, position_BM, target_BM, token_mask_BM.bool(), torch.from_numpy(read_slot_BN))

    def reader_pretraining(
        self, examples: Sequence[MaskedSentence], passages: Sequence[Parts], max_span_tokens: int
    ) -> ReaderPretrainingBatch:
        """Reader inputs of examples with one passage each, and the span's places in the passage.

        All occurrences of the span in title and text are targets.
        """
        words = self.inputs.wordpieces
        masked, spans = self.masked(examples, [[parts] for parts in passages]), []
        for joint in masked.joint:
            places = []
            for ids, mask, kind, row in zip(
                joint.ids_RL.numpy(), joint.mask_RL.numpy(), joint.type_RL.numpy(), joint.row_R.tolist(), strict=True
            ):
                first, length = int((kind == 0).sum() - (mask == 0).sum()), int(mask.sum())
                span_ids = examples[row].span_ids
                places.append([(first + start, len(span_ids)) for start in words.find(ids[first:length], span_ids)])
            targets = span_targets(places, joint.ids_RL, joint.mask_RL, joint.type_RL, words, max_span_tokens)
            spans.append(SpanTargets(*targets))
        return ReaderPretrainingBatch(masked, spans)

    def realm(
        self,
        examples: Sequence[MaskedSentence],
        candidates: np.ndarray,
        pool: SpanPool | None,
        substitution_prob: float,
        rng: np.random.Generator,
        lexical: np.ndarray | None = None,
    ) -> RealmBatch:
        """A batch of REALM pretraining; `candidates` (B, N − 1) are passage rows or EMPTY, and
        `lexical` their scores of fused retrieval (default: 0).

        With probability `substitution_prob`, an example's span is substituted from `pool`.
        """
        inputs = self.inputs
        passages, read_examples, contains_span = [], [], []
        read_slot_BN = np.zeros((len(examples), candidates.shape[1] + 1), dtype=np.int64)
        for b, (example, rows) in enumerate(zip(examples, candidates, strict=True)):
            # Slot 0 is the null passage; empty slots (-1 in `read_slots`) are read with it.
            read_slot_BN[b, 1:] = 1 + np.array(inputs.contexts.read_slots(rows))
            slots = [inputs.in_context(NULL), *(inputs.in_context(int(row)) for row in rows)]
            contains_span.append([inputs.contains(parts, example.span_ids) for parts in slots])
            if pool is not None and rng.random() < substitution_prob:
                flat = [part for parts in slots for part in parts]
                example, flat = substitute(example, flat, pool, inputs.wordpieces, rng)
                slots = list(zip(flat[0::2], flat[1::2], strict=True))
            read_examples.append(example)
            passages.append(slots)
        distinct, inverse = np.unique(candidates, return_inverse=True)
        # Row 0 is the null passage, which also fills empty slots; these are masked in the softmax.
        unique_parts = [inputs.passage(NULL), *(inputs.passage(int(row)) for row in distinct)]
        candidate_BN = torch.zeros(len(examples), candidates.shape[1] + 1, dtype=torch.long)
        candidate_BN[:, 1:] = torch.from_numpy(inverse.reshape(candidates.shape)) + 1
        valid_BN = torch.ones_like(candidate_BN, dtype=torch.bool)
        valid_BN[:, 1:] = torch.from_numpy(candidates >= 0)
        lexical_BN = torch.zeros(candidate_BN.shape)
        if lexical is not None:
            lexical_BN[:, 1:] = torch.from_numpy(lexical)
        return RealmBatch(
            *self.queries(examples),
            *inputs.passage_inputs(unique_parts),
            candidate_BN,
            valid_BN,
            torch.tensor(contains_span),
            self.masked(read_examples, passages, read_slot_BN),
            lexical_BN,
        )
