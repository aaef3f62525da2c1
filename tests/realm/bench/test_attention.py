"""The attention benchmark: one row per variant and length, the files it writes, and invalid
settings."""

import json

import pytest
import torch

from realm.attention.longformer import LongformerAttention
from realm.bench.attention import Setting, approximation_errors, bench_attention, growth
from realm.bench.attention_cases import Shape, build_call, parse_variant, registered_variants
from realm.errors import UserError


def test_rows_are_measured_and_written(tmp_path):
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
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_without_projections_hidden_states_are_used_as_queries_keys_and_values():
    shape = Shape(2, 8, 40, projections=False)
    hidden = torch.randn(1, 40, 16)
    heads = hidden.view(1, 40, 2, 8).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(1, 40, 16)
    for case in ("dense", "{type: longformer, window: 40}", "{type: infini, segment: 40}"):
        torch.testing.assert_close(build_call(parse_variant(case), shape, "cpu")(hidden), expected)


def test_a_failed_length_is_reported_with_the_reason(tmp_path):
    (row,) = bench_attention(["linformer"], Setting((64,), 2, 8), False, None, None)
    assert "projected_tokens (256) exceeds" in row["failed"]


def test_growth_is_the_factor_per_doubling():
    rows = [
        {"tokens": 4096, "seconds": 1.0},
        {"tokens": 8192, "seconds": 3.0},
        {"tokens": 16384, "seconds": 9.0},
        {"tokens": 512, "seconds": 7.0},
    ]
    assert growth(sorted(rows, key=lambda row: row["tokens"]), "seconds") == pytest.approx(3.0)


def test_more_features_reduce_the_error_and_positive_ones_are_better_for_large_score_differences():
    errors = {(row["deviation"], row["features"], row["count"]): row["error"] for row in approximation_errors(16, 128)}
    for row_type in ("orthogonal", "independent"):
        positive, trigonometric = f"positive, {row_type}", f"trigonometric, {row_type}"
        assert all(errors[0.5, kind, 512] < errors[0.5, kind, 16] for kind in (positive, trigonometric))
        assert all(errors[1.0, positive, count] < errors[1.0, trigonometric, count] for count in (16, 64, 512))


def test_variants_are_parsed_from_a_name_or_a_config():
    assert parse_variant("{type: longformer, window: 7}") == LongformerAttention(window=7)
    assert next(iter(registered_variants())) == "dense"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: longformer, window: 0}", r"window: 0}': attention.window must be at least 1"),
        ("{type: infini, segment: long}", r"segment: long}': .*segment"),
        ("{type: performer, widow: 3}", r"widow: 3}': .*widow"),
    ],
)
def test_invalid_fields_of_a_variant_raise(text, message):
    with pytest.raises(UserError, match=message):
        parse_variant(text)


@pytest.mark.parametrize("text", ["nonsense", "{type", "{window: 3}", "[dense]"])
def test_unknown_variants_raise(text):
    with pytest.raises(UserError, match="is not an attention variant; use one of dense"):
        parse_variant(text)


def test_settings_and_files_are_checked_before_measuring(tmp_path):
    with pytest.raises(UserError, match="--lengths must be 64 tokens or more, got 8"):
        Setting((8, 128))
    with pytest.raises(UserError, match="--heads and --head-width must be at least 1, got 0 and 64"):
        Setting(heads=0)
    with pytest.raises(UserError, match="none does not exist; create it first"):
        bench_attention(None, Setting(), False, tmp_path / "none" / "a.json", None)
