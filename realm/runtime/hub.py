"""The Hugging Face hub and its data sets: whether a model or data set can be had, asked once and
quickly (the loaders retry for a minute)."""

from pathlib import Path
from typing import Any, Literal

from realm.errors import UserError


def require_on_hub(name: str, what: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Return where the hub has the model (or data set) `name`; raise UserError, which calls it
    `what`, where it has not or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=10)
    except HFValidationError:
        raise UserError(f"{what} {name!r} is neither an existing path nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what} {name} is neither an existing path nor a public {kind} on the Hugging Face hub"
        ) from None
    except (OSError, HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{what} {name} is not on this machine and the Hugging Face hub cannot be reached; give a local folder or connect"
        ) from error


def load_split(path: str, name: str | None, split: str | None) -> Any:
    """One split of a data set, saved in a folder or on the hub; without a name the only one.
    Raises UserError naming it where it cannot be had."""
    import datasets

    if Path(path).is_dir():
        try:
            loaded = datasets.load_from_disk(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is no data set saved by the datasets library ({str(error).splitlines()[0]})"
            ) from error
    else:
        require_on_hub(path, "data set", kind="dataset")
        try:
            loaded = datasets.load_dataset(path, name, split=split)
        except (OSError, ValueError) as error:
            raise UserError(
                f"data set {path} cannot be loaded ({str(error).splitlines()[0]}); check `name` and `split`"
            ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    splits = list(map(str, loaded))
    if split is None and len(splits) > 1:
        raise UserError(f"data set {path} has the splits {', '.join(splits)}; name one with `split`")
    if split is not None and split not in splits:
        raise UserError(f"data set {path} has no split {split!r} but {', '.join(splits)}")
    return loaded[split or splits[0]]
