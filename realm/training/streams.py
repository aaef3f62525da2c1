"""Named random streams.

Every random choice of a run is a function of its seed, a stream and, in training, the step and the
rank. A resumed stage therefore needs no generator state. Runs are only reproducible if the numbers
of the streams stay the same: never reuse or change one.
"""

from enum import IntEnum

import numpy as np
import torch

from realm.runtime.distributed import rank


class RunStream(IntEnum):
    """Streams that are used once per run: initial weights, order of epochs, samples."""

    ICT = 0
    """Initial retriever, and the order of the blocks in inverse cloze."""
    READER_PRETRAINING = 1
    PRETRAIN = 2
    FINETUNE = 3
    FINETUNE_RETRIEVER = 4
    READER_CHECK = 5
    """Sentences on which the reader is tested before REALM."""
    MASKED_SPAN_ITEMS = 7
    """Sentences of masked-span evaluation, if none are annotated."""
    MASKED_SPAN_RANDOM_PASSAGES = 11
    EVALUATION_RANDOM_PASSAGES = 13
    HELD_OUT = 17
    """Held-out questions, and the passages among which their passages are searched."""


class StepStream(IntEnum):
    """Streams that are used in each step, on each rank."""

    ICT_EXAMPLES = 1
    READER_PRETRAINING_EXAMPLES = 2
    SUPPORTING_PASSAGES = 3
    """Sentences for which reader pretraining retrieves supporting passages."""
    MASKED_SENTENCES = 4
    PRETRAIN_SUBSTITUTION = 5
    FINETUNE_SUBSTITUTION = 6
    HARD_NEGATIVES = 7
    ICT_NEGATIVES = 9


def run_seed(seed: int, stream: RunStream) -> int:
    """Seed of a stream of the run with seed `seed`."""
    return seed + stream


def run_generator(seed: int, stream: RunStream) -> np.random.Generator:
    """Generator of a stream of the run."""
    return np.random.default_rng(run_seed(seed, stream))


def step_generator(seed: int, stream: StepStream, step: int) -> np.random.Generator:
    """Generator of a stream at a step, on this rank."""
    return np.random.default_rng((seed, step, rank(), int(stream)))


def seed_step(seed: int, step: int) -> None:
    """Seed torch (dropout) for a step on this rank."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank())
