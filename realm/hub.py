"""The Hugging Face hub: whether a model can be had from it, asked once and quickly; the loaders themselves retry for a minute."""

from realm.errors import UserError


def require_on_hub(name: str, what: str) -> None:
    """Return where the hub has the model `name`; raise UserError, which calls it `what`, where it has not or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except HFValidationError:
        raise UserError(f"{what} {name!r} is neither an existing path nor a possible hub name") from None
    except RepositoryNotFoundError:
        raise UserError(f"{what} {name} is neither an existing path nor a public model on the Hugging Face hub") from None
    except (OSError, HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"{what} {name} is not on this machine and the Hugging Face hub cannot be reached; give a local folder or connect") from error
