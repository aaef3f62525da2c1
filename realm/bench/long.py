"""`realm bench long`: accuracy and cost of the attention variants on texts that are longer than in
training.

A small reader is trained from scratch for each task and variant, with the same seed, steps and
batches. Position embeddings are initialized as sinusoids, and positions are shifted by a random
offset in training, so that all positions of the longest test texts are trained.
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
_TEST_TOKENS_PER_BATCH = 2**15
Row = dict[str, Any]


def bench_long(
    variants: Sequence[str], tasks: Sequence[str], seed: int, tests: int, steps: int | None, json_file: Path | None
) -> list[Row]:
    """Train and test every variant on every task, print one table, and write the rows to
    `json_file` if given; returns one row per variant, task and length."""
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise UserError(f"--tasks: {unknown[0]!r} is not a task; choose from {', '.join(TASKS)}.")
    if tests < 1 or (steps is not None and steps < 1):
        raise UserError(f"--tests and --steps must be at least 1, got {tests} and {steps}.")
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"{json_file}: the folder {json_file.parent} does not exist; create it first.")
    cases = [(name, text, parse_variant(text)) for name in tasks for text in variants]
    for name, _, attention in cases:  # raise for a variant that does not fit a task's lengths before any training
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
    """One row per test length: accuracy, and milliseconds per training step (without generating the
    texts) and per test text."""
    torch.manual_seed(seed)
    reader = tiny_reader(task, attention).to(device)
    steps = steps or task.steps
    step_ms = 1000 * train(reader, task, steps, seed, label) / steps
    rows = []
    for tokens in task.test_tokens:
        accuracy, text_ms = evaluate(reader, task, tokens, seed, tests)
        row = {"tokens": tokens, "times the training length": tokens // task.train_tokens, "steps": steps}
        rows.append({**row, "right": accuracy, "step_ms": step_ms, "text_ms": text_ms})
    return rows


class ShiftedPositions(nn.Embedding):
    """Learned position embeddings; in training, all positions of a batch are shifted by the same
    random offset (Kiyono et al. 2021, "SHAPE")."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """(1, L) position ids to embeddings (1, L, H)."""
        offset = 0
        if self.training:
            offset = int(torch.randint(self.num_embeddings - position_ids.shape[-1] + 1, ()))
        return super().forward(position_ids + offset)


def tiny_reader(task: Task, attention: AttentionConfig) -> Reader:
    """A small reader with random weights and the positions of the task's longest texts."""
    max_tokens = max(task.test_tokens)
    config = BertConfig(
        vocab_size=task.vocabulary,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = BertModel(config, add_pooling_layer=False)
    mimetic_init(bert)
    positions = ShiftedPositions(max_tokens, _WIDTH)
    positions.weight.data.copy_(bert.embeddings.position_embeddings.weight)
    bert.embeddings.position_embeddings = positions
    return Reader(bert, ReaderConfig(attention=attention, mlm_head="tied", span_hidden=8, max_tokens=max_tokens))


def logits(reader: Reader, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Vocabulary logits at every mask, (B, M, V), and the target ids, (B, M)."""
    device = reader.mlm_bias.device
    batch = pad_joint([example.ids for example in examples], [example.first for example in examples], PAD)
    ids_BL, mask_BL, type_BL = (tensor.to(device) for tensor in batch)
    position_BM = (ids_BL == MASK).nonzero()[:, 1].view(len(examples), -1)
    answer_BM = torch.tensor([example.answer for example in examples], device=device)
    return reader.mlm_logits(reader(ids_BL, mask_BL, type_BL), position_BM), answer_BM


def train(reader: Reader, task: Task, steps: int, seed: int, label: str) -> float:
    """Train with AdamW, linear warmup and linear decay; returns the seconds of all steps without
    generating the texts."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, (steps - step) / steps))
    rng, seconds = np.random.default_rng((seed, 1)), 0.0
    reader.train()
    with progress(label, steps, unit="step", every_s=20.0) as ticker:
        for step in range(steps):
            examples = [task.example(task.train_tokens, rng) for _ in range(task.batch_size)]
            began = time.perf_counter()
            logits_BMV, answer_BM = logits(reader, examples)
            loss = F.cross_entropy(logits_BMV.flatten(0, 1), answer_BM.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            count_update(reader)
            schedule.step()
            loss_value = loss.item()  # on a GPU this waits for the end of the step
            seconds += time.perf_counter() - began
            ticker.update(step + 1, f"loss {loss_value:.3f}")
    return seconds


@torch.inference_mode()
def evaluate(reader: Reader, task: Task, tokens: int, seed: int, count: int) -> tuple[float, float]:
    """Accuracy (fraction of texts with all masks predicted), and milliseconds per text."""
    rng = np.random.default_rng((seed, 2, tokens))
    reader.eval()
    examples = [task.example(tokens, rng) for _ in range(count)]
    batch_size, num_correct, seconds = max(1, _TEST_TOKENS_PER_BATCH // tokens), 0, 0.0
    for start in range(0, count, batch_size):
        began = time.perf_counter()
        logits_BMV, answer_BM = logits(reader, examples[start : start + batch_size])
        num_correct += int((logits_BMV.argmax(-1) == answer_BM).all(1).sum())
        seconds += time.perf_counter() - began
    return num_correct / count, 1000 * seconds / count


def report(rows: Sequence[Row], tasks: Sequence[str], seed: int) -> None:
    """Print one table: a row per variant; per task, columns with the accuracy at each length and
    the time of a training step and of the longest text."""
    row_of = {(row["variant"], row["task"], row["tokens"]): row for row in rows}
    rng = np.random.default_rng(seed)
    columns, guesses = [], []
    for name in tasks:
        lengths = TASKS[name].test_tokens
        columns += [f"{name}, {tokens // TASKS[name].train_tokens}x" for tokens in lengths]
        columns += ["ms per step", f"ms per text of {max(lengths):,}"]
        guesses += [f"{100 * TASKS[name].guess(rng):.1f}"] * len(lengths) + [None, None]
    table: list[list[object]] = [["guess baseline", *guesses]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells: list[object] = [variant]
        for name in tasks:
            task_rows = [row_of[variant, name, tokens] for tokens in TASKS[name].test_tokens]
            cells += [f"{100 * row['right']:.1f}" for row in task_rows]
            cells += [f"{task_rows[0]['step_ms']:.0f}", f"{task_rows[-1]['text_ms']:.1f}"]
        table.append(cells)
    title = "Accuracy, %, by test length as a multiple of the training length, and cost"
    print_table(title, ["variant", *columns], table)
