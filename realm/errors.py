"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: its message is one sentence naming the file, line, field or
    value, and the remedy.

    The command line prints the message without a traceback and exits with status 2.
    """
