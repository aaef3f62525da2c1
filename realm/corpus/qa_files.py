"""SQuAD and TimeQA files, whose articles are read as documents and as the context of questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from realm.corpus.records import Place, expect, expect_field
from realm.corpus.text_files import read_json
from realm.errors import UserError

TIMEQA_SEPARATOR = "\n\n"
"""Between the paragraphs of a TimeQA article."""


def squad_articles(path: Path) -> list[Any]:
    """The articles of a SQuAD file. Raises UserError if it is not one."""
    squad = read_json(path, "SQuAD articles")
    if not isinstance(squad, dict) or not isinstance(squad.get("data"), list):
        raise UserError(f'{path} is not in SQuAD format: expected an object with a list under "data".')
    articles: list[Any] = squad["data"]
    return articles


def timeqa_articles(path: Path) -> Iterator[tuple[Place, object]]:
    """The articles of a TimeQA file, and their positions."""
    content = read_json(path, "a list of TimeQA articles")
    for number, article in enumerate(content if isinstance(content, list) else [content]):
        yield Place(f"{path}, record {number}"), article


def timeqa_document(article: object) -> tuple[str, list[str]]:
    """Link and paragraphs of a TimeQA article. Raises BadRecord if it has none."""
    link = expect_field(article, "link", str, "the TimeQA article")
    paragraphs = expect_field(article, "paras", list, "the TimeQA article")
    return link, [expect(paragraph, str, "a paragraph") for paragraph in paragraphs]
