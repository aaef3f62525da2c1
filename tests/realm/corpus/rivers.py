"""Test documents about rivers, a tokenizer, and a function to prepare them.

A separate module, because other processes import it.
"""

import json

from realm.corpus.prepare import prepare_corpus
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.text.tokenizer import TokenizerConfig, train_wordpiece
from tests.realm.corpus.stub_tagger import PLACES, StubTagger


def make_documents(num_documents):
    documents = []
    for i in range(num_documents):
        sentences = [
            f"The river {PLACES[(i + j) % 5]} has {i * 7 + j} bridges near Mt. Foo, e.g. number {j}."
            for j in range(1 + i % 4)
        ]
        documents.append(
            {"id": f"doc{i}", "title": f"River {i}", "text": "  ".join(sentences) + " [MASK]" * (i % 3 == 0)}
        )
    return documents


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def river_tokenizer():
    texts = [document["text"] for document in make_documents(50)] + [
        "the cat sat 한국어 naïve Ünder Zürich 東京 [MASK] ( ) \" ' ! ? ,"
    ]
    return train_wordpiece(texts, TokenizerConfig(vocab_size=300))


def all_texts(corpus: PreparedCorpus) -> list[str]:
    return [corpus.text(row) for row in range(len(corpus))]


def prepare(tmp_path, tokenizer, documents=None, out="out", name="corpus.jsonl", **changes):
    source = tmp_path / name
    if documents is not None:
        write_jsonl(source, documents)
    options = {"block_tokens": 48, "tagger": StubTagger(), "num_workers": 1} | changes
    return prepare_corpus([SourceConfig(str(source))], tmp_path / out, tokenizer, **options)


FILES = ("blocks.arrow", "manifest.json")


def file_contents(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return [(folder / name).read_bytes() for name in FILES]
