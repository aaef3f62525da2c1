"""Every number of a config, with every value that it could have: refused, or meaningful."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from realm.attention import AttentionConfig
from realm.errors import UserError
from realm.models.reader import ReaderConfig
from realm.run.config import RealmConfig
from realm.run.config_file import load_config
from realm.runtime.section import MAX_INT

BASE = """
run: runs/x
corpus: {passages: [{path: p.jsonl, limit: 5}], statements: s.jsonl, limit: 5}
data: {train: {path: q.json, limit: 5, num_folds: 2, use_folds: [0]}}
init_from: {}
ict: {optim: {retriever_lr: 1.0e-3}}
fusion: {weight: 0.5}
refresh: {max_drift: 0.1, max_stale_steps: 5000}
"""
ODD_INT, ODD_LARGE = str(MAX_INT + 1), str(10**25)
ODD = ("-1", "0", ".nan", ".inf", "-.inf", "nan", "1e400", ODD_INT, ODD_LARGE, "-" + "9" * 5000)
"""Values that most fields refuse, as they are written in YAML."""

ZERO = {
    *("seed", "corpus.context_tokens", "corpus.num_workers", "corpus.passages.0.limit"),
    *("engine.threads", "engine.log_every_s", "pretrain.threads", "pretrain.extra_retrieved", "pretrain.reader_check"),
    *("reader_pretraining.span_loss", "reader_pretraining.sentence_steps", "finetune_retriever.negatives"),
    *("refresh.export_every", "refresh.max_drift", "refresh.grace_s", "refresh.wait_timeout_s"),
    *("fusion.weight", "fusion.k1", "fusion.b", "fusion.prefix", "fusion.rank_constant"),
    *("lexical", "document", "average", "held_out.share", "clause_words", "shuffle", "min_frequent_share"),
    *("refresh.max_stale_steps", "data.train.use_folds"),
    *("retriever.bert.dropout", "retriever.bert.init_std", "reader.bert.dropout", "reader.bert.init_std"),
    *("redraw_every", "gate_init", "seed"),
}
"""Fields for which 0 means something, and `steps`, probabilities and those of `optim`."""
LARGE = {"lr", "retriever_lr", "weight_decay", "max_grad_norm", "span_loss", "temperature"}
"""Real numbers of any finite size: training stops where one makes it diverge."""
NEGATIVE = {"gate_init"}
"""Fields that may be negative."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE)
    return path


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of all numeric fields."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        parts = {f"{entry.name}.{n}": part for n, part in enumerate(value)} if isinstance(value, tuple) else {}
        for name, part in {entry.name: value, **parts}.items():
            if is_dataclass(part):
                yield from numbers(part, f"{prefix}{name}.")
            elif isinstance(part, int | float) and not isinstance(part, bool):
                yield f"{prefix}{name.removesuffix('.0').removesuffix('.1')}", part


def allowed(name: str, value: str) -> bool:
    """Whether a field may have one of the odd values."""
    last = name.rpartition(".")[2]
    if value == "0":
        zero = last == "steps" or last.endswith("_prob") or ".optim." in name
        return zero or name in ZERO or last in ZERO
    return (value == "-1" and last in NEGATIVE) or (value in (ODD_INT, ODD_LARGE) and last in LARGE)


def test_every_number_of_a_config_is_checked(base: Path) -> None:
    """Through the command line, as nearly all values arrive."""
    config = load_config(base)
    names = dict(numbers(config))
    assert len(names) > 120
    wrong = []
    for name in names:
        for odd in ODD:
            override = with_value(name, odd)
            try:
                changed = load_config(base, override)
            except UserError as error:
                message = str(error)
                if allowed(name, odd) or name.rpartition(".")[2].split("[")[0] not in message:
                    wrong.append((name, odd, message))
                if "Traceback" in message or len(message) > 1000:
                    wrong.append((name, odd, message))
            else:
                if not allowed(name, odd) or not all(math.isfinite(number) for _, number in numbers(changed)):
                    wrong.append((name, odd, "accepted"))
    assert wrong == []


def with_value(name: str, value: str) -> list[str]:
    """The override that sets a number, which may be in a list."""
    if name.endswith(".betas"):
        return [f"--{name}", f"[{value}, 0.9]"]
    if name.endswith(".use_folds"):
        return [f"--{name}", f"[{value}]"]
    if name.startswith(("corpus.passages.0", "corpus.statements.0")):
        return ["--" + name.rpartition(".0.")[0], f"{{path: p, limit: {value}}}"]
    return [f"--{name}={value}"]


def test_every_number_of_an_attention_variant_is_checked(base: Path) -> None:
    wrong, count = [], 0
    for kind, variant in AttentionConfig.get_known_choices().items():
        for name in dict(numbers(variant())):
            for odd in ODD:
                count += 1
                try:
                    load_config(base, [f"--reader.attention={{type: {kind}, {name}: {odd}}}"])
                except UserError as error:
                    if allowed(name, odd) or name not in str(error):
                        wrong.append((kind, name, odd, str(error)))
                else:
                    if not allowed(name, odd):
                        wrong.append((kind, name, odd, "accepted"))
    assert count >= 60 and wrong == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("engine.threads", "1025"),
        ("refresh.threads", "100000"),
        ("spans.num_workers", "2000"),
        ("corpus.num_workers", "2000"),
        ("retriever.bert.dropout", "1"),
        ("retriever.bert.dropout", "2"),
        ("ict.optim.betas", "[2, 2]"),
        ("ict.optim.betas", "[0.9, 1.0]"),
        ("retriever.temperature", "0"),
        ("refresh.poll_s", "1.0e+10"),
        ("pretrain.candidates", "1"),
        ("reader.attention", "{type: longformer, layer_windows: [4, 0]}"),
        ("reader.attention", "{type: longformer, dilation: [0]}"),
        ("reader.attention", "{type: performer, seed: 1000001}"),
        ("reader.attention", "{type: infini, gate_init: 1.0e+9}"),
    ],
)
def test_values_beyond_a_limit_are_refused(base: Path, name: str, value: str) -> None:
    last = name.rpartition(".")[2]
    with pytest.raises(UserError, match=rf"^command line: .*{last}\S* must be"):
        load_config(base, [f"--{name}", value])


def test_sizes_are_limited_by_memory_only(base: Path) -> None:
    """Sizes have no largest value but that of a whole number: what fits depends on the machine."""
    for name in ("retriever.bert.layers", "retriever.bert.hidden", "tokenizer.vocab_size"):
        load_config(base, [f"--{name}={MAX_INT}"])


def test_sections_built_in_python_are_checked_in_the_same_way(base: Path) -> None:
    config = load_config(base)
    with pytest.raises(UserError, match=r"reader\.bert\.dropout must be .*; .*seed must be at least 0|seed must"):
        replace(config, seed=-1, reader=ReaderConfig(bert=replace(config.reader.bert, dropout=2.0)))
    assert isinstance(config, RealmConfig)
