"""Fuzz targets of configs, overrides, mappings of sources, and command lines."""

import argparse
import contextlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import draccus

from realm.app.cli import _parser
from realm.app.cli.arguments import parse_arguments
from realm.attention import AttentionConfig
from realm.corpus.sources import CorpusConfig, SourceConfig
from realm.errors import UserError
from realm.run.changes import changed_fields
from realm.run.config import RealmConfig
from realm.run.config_file import dump_config, load_config, parse_section, read_config
from realm.run.data_config import QuestionSource
from tests.fuzz.mutate import ODD_VALUES, dumped, mutated_bytes, mutated_json, mutated_tree
from tests.fuzz.targets import Case, Target, register

_FULL = b"""\
extends: base.yaml
run: runs/x
seed: 3
corpus:
  passages: [p.jsonl, {path: ~/q.parquet, fields: {text: contents, id: "wiki-#"}, limit: 100}]
  statements: {path: s.jsonl}
  prepared: prepared
tokenizer: {vocab_size: 400, lowercase: true}
retriever: &r {bert: {layers: 1, hidden: 32, heads: 2, dropout: 0.1}, pooling: mean, temperature: 0.05}
reader: {bert: {layers: 1}, attention: {type: longformer, window: 7, layer_windows: [3, 4]}, max_tokens: 256}
engine: {precision: bf16, deepspeed: {zero_optimization: {stage: 1}, torch_autocast: {enabled: true}}}
ict: {steps: 5, optim: &o {lr: 1e-4, betas: [0.9, 0.98], schedule: constant}}
pretrain: {optim: {<<: *o, lr: 3.0e-5}, marginal: joint}
refresh: {export_every: 4, max_drift: 0.1, stale_policy: wait, max_stale_steps: 100, compile: false}
finetune: {optim: *o}
data:
  train: {path: q.json, articles: [Oxygen], num_folds: 2, use_folds: [0]}
  test: "builtin:questions.json"
  masked_spans: m.jsonl
"""
_TREE: dict[str, Any] = {
    "run": "runs/x",
    "corpus": {"passages": [{"path": "p.jsonl", "fields": {"text": "t"}}], "limit": 5, "prepared": "~/p"},
    "retriever": {"bert": {"layers": 1, "dropout": 0.1}, "normalize": True, "temperature": 1.0},
    "reader": {"attention": {"type": "performer", "num_features": 8, "kernel": "relu"}},
    "engine": {"deepspeed": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": None}}},
    "ict": {"steps": 3, "optim": {"lr": 0.1, "betas": [0.9, 0.98]}},
    "data": {"test": {"path": "q.json", "use_folds": [0], "num_folds": 2}, "train": "t.json"},
}
_MAPPINGS = (
    {"path": "p.jsonl", "format": "jsonl", "fields": {"text": "contents", "id": "wiki-#"}, "limit": 3},
    {"path": "q.json", "articles": ["Oxygen"], "num_folds": 3, "use_folds": [0, 1], "skip_bad": True},
    {"path": "rajpurkar/squad", "format": "datasets", "split": "validation", "name": None},
)
_YAML = (
    *("&a [*a]", "<<: {a: 1}", "!!int ''", "[a]: b", "0x_", "2026-02-30", "12:30:45", "007", "=", "~", "? [a]", "*b"),
    *("{type: longformer, window: 3}", "[1, 2", "{a: b, a: c}", "1e5", ".nan", "-.inf", "1_0", "'", '"\\ud800"', "%"),
    *("|\n a", "&a {<<: [*a, *a]}", "true", "null", "-1", "9" * 5000, "\x1b[31m", "{}", "[]", "--", "a: b: c", "- -"),
)
"""Values that are special in YAML."""
_EXTENDS = ("base.yaml", "run.yaml", "no.yaml", ".", "/dev/null", "~/x", "[a]", "''", "../base.yaml", "5", "a\\0")


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields with their values."""
    found = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


_DEFAULTS = _leaves(draccus.encode(RealmConfig(run="x", corpus=CorpusConfig(passages=(SourceConfig("p"),)))))
"""All fields and their defaults."""
_NAMES = [*_DEFAULTS, "ict", "reader.bert", "data.test.path", "engine.deepspeed.zero_optimization.stage"]
_COMMANDS = (
    ["run", "--config", "c.yaml", "--resume"],
    ["prepare", "--config", "c.yaml", "--limit", "5", "--skip-bad"],
    ["pretrain", "--config", "c.yaml", "--with-refresher", "--replay", "r", "--pretrain.steps", "5"],
    ["ask", "--run", "r", "--passages", "3", "--stage", "ict", "Who wrote it?"],
    ["evaluate", "--run", "r", "--questions", "{path: q.json}", "--compare", "bm25", "ict", "--name", "n"],
    ["compare", "a", "b"],
    ["index", "add", "--run", "r", "new.jsonl", "--delete", "d.txt", "--refresh.factory", "Flat"],
    ["index", "gc", "--run", "r", "--grace", "0.5", "--dry-run"],
    ["bench", "attention", "--lengths", "64", "128", "--heads", "2", "--json", "x.json"],
    ["bench", "spans", "--entities", "e.conll"],
)


def _odd_text(rng: Random) -> str:
    return str(rng.choice((*_YAML, *map(str, ODD_VALUES), *_NAMES)))


def _config(rng: Random) -> Case:
    content = mutated_bytes(rng, _FULL) if rng.random() < 0.5 else mutated_json(rng, _TREE)
    if rng.random() < 0.3:  # replace the value of a line
        lines = _FULL.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = lines[number].split(":")[0] + ": " + _odd_text(rng)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return Case(content, {"base": f"extends: {rng.choice(_EXTENDS)}" if rng.random() < 0.2 else "seed: 5"})


def _run_config(case: Case, folder: Path) -> int:
    (folder / "base.yaml").write_text(case.settings["base"])
    path = folder / "run.yaml"
    path.write_bytes(case.content)
    config = load_config(path)
    dump = folder / "dumped.yaml"
    dump.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dump) == config, "a dumped config is read back"
    return 0


def _run_folder_config(case: Case, folder: Path) -> int:
    """What `Run.create` does with the config of an existing run, damaged."""
    path = folder / "config.yaml"
    path.write_bytes(case.content)
    list(changed_fields(read_config(path), _TREE))
    return 0


def _overrides(rng: Random) -> Case:
    arguments = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(_NAMES)
        value = json.dumps(_DEFAULTS.get(name, {}) if rng.random() < 0.3 else rng.choice(list(_DEFAULTS.values())))
        match rng.randrange(5):
            case 0:
                value = _odd_text(rng)
            case 1:
                value = dumped(rng, mutated_tree(rng, _TREE)).decode("utf-8", "replace")
            case 2:
                name = mutated_bytes(rng, name.encode(), encodings=False).decode("utf-8", "replace")
        arguments += [f"--{name}={value}"] if rng.random() < 0.5 else [f"--{name}", value]
    return Case("\0".join(arguments).encode("utf-8", "surrogatepass"))


def _arguments(case: Case) -> list[str]:
    return case.content.decode("utf-8", "surrogateescape").split("\0")


def _run_overrides(case: Case, folder: Path) -> int:
    path = folder / "run.yaml"
    path.write_text("run: x\ncorpus: {passages: p}\n")
    load_config(path, _arguments(case))
    return 0


def _mapping(rng: Random) -> Case:
    if rng.random() < 0.2:
        return Case(_odd_text(rng).encode("utf-8", "surrogatepass"))
    return Case(mutated_json(rng, rng.choice(_MAPPINGS)))


def _run_mapping(case: Case, folder: Path) -> int:
    text = case.content.decode("utf-8", "surrogateescape")
    refused = 0
    for kind in (QuestionSource, SourceConfig):
        try:
            parse_section(kind, text, "--questions")
        except UserError:
            refused += 1
    if refused == 2:
        raise UserError("refused as both.")
    return refused


def _command_line(rng: Random) -> Case:
    arguments = list(rng.choice(_COMMANDS))
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randint(0, len(arguments))
        match rng.randrange(5):
            case 0:
                arguments.insert(place, _odd_text(rng))
            case 1:
                arguments[place : place + 1] = []
            case 2:
                arguments[place:place] = [f"--{rng.choice(_NAMES)}", _odd_text(rng)]
            case 3:
                arguments.insert(
                    place, rng.choice(("--", "--resmue", "-x", "--run", "--ict", "--=", "---", "-h", "--a.b"))
                )
            case _:
                changed = mutated_bytes(rng, "\0".join(arguments).encode("utf-8", "surrogatepass"))
                arguments = changed.decode("utf-8", "surrogateescape").split("\0")
    return Case("\0".join(arguments).encode("utf-8", "surrogatepass"))


def _run_command_line(case: Case, folder: Path) -> int:
    """Parse the arguments, and what they say about the config; the command is not executed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        try:
            options = parse_arguments(_PARSER, _arguments(case))
        except SystemExit as end:
            assert end.code in (0, 2)
            assert not set(printed.getvalue()) & set("\x1b\x07\x9b\u202e")
            raise UserError("refused by argparse.") from None
    assert isinstance(options, argparse.Namespace) and callable(options.command)
    path = folder / "run.yaml"
    path.write_text("run: x\ncorpus: {passages: p}\n")
    load_config(path, options.overrides)
    return 0


def _variant(rng: Random) -> Case:
    kind, variant = rng.choice(list(AttentionConfig.get_known_choices().items()))
    content = mutated_json(rng, {"type": kind, **draccus.encode(variant())})
    return Case(b"run: x\ncorpus: {passages: p}\nreader: {attention: " + content + b"}\n")


_PARSER = _parser()
register(Target("config", _config, _run_config))
register(Target("config of a run", lambda rng: _config(rng), _run_folder_config))
register(Target("overrides", _overrides, _run_overrides))
register(Target("source mapping", _mapping, _run_mapping))
register(Target("command line", _command_line, _run_command_line))
register(
    Target(
        "attention config",
        _variant,
        lambda case, folder: _run_config(Case(case.content, {"base": ""}), folder),
    )
)
