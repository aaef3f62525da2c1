"""Text from documents, questions and file names, made safe to print."""

import re

_UNPRINTABLE = re.compile(
    "["
    "\0-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls but tab and line feed: escape sequences begin with one
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates: they reorder other text
    "\ud800-\udfff"  # surrogates: cannot be encoded
    "\ufff9-\ufffb"  # interlinear annotations
    "]"
)


def printable(text: str) -> str:
    r"""Return `text` with the characters escaped that a terminal would obey or cannot show.

    An escape character becomes `\x1b`, a right-to-left override `\u202e`. Tabs and line feeds stay.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
