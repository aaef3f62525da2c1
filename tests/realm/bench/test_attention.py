"""The attention benchmark: a row for each variant and length, the files it writes, and what it
refuses."""

import json

import pytest
import torch

from realm.attention.longformer import LongformerAttention
from realm.bench.attention import Setting, approximation_errors, bench_attention, growth
from realm.bench.attention_cases import Shape, build_call, every_variant, parse_variant
from realm.errors import UserError


def test_variants_are_measured_and_written(tmp_path):
    rows = bench_attention(
        ["dense", "{type: longformer, window: 16}"],
        Setting((64, 128), 2, 8),
        False,
        tmp_path / "a.json",
        tmp_path / "a.png",
    )
    expected = [(name, length) for name in ("dense", "{type: longformer, window: 16}") for length in (64, 128)]
    assert [(row["what"], row["tokens"]) for row in rows] == expected
    assert all(0 < row["forward_s"] < row["seconds"] and row["mib"] >= 0 for row in rows)
    assert (
        json.loads((tmp_path / "a.json").read_text())["rows"] == rows and (tmp_path / "a.png").stat().st_size > 10_000
    )


def test_without_projections_hidden_states_are_queries_keys_and_values():
    shape = Shape(2, 8, 40, projections=False)
    hidden = torch.randn(1, 40, 16)
    heads = hidden.view(1, 40, 2, 8).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(1, 40, 16)
    for case in ("dense", "{type: longformer, window: 40}", "{type: infini, segment: 40}"):
        torch.testing.assert_close(build_call(parse_variant(case), shape, "cpu")(hidden), expected)


def test_a_length_that_cannot_be_read_says_why(tmp_path):
    (row,) = bench_attention(["linformer"], Setting((64,), 2, 8), False, None, None)
    assert "projected_tokens (256) exceeds" in row["failed"]


def test_growth_is_per_doubling():
    rows = [
        {"tokens": 4096, "seconds": 1.0},
        {"tokens": 8192, "seconds": 3.0},
        {"tokens": 16384, "seconds": 9.0},
        {"tokens": 512, "seconds": 7.0},
    ]
    assert growth(sorted(rows, key=lambda row: row["tokens"]), "seconds") == pytest.approx(3.0)


def test_more_features_approximate_better_and_positive_ones_where_scores_differ_much():
    errors = {(row["deviation"], row["features"], row["count"]): row["error"] for row in approximation_errors(16, 128)}
    for rows in ("orthogonal", "independent"):
        positive, trigonometric = f"positive, {rows}", f"trigonometric, {rows}"
        assert all(errors[0.5, kind, 512] < errors[0.5, kind, 16] for kind in (positive, trigonometric))
        assert all(errors[1.0, positive, count] < errors[1.0, trigonometric, count] for count in (16, 64, 512))


def test_variants_by_name_or_as_in_a_config():
    assert parse_variant("{type: longformer, window: 7}") == LongformerAttention(window=7)
    assert next(iter(every_variant())) == "dense"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: longformer, window: 0}", r"window: 0}': attention.window must be at least 1"),
        ("{type: infini, segment: long}", r"segment: long}': .*segment"),
        ("{type: performer, widow: 3}", r"widow: 3}': .*widow"),
    ],
)
def test_a_variant_with_fields_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_variant(text)


@pytest.mark.parametrize("text", ["nonsense", "{type", "{window: 3}", "[dense]"])
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(UserError, match="is no attention variant; name one of dense"):
        parse_variant(text)


def test_settings_and_files_are_checked_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match="--lengths must be 64 tokens or more, got 8"):
        Setting((8, 128))
    with pytest.raises(UserError, match="--heads and --head-width must be at least 1, got 0 and 64"):
        Setting(heads=0)
    with pytest.raises(UserError, match="there is no folder"):
        bench_attention(None, Setting(), False, tmp_path / "none" / "a.json", None)
