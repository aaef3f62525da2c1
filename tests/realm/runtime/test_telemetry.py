"""What reaches the console: data is never markup, and control characters are escaped."""

import io
import re

import pytest
from rich.text import Text

from realm.runtime import telemetry
from realm.runtime.printable import printable
from realm.runtime.telemetry import log_line, print_table, progress, styled

NASTY = "a[b]r[/]\\\\\\[bold]:smile:\x1b]0;owned\x07\x9b31m\r\u202eevil\u2066\ud800 end"
SHOWN = "a[b]r[/]\\\\\\[bold]:smile:\\x1b]0;owned\\x07\\x9b31m\\r\\u202eevil\\u2066\\ud800 end"


def test_only_characters_that_a_terminal_obeys_are_escaped() -> None:
    assert printable(NASTY) == SHOWN
    text = "Zürich, 東京, עברית\u200f, 👩\u200d🔬, é:\n\ttab"
    assert printable(text) == text
    assert all(printable(chr(code)).isprintable() for code in (*range(9), *range(11, 32), *range(127, 160)))


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    console = telemetry._Console(soft_wrap=True, file=file, force_terminal=request.param, width=200)
    monkeypatch.setattr(telemetry, "console", console)
    return file


def plain(output: io.StringIO) -> str:
    """The output without the styles and cursor movements of rich itself."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


def test_everything_that_is_printed_is_escaped(output: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    log_line(NASTY)
    telemetry.console.print(NASTY, style="bold")
    telemetry.console.print(styled("from ", (NASTY, "bold green")))
    print_table(NASTY, [NASTY, "b"], [[NASTY, 1.0]])
    with progress(NASTY, 2, every_s=0) as reporter:
        reporter.update(2, note=NASTY)
    shown = plain(output) + capsys.readouterr().out
    assert shown.count(SHOWN) >= 8
    assert not set(shown) & set("\x1b\x07\x9b\u202e\u2066\ud800")


def test_styles_are_kept_apart_from_the_text() -> None:
    assert styled("a", ("[b]", "bold")) == Text.assemble("a", ("[b]", "bold"))
