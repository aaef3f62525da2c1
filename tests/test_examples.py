"""Every program of `examples/`, run on the tiny run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Function that runs an example with arguments and returns the lines it prints."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def ranking(lines: list[str]) -> list[str]:
    """Titles in the order in which a search example prints them."""
    return re.findall(r"(Marie Curie|Danube|Ada Lovelace): ", "\n".join(lines))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"], ids=["shared tower", "two towers"])
def test_a_retriever_ranks_alike_here_and_in_sentence_transformers(run_example, finished: Path, stage: str) -> None:
    retriever = finished / "run" / stage / "model" / "retriever"
    here = run_example("search_passages.py", retriever, "--question", "Where does the river rise?")
    there = run_example("use_sentence_transformers.py", retriever, "--question", "Where does the river rise?")
    assert here[0] == there[0] == "Where does the river rise?"
    assert len(set(ranking(here))) == 3 and ranking(here) == ranking(there)
    assert sum(float(p) for p in re.findall(r"p\(z\|x\) = (\d\.\d\d)", "\n".join(here))) == pytest.approx(1, abs=0.02)


def test_the_newest_index_is_searched(run_example, finished: Path) -> None:
    first, *found = run_example("search_index.py", finished / "run", "Who founded Alda?", "-k", 12)
    assert re.fullmatch(r"a01-step-000008-e\d: 12 passages", first)
    scores = [float(line.split()[0]) for line in found]
    assert scores == sorted(scores, reverse=True)
    assert {line.split()[1] for line in found} == {f"[town-{number}]" for number in range(12)}


def test_a_folder_that_is_not_a_run_is_refused_in_one_sentence(run_example, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"config\.yaml"):
        run_example("search_index.py", tmp_path, "Who?")


def test_every_variant_reads_a_text_longer_than_the_checkpoint(run_example, finished: Path) -> None:
    checkpoint = finished / "run" / "pretrain" / "model" / "retriever"  # a BERT of 96 positions
    lines = run_example("long_attention.py", checkpoint, "--tokens", 600)
    assert [line.split(":")[0].strip() for line in lines] == ["dense", "longformer", "performer", "linformer", "infini"]
    assert all("600 wordpieces of width 32" in line for line in lines)


def test_metrics_are_printed_and_plotted(run_example, finished: Path, tmp_path: Path) -> None:
    title, *curve = run_example("plot_metrics.py", finished / "run", "--figure", "utility", "--lines", 4)
    assert title == "pretrain: utility, mean of 2 steps" and [line.split()[0] for line in curve] == ["1", "3", "5", "7"]
    picture = tmp_path / "loss.png"
    assert run_example("plot_metrics.py", finished / "run", "--stage", "ict", "--picture", picture) == []
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_salient_spans_are_marked(run_example) -> None:
    assert run_example("tag_spans.py", "She moved to Paris in May 1901.", "nothing here") == [
        "She moved to [Paris](place) in [May 1901](date).",
        "nothing here",
    ]


def test_every_example_is_listed_and_tested() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert names <= set(re.findall(r'run_example\(\s*"(\w+\.py)"', Path(__file__).read_text()))
