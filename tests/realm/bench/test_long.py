"""The tasks of `realm bench long` compared with their definitions, and one small run."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.attention import AttentionConfig
from realm.bench.long import ShiftedPositions, bench_long
from realm.bench.long_tasks import CLS, MASK, OPERATORS, SEP, TASKS, Example, Kinds, ListOps, MaskedSpan, Passkey
from realm.errors import UserError

SEEDS = st.integers(0, 10_000)


def x_and_text(example: Example) -> tuple[list[int], list[int]]:
    """Ids of x and of the text."""
    ids = example.ids.tolist()
    assert ids[0] == CLS and ids[example.first - 1] == SEP and ids[-1] == SEP
    x, text = ids[1 : example.first - 1], ids[example.first : -1]
    assert x.count(MASK) == len(example.answer) and MASK not in text
    return x, text


def count_mentions(example: Example, task: Kinds) -> Counter[int]:
    """How often the text contains each word of the kind that x asks for."""
    (kind, mask), text = x_and_text(example)
    first_word = 4 + task.kinds
    assert mask == MASK and max(example.ids) < task.vocabulary and min(text) >= first_word
    return Counter(id for id in text if (id - first_word) // task.words == kind - 4)


@given(SEEDS, st.sampled_from([64, 65, 256]))
@settings(max_examples=50, deadline=None)
def test_the_passkey_is_the_only_key_of_its_kind(seed, tokens):
    task = Passkey()
    example = task.example(tokens, np.random.default_rng(seed))
    assert len(example.ids) == tokens
    assert count_mentions(example, task) == {example.answer[0]: 1}
    num_keys = sum(4 + task.kinds <= id < 4 + task.kinds * (1 + task.words) for id in example.ids)
    assert num_keys == task.keys


@given(SEEDS, st.sampled_from([128, 300, 2048]))
@settings(max_examples=50, deadline=None)
def test_the_masked_span_is_the_most_frequent_word_of_its_kind(seed, tokens):
    task = MaskedSpan()
    example = task.example(tokens, np.random.default_rng(seed))
    times, counts = tokens // 128, count_mentions(example, task)
    assert len(example.ids) == tokens
    assert counts[example.answer[0]] == 3 * times and sorted(counts.values()) == [times, times, 3 * times]


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_listops_answers_are_the_values_of_the_lists(seed):
    task = ListOps()
    example = task.example(128, np.random.default_rng(seed))
    _, text = x_and_text(example)
    names = list(OPERATORS)

    def value(at: int) -> tuple[int, int]:
        if text[at] < 14:
            return text[at] - 4, at + 1
        operator, arguments, at = names[text[at] - 14], [], at + 1
        while text[at] != 18:
            argument, at = value(at)
            arguments.append(argument)
        assert 2 <= len(arguments) <= 10
        result = {
            "MAX": max(arguments),
            "MIN": min(arguments),
            "MED": int(np.median(arguments)),
            "SM": sum(arguments) % 10,
        }[operator]
        return result, at + 1

    assert value(0) == (example.answer[0] - 4, len(text)) and 62 < len(text) <= 124


def test_positions_are_shifted_together_and_only_in_training():
    positions = ShiftedPositions(40, 4)
    position_ids = torch.arange(8)[None]
    assert torch.equal(positions.eval()(position_ids), positions.weight[None, :8])
    torch.manual_seed(0)
    offsets = set()
    for _ in range(200):
        embeddings = positions.train()(position_ids)[0]
        offset = int((positions.weight == embeddings[0]).all(1).nonzero())
        assert torch.equal(embeddings, positions.weight[offset : offset + 8])
        offsets.add(offset)
    assert offsets == set(range(33))


def test_every_variant_runs_and_is_reported(tmp_path, capsys):
    names = [name for name in AttentionConfig.get_known_choices() if name != "linformer"]
    rows = bench_long([*names, "{type: linformer, projected_tokens: 16}"], ["passkey"], 0, 4, 2, tmp_path / "long.json")
    assert len(rows) == 3 * (len(names) + 1) and {row["times the training length"] for row in rows} == {1, 4, 16}
    assert all(0 <= row["right"] <= 1 and row["step_ms"] > 0 and row["text_ms"] > 0 for row in rows)
    assert json.loads((tmp_path / "long.json").read_text())["rows"] == rows
    assert "guess baseline" in capsys.readouterr().out


def test_invalid_options_raise_before_training(tmp_path):
    with pytest.raises(UserError, match="--tasks: 'chess' is not a task; choose from passkey, masked span, listops"):
        bench_long(["dense"], ["chess"], 0, 1, 1, None)
    with pytest.raises(UserError, match="--tests and --steps must be at least 1, got 0 and None"):
        bench_long(["dense"], list(TASKS), 0, 0, None, None)
    with pytest.raises(UserError, match="projected_tokens \\(256\\) exceeds"):
        bench_long(["dense", "linformer"], list(TASKS), 0, 1, 1, None)
    with pytest.raises(UserError, match="none does not exist; create it first"):
        bench_long(["dense"], list(TASKS), 0, 1, 1, tmp_path / "none" / "a.json")
