"""Config files: reading, extending, overriding, and error messages with file and field."""

import tracemalloc
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml

from realm.attention.dense import DenseAttention
from realm.attention.longformer import LongformerAttention
from realm.errors import UserError
from realm.run.config_file import dump_config, load_config, parse_overrides, parse_section
from realm.run.data_config import QuestionSource
from realm.runtime.threads import cpu_threads

BASE = "run: runs/x\ncorpus: {passages: p.jsonl}\n"
SHIPPED = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    assert config.run and config.corpus.passages


def test_shipped_configs_are_found():
    assert SHIPPED


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--reader.attention.type", "longformer", "--reader.attention.window", "9", "--ict.optim.betas", "[0.8, 0.9]"],
        [
            "--engine.deepspeed",
            "{zero_optimization: {stage: 1}, data_types: {grad_accum_dtype: null}}",
            "--refresh.max_stale_steps",
            "3",
        ],
        [
            "--retriever.bert.path",
            "some/where",
            "--data.masked_spans",
            "null",
            "--retriever.normalize",
            "true",
            "--seed",
            "7",
        ],
    ],
)
def test_a_dumped_config_loads_to_an_equal_one(overrides, tmp_path):
    config = load_config(write(tmp_path, BASE), overrides)
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config
    if overrides:
        assert config != load_config(write(tmp_path, BASE))


def test_a_dumped_config_contains_every_field(tmp_path):
    config = load_config(write(tmp_path, BASE))

    def missing(part, tree):
        return [f.name for f in fields(part) if f.name not in tree] + [
            name
            for f in fields(part)
            if is_dataclass(value := getattr(part, f.name))
            for name in missing(value, tree[f.name])
        ]

    tree = yaml.safe_load(dump_config(config))
    assert missing(config, tree) == []
    assert tree["reader"]["attention"]["type"] == "dense"


def test_extends_merges_a_chain_of_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, BASE + "seed: 1\nict: {steps: 5, optim: {lr: 0.5, max_grad_norm: 2.0}}\n", "base.yaml")
    write(tmp_path, "extends: base.yaml\nseed: 2\nict: {steps: 6}\n", "middle.yaml")
    path = write(tmp_path / "sub", "extends: ../middle.yaml\nict: {optim: {lr: 0.25}}\n")
    config = load_config(path, ["--ict.batch_size", "3"])
    assert (config.run, config.seed, config.ict.steps, config.ict.batch_size) == ("runs/x", 2, 6, 3)
    assert (config.ict.optim.lr, config.ict.optim.max_grad_norm) == (0.25, 2.0)


@pytest.mark.parametrize(
    "order", [["--ict.steps", "5", "--ict.optim.lr=1e-2"], ["--ict.optim.lr", "0.01", "--ict={steps: 5}"]]
)
def test_overrides_are_dotted_and_merged(order, tmp_path):
    config = load_config(write(tmp_path, BASE + "ict: {steps: 1, batch_size: 2}\n"), order)
    assert (config.ict.steps, config.ict.batch_size, config.ict.optim.lr) == (5, 2, 0.01)


def test_overrides_are_yaml_values():
    assert parse_overrides(["--a.b", "null", "--a.c=[1, 2]", "--d", "x=y", "--a.b", "0.5"]) == {
        "a": {"b": 0.5, "c": [1, 2]},
        "d": "x=y",
    }


