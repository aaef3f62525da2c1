"""User errors: one sentence with the place and the remedy, and exit status 2."""

import json
from pathlib import Path

import pytest

from realm.app.cli import _split_overrides, main
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
    rest, overrides = _split_overrides(
        ["ask", "--run", "r", "--refresh.search_parameters", "nprobe=64", "--a.b=3", "Who discovered radium?"]
    )
    assert rest == ["ask", "--run", "r", "Who discovered radium?"]
    assert overrides == ["--refresh.search_parameters", "nprobe=64", "--a.b=3"]


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
    assert main(["ict", *arguments, "--resume", *changes]) == 0
    assert "config.yaml updated: finetune.optim.lr, evaluate.read, data.train.path" in capsys.readouterr().out
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
