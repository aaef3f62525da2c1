"""Saved models: checking their files, and reading them with one kind of error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from realm.errors import UserError
from realm.models.bert import first_line
from realm.runtime.publish import check_folder

REMEDY = "restore the model from a copy, or rebuild it (`realm verify RUN` prints how)"


@contextmanager
def reading_model(path: Path, part: str) -> Iterator[None]:
    """Check every file of the model saved in `path` against its manifest, then read it in the
    block.

    `part`: retriever or reader. Checksums take about 1 s per GB. Raises UserError, which names
    the file and the remedy, if a file is missing, unreadable, or not as it was saved; without a
    manifest (models of earlier versions) if the block cannot read it.
    """
    if not check_folder(path, REMEDY) and not (path / f"{part}.json").exists():
        exported = " or RUN/encoders/VERSION" if part == "retriever" else ""
        raise UserError(
            f"{path} is not a saved {part} (no {part}.json); use RUN/STAGE/model/{part}{exported} of a run."
        )
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        # The libraries have no common exception for files that do not have the expected content.
        raise UserError(f"{path} cannot be read as a {part} ({first_line(error)}); {REMEDY}.") from error
