"""What a user gets wrong is answered in one sentence, with the place and the remedy, and an exit
status that is not zero."""

import json
from pathlib import Path

import pytest

from realm.app.cli import _dotted, main
from tests.tiny import write_config, write_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command line says on standard error; it must end with status 2 and show no
    traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("realm: ") and "Traceback" not in said
    return said


def test_missing_config(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "nowhere.yaml does not exist" in complaint(capsys, "prepare", "--config", folder / "nowhere.yaml")


def test_missing_corpus_file(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder, corpus={"passages": str(folder / "absent.jsonl")})
    assert "absent.jsonl does not exist" in complaint(capsys, "prepare", "--config", config)
    assert not (folder / "prepared" / "passages").exists()


def test_wrong_json_field(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "passages.jsonl").write_text(json.dumps({"id": "1", "title": "a", "body": "b"}) + "\n")
    said = complaint(capsys, "prepare", "--config", write_config(folder))
    assert "passages.jsonl:1" in said and '"text"' in said and "body" in said


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
def test_config_mistakes_name_the_field(
    capsys: pytest.CaptureFixture[str], folder: Path, override: list[str], words: list[str]
) -> None:
    said = complaint(capsys, "ict", "--config", write_config(folder), *override)
    assert all(word in said for word in words)


def test_nothing_prepared_yet(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "realm prepare" in complaint(capsys, "ict", "--config", write_config(folder))


def test_a_corpus_prepared_from_a_part_is_not_taken_for_the_whole(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config), "--limit", "5"]) == 0
    said = complaint(capsys, "ict", "--config", config)
    assert (
        "was prepared otherwise: the limit of documents of each source was [5] and is now [None]" in said
        and "--corpus.prepared" in said
    )
    assert "corpus.block_tokens was 80 and is now 70" in complaint(
        capsys, "ict", "--config", config, "--limit", "5", "--corpus.block_tokens", "70"
    )


def test_stages_that_need_questions_are_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    config = write_config(folder, data={"train": None})
    assert "data.train names no questions" in complaint(capsys, "run", "--config", config)
    assert not (folder / "prepared").exists()


def test_an_override_before_an_argument_is_not_taken_for_it() -> None:
    rest, overrides = _dotted(
        ["ask", "--run", "r", "--refresh.search_parameters", "nprobe=64", "--a.b=3", "Who discovered radium?"]
    )
    assert rest == ["ask", "--run", "r", "Who discovered radium?"]
    assert overrides == ["--refresh.search_parameters", "nprobe=64", "--a.b=3"]


def test_no_such_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for command in (
        ["ask", "--run", folder / "none", "Who?"],
        ["evaluate", "--run", folder / "none"],
        ["refresh", "--run", folder / "none"],
    ):
        assert "no run folder" in complaint(capsys, *command)


def test_hub_name_without_network(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    said = complaint(capsys, "ict", "--config", config, "--retriever.bert.path", "google-bert/no-such-model-here")
    assert "retriever.bert.path" in said and "no-such-model-here" in said


def test_run_folder_of_another_config(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    config = write_config(folder)
    assert main(["prepare", "--config", str(config)]) == 0
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("run: elsewhere\n")
    said = complaint(capsys, "ict", "--config", config)
    assert "another config" in said and "--run" in said


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
        PassageIndex(Version(1, 1, 1), manifest, index, index, None, np.zeros(0, np.int64)).search(
            np.eye(4, dtype=np.float32), 5
        )
