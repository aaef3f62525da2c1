"""Starting from the models of another run (`init_from`): weights, finetuning, and refusals."""

from pathlib import Path

import pytest
import torch

from finetune.answer import Answerer
from finetune.train_reader import Finetuning
from realm.errors import UserError
from realm.models.reader import build_reader, load_reader, save_reader
from realm.models.retriever import build_retriever
from realm.models.retriever_files import save_retriever
from realm.run.config_file import load_config
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever, initial_reader, initial_retriever
from realm.run.train import train_stage
from realm.runtime.publish import checksum
from tests.tiny import prepared_run, write_config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a prepared corpus, and a retriever and a reader of another run in `other/`."""
    run = prepared_run(tmp_path_factory.mktemp("init_from"))
    torch.manual_seed(7)
    save_retriever(
        build_retriever(run.config.retriever, run.tokenizer), run.tokenizer, run.folder / "other/retriever", 32, 80
    )
    save_reader(build_reader(run.config.reader, run.tokenizer)[0], run.tokenizer, run.folder / "other/reader")
    return run


def another(source: Run, folder: Path, **changes: dict) -> Run:
    """Another run over the same corpus, which starts from the models in `other/`."""
    other = source.folder / "other"
    init_from = {"retriever": str(other / "retriever"), "reader": str(other / "reader")}
    data = {
        key: str(source.folder.parent / name)
        for key, name in (
            ("train", "questions.json"),
            ("test", "questions.json"),
            ("masked_spans", "masked_spans.jsonl"),
        )
    }
    corpus = {
        "passages": str(source.folder.parent / "passages.jsonl"),
        "statements": None,
        "prepared": str(source.prepared),
    }
    changes["corpus"] = corpus | changes.get("corpus", {})
    return Run.create(load_config(write_config(folder, **{"init_from": init_from, "data": data, **changes})))


def test_the_first_stage_starts_from_the_weights_of_the_other_run(source: Run, tmp_path: Path) -> None:
    run = another(source, tmp_path)
    assert checksum(initial_retriever(run, "ict")) == checksum(source.folder / "other/retriever")
    theirs = load_reader(source.folder / "other/reader").state_dict()
    assert all(
        torch.equal(value, theirs[name])
        for name, value in initial_reader(run, "reader_pretraining").state_dict().items()
    )


def test_a_dense_reader_continues_with_longformer_and_longer_inputs(source: Run, tmp_path: Path) -> None:
    longer = {
        "reader": {**source_reader(source), "attention": {"type": "longformer", "window": 8}, "max_tokens": 160},
        "corpus": {"context_tokens": 120},
    }
    reader = initial_reader(another(source, tmp_path, **longer), "finetune", learned=True)
    assert reader.bert.config.max_position_embeddings >= 160
    assert any("key_global" in name for name in reader.state_dict())


def source_reader(source: Run) -> dict:
    """The `reader` section of the tiny config."""
    from tests.tiny import tiny_tree

    return dict(tiny_tree(source.folder.parent)["reader"])


def test_models_of_another_run_are_finetuned_and_answer_without_pretraining(source: Run, tmp_path: Path) -> None:
    run = another(source, tmp_path)
    before = Answerer(run, "initial")
    assert before.model is not None, "the reader of the other run is used zero-shot"
    train_stage(run, "finetune", Finetuning.open)
    after = Answerer(run)
    assert (
        after.index.manifest.encoder_checksum
        == checksum(build_initial_retriever(run))
        == before.index.manifest.encoder_checksum
    )
    theirs = load_reader(source.folder / "other/reader").state_dict()
    assert after.model is not None
    assert any(not torch.equal(value, theirs[name]) for name, value in after.model.reader.state_dict().items()), (
        "finetuning changes the weights"
    )


def test_another_vocabulary_and_folders_without_models_are_refused(source: Run, tmp_path: Path, tokenizer) -> None:
    foreign = tmp_path / "foreign"
    save_reader(build_reader(source.config.reader, tokenizer)[0], tokenizer, foreign)
    run = another(source, tmp_path, init_from={"reader": str(foreign), "retriever": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="has a different vocabulary than the corpus"):
        initial_reader(run, "finetune")
    with pytest.raises(UserError, match="nothing' is not a saved retriever"):
        initial_retriever(run, "finetune")
    assert not (run.folder / "initial").exists()


def test_random_weights_are_not_finetuned(source: Run) -> None:
    with pytest.raises(UserError, match="no trained retriever yet; run `realm ict`"):
        initial_retriever(source, "finetune", learned=True)
    with pytest.raises(UserError, match="no trained reader yet; run `realm reader-pretraining`"):
        initial_reader(source, "finetune", learned=True)


@pytest.mark.parametrize("part", ["retriever", "reader"])
def test_a_missing_model_of_a_finished_stage_is_an_error_and_not_replaced_by_an_earlier_one(
    tmp_path: Path, part: str
) -> None:
    run = prepared_run(tmp_path)
    for stage, models in (("ict", ["retriever"]), ("pretrain", ["retriever", "reader"])):
        for model in models:
            (run.model(stage) / model).mkdir(parents=True)
    assert run.latest(part) == run.model("pretrain") / part
    (run.model("pretrain") / part).rmdir()
    with pytest.raises(UserError, match=f"{part} is missing, although stage pretrain is finished"):
        run.latest(part)
