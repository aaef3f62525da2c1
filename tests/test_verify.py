"""`realm verify`, and messages about files that cannot be read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from realm.app.cli import main
from realm.errors import UserError
from realm.run.folder import Run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_run_passes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) > 30 and all("whole" in row for row in rows)


@pytest.mark.parametrize(
    ("path", "damage", "remedy"),
    [
        ("ict/model/retriever/model.safetensors", flip, "to train the stage again, remove"),
        ("pretrain/model/reader/tokenizer.json", Path.unlink, "to train the stage again, remove"),
        ("finetune/model", shutil.rmtree, None),
        ("pretrain/model", shutil.rmtree, "is missing; restore it from a copy"),
        ("pretrain/checkpoints/step-000004/candidates-000.npy", flip, "resume: an older whole checkpoint is used"),
        ("encoders/a01-step-000008/config.json", flip, "remove it, and the next command that needs it writes it again"),
        ("indexes/a01-step-000008-e1/passages.index", flip, "realm refresh"),
        ("evaluations/test.json", lambda path: path.write_text("{"), "remove it and evaluate again"),
        ("evaluations/test.finetune.predictions.jsonl", Path.unlink, "predictions.jsonl does not exist"),
        ("evaluations", lambda path: (shutil.rmtree(path), path.touch()), "is a file instead of a folder"),
        ("lineage.json", lambda path: path.write_text("[1]"), "restore it from a backup of the run"),
    ],
)
def test_damage_is_listed_with_its_remedy(
    run: Path, capsys: pytest.CaptureFixture[str], path: str, damage: Callable[[Path], object], remedy: str | None
) -> None:
    damage(run / path)
    assert main(["verify", str(run)]) == (0 if remedy is None else 2)
    printed = capsys.readouterr()
    if remedy is not None:
        assert remedy in printed.out and printed.err.startswith("realm: ") and "damaged or missing" in printed.err


def test_commands_name_files_that_cannot_be_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert main(["pretrain", "--config", str(run / "config.yaml"), "--replay", str(run), "--run", str(run)]) in (0, 2)
    shutil.rmtree(run / "frozen")
    (run / "frozen").write_text("")
    capsys.readouterr()
    assert main(["ask", "--run", str(run), "Who founded Alda?"]) == 2
    message = capsys.readouterr().err
    assert f"{run}/frozen" in message and "Not a directory" in message


def test_resuming_without_a_checkpoint_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "ict" / "model")
    for folder in (run / "ict" / "checkpoints").iterdir():
        shutil.rmtree(folder)
    assert Run.open(run).begin("ict", resume=True)
    assert f"ict has no checkpoint in {run}/ict; training starts from step 0" in capsys.readouterr().out


def test_an_unfinished_last_stage_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "finetune" / "model")
    assert Run.open(run).last_finished() == "finetune_retriever"
    assert "stage finetune is not finished" in capsys.readouterr().out


def test_a_stage_is_not_resumed_with_other_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "--run", str(run), "--resume", "--finetune.steps", "12"]
    assert main(command) == 2
    assert "is already finetuned, so --finetune.steps 12 would not be used" in capsys.readouterr().err
    shutil.rmtree(run / "finetune" / "model")
    for changed in ("--finetune.steps", "12"), ("--seed", "9"), ("--questions", "{path: other.jsonl}"):
        assert main([*command[:4], *changed]) == 2
        assert "was started with other values of" in capsys.readouterr().err
    assert Run.open(run, ["--engine.threads", "1"]).begin("finetune", resume=True)


def test_a_stage_is_not_resumed_with_another_model_than_it_was_started_with(run: Path) -> None:
    shutil.rmtree(run / "finetune" / "model")
    shutil.rmtree(run / "finetune_retriever" / "model")
    with pytest.raises(UserError, match="was started with the retriever finetune_retriever/model/retriever, and would"):
        Run.open(run).begin("finetune", resume=True)
