"""The documents: generated pages are up to date, links have targets, configs and commands in them
are accepted."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from realm.run.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
CHECKED = [page for page in PAGES if page.parent.name != "results"]
"""Pages whose configs and commands are complete; those of results have placeholders."""
MINIMAL = {"run": "runs/my", "corpus": {"passages": "documents.jsonl"}}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", ["configuration", "commands"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    render = runpy.run_path(str(ROOT / "docs" / f"make_{page}.py"))["render"]
    assert render() == (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), "run `make docs`"


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", CHECKED, ids=name_of)
def test_configs_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        tree = yaml.safe_load(block)
        tree.pop("extends", None)
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(MINIMAL | tree | {"corpus": MINIMAL["corpus"] | tree.get("corpus", {})})
        )
        load_config(tmp_path / "config.yaml")


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of each call of `realm` in an indented block."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ {4}(?:\S+/)?realm ([a-z].+)$", text, re.MULTILINE):
        yield shlex.split(line.replace("…", "words"), comments=True)


@pytest.mark.parametrize("page", CHECKED, ids=name_of)
def test_commands_are_accepted(page: Path, tmp_path: Path) -> None:
    parser = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["parser_of"]()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(MINIMAL))
    for arguments in commands(page):
        if arguments[:2] == ["bench", "spans"]:  # reads its arguments itself
            continue
        dotted = {at for at, word in enumerate(arguments) if re.match(r"--\w+\.", word)}
        values = {at + 1 for at in dotted if "=" not in arguments[at]}
        rest = [word for at, word in enumerate(arguments) if at not in dotted | values]
        _, others = parser.parse_known_args(rest)  # exits for a wrong argument
        load_config(tmp_path / "config.yaml", [arguments[at] for at in sorted(dotted | values)] + others)
