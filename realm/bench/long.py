"""`realm bench long`: what the attention variants can do on texts longer than they were trained on,
beside what that costs.

A reader of a few narrow layers is trained from scratch on each task and variant, with the same
seed, steps and batches. Positions start as sinusoids and are shifted at random in training, so that
all of those of the longest test have been seen.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from realm.attention import AttentionConfig, count_update
from realm.bench.attention_cases import parse_variant
from realm.bench.long_tasks import MASK, PAD, TASKS, Example, Task
from realm.errors import UserError
from realm.models.bert import mimetic_init
from realm.models.reader import Reader, ReaderConfig, pad_joint
from realm.runtime.publish import write_json_atomic
from realm.runtime.telemetry import print_table, progress

VARIANTS = (
    "dense",
    "{type: longformer, window: 8}",
    "{type: performer, num_features: 64}",
    "{type: linformer, projected_tokens: 32}",
    "{type: infini, segment: 32}",
)
_LAYERS, _WIDTH, _HEADS = 2, 128, 4
_TEST_TOKENS_A_BATCH = 2**15
Row = dict[str, Any]


def bench_long(
    variants: Sequence[str], tasks: Sequence[str], seed: int, tests: int, steps: int | None, json_file: Path | None
) -> list[Row]:
    """Train and test every variant on every task, print one table, write rows where asked;
    returns a row for each variant, task and length."""
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise UserError(f"--tasks {unknown[0]!r} is none; name some of {', '.join(TASKS)}.")
    if tests < 1 or (steps is not None and steps < 1):
        raise UserError(f"--tests and --steps must be at least 1, got {tests} and {steps}.")
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"{json_file}: there is no folder {json_file.parent}; make it first.")
    cases = [(name, text, parse_variant(text)) for name in tasks for text in variants]
    for name, _, attention in cases:  # what a task's lengths do not allow is said before anything is trained
        tiny_reader(TASKS[name], attention)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = {
        "layers": _LAYERS,
        "width": _WIDTH,
        "heads": _HEADS,
        "seed": seed,
        "tests": tests,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    rows: list[Row] = []
    for name, text, attention in cases:
        rows += [
            {"task": name, "variant": text, **row}
            for row in run_task(TASKS[name], attention, seed, tests, steps, f"{name}, {text}", device)
        ]
        if json_file is not None:
            write_json_atomic(json_file, {"setting": setting, "rows": rows})
    report(rows, tasks, seed)
    return rows


def run_task(
    task: Task, attention: AttentionConfig, seed: int, tests: int, steps: int | None, label: str, device: str
) -> list[Row]:
    """A row for each test length: share right, milliseconds of a training step (without making
    the texts) and of a tested text."""
    torch.manual_seed(seed)
    reader = tiny_reader(task, attention).to(device)
    steps = steps or task.steps
    step_ms = 1000 * train(reader, task, steps, seed, label) / steps
    rows = []
    for tokens in task.test_tokens:
        right, text_ms = test(reader, task, tokens, seed, tests)
        row = {"tokens": tokens, "times the training length": tokens // task.train_tokens, "steps": steps}
        rows.append({**row, "right": right, "step_ms": step_ms, "text_ms": text_ms})
    return rows


class ShiftedPositions(nn.Embedding):
    """Learned positions started as sinusoids, all of a batch shifted by the same random number
    in training (Kiyono et al. 2021, "SHAPE")."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """(1, L) position ids to (1, L, H)."""
        shift = 0
        if self.training:
            shift = int(torch.randint(self.num_embeddings - position_ids.shape[-1] + 1, ()))
        return super().forward(position_ids + shift)


def tiny_reader(task: Task, attention: AttentionConfig) -> Reader:
    """From random weights, for the longest text of a task."""
    longest = max(task.test_tokens)
    config = BertConfig(
        vocab_size=task.vocabulary,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=longest,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertModel(config, add_pooling_layer=False)
    mimetic_init(bert)
    positions = ShiftedPositions(longest, _WIDTH)
    positions.weight.data.copy_(bert.embeddings.position_embeddings.weight)
    bert.embeddings.position_embeddings = positions
    return Reader(bert, ReaderConfig(attention=attention, mlm_head="tied", span_hidden=8, max_tokens=longest))


def logits(reader: Reader, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Scores of the vocabulary at every mask, (B, M, V), and the answers, (B, M)."""
    device = reader.mlm_bias.device
    batch = pad_joint([example.ids for example in examples], [example.first for example in examples], PAD)
    ids_BL, mask_BL, type_BL = (tensor.to(device) for tensor in batch)
    position_BM = (ids_BL == MASK).nonzero()[:, 1].view(len(examples), -1)
    answer_BM = torch.tensor([example.answer for example in examples], device=device)
    return reader.mlm_logits(reader(ids_BL, mask_BL, type_BL), position_BM), answer_BM


def train(reader: Reader, task: Task, steps: int, seed: int, label: str) -> float:
    """AdamW with warm-up and a linear descent; returns the seconds of all steps, without those
    that making the texts took."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, (steps - step) / steps))
    rng, seconds = np.random.default_rng((seed, 1)), 0.0
    reader.train()
    with progress(label, steps, unit="step", every_s=20.0) as ticker:
        for step in range(steps):
            examples = [task.example(task.train_tokens, rng) for _ in range(task.batch_size)]
            began = time.perf_counter()
            score_BMV, answer_BM = logits(reader, examples)
            loss = F.cross_entropy(score_BMV.flatten(0, 1), answer_BM.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            count_update(reader)
            schedule.step()
            last = loss.item()  # on a GPU: waits for the step
            seconds += time.perf_counter() - began
            ticker.update(step + 1, f"loss {last:.3f}")
    return seconds


@torch.inference_mode()
def test(reader: Reader, task: Task, tokens: int, seed: int, count: int) -> tuple[float, float]:
    """Share of texts whose masks are all right, and milliseconds a text."""
    rng = np.random.default_rng((seed, 2, tokens))
    reader.eval()
    examples = [task.example(tokens, rng) for _ in range(count)]
    size, right, seconds = max(1, _TEST_TOKENS_A_BATCH // tokens), 0, 0.0
    for start in range(0, count, size):
        began = time.perf_counter()
        score_BMV, answer_BM = logits(reader, examples[start : start + size])
        right += int((score_BMV.argmax(-1) == answer_BM).all(1).sum())
        seconds += time.perf_counter() - began
    return right / count, 1000 * seconds / count


def report(rows: Sequence[Row], tasks: Sequence[str], seed: int) -> None:
    """One table: a row for each variant, for each task a column for each length and what a
    training step and the longest text cost."""
    found = {(row["variant"], row["task"], row["tokens"]): row for row in rows}
    rng = np.random.default_rng(seed)
    heads, guesses = [], []
    for name in tasks:
        lengths = TASKS[name].test_tokens
        heads += [f"{name}, {tokens // TASKS[name].train_tokens}x" for tokens in lengths] + [
            "ms a step",
            f"ms a text of {max(lengths):,}",
        ]
        guesses += [f"{100 * TASKS[name].guess(rng):.1f}"] * len(lengths) + [None, None]
    table: list[list[object]] = [["a guess", *guesses]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells: list[object] = [variant]
        for name in tasks:
            mine = [found[variant, name, tokens] for tokens in TASKS[name].test_tokens]
            cells += [f"{100 * row['right']:.1f}" for row in mine] + [
                f"{mine[0]['step_ms']:.0f}",
                f"{mine[-1]['text_ms']:.1f}",
            ]
        table.append(cells)
    print_table("Right, %, by test length in training lengths, and cost", ["variant", *heads], table)
