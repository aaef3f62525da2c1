"""Exception for errors that the user can fix, and the wording that messages share."""


class UserError(ValueError):
    """An error in the user's input.

    The message is one sentence that names the file, line, field or value, and the remedy. The
    command line prints it without a traceback and exits with status 2.
    """


def shortened(text: str, limit: int = 200) -> str:
    """The first `limit` characters of a text from the input, for messages."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def first_line(error: BaseException) -> str:
    """First line of the message of another library's exception, or its type if it has none."""
    return shortened(str(error).strip().partition("\n")[0]) or type(error).__name__