def test_another_attention_type_replaces_the_fields_of_the_first(tmp_path):
    longformer = write(tmp_path, BASE + "reader: {attention: {type: longformer, window: 7}, span_hidden: 3}\n")
    assert load_config(longformer).reader.attention == LongformerAttention(window=7)
    assert load_config(longformer, ["--reader.attention.window", "8"]).reader.attention == LongformerAttention(window=8)
    dense = load_config(longformer, ["--reader.attention.type", "dense"])
    assert dense.reader.attention == DenseAttention() and dense.reader.span_hidden == 3
    base = write(tmp_path, BASE, "base.yaml")
    assert load_config(base).reader.attention == DenseAttention()
    assert load_config(
        base, ["--reader.attention", "{type: longformer, window: 2}"]
    ).reader.attention == LongformerAttention(window=2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("corpus: {passages: p}", ["run"]),
        ("run: x", ["corpus"]),
        ("run: x\ncorpus: {prepared: y}", ["corpus", "passages"]),
        (BASE + "retriver: {}", ["retriver"]),
        (BASE + "retriever: {bert: {layerz: 3}}", ["retriever.bert", "layerz"]),
        (BASE + "3: {}", ["3"]),
        (BASE + "ict: {steps: many}", ["ict.steps", "'many'"]),
        (BASE + "ict: {steps: 1.5}", ["ict.steps", "1.5"]),
        (BASE + "ict: {steps: null}", ["ict.steps", "empty"]),
        (BASE + "ict: {steps: {x: 3}}", ["ict.steps"]),
        (BASE + "ict: {optim: {betas: [0.9]}}", ["ict.optim.betas", "2"]),
        (BASE + "ict: 5", ["ict", "mapping", "5"]),
        (BASE + "ict: {steps: " + "9" * 5000 + "}", ["ict.steps", "whole number"]),
        ("run: [a, b]\ncorpus: {passages: p}", ["run", "path", "['a', 'b']"]),
        ("run: 1.10\ncorpus: {passages: p}", ["run", "in quotes", "1.1"]),
        ("run: yes\ncorpus: {passages: p}", ["run", "in quotes", "True"]),
        ("extends: " + "x" * 5000 + "\n" + BASE, ["`extends` must name a file"]),
        ("run: " + "x" * 5000 + "\ncorpus: {passages: p}", ["run", "at most 4,096 characters"]),
        ("run: ''\ncorpus: {passages: p}", ["run", "not empty"]),
        ('run: "a\\0b"\ncorpus: {passages: p}', ["run", "null characters"]),
        ('run: "a\\ud800b"\ncorpus: {passages: p}', ["unpaired surrogate"]),
        (BASE + "seed: !!int ''", ["'tag:yaml.org,2002:int'", "line 3"]),
        (BASE + "seed: 0x_", ["seed", "'0x_'"]),
        (BASE + "[a]: b", ["key", "not text", "line 3"]),
        (BASE + "{a: b}: c", ["key", "not text", "line 3"]),
        (BASE + "on: 3", ["key on is not text", "quotes"]),
        (BASE + "reader: {attention: {type: [a]}}", ["reader.attention.type", "['a']", "dense"]),
        (BASE + "reader: {attention: {type: 3}}", ["reader.attention.type", "3", "dense"]),
        (BASE + "ict: &a {optim: *a}", ["*a is a part of itself", "line 3"]),
        (BASE + "ict: &a [*a]", ["*a is a part of itself"]),
        (BASE + "ict: " + "[" * 3000, ["more than 50 levels"]),
        (BASE + "ict: " + "{a: " * 3000, ["more than 50 levels"]),
        (BASE + "ict: [" + "1, " * 20_000 + "]", ["more than 10,000 values"]),
        ("# " + "x" * 600_000, ["longer than"]),
        ('{"run": "x", "run": "y", "corpus": {"passages": "p"}}', ["'run' appears twice"]),
        (BASE + "data: {test: {path: a, path: b}}", ["'path' appears twice"]),
        (BASE + "retreiver: {}", ["`retreiver`", "`retriever`"]),
        (BASE + "ict: {optim: {lrr: 3}}", ["`ict.optim.lrr`", "`ict.optim.lr`"]),
        (BASE + "data: {test: {path: q, fields: {question: [a]}}}", ["data.test.fields.question", "text"]),
        (
            BASE + "engine: {deepspeed: {gradient_cliping: 1}}",
            ["engine.deepspeed.gradient_cliping", "gradient_clipping"],
        ),
        (BASE + "engine: {deepspeed: {zero_optimization: {stag: 1}}}", ["engine.deepspeed", "ZeroConfig, stag"]),
        (BASE + "engine: {deepspeed: {torch_autocast: {enabld: true}}}", ["torch_autocast.enabld", "enabled"]),
        (BASE + "engine: {deepspeed: {zero_optimization: 3}}", ["engine.deepspeed", "rejected"]),
        (BASE + "engine: {deepspeed: {train_batch_size: 3}}", ["deepspeed.train_batch_size would be ignored"]),
        (BASE + "reader: {x: {optim: {clip: 3}}}", ["`reader.x`"]),
        (
            BASE + "refresh: {max_stale_steps: 10, stale_policy: wait}",
            ["refresh.max_stale_steps (10)", "refresh.export_every (500)", "wait"],
        ),
        (
            BASE + "refresh: {max_stale_steps: 500, stale_policy: stop, staleness_multiplier: 4}",
            ["stale_steps (500)", "staleness_multiplier (4)"],
        ),
        (BASE + "ict: {steps: true}", ["ict.steps", "number", "True"]),
        (BASE + "ict: {steps: -5}", ["ict.steps", "at least 0", "-5"]),
        (BASE + "evaluate: {batch_size: 0}", ["evaluate.batch_size", "at least 1"]),
        (BASE + "ict: {null_prob: 7}", ["ict.null_prob", "between 0 and 1"]),
        (BASE + "ict: {optim: {lr: .nan}}", ["ict.optim.lr", "finite number", "nan"]),
        (BASE + "ict: {steps: 5}\nict: {batch_size: 3}", ["'ict' appears twice", "line"]),
        ("run: x\ncorpus: {passages: []}", ["corpus.passages must contain at least one source"]),
        (BASE + "data: {test: {path: q.json, articles: Oxygen}}", ["data.test.articles", "list", "'Oxygen'"]),
        (BASE + "data: {test: {path: q.json, limit: 0}}", ["`limit` of q.json", "at least 1"]),
        (BASE + "ict:", ["ict", "empty"]),
        (BASE + "engine: {deepspeed: [1]}", ["engine.deepspeed", "mapping"]),
        (BASE + "retriever: {pooling: max}", ["retriever.pooling", "'max'", "cls, mean"]),
        (BASE + "retriever: {normalize: 3}", ["retriever.normalize", "3"]),
        (BASE + "reader: {max_tokens: 100}", ["reader.max_tokens (100)", "retriever.max_query_tokens (96)"]),
        (BASE + "pretrain: {candidates: 1}", ["pretrain.candidates", "at least 2"]),
        (
            BASE + "reader: {attention: {type: spiral}}",
            ["reader.attention", "'spiral'", "dense, infini, linformer, longformer, performer"],
        ),
        (BASE + "reader: {attention: longformer}", ["reader.attention", "mapping", "longformer"]),
        (BASE + "reader: {attention: {window: 3}}", ["reader.attention.window", "type dense"]),
        (BASE + "reader: {attention: {type: longformer, window: 0}}", ["attention.window", "at least 1", "0"]),
        (BASE + "reader: {attention: {type: longformer, window: wide}}", ["reader.attention", "window", "'wide'"]),
        ("", ["mapping of sections"]),
        ("- run", ["mapping of sections", "list"]),
        ("run: [", ["YAML", "line"]),
        ("extends: 3\n" + BASE, ["extends", "3"]),
        ("extends: run.yaml\n" + BASE, ["extends itself"]),
        ("extends: nowhere.yaml\n" + BASE, ["nowhere.yaml", "does not exist"]),
    ],
)
def test_mistakes_are_reported_with_the_field(text, named, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert str(path if "nowhere" not in text else path.parent / "nowhere.yaml") in message
    assert [part for part in named if part not in message] == []
    assert "\n" not in message and "Error" not in message and message.endswith(".")


def bomb(merge: bool) -> str:
    """A text of 500 characters that stands for 10^9 values."""
    lines = ["a: &a {x: 1, y: 2}"]
    for above, name in zip("abcdefghi", "bcdefghij", strict=True):
        aliases = ", ".join([f"*{above}"] * 9)
        lines.append(f"{name}: &{name} {{<<: [{aliases}]}}" if merge else f"{name}: &{name} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True], ids=["aliases", "merge keys"])
def test_aliases_are_counted_as_copies(merge, tmp_path):
    tracemalloc.start()
    with pytest.raises(UserError, match=r"line [45]: more than 10,000 values, with aliases counted as copies"):
        load_config(write(tmp_path, bomb(merge)))
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_aliases_and_merge_keys_of_usual_size_are_read(tmp_path):
    text = BASE + "ict: {optim: &a {lr: 0.5}}\npretrain: {optim: *a}\nfinetune: {optim: {<<: *a, weight_decay: 0.25}}\n"
    config = load_config(write(tmp_path, text))
    assert (config.pretrain.optim.lr, config.finetune.optim.lr, config.finetune.optim.weight_decay) == (0.5, 0.5, 0.25)


def test_a_long_chain_of_files_is_refused(tmp_path):
    for number in range(1500):
        write(tmp_path, f"extends: {number + 1}.yaml\n", f"{number}.yaml")
    with pytest.raises(UserError, match=r"0\.yaml extends more than 20 files"):
        load_config(tmp_path / "0.yaml")


def test_text_that_resembles_a_date_or_a_number_stays_text(tmp_path):
    for text in ("2026-02-30", "2026-02-03", "12:30", "007", "1e5x", "=", "r[b]"):
        assert load_config(write(tmp_path, f"run: {text}\ncorpus: {{passages: p}}\n")).run == text
    config = load_config(write(tmp_path, BASE), ["--run", "2026", "--ict.steps", "1_000", "--ict.optim.lr", "1e-3"])
    assert (config.run, config.ict.steps, config.ict.optim.lr) == ("2026", 1000, 0.001)
    assert load_config(write(tmp_path, dump_config(config), "dumped.yaml")) == config
    emoji = load_config(write(tmp_path, 'run: "\\ud83d\\ude00"\ncorpus: {passages: p}\n'))
    assert emoji.run == "\U0001f600"


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = """
run: ~/run
corpus: {passages: [~/p.jsonl, {path: ~/q.jsonl}], statements: ~/s.jsonl, prepared: ~/prepared}
tokenizer: {path: ~/vocab.txt}
spans: {pipeline: ~/pipeline}
retriever: {bert: {path: ~/bert}}
init_from: {retriever: ~/retriever, reader: ~/reader}
data: {train: ~/train.json, test: {path: ~/test.json}, masked_spans: ~/m, closed_book: ~/c, unsupported: ~/u}
"""
    dumped = dump_config(load_config(write(tmp_path, paths)))
    assert "~" not in dumped and dumped.count("/home/me/") == 15
    assert load_config(write(tmp_path, BASE), ["--run=~/x"]).run == "/home/me/x"
    write(tmp_path, BASE, "base.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(tmp_path, "extends: ~/base.yaml\n")).run == "runs/x"


def test_mistakes_in_overrides_are_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path, BASE + "ict: {batch_size: 3}\n")
    for override in (["--ict.stpes", "5"], ["--ict.steps", "-1"], ["--run", "[a, b]"], ["--reader.max_tokens", "9"]):
        with pytest.raises(UserError) as caught:
            load_config(path, override)
        assert str(caught.value).startswith("command line: ") and str(path) not in str(caught.value)
    path = write(tmp_path, BASE + "ict: {batch_size: 0}\n")
    with pytest.raises(UserError, match=r"run\.yaml: ict.batch_size must .*; command line: seed must .* -1\.$"):
        load_config(path, ["--seed", "-1"])
    assert load_config(path, ["--ict.batch_size", "1"]).ict.batch_size == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{path: a, path: b}", "--questions: .*'path' appears twice"),
        ('{"path": "a", "path": "b"}', "'path' appears twice"),
        ("{path: [a]}", "--questions: `path` must be one path"),
        ("{path: a, limit: -1}", "`limit` of a must be at least 1"),
        ("{paht: a}", "no field `paht`; the closest is `path`; `path` is missing"),
        ("{path: a, limit: !!int ''}", "tag"),
        ("a\0b", "--questions"),
    ],
)
def test_mappings_of_sources_are_read_like_files(text, message):
    with pytest.raises(UserError, match=message):
        parse_section(QuestionSource, text, "--questions")


