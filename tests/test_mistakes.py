"""User errors: one sentence with the place and the remedy, and exit status 2."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from index.lease import LeaseLost
from realm.app.cli import main
from realm.app.cli.arguments import Parser, split_overrides
from realm.run.config_file import load_config
from tests.tiny import write_config, write_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def error_message(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with status 2 and without a traceback; returns the message."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("realm: ") and "Traceback" not in message
    return message


def test_missing_config(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "nowhere.yaml does not exist" in error_message(capsys, "prepare", "--config", folder / "nowhere.yaml")


def test_missing_corpus_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder, corpus={"passages": str(folder / "absent.jsonl")})
    assert "absent.jsonl does not exist" in error_message(capsys, "prepare", "--config", config)
    assert not (folder / "prepared" / "passages").exists()


def test_wrong_json_field(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "passages.jsonl").write_text(json.dumps({"id": "1", "title": "a", "body": "b"}) + "\n")
    message = error_message(capsys, "prepare", "--config", write_config(folder))
    assert "passages.jsonl:1" in message and '"text"' in message and "body" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--pretrain.stpes", "5"], ["stpes"]),
        (["--reader.attention.type", "quadratic"], ["reader.attention", "quadratic"]),
        (["--pretrain.steps", "many"], ["pretrain.steps", "many"]),
        (["--pretrain.steps"], ["--pretrain.steps needs a value"]),
        (["pretrain.steps=5"], ["pretrain.steps=5"]),
    ],
    ids=["unknown key", "unknown attention", "wrong type", "no value", "no dashes"],
)
def test_config_errors_name_the_field(
    capsys: pytest.CaptureFixture[str], folder: Path, override: list[str], words: list[str]
) -> None:
    message = error_message(capsys, "ict", "--config", write_config(folder), *override)
    assert all(word in message for word in words)


def test_nothing_prepared_yet(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "realm prepare" in error_message(capsys, "ict", "--config", write_config(folder))


def test_a_corpus_prepared_with_a_limit_is_refused_without_it(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config), "--limit", "5"]) == 0
    message = error_message(capsys, "ict", "--config", config)
    assert (
        "was prepared with different settings: the limit of documents per source was [5] and is now [None]" in message
        and "--corpus.prepared" in message
    )
    assert "corpus.block_tokens was 80 and is now 70" in error_message(
        capsys, "ict", "--config", config, "--limit", "5", "--corpus.block_tokens", "70"
    )


def test_stages_without_questions_are_refused_before_training(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder, data={"train": None})
    assert "data.train is not set" in error_message(capsys, "run", "--config", config)
    assert not (folder / "prepared").exists()


def test_an_override_before_an_argument_does_not_replace_it() -> None:
    command = Parser()
    command.add_argument("--run")
    command.set_defaults(takes_overrides=True)
    rest, overrides = split_overrides(
        command,
        ["--run", "r", "--refresh.search_parameters", "nprobe=64", "--ict.steps=3", "--seed", "1", "Who -- or --what?"],
    )
    assert rest == ["--run", "r", "Who -- or --what?"]
    assert overrides == ["--refresh.search_parameters", "nprobe=64", "--ict.steps=3", "--seed", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ict", "--config", "c.yaml", "--resmue"], ["realm ict has no option --resmue", "--resume"]),
        (["ask", "--run", "r", "--stge", "ict", "who?"], ["no option --stge", "--stage"]),
        (["index", "ls", "--rnu", "r"], ["realm index ls has no option --rnu", "--run"]),
        (["bench", "faults", "--kils", "3"], ["realm bench faults has no option --kils", "--kills"]),
        (["ask", "--run", "r", "who", "wrote", "it"], ["unexpected argument 'wrote'", "question in quotes"]),
        (["ask", "--config", "c", "who", "wrote", "it"], ["realm ask has no option --config"]),
        (["compare", "a", "b", "c"], ["unexpected argument 'c'", "realm compare --help"]),
        (["ict", "--config", "c.yaml", "steps=5"], ["unexpected argument 'steps=5'", "--section.field value"]),
        (["ict", "--config", "c.yaml", "--ict.steps"], ["--ict.steps needs a value"]),
        (["ict", "--config", "c.yaml", "--ict.steps", "--resume"], ["--ict.steps needs a value"]),
        (["ask", "--run", "r\udcff", "who?"], ["'r\\udcff' is not valid UTF-8"]),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if value[0] in ("ict", "ask") else None,
)
def test_wrong_arguments_are_named_with_the_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    message = error_message(capsys, *arguments)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "--run", "r", "who?", "--passages", "0"],
        ["ask", "--run", "r", "who?", "--passages", "-1"],
        ["plan", "--config", "c", "--passages", "9" * 50],
        ["prepare", "--config", "c", "--limit", "0"],
        ["index", "gc", "--run", "r", "--grace", "nan"],
        ["bench", "swaps", "--rows", "x"],
        ["ask", "--run", "", "who?"],
    ],
    ids=" ".join,
)
def test_values_of_options_are_checked(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "error: argument --" in capsys.readouterr().err


def test_control_characters_of_arguments_are_escaped(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["\x1b]0;owned\x07"])
    assert "\x1b" not in capsys.readouterr().err
    monkeypatch.chdir(folder)
    assert "r[b]\\x1b[31m is not a run folder" in error_message(capsys, "ask", "--run", "r[b]\x1b[31m", "who?")
    assert "\x1b" not in error_message(capsys, "prepare", "--config", write_config(folder), "--ict", "{\x1b: 3}")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 2, "/runs/x: No space left on device; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "a", None, "b"), 2, "a and b: Permission denied; change"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "Read-only file system; use a folder"),
        (OSError("no such model\nat all\n"), 2, "no such model."),
        (LeaseLost("the lease of epoch 1 was taken over by host.2"), 2, "the lease of epoch 1 was taken over"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failures_outside_the_program_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr("realm.app.cli.questions.open_run", raises(error))
    assert main(["ask", "--run", "r", "who?"]) == status
    printed = capsys.readouterr().err
    assert printed.startswith(f"realm: {message}") and printed.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError("a bug"), TypeError("a bug"), RuntimeError("a bug")], ids=repr)
def test_errors_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("realm.app.cli.questions.open_run", raises(error))
    with pytest.raises(type(error), match="a bug"):
        main(["ask", "--run", "r", "who?"])


def raises(error: BaseException) -> Callable[[object], None]:
    """A function that raises `error`."""

    def function(_: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("ict", "run"),
        ("run", "run"),
        ("prepare", "corpus.prepared"),
        ("ict", "corpus.prepared"),
        ("run", "corpus.prepared"),
    ],
)
def test_a_file_in_place_of_a_folder_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, command: str, field: str
) -> None:
    config = write_config(folder)
    if field == "run":
        assert main(["prepare", "--config", str(config)]) == 0
    (folder / "file").write_text("")
    message = error_message(capsys, command, "--config", config, f"--{field}", folder / "file")
    assert str(folder / "file") in message


@pytest.mark.parametrize(
    "content", [b"", b"- a\n", b"run", b"run: [", b"run: Z\xfcrich\n", b"a: !!int ''\n", b"\0"], ids=repr
)
def test_a_damaged_config_of_a_run_is_named(capsys: pytest.CaptureFixture[str], folder: Path, content: bytes) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_bytes(content)
    for arguments in (["ict", "--config", config], ["ask", "--run", folder / "run", "who?"]):
        message = error_message(capsys, *arguments)
        assert str(folder / "run" / "config.yaml") in message
        assert "restore it" in message
    assert (folder / "run" / "config.yaml").read_bytes() == content


def test_missing_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for command in (
        ["ask", "--run", folder / "none", "Who?"],
        ["evaluate", "--run", folder / "none"],
        ["refresh", "--run", folder / "none"],
    ):
        assert "is not a run folder" in error_message(capsys, *command)


def test_hub_name_without_network(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    message = error_message(
        capsys, "ict", "--config", config, "--retriever.bert.path", "google-bert/no-such-model-here"
    )
    assert "retriever.bert.path" in message and "no-such-model-here" in message


def test_run_folder_with_another_config(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("run: elsewhere\n")
    message = error_message(capsys, "ict", "--config", config)
    assert "different config" in message and "--run" in message


def test_only_settings_that_nothing_has_used_may_change(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["--config", str(write_config(folder))]
    assert main(["prepare", *arguments]) == 0 and main(["ict", *arguments]) == 0
    capsys.readouterr()
    changes = ["--data.train", "other.json", "--evaluate.read", "1", "--finetune.optim.lr", "0.5"]
    changes += ["--pretrain.threads", "1", "--engine.log_every_s", "1"]
    assert main(["ict", *arguments, "--resume", *changes]) == 0
    updated = "engine.log_every_s, pretrain.threads, finetune.optim.lr, evaluate.read, data.train.path"
    assert f"config.yaml updated: {updated}" in capsys.readouterr().out
    assert load_config(folder / "run" / "config.yaml").evaluate.read == 1
    message = error_message(capsys, "ict", *arguments, "--resume", *changes, "--ict.optim.lr", "0.5")
    assert "changed: ict.optim.lr)" in message
    (folder / "run" / "finetune" / "checkpoints").mkdir(parents=True)
    message = error_message(capsys, "ict", *arguments, "--resume")
    assert "changed: finetune.optim.lr, data.train.path)" in message


@pytest.mark.parametrize(
    "field", ["data.test", "data.train", "data.closed_book", "data.masked_spans", "init_from.reader"]
)
def test_missing_files_are_found_before_the_first_step(
    capsys: pytest.CaptureFixture[str], folder: Path, field: str
) -> None:
    message = error_message(capsys, "run", "--config", write_config(folder), f"--{field}", folder / "missing.json")
    assert "missing.json" in message
    assert not (folder / "run" / "ict").exists() and not (folder / "run" / "initial").exists()


@pytest.mark.parametrize("override", [("--ict.optim.lr", "1e20"), ("--retriever.temperature", "1e-40")])
def test_diverged_training_stops_and_publishes_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path, override: tuple[str, str]
) -> None:
    config = write_config(folder, ict={"checkpoint_every": 1, "optim": {"warmup_steps": 0}})
    assert main(["prepare", "--config", str(config)]) == 0
    assert main(["ict", "--config", str(config), *override]) == 2
    message = capsys.readouterr().err
    assert "ict diverged at step" in message and "ict.optim.lr" in message and "checkpoint" in message
    assert not (folder / "run" / "ict" / "model").exists()


def test_k_larger_than_the_corpus(tmp_path: Path) -> None:
    import faiss
    import numpy as np

    from index.build import IndexManifest
    from index.search import PassageIndex
    from realm.errors import UserError
    from realm.runtime.versions import Version

    index = faiss.IndexFlatIP(4)
    index.add(np.eye(4, dtype=np.float32))
    manifest = IndexManifest("a01-step-000001", "", "", "", 4, 4, "Flat", {}, "")
    with pytest.raises(UserError, match=r"k = 5 .* only 4"):
        PassageIndex(Version(1, 1, 1), manifest, {}, index, index, None, np.zeros(0, np.int64)).search(
            np.eye(4, dtype=np.float32), 5
        )


def test_two_prepare_at_once(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    import fcntl

    config = write_config(folder)
    lock = folder / "prepared" / "prepare.lock"
    lock.parent.mkdir()
    with lock.open("w") as file:
        file.write("process 17 on host")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        message = error_message(capsys, "prepare", "--config", config)
    assert f"process 17 on host is already preparing {folder / 'prepared'}" in message
    assert not (folder / "prepared" / "tokenizer").exists()
    assert main(["prepare", "--config", str(config)]) == 0, "the file of a killed process is no lock"
    assert not lock.exists()


def test_a_relative_prepared_folder_is_named_in_full(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(folder, corpus={"prepared": "here"})
    monkeypatch.chdir(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    message = error_message(capsys, "ict", "--config", config)
    assert f"{folder / 'elsewhere' / 'here'} contains no prepared corpus" in message
    assert "the folder that corpus.prepared (here) is relative to" in message


def test_a_corpus_of_one_document(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "passages.jsonl").write_text(json.dumps({"id": "1", "text": "Alda is old. It lies on the Ister."}) + "\n")
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    message = error_message(capsys, "ict", "--config", config)
    assert "at least two passages with two sentences" in message and "contains 1 such passages, of 1" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--pretrain.candidates", "1000"], "pretrain.candidates (1000) exceeds the corpus"),
        (["--finetune.retrieve", "1000"], "finetune.retrieve (1000) exceeds the corpus"),
        (["--reader.bert.path", "./nothere"], "reader.bert.path: './nothere' is not a transformers checkpoint"),
        (["--data.train", "nothere.json"], "data.train: nothere.json does not exist"),
    ],
)
def test_a_run_is_refused_before_its_first_step(
    capsys: pytest.CaptureFixture[str], folder: Path, override: list[str], words: str
) -> None:
    assert words in error_message(capsys, "run", "--config", write_config(folder), "--run", folder / "new", *override)
    assert not (folder / "new" / "ict").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["--ict.batch_size", "1000000"], "ict.batch_size must be at most 65,536"),
        (["--corpus.statements", "[]"], "corpus.statements must contain at least one source"),
    ],
)
def test_values_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, override: list[str], words: str
) -> None:
    assert words in error_message(capsys, "ict", "--config", write_config(folder), *override)


def test_half_a_launcher_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK is not set" in error_message(capsys, "prepare", "--config", write_config(folder))
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE must be a whole number" in error_message(capsys, "prepare", "--config", write_config(folder))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "first")
    assert "RANK must be a whole number" in error_message(capsys, "prepare", "--config", write_config(folder))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "test", "--questions", "q.json"], "give one of them"),
        (
            ["--questions", "{path: q.json, format: trec}", "--format", "squad"],
            "has format: trec, but --format is squad",
        ),
        (["--stage", "nothing"], "'nothing' is not a retriever; give a stage"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, options: list[str], words: str
) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    run = folder / "run"
    assert main(["ict", "--config", str(config), "--ict.steps", "1", "--run", str(run)]) == 0
    assert words in error_message(capsys, "evaluate", "--run", run, *options)
