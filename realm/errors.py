"""Exception for errors that the user can fix."""


class UserError(ValueError):
    """An error in the user's input.

    The message is one sentence that names the file, line, field or value, and the remedy. The
    command line prints it without a traceback and exits with status 2.
    """
