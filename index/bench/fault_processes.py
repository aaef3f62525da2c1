"""The tiny run that faults are tried on, and its two processes: a trainer that exports and
follows, a refresher that builds."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import index.version_build as cycle
from index.live import remove_export_leftovers
from index.refresh import refresh
from index.retention import GarbageCollector
from index.search import IndexWatcher, PassageIndex
from realm.corpus.prepare import prepare_corpus
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.models.bert import BertSource
from realm.models.retriever import Retriever, RetrieverConfig, build_retriever, embed_no_grad
from realm.models.retriever_files import save_retriever
from realm.runtime.publish import published
from realm.runtime.versions import Lineage, Version, newest, start_attempt
from realm.spans.tagger import SpanConfig, SpanTagger
from realm.text.inputs import Wordpieces, pad_batch
from realm.text.tokenizer import TokenizerConfig, train_wordpiece
from realm.training.sections import RefreshConfig

PHASES = {"refresher": ("encode", "build", "publish", "collect"), "trainer": ("export", "open", "swap")}
"""Moments at which each process is killed."""
PHASE_NUMBERS = {
    phase: number for number, phase in enumerate([phase for phases in PHASES.values() for phase in phases], 1)
}
CONFIG = RefreshConfig(
    shard_rows=40, token_budget=512, poll_s=0.01, keep_last=2, grace_s=0.0, lease_expiry_s=0.3, drift_passages=16
)
PASSAGES = 200
_LONGEST = 32


@dataclass
class Scene:
    """A tiny run: corpus, untrained retriever, and the phase each process is in."""

    run: Path
    notes: Path
    """Folder of what the processes tell; never on the disk that runs full."""
    corpus: PreparedCorpus
    retriever: Retriever
    tokenizer: Any
    phase: dict[str, Any]
    """Shared with the processes: number of the phase, by kind of process."""

    @classmethod
    def build(cls, folder: Path) -> "Scene":
        rng = random.Random(0)
        syllables = ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti")
        words = [first + second for first in syllables for second in syllables]
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 20))) + "." for _ in range(PASSAGES)]
        lines = [{"id": str(number), "title": rng.choice(words), "text": text} for number, text in enumerate(texts)]
        (folder / "passages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokenizer = train_wordpiece(texts, TokenizerConfig(vocab_size=200))
        source = SourceConfig(str(folder / "passages.jsonl"))
        corpus = prepare_corpus([source], folder / "passages", tokenizer, _LONGEST, SpanTagger.load(SpanConfig()), 1)
        bert = BertSource(layers=1, hidden=16, heads=2, intermediate=16, dropout=0.0, max_positions=_LONGEST)
        config = RetrieverConfig(bert, "mean", "none", max_query_tokens=_LONGEST, max_passage_tokens=_LONGEST)
        phase = {kind: multiprocessing.get_context("fork").Value("i", 0) for kind in PHASES}
        return cls(folder / "run", folder, corpus, build_retriever(config, tokenizer), tokenizer, phase)

    def note(self, name: str, line: object) -> None:
        """Append a line to a file of the scene; short appends are whole whatever kills the writer."""
        with (self.notes / name).open("a") as file:
            file.write(f"{line}\n")

    def noted(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    def truth(self, version: Version) -> Path:
        """Embeddings of every passage by the encoder of a version, written before it is exported."""
        return self.notes / "truth" / f"{version.encoder.name}.npy"


def export(scene: Scene, version: Version) -> None:
    """What a trainer does at an export; the weights are a function of the version."""
    generator = torch.Generator().manual_seed(version.attempt * 100_003 + version.step)
    with torch.no_grad():
        weight = scene.retriever.query_tower.bert.embeddings.word_embeddings.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    words, corpus = Wordpieces.of(scene.tokenizer), scene.corpus
    inputs = [words.passage(corpus.title_ids(row), corpus.text_ids(row), _LONGEST) for row in range(len(corpus))]
    truth = scene.truth(version)
    truth.parent.mkdir(exist_ok=True)
    np.save(truth, embed_no_grad(scene.retriever.passage_tower, *pad_batch(inputs, words.pad)))
    with published(scene.run / "encoders" / version.name) as folder:
        save_retriever(scene.retriever, scene.tokenizer, folder, _LONGEST, _LONGEST)


def _marked(
    scene: Scene, kind: str, phase: str, call: Callable[..., Any], pause_s: float = 0.005
) -> Callable[..., Any]:
    """`call`, with the phase told to whoever waits to kill, and long enough to be hit."""

    def marked(*arguments: Any, **options: Any) -> Any:
        scene.phase[kind].value = PHASE_NUMBERS[phase]
        time.sleep(pause_s)
        try:
            return call(*arguments, **options)
        finally:
            scene.phase[kind].value = 0

    return marked


def run_refresher(scene: Scene, config: RefreshConfig = CONFIG, once: bool = False) -> None:
    """A refresher whose phases can be seen; it notes each shard it begins."""
    encode_in_shards = cycle.encode_in_shards

    def noting(
        work: Path, rows: range, shard_rows: int, plan: Any, encode: Any, before_shard: Any, workers: Any
    ) -> Any:
        def encode_noted(part: np.ndarray) -> np.ndarray:
            scene.note("shards", f"{work.name}/{part[0]}")
            return encode(part)

        return encode_in_shards(
            work, rows, shard_rows, plan, _marked(scene, "refresher", "encode", encode_noted), before_shard, workers
        )

    # In this process alone: the program that is tested is the one that ships.
    cycle.encode_in_shards = noting  # type: ignore[assignment]
    cycle.build_index = _marked(scene, "refresher", "build", cycle.build_index)
    cycle.write_version = _marked(scene, "refresher", "publish", cycle.write_version)
    GarbageCollector.collect = _marked(scene, "refresher", "collect", GarbageCollector.collect, 0.001)  # type: ignore[method-assign]
    try:
        refresh(scene.run, config, scene.corpus, once=once, log=lambda line: scene.note("log", line))
    except BaseException as error:
        scene.note("ended", f"{type(error).__name__}: {error}")
        raise


def run_trainer(scene: Scene, seed: int) -> None:
    """Resume from a recent export, export further, and check every index that the watcher serves."""
    rng = random.Random(seed)
    remove_export_leftovers(scene.run)
    lineage = Lineage.load(scene.run)
    exported = [] if lineage.current is None else newest(scene.run / "encoders", lineage, lineage.current)
    step, parent = 0, lineage.current
    if exported and parent is not None:
        step = rng.choice(exported[:3]).step  # going back behind the newest abandons a future
    attempt = start_attempt(scene.run, parent if exported else None, step if exported else None)
    export_marked = _marked(scene, "trainer", "export", export)
    IndexWatcher._open = _marked(scene, "trainer", "open", IndexWatcher._open)  # type: ignore[method-assign]
    held: PassageIndex | None = None
    with IndexWatcher(
        scene.run, attempt, scene.corpus.fingerprint, poll_s=0.01, log=lambda line: scene.note("watcher", line)
    ) as watcher:
        while True:
            step += 1
            export_marked(scene, Version(attempt, step))
            for _ in range(20):
                taken = watcher.take()
                if taken is not None:
                    scene.phase["trainer"].value = PHASE_NUMBERS["swap"]
                    check_served(scene, taken, attempt)
                    if held is not None:
                        held.close()
                    held = taken
                    scene.phase["trainer"].value = 0
                time.sleep(0.01)


def check_served(scene: Scene, index: PassageIndex, attempt: int) -> None:
    """An index that is served holds what its encoder gives, and is not of an abandoned future."""
    truth = np.load(scene.truth(index.version))
    found = index.embeddings(np.arange(len(truth)))
    if not np.allclose(found, truth, rtol=1e-4, atol=1e-5):
        scene.note("violations", f"{index.version} was served with other embeddings than its encoder gives")
    if not Lineage.load(scene.run).allows(index.version, attempt):
        scene.note("violations", f"{index.version} was served to attempt {attempt}, which abandoned it")
    scene.note("served", index.version)


def silently(target: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """In a child: its progress would be torn by the kill."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    target(*arguments, **options)
