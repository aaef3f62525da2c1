"""The Hugging Face hub: whether a model or data set can be had from it, asked once and quickly; the loaders themselves retry for a minute."""

from typing import Literal

from realm.errors import UserError


def require_on_hub(name: str, what: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Return where the hub has the model (or data set) `name`; raise UserError, which calls it `what`, where it has not or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=10)
    except HFValidationError:
        raise UserError(f"{what} {name!r} is neither an existing path nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise UserError(f"{what} {name} is neither an existing path nor a public {kind} on the Hugging Face hub") from None
    except (OSError, HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"{what} {name} is not on this machine and the Hugging Face hub cannot be reached; give a local folder or connect") from error
