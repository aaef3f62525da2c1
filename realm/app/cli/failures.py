"""The sentence and the exit status for an error that ends a command."""

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "free some space and rerun",
    errno.EDQUOT: "free some space and rerun",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "use a folder that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "use shorter names",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def describe_os_error(error: OSError) -> str:
    """A sentence with the files, the system's error text and a remedy.

    Other libraries raise OSError with a text of their own; its first line is quoted.
    """
    files = " and ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    text = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{files + ': ' if files else ''}{text}{'; ' + remedy if remedy else ''}."
