"""What a stage publishes: the trained retriever, its average with the first one, or the first
one."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.ict import InverseCloze, average_weights
from pretrain.realm import LiveRealmPretraining
from pretrain.verdict import compare
from realm.models.retriever_files import load_retriever
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever, initial_retriever
from realm.run.train import train_stage
from realm.runtime.publish import checksum
from realm.runtime.telemetry import read_metrics
from realm.training.checkpoints import checkpoints
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("towns"), ict={"steps": 2, "checkpoint_every": 5})


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", prepared.config)


def ranks(better: bool, count: int = 200) -> dict:
    """A measurement whose supporting passages are found at rank 2 on average, or a little
    better."""
    rank_B = np.random.default_rng(0).integers(1, 4, count)
    found = {"dense": np.maximum(1, rank_B - better).tolist(), "fused": rank_B.tolist()}
    return {"ranks": {"source": {"dense": rank_B.tolist()}, "supporting": found}}


def measurements(monkeypatch: pytest.MonkeyPatch, run: Run, better: bool | None) -> None:
    """Make the trained retriever better or equal; None: it cannot be measured."""

    def measure(run: Run, folder: Path) -> dict | None:
        return None if better is None else ranks(better and "initial" not in folder.parts)

    monkeypatch.setattr("pretrain.verdict.measure_retriever", measure)


@pytest.mark.parametrize(
    ("better", "keep", "published", "said"),
    [
        (True, "better", "trained", "made the retriever better"),
        (False, "better", "initial", "did not make the retriever better"),
        (False, "always", "trained", ""),
        (None, "better", "trained", "fewer than 100 questions"),
    ],
    ids=["better", "equal", "equal, but wanted", "not measured"],
)
def test_the_retriever_that_is_not_better_is_not_published(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys, better: bool | None, keep: str, published: str, said: str
) -> None:
    measurements(monkeypatch, run, better)
    run = Run(run.folder, replace(run.config, ict=replace(run.config.ict, keep=keep)))
    train_stage(run, "ict", InverseCloze.open)
    first, model = build_initial_retriever(run), run.model("ict")
    assert (checksum(model / "retriever") == checksum(first)) == (published == "initial")
    output = " ".join(capsys.readouterr().out.split())
    assert said in output
    if keep == "better" and better is not None:
        verdict = json.loads((model / "verdict.json").read_text())
        assert verdict["better"] == better and verdict["sentence"] in output and verdict["questions"] == 200
    else:
        assert not (model / "verdict.json").exists()
    assert initial_retriever(run, "pretrain") == model / "retriever"


def test_a_verdict_needs_an_interval_above_zero() -> None:
    before, after = ranks(False), ranks(True)
    verdict = compare(before, after, "supporting", "dense")
    assert (
        verdict["better"] and 0 < verdict["interval"][0] < verdict["after"] - verdict["before"] < verdict["interval"][1]
    )
    assert not compare(after, before, "supporting", "dense")["better"]
    same = compare(before, after, "supporting", "fused")
    assert not same["better"] and same["interval"] == [0.0, 0.0]
    few = {"ranks": {"source": {"dense": [2] * 5}}}, {"ranks": {"source": {"dense": [1, 3, 2, 2, 2]}}}
    assert not compare(*few, "source", "dense")["better"]


def test_an_interrupted_verdict_is_given_on_resume_without_training_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Run, folder: Path) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.verdict.measure_retriever", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_stage(run, "ict", InverseCloze.open)
    assert not run.finished("ict") and len(checkpoints(run.stage("ict"))) == 1
    measurements(monkeypatch, run, better=True)
    monkeypatch.setattr(InverseCloze, "draw", None)
    train_stage(run, "ict", InverseCloze.open, resume=True)
    assert run.finished("ict") and len(read_metrics(run.folder / "metrics.jsonl")["ict"]) == 2


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_weights_are_averaged_with_the_first_ones(run: Run, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    first = load_retriever(build_initial_retriever(run))[0]
    weights = []
    for average in (0.0, share):
        ict = replace(run.config.ict, average=average, keep="always")
        chosen = Run(run.folder.with_name(f"average-{average}"), replace(run.config, ict=ict))
        train_stage(chosen, "ict", InverseCloze.open)
        weights.append(load_retriever(chosen.model("ict") / "retriever")[0].state_dict())
    trained, averaged = weights
    moved = 0
    for name, start in first.state_dict().items():
        torch.testing.assert_close(averaged[name], (1 - share) * trained[name] + share * start, rtol=1e-4, atol=1e-6)
        moved += int(not torch.equal(trained[name], start))
    assert moved > 5


def test_every_weight_is_averaged(run: Run) -> None:
    trained, start = (load_retriever(build_initial_retriever(run))[0] for _ in range(2))
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1.0)
    average_weights(trained, start, 0.75)
    for weight, before in zip(trained.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(weight, before + 0.25)


@pytest.mark.slow
def test_an_interrupted_verdict_of_realm_is_given_on_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run, folder: Path) -> dict:
        raise KeyboardInterrupt

    run = Run.create(replace(run.config, run=str(run.folder)))
    open_stage = partial(LiveRealmPretraining.open, with_refresher=True)
    monkeypatch.setattr("pretrain.verdict.measure_retriever", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_stage(run, "pretrain", open_stage)
    measurements(monkeypatch, run, better=False)
    train_stage(run, "pretrain", open_stage, resume=True)
    assert len(read_metrics(run.folder / "metrics.jsonl")["pretrain"]) == run.config.pretrain.steps
    assert checksum(run.model("pretrain") / "retriever") == checksum(build_initial_retriever(run))
    assert (run.model("pretrain") / "reader").exists() and (run.folder / "training-ended").exists()