def test_a_path_or_a_mapping_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_section(QuestionSource, "q.json", "") == QuestionSource("q.json")
    assert parse_section(QuestionSource, "{path: ~/q.json, limit: 3}", "") == QuestionSource("/home/me/q.json", limit=3)
    (odd := tmp_path / "{path: [").write_text("")
    assert parse_section(QuestionSource, str(odd), "").path == str(odd)


def test_all_empty_and_misplaced_fields_are_reported_at_once(tmp_path):
    with pytest.raises(UserError, match=r"`ict` must be a mapping.*`reader.span_hidden` is empty"):
        load_config(write(tmp_path, BASE + "ict: 3\nreader: {span_hidden: null}\n"))


def test_unreadable_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run: Zürich".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml cannot be read"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps"], "unexpected argument 'steps'"),
        (["--"], "unexpected argument '--'"),
        (["--seed"], "--seed needs a value"),
        (["--seed=["], "--seed: '\\[' is not a YAML value"),
        (["--ict.nope", "3"], "command line: there is no field `ict.nope`"),
        (["--ict.steps", "many"], "`ict.steps`.*'many'"),
        (["--" + "a." * 2000 + "a", "1"], "has 2001 parts"),
        (["--ict..steps", "1"], "no field `ict.`"),
        (["--seed", "&a [*a]"], "--seed: .* is a part of itself"),
        (["--reader.attention.type", "spiral"], "reader.attention.*'spiral'"),
    ],
)
def test_invalid_overrides_are_reported(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, BASE), overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--pretrain.threads", "-1"], r"pretrain.threads must be at least 0, got -1"),
        (["--engine.threads", "-2"], "engine.threads must be at least 0"),
        (["--refresh.threads", "0"], "refresh.threads must be at least 1, got 0"),
    ],
)
def test_invalid_numbers_of_threads_are_refused(override, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, BASE), override)


