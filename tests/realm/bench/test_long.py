"""The tasks of `realm bench long` against their definitions, and one tiny run of it."""

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


def parts(example: Example) -> tuple[list[int], list[int]]:
    """x and the text."""
    ids = example.ids.tolist()
    assert ids[0] == CLS and ids[example.first - 1] == SEP and ids[-1] == SEP
    x, text = ids[1 : example.first - 1], ids[example.first : -1]
    assert x.count(MASK) == len(example.answer) and MASK not in text
    return x, text


def asked(example: Example, task: Kinds) -> Counter[int]:
    """How often the text names each word of the kind that x asks for."""
    (kind, mask), text = parts(example)
    first = 4 + task.kinds
    assert mask == MASK and max(example.ids) < task.vocabulary and min(text) >= first
    return Counter(id for id in text if (id - first) // task.words == kind - 4)


@given(SEEDS, st.sampled_from([64, 65, 256]))
@settings(max_examples=50, deadline=None)
def test_the_passkey_is_the_one_key_of_its_kind(seed, tokens):
    task = Passkey()
    example = task.example(tokens, np.random.default_rng(seed))
    assert len(example.ids) == tokens
    assert asked(example, task) == {example.answer[0]: 1}
    assert sum(4 + task.kinds <= id < 4 + task.kinds * (1 + task.words) for id in example.ids) == task.keys, (
        "several, one of which is asked for"
    )


@given(SEEDS, st.sampled_from([128, 300, 2048]))
@settings(max_examples=50, deadline=None)
def test_a_masked_span_is_what_the_text_names_most(seed, tokens):
    task = MaskedSpan()
    example = task.example(tokens, np.random.default_rng(seed))
    times, counts = tokens // 128, asked(example, task)
    assert len(example.ids) == tokens
    assert counts[example.answer[0]] == 3 * times and sorted(counts.values()) == [times, times, 3 * times]


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_listops_answers_are_the_values_of_their_lists(seed):
    task = ListOps()
    example = task.example(128, np.random.default_rng(seed))
    _, text = parts(example)
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


def test_positions_move_together_in_training_alone():
    positions = ShiftedPositions(40, 4)
    places = torch.arange(8)[None]
    assert torch.equal(positions.eval()(places), positions.weight[None, :8])
    torch.manual_seed(0)
    starts = set()
    for _ in range(200):
        found = positions.train()(places)[0]
        start = int((positions.weight == found[0]).all(1).nonzero())
        assert torch.equal(found, positions.weight[start : start + 8])
        starts.add(start)
    assert starts == set(range(33))


def test_every_variant_runs_and_is_reported(tmp_path, capsys):
    names = [name for name in AttentionConfig.get_known_choices() if name != "linformer"]
    rows = bench_long([*names, "{type: linformer, projected_tokens: 16}"], ["passkey"], 0, 4, 2, tmp_path / "long.json")
    assert len(rows) == 3 * (len(names) + 1) and {row["times the training length"] for row in rows} == {1, 4, 16}
    assert all(0 <= row["right"] <= 1 and row["step_ms"] > 0 and row["text_ms"] > 0 for row in rows)
    assert json.loads((tmp_path / "long.json").read_text())["rows"] == rows
    assert "a guess" in capsys.readouterr().out


def test_mistakes_are_answered_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match="--tasks 'chess' is none; name some of passkey, masked span, listops"):
        bench_long(["dense"], ["chess"], 0, 1, 1, None)
    with pytest.raises(UserError, match="--tests and --steps must be at least 1, got 0 and None"):
        bench_long(["dense"], list(TASKS), 0, 0, None, None)
    with pytest.raises(UserError, match="projected_tokens \\(256\\) exceeds"):
        bench_long(["dense", "linformer"], list(TASKS), 0, 1, 1, None)
    with pytest.raises(UserError, match="there is no folder"):
        bench_long(["dense"], list(TASKS), 0, 1, 1, tmp_path / "none" / "a.json")
