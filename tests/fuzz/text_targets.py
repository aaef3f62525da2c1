"""Fuzz targets: sentences, blocks, salient spans, tokenizers."""

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from realm.corpus.documents import Document
from realm.corpus.prepare import prepare_corpus
from realm.corpus.sources import SourceConfig
from realm.errors import UserError
from realm.spans.rules import builtin_spans
from realm.spans.tagger import SpanConfig, SpanTagger
from realm.text.blocks import cut_blocks, sentence_bounds
from realm.text.tokenizer import TokenizerConfig, load_tokenizer, tokenize, train_wordpiece
from tests.fuzz.mutate import mutated_bytes, mutated_json
from tests.fuzz.targets import Case, Target, register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = (
    "the",
    "Danube",
    "river",
    "A",
    "U.S.",
    "Dr.",
    "St.",
    "1999",
    "1,000",
    "12",
    "-",
    "–",
    "'",
    "''",
    '"',
    "“",
    "”",
    "(",
    ")",
    "[1]",
    ".",
    "!",
    "?",
    "…",
    ",",
    ";",
    "。",
    "！",
    "」",
    "\n",
    "\n\n",
    "\t",
    "\r",
    "\0",
    "\x85",
    "\u2028",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "\ufffd",
    "e\u0301",
    "\u0301",
    "İ",
    "ẞ",
    "ﬁ",
    "𝔘",
    "👨‍👩‍👧",
    "東京",
    "กรุงเทพ",
    "حيدر",
    "of",
    "and",
    "January",
    "19th",
    "century",
    "ago",
    "million",
    "$",
    "%",
    "##a",
    "[MASK]",
    "[UNK]",
    "a",
    "/",
    "&",
    "BC",
    "AD",
)


def random_text(rng: Random) -> str:
    """Words, marks and rare characters, some of them repeated up to 50,000 times."""
    parts = []
    for _ in range(rng.choice((1, 3, 10, 60))):
        word = rng.choice(_WORDS) + rng.choice(("", " ", " ", " "))
        parts.append(word * rng.choice((1,) * 60 + (3, 30, 1_000, 50_000 // len(word))))
    return "".join(parts)[:60_000]


def _text(rng: Random) -> Case:
    return Case(random_text(rng).encode())


@cache
def small_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer of the words of the texts."""
    return train_wordpiece([" ".join(_WORDS)] * 3, TokenizerConfig(vocab_size=400))


def _cut(case: Case, folder: Path) -> int:
    """The blocks of a text put together are the text, and no block is too long."""
    text = case.content.decode("utf-8", "replace")
    ids, offset_L2 = tokenize(small_tokenizer(), [text])[0]
    if not len(ids):
        raise UserError("no wordpieces")
    starts = np.array([not name.startswith("##") for name in small_tokenizer().convert_ids_to_tokens(ids.tolist())])
    room = 8 + len(text) % 40
    blocks = cut_blocks(len(text), offset_L2, starts, sentence_bounds(text), room)
    assert "".join(text[block.start : block.end] for block in blocks) == text
    assert [block.first for block in blocks] + [len(ids)] == [0] + [block.last for block in blocks]
    assert all(0 < block.last - block.first <= room for block in blocks)
    return 0


def _spans(case: Case, folder: Path) -> int:
    """Spans are sorted, do not overlap, and have no white space around them."""
    text = case.content.decode("utf-8", "replace")
    end = 0
    for span in builtin_spans(text):
        assert end <= span.start < span.end <= len(text)
        assert text[span.start : span.end] == text[span.start : span.end].strip()
        end = span.end
    return 0


@cache
def _tagger() -> SpanTagger:
    return SpanTagger.load(SpanConfig())


def _prepare(case: Case, folder: Path) -> int:
    """A prepared document has the text of the input."""
    text = case.content.decode("utf-8", "replace")
    (folder / "a.jsonl").write_text(json.dumps(Document("1", text[:50], text)._asdict()) + "\n")
    corpus = prepare_corpus(
        [SourceConfig(str(folder / "a.jsonl"))], folder / "out", small_tokenizer(), 32, _tagger(), num_workers=1
    )
    assert "".join(corpus.text(row) for row in range(len(corpus))) == text
    return 0


def _train(case: Case, folder: Path) -> int:
    text = case.content.decode("utf-8", "replace")
    tokenizer = train_wordpiece([text, text[:1_000]], TokenizerConfig(vocab_size=300, min_frequency=1))
    tokenize(tokenizer, [text])
    return 0


@cache
def _savedsmall_tokenizer() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train_wordpiece(["a b c d e f g"], TokenizerConfig(vocab_size=100)).save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _tokenizer_case(rng: Random) -> Case:
    files = _savedsmall_tokenizer()
    name = rng.choice((*files, "vocab.txt"))
    if name == "vocab.txt":
        vocabulary = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nc\n"
        return Case(mutated_bytes(rng, vocabulary), {"file": name})
    return Case(mutated_json(rng, json.loads(files[name])), {"file": name})


def _load(case: Case, folder: Path) -> int:
    name = case.settings["file"]
    if name != "vocab.txt":
        for other, content in _savedsmall_tokenizer().items():
            (folder / other).write_bytes(content)
    (folder / name).write_bytes(case.content)
    tokenize(load_tokenizer(str(folder / name if name == "vocab.txt" else folder)), ["a b [MASK]", "x" * 10_000])
    return 0


register(Target("text-blocks", _text, _cut, share=0.2))
register(Target("text-spans", _text, _spans, share=0.5))
register(Target("text-prepare", _text, _prepare, share=0.05))
register(Target("tokenizer-train", _text, _train, share=0.05))
register(Target("tokenizer-load", _tokenizer_case, _load, share=0.1))