@pytest.mark.parametrize(
    ("omp_threads", "cores", "refresher", "expected"),
    [(None, 2, 1, 1), (None, 16, 3, 13), (None, 1, 1, 1), ("4", 16, 1, 3), ("1", 16, 1, 1), ("", 8, 2, 6)],
)
def test_pretraining_leaves_the_refresher_its_cores(omp_threads, cores, refresher, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("realm.runtime.threads.cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_threads)
    config = load_config(write(tmp_path, BASE), ["--refresh.threads", str(refresher)])
    assert (config.threads("pretrain"), config.threads("ict")) == (expected, 0)


def test_threads_can_be_set_per_stage(tmp_path):
    config = load_config(write(tmp_path, BASE), ["--engine.threads", "3", "--pretrain.threads", "1"])
    assert (config.threads("ict"), config.threads("pretrain")) == (3, 1)
    before = torch.get_num_threads()
    with cpu_threads(1):
        torch.set_num_threads(2)  # changed inside the context
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("num_folds", "use_folds"), [(4, [4]), (4, [0, -1]), (0, [])])
def test_invalid_folds_are_refused(tmp_path, num_folds, use_folds):
    path = write(tmp_path, f"{BASE}data: {{test: {{path: q.json, num_folds: {num_folds}, use_folds: {use_folds}}}}}\n")
    with pytest.raises(UserError, match=r"`use_folds` of .* must be between 0 and"):
        load_config(path)


def test_all_renamed_keys_are_reported_at_once_with_their_new_names(tmp_path):
    old = (
        "start: {reader: x}\nreader_warmup: {topic_share: 0.2, steps: 5, optim: {clip: 1.0}}\n"
        "reader: {context_tokens: 400}\nrefresh: {every_steps: 10}\ndata: {test: {path: q.json, folds: 5, take: [0]}}\n"
    )
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, BASE + old))
    for clause in (
        "`start` is now `init_from`",
        "`reader_warmup` is now `reader_pretraining`",
        "`reader_warmup.topic_share` is now `reader_pretraining.title_span_prob`",
        "`reader_warmup.optim.clip` is now `reader_pretraining.optim.max_grad_norm`",
        "`reader.context_tokens` is now `corpus.context_tokens`",
        "`refresh.every_steps` is now `refresh.export_every`",
        "`data.test.folds` is now `data.test.num_folds`",
        "`data.test.take` is now `data.test.use_folds`",
    ):
        assert clause in str(error.value)
    assert "reader_warmup.steps" not in str(error.value)


def test_all_invalid_values_are_reported_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, BASE + "ict: {steps: -1, batch_size: 0}\nrefresh: {keep_last: 0}\n"))
    for clause in ("ict.steps must be at least 0", "ict.batch_size must be at least 1", "refresh.keep_last must be"):
        assert clause in str(error.value)
