"""Access to models and datasets on the Hugging Face hub.

Availability is checked with one quick request first, because the loaders retry for a minute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from realm.errors import UserError, first_line


def require_on_hub(name: str, what: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Check that the model or dataset `name` is on the hub.

    Raises UserError if it is not, or if the hub is unreachable; `what` describes the name in the
    message.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=10)
    except HFValidationError:
        raise UserError(f"{what} {name!r} is neither an existing path nor a valid hub name.") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what} {name} is neither an existing path nor a public {kind} on the Hugging Face hub."
        ) from None
    except (OSError, HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{what} {name} is not on this machine and the Hugging Face hub cannot be reached; "
            "connect to the network or give a local folder."
        ) from error


def load_split(path: str, name: str | None, split: str | None) -> Any:
    """Load one split of a dataset from a folder or the hub; `split` None: its only split.

    Raises UserError naming the dataset if it cannot be loaded or has no such split, or if `name` is
    given for a folder.
    """
    import datasets

    if Path(path).is_dir():
        if name is not None:
            raise UserError(f"`name` of {path} is only for a dataset on the hub, but this is a folder; remove it.")
        try:
            loaded = datasets.load_from_disk(path)
        except Exception as error:  # files with wrong content raise KeyError, TypeError, AttributeError, …
            reason = "it has no rows" if isinstance(error, IndexError) else first_line(error)
            raise UserError(f"{path} is not a usable dataset saved with `save_to_disk` ({reason}).") from error
        if isinstance(loaded, datasets.Dataset) and split is not None and split != str(loaded.split):
            only = "is not divided into splits" if loaded.split is None else f"contains only the split {loaded.split}"
            raise UserError(f"dataset {path} {only}, but `split` is {split!r}; remove it.")
    else:
        require_on_hub(path, "dataset", kind="dataset")
        try:
            loaded = datasets.load_dataset(path, name, split=split)
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset {path} cannot be loaded ({first_line(error)}); check `name` and `split`."
            ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    splits = list(map(str, loaded))
    if not splits:
        raise UserError(f"dataset {path} has no splits.")
    if split is None and len(splits) > 1:
        raise UserError(f"dataset {path} has several splits ({', '.join(splits)}); choose one with `split`.")
    if split is not None and split not in splits:
        raise UserError(f"dataset {path} has no split {split!r}; choose one of {', '.join(splits)}.")
    return loaded[split or splits[0]]


def dataset_batches(dataset: Any) -> Iterator[Any]:
    """The rows of a dataset as Arrow tables of up to 1,000 rows."""
    batches: Iterator[Any] = dataset.with_format("arrow").iter(1000)
    return batches


@contextmanager
def damage_refused(path: str) -> Iterator[None]:
    """Raise UserError if the Arrow files of the dataset `path`, read in the block, are damaged."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"dataset {path} is damaged ({first_line(error)}).") from error
