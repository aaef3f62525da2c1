"""The index benchmarks at small scale: their reference values, printed tables and reports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from index.bench.searching import TORCH_FLAT, bench_search, bench_synthetic, jittered_copies
from index.frozen import frozen_index
from realm.app.cli import main
from realm.run.initial import build_initial_retriever
from tests.tiny import prepared_run

RNG = np.random.default_rng(0)
EMBEDDINGS_ND = RNG.standard_normal((2000, 16)).astype(np.float32)
EMBEDDINGS_ND /= np.linalg.norm(EMBEDDINGS_ND, axis=1, keepdims=True)


def test_benchmark_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = prepared_run(tmp_path)
    assert main(["bench", "index", "--run", str(run.folder)]) == 2 and "no index yet" in capsys.readouterr().err
    frozen_index(run.folder, build_initial_retriever(run), run.passages, run.config.refresh, lambda line: None).close()
    report, picture = tmp_path / "report.json", tmp_path / "curve.png"
    arguments = [
        "--passages",
        "8",
        "--queries",
        "4",
        "--scale",
        "300",
        "--json",
        str(report),
        "--picture",
        str(picture),
    ]
    assert main(["bench", "index", "--run", str(run.folder), *arguments]) == 0, capsys.readouterr().err
    figures = json.loads(report.read_text())
    encoding = {row["what"]: row for row in figures["encoding"]}
    ours, theirs = encoding["realm, fp32"], encoding["sentence-transformers, default (fp32)"]
    assert ours["1 - cosine to fp32, worst"] < 1e-6 and theirs["1 - cosine to fp32, worst"] < 1e-5, (
        "the same inputs and weights"
    )
    assert theirs["speed of default"] == 1.0 and set(figures["search"]) == {"12", "300"}
    assert figures["opening"]["of it in memory (PSS), each of two, MiB"] >= 0
    assert "realm, bf16, compiled" not in encoding and "no C++ compiler" in (out := capsys.readouterr().out)
    assert picture.stat().st_size > 10_000 and "Encoding 8 passages" in out


def test_recall_is_measured_against_exact_search() -> None:
    results = bench_search(
        EMBEDDINGS_ND, EMBEDDINGS_ND[:50], [("IVF32,Flat", ["nprobe=1", "nprobe=32"]), ("SQ8", [""])]
    )
    by_name = {(result["factory"], result["parameters"]): result for result in results}
    assert by_name["Flat", ""]["recall@8"] == by_name["IVF32,Flat", "nprobe=32"]["recall@8"] == 1.0
    assert by_name["IVF32,Flat", "nprobe=1"]["recall@8"] < 0.9 < by_name["SQ8", ""]["recall@8"]
    assert (
        sum(result.get("best", False) for result in results) == 1
        and max(by_name[name, ""]["times exact"] for name in ("Flat", TORCH_FLAT)) == 1.0
    )


def test_jittered_copies_keep_their_norm_and_move_by_the_neighbour_distance() -> None:
    grown = jittered_copies(EMBEDDINGS_ND[:500], 1300)
    assert grown.shape == (1300, 16) and np.array_equal(grown[:500], EMBEDDINGS_ND[:500])
    np.testing.assert_allclose(np.linalg.norm(grown, axis=1), 1.0, rtol=1e-5)
    nearest = [np.sort(np.linalg.norm(EMBEDDINGS_ND[:500] - row, axis=1))[1] for row in EMBEDDINGS_ND[:500]]
    moved = np.linalg.norm(grown[500:1000] - EMBEDDINGS_ND[:500], axis=1)
    assert 0.5 * np.median(nearest) < np.median(moved) < 1.2 * np.median(nearest)


def test_an_index_of_random_vectors_is_built_written_mapped_and_searched() -> None:
    result = bench_synthetic(5000, 16)
    assert result["own row found first, %"] > 90 and result["GiB on disk"] > 0


@pytest.mark.parametrize("shape", ["many", "0x0", "10x128", "100000", "1000x0"])
def test_a_shape_that_cannot_be_built_is_refused_before_anything_else(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "index", "--run", "missing", "--synthetic", shape])
    assert "must have the form NxD" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_with_and_without_swaps_are_measured(tmp_path: Path) -> None:
    report = tmp_path / "swaps.json"
    assert (
        main(["bench", "swaps", "--rows", "500", "--dim", "8", "--steps", "60", "--every", "10", "--json", str(report)])
        == 0
    )
    result = json.loads(report.read_text())
    assert result["with swaps"]["steps"] == result["without swaps"]["steps"] == 60
    assert result["swaps"] >= 1 and result["p99 with / without"] > 0
