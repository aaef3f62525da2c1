"""Config section of fused retrieval: BM25 in addition to the inner products."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import Stemmer

from realm.runtime.section import Section
from realm.text.terms import TERMS_VERSION


@dataclass(frozen=True)
class FusionConfig(Section):
    """Fused retrieval: passages are found by the retriever and by BM25 over title and text.

    BM25 is part of each index version, and of every retrieval: for candidates in pretraining, in
    finetuning, evaluation and `realm ask`.
    """

    method: Literal["none", "weighted", "ranks"] = "none"
    """How both are combined. none: the retriever alone. weighted: the inner product plus `weight`
    times the BM25 score divided by the query's largest one; also added to the retrieval score in
    p(z|x). ranks: reciprocal rank fusion (Cormack et al. 2009) chooses the passages, and p(z|x)
    uses the inner product alone."""
    weight: float | None = None
    """Weight of BM25 in units of the inner product, for `weighted`; default: tuned for each
    retriever on the held-out questions, or 0.5 with too few of them."""
    k1: float = 1.5
    """BM25: how slowly repetitions of a term saturate."""
    b: float = 0.75
    """BM25: normalization by length, between 0 (none) and 1."""
    prefix: int = 4
    """BM25: the first so many characters of a longer word are a term in addition to the word, so
    that forms of a word match in any language; 0: words only."""
    stemmer: str | None = None
    """BM25: language of a Snowball stemmer, whose stems replace the words of passages and queries;
    null: no stemming."""
    rank_constant: int = 60
    """Constant added to the ranks, for `ranks`."""

    @property
    def lexical(self) -> dict[str, Any]:
        """The BM25 that indexes must contain; empty if retrieval is not fused."""
        return {} if self.method == "none" else self.bm25

    @property
    def bm25(self) -> dict[str, Any]:
        """Everything that determines BM25 of a corpus."""
        return {"k1": self.k1, "b": self.b, "prefix": self.prefix, "stemmer": self.stemmer, "terms": TERMS_VERSION}

    @property
    def tunes_weight(self) -> bool:
        """Whether the weight is that tuned for the retriever."""
        return self.method == "weighted" and self.weight is None

    def problems(self) -> Iterator[str]:
        yield from self.at_least(0, "weight", "k1", "prefix", "rank_constant")
        yield from self.at_most(1_000_000, "weight", "k1")
        yield from self.probabilities("b")
        languages = Stemmer.algorithms()
        if self.stemmer is not None and self.stemmer not in languages:
            yield f"stemmer must be null or one of {', '.join(languages)}, got {self.stemmer!r}"
