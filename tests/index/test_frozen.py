"""The index of a frozen retriever: built once, reused, published for a trainer, pinned in use."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from index import version_build
from index.encode import encode_passages
from index.frozen import frozen_index, publish_frozen
from index.retention import is_pinned
from index.search import PassageIndex
from realm.errors import UserError
from realm.run.folder import Run
from realm.run.initial import build_initial_retriever
from realm.runtime.publish import checksum
from realm.runtime.signals import Interrupted
from realm.runtime.versions import Version, start_attempt, versions_in
from tests.tiny import prepared_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepared_run(tmp_path_factory.mktemp("frozen"))


def test_it_is_built_once_reused_and_pinned(run: Run) -> None:
    retriever = build_initial_retriever(run)
    assert build_initial_retriever(run) == retriever and checksum(retriever) == checksum(build_initial_retriever(run))
    lines: list[str] = []
    first = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert len(first) == len(run.passages) and any("published" in line for line in lines)
    lines.clear()
    again = frozen_index(run.folder, retriever, run.passages, run.config.refresh, lines.append)
    assert again.version == first.version and lines == [], "it is not built a second time"
    store = run.folder / "frozen" / checksum(retriever)[:12]
    assert is_pinned(store, first.version)
    first.close()
    again.close()
    assert not is_pinned(store, first.version)


def test_it_is_published_for_a_trainer_with_the_same_retriever_only(run: Run) -> None:
    retriever = build_initial_retriever(run)
    frozen = frozen_index(run.folder, retriever, run.passages, run.config.refresh)
    attempt = start_attempt(run.folder)
    encoder = Version(attempt, 0)
    assert publish_frozen(run.folder, retriever, run.passages, run.config.refresh, encoder)
    first = PassageIndex.open(run.folder / "indexes" / encoder.with_epoch(0).name, run.passages.fingerprint)
    np.testing.assert_array_equal(first.embeddings(np.arange(5)), frozen.embeddings(np.arange(5)))
    assert first.manifest.encoder == encoder.name and first.manifest.encoder_checksum == checksum(retriever)
    other = run.folder / "other"
    other.mkdir()
    (other / "retriever.json").write_text("{}")
    assert not publish_frozen(run.folder, other, run.passages, run.config.refresh, Version(attempt, 1)), (
        "another retriever has other embeddings"
    )


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run's folder that a test may damage; without the indexes that others built."""
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "indexes", ignore_errors=True)
    yield tmp_path / "run"


def open_frozen(run: Run, folder: Path, log: Callable[[str], None] = lambda line: None) -> PassageIndex:
    return frozen_index(folder, build_initial_retriever(run), run.passages, run.config.refresh, log)


def frozen_store(run: Run, folder: Path) -> Path:
    return folder / "frozen" / checksum(build_initial_retriever(run))[:12]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "folder", "manifest", "encoder"])
def test_a_damaged_index_is_named_with_the_remedy(run: Run, copy: Path, damage: str) -> None:
    open_frozen(run, copy).close()
    store = frozen_store(run, copy)
    version = store / "indexes" / versions_in(store / "indexes")[-1].name
    file = version / ("manifest.json" if damage == "manifest" else "passages.index")
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "encoder":
        shutil.rmtree(version)
        encoder = store / "encoders" / versions_in(store / "encoders")[-1].name
        (encoder / "retriever.json").write_text("{}")
    elif damage == "folder":
        file.mkdir()
    elif damage != "missing":
        content[len(content) // 2] ^= 1
        end = {"truncate": len(content) // 2, "empty": 0}.get(damage, len(content))
        file.write_bytes(bytes(content[:end]))
    if damage == "manifest":  # without a readable manifest nobody knows what it is: it is built again
        assert len(open_frozen(run, copy)) == len(run.passages)
        return
    lines: list[str] = []
    with pytest.raises(UserError, match=rf"remove {store} and rerun"):
        open_frozen(run, copy, lines.append)
    assert damage == "encoder" or "passages.index" in lines[0]
    shutil.rmtree(store)
    assert len(open_frozen(run, copy)) == len(run.passages)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_an_index_on_a_file_system_that_cannot_be_written_is_read(
    run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    open_frozen(run, copy).close()

    def fail(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    for name in ("mkdir", "touch", "write_text", "write_bytes", "rename", "unlink"):
        monkeypatch.setattr(Path, name, fail)
    lines: list[str] = []
    for _ in range(2):
        index = frozen_index(copy, copy / "initial" / "retriever", run.passages, run.config.refresh, lines.append)
        assert len(index) == len(run.passages)
        index.close()
    assert len(lines) == 1 and "cannot be written" in lines[0], "said once"


def test_an_index_that_cannot_be_written_is_not_built(run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copy / "frozen", ignore_errors=True)
    retriever = build_initial_retriever(run)

    def fail(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match=r"cannot be built in .*Read-only file system"):
        frozen_index(copy, retriever, run.passages, run.config.refresh, lambda line: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_says_so_and_is_continued(
    run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    shutil.rmtree(copy / "frozen", ignore_errors=True)

    def encode_interrupted(*arguments: object) -> np.ndarray:
        os.kill(os.getpid(), number)
        return encode_passages(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(version_build, "encode_passages", encode_interrupted)
    with pytest.raises(Interrupted, match="rerun the command to continue"):
        open_frozen(run, copy)
    monkeypatch.undo()
    assert len(open_frozen(run, copy)) == len(run.passages)
