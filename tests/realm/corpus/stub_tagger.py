"""A span tagger for tests, in a separate module that worker processes can import."""

import os
import re
import time
from collections.abc import Iterable, Iterator

from realm.spans.rules import SalientSpan

PLACES = ("Danube", "Black Forest", "Black Sea", "Rhine", "Zürich")


class StubTagger:
    """Tags the names in PLACES and numbers.

    It takes `delay` seconds per text and writes its process id to the file `log`.
    """

    def __init__(self, name: str = "stub", delay: float = 0.0, log: str | None = None):
        self.name, self.delay, self.log = name, delay, log

    def tag(self, texts: Iterable[str]) -> Iterator[tuple[SalientSpan, ...]]:
        for text in texts:
            if self.log is not None:
                with open(self.log, "a") as file:
                    file.write(f"{os.getpid()}\n")
            time.sleep(self.delay)
            names = [(match.start(), match.end(), "place") for match in re.finditer("|".join(PLACES), text)]
            numbers = [(match.start(), match.end(), "number") for match in re.finditer("[0-9]+", text)]
            yield tuple(SalientSpan(*span) for span in sorted(names + numbers))
