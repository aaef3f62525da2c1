"""The tiny run of the fault benchmark, and its two processes: a trainer that exports encoders and
follows the index, and a refresher that builds it."""

import json
import multiprocessing
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index import version_build
from index.live import remove_export_leftovers
from index.refresh import refresh
from index.retention import GarbageCollector, Reference, referenced_by_checkpoints
from index.search import PassageIndex
from index.watcher import IndexWatcher
from realm.corpus.prepare import prepare_corpus
from realm.corpus.prepared import PreparedCorpus
from realm.corpus.sources import SourceConfig
from realm.models.bert import BertSource
from realm.models.retriever import Retriever, RetrieverConfig, build_retriever, embed_no_grad
from realm.models.retriever_files import save_retriever
from realm.runtime.publish import TEMPORARY, published
from realm.runtime.versions import Lineage, Version, start_attempt
from realm.spans.tagger import SpanConfig, SpanTagger
from realm.text.inputs import Wordpieces, pad_batch
from realm.text.tokenizer import TokenizerConfig, train_wordpiece
from realm.training.checkpoints import checkpoint_folder, checkpoints, read_state, write_state
from realm.training.refresh_section import RefreshConfig

PHASES = {"refresher": ("encode", "build", "publish", "collect"), "trainer": ("export", "open", "swap")}
"""Phases in which each process is killed."""
PHASE_NUMBERS = {
    phase: number for number, phase in enumerate([phase for phases in PHASES.values() for phase in phases], 1)
}
CONFIG = RefreshConfig(
    shard_rows=40, token_budget=512, poll_s=0.01, keep_last=2, grace_s=0.0, lease_expiry_s=0.3, drift_passages=16
)
NUM_PASSAGES = 200
_MAX_TOKENS = 32
_STAGE = "pretrain"
_KEEP_CHECKPOINTS = 3


@dataclass
class FaultSetup:
    """A tiny run to inject faults into: corpus, untrained retriever, and the processes' phases."""

    run: Path
    records: Path
    """Folder of the files that the processes write for the benchmark; never on the full disk."""
    corpus: PreparedCorpus
    retriever: Retriever
    tokenizer: Any
    phase: dict[str, Any]
    """Number of the current phase by kind of process; shared memory."""

    @classmethod
    def build(cls, folder: Path) -> "FaultSetup":
        """Create the run and its corpus of random words in `folder`."""
        rng = random.Random(0)
        syllables = ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti")
        words = [first + second for first in syllables for second in syllables]
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 20))) + "." for _ in range(NUM_PASSAGES)]
        lines = [{"id": str(number), "title": rng.choice(words), "text": text} for number, text in enumerate(texts)]
        (folder / "passages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokenizer = train_wordpiece(texts, TokenizerConfig(vocab_size=200))
        source = SourceConfig(str(folder / "passages.jsonl"))
        corpus = prepare_corpus([source], folder / "passages", tokenizer, _MAX_TOKENS, SpanTagger.load(SpanConfig()), 1)
        bert = BertSource(layers=1, hidden=16, heads=2, intermediate=16, dropout=0.0, max_positions=_MAX_TOKENS)
        config = RetrieverConfig(bert, "mean", "none", max_query_tokens=_MAX_TOKENS, max_passage_tokens=_MAX_TOKENS)
        phase = {kind: multiprocessing.get_context("fork").Value("i", 0) for kind in PHASES}
        return cls(folder / "run", folder, corpus, build_retriever(config, tokenizer), tokenizer, phase)

    def record(self, name: str, line: object) -> None:
        """Append a line to the record `name`; short appends are atomic even if the process is
        killed."""
        with (self.records / name).open("a") as file:
            file.write(f"{line}\n")

    def recorded(self, name: str) -> list[str]:
        """The lines of the record `name`; empty if there is none."""
        path = self.records / name
        return path.read_text().splitlines() if path.exists() else []

    def expected_embeddings(self, version: Version) -> Path:
        """File with all passages' embeddings by a version's encoder, written before its export."""
        return self.records / "truth" / f"{version.encoder.name}.npy"


def export(setup: FaultSetup, version: Version) -> None:
    """Export an encoder as a trainer does; its weights are a function of the version."""
    generator = torch.Generator().manual_seed(version.attempt * 100_003 + version.step)
    with torch.no_grad():
        weight = setup.retriever.query_tower.bert.embeddings.word_embeddings.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    wordpieces, corpus = Wordpieces.from_tokenizer(setup.tokenizer), setup.corpus
    inputs = [
        wordpieces.passage(corpus.title_ids(row), corpus.text_ids(row), _MAX_TOKENS) for row in range(len(corpus))
    ]
    path = setup.expected_embeddings(version)
    path.parent.mkdir(exist_ok=True)
    np.save(path, embed_no_grad(setup.retriever.passage_tower, *pad_batch(inputs, wordpieces.pad)))
    with published(setup.run / "encoders" / version.name) as folder:
        save_retriever(setup.retriever, setup.tokenizer, folder, _MAX_TOKENS, _MAX_TOKENS)


def _with_phase(
    setup: FaultSetup, kind: str, phase: str, call: Callable[..., Any], pause_s: float = 0.005
) -> Callable[..., Any]:
    """Wrap `call` to report its phase to the supervisor, and pause so that a kill can hit it."""

    def call_in_phase(*arguments: Any, **options: Any) -> Any:
        setup.phase[kind].value = PHASE_NUMBERS[phase]
        time.sleep(pause_s)
        try:
            return call(*arguments, **options)
        finally:
            setup.phase[kind].value = 0

    return call_in_phase


def run_refresher(setup: FaultSetup, config: RefreshConfig = CONFIG, once: bool = False) -> None:
    """Run a refresher that reports its phases and records each shard that it starts, and each
    version before it is published."""
    encode_in_shards, write_version = version_build.encode_in_shards, version_build.write_version

    def encode_in_shards_recorded(
        work: Path, rows: range, shard_rows: int, plan: Any, encode: Any, before_round: Any, workers: Any
    ) -> Any:
        def encode_recorded(part: np.ndarray) -> np.ndarray:
            setup.record("shards", f"{work.name}/{part[0]}")
            return encode(part)

        return encode_in_shards(
            work,
            rows,
            shard_rows,
            plan,
            _with_phase(setup, "refresher", "encode", encode_recorded),
            before_round,
            workers,
        )

    def write_version_recorded(indexes: Path, version: Version, *arguments: Any) -> Path:
        setup.record("shards", f"{version.encoder.name}/published")
        return write_version(indexes, version, *arguments)

    # Patched in this process only: the tested program is the one that is shipped.
    version_build.encode_in_shards = encode_in_shards_recorded  # type: ignore[assignment]
    version_build.build_index = _with_phase(setup, "refresher", "build", version_build.build_index)
    version_build.write_version = _with_phase(setup, "refresher", "publish", write_version_recorded)
    GarbageCollector.collect = _with_phase(setup, "refresher", "collect", GarbageCollector.collect, 0.001)  # type: ignore[method-assign]
    try:
        refresh(setup.run, config, setup.corpus, once=once, log=lambda line: setup.record("log", line))
    except BaseException as error:
        setup.record("ended", f"{type(error).__name__}: {error}")
        raise


def run_trainer(setup: FaultSetup, seed: int) -> None:
    """Resume from a recent checkpoint, keep exporting and writing checkpoints, and check every
    index that the watcher opens."""
    remove_export_leftovers(setup.run)
    reference, attempt = _resume(setup, random.Random(seed))
    step = 0 if reference is None else reference.step
    export_in_phase = _with_phase(setup, "trainer", "export", export)
    IndexWatcher._open = _with_phase(setup, "trainer", "open", IndexWatcher._open)  # type: ignore[method-assign]
    current: PassageIndex | None = None
    with IndexWatcher(
        setup.run, attempt, setup.corpus.fingerprint, poll_s=0.01, log=lambda line: setup.record("watcher", line)
    ) as watcher:
        while True:
            step += 1
            export_in_phase(setup, Version(attempt, step))
            for _ in range(20):
                taken = watcher.take()
                if taken is not None:
                    setup.phase["trainer"].value = PHASE_NUMBERS["swap"]
                    check_served(setup, taken, attempt, reference)
                    if current is not None:
                        current.close()
                    current = taken
                    setup.phase["trainer"].value = 0
                time.sleep(0.01)
            if current is not None:
                _write_checkpoint(setup.run, attempt, step, current.version)


def _resume(setup: FaultSetup, rng: random.Random) -> tuple[Reference | None, int]:
    """Start the attempt that continues one of the newest checkpoints, without those after it, which
    abandons newer exports; returns what the checkpoint references, and the attempt's number."""
    stage = setup.run / _STAGE
    kept = checkpoints(stage)
    if not kept:
        return None, start_attempt(setup.run)
    chosen = rng.choice(kept)
    for newer in kept[kept.index(chosen) + 1 :]:
        _remove_checkpoint(newer)
    state = read_state(chosen)
    (reference,) = (found for found in referenced_by_checkpoints(setup.run) if found.step == state["step"])
    return reference, start_attempt(setup.run, state["attempt"], state["step"])


def _write_checkpoint(run: Path, attempt: int, step: int, index: Version) -> None:
    """Write the part of a checkpoint that concerns the index, and remove old checkpoints."""
    with published(checkpoint_folder(run / _STAGE, step)) as folder:
        write_state(folder, {"attempt": attempt, "step": step})
        (folder / "index_version").write_text(index.name + "\n")
    for old in checkpoints(run / _STAGE)[:-_KEEP_CHECKPOINTS]:
        _remove_checkpoint(old)


def _remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint as a whole: the next trainer reads those that it finds."""
    aside = folder.with_name(f"{TEMPORARY}{folder.name}-{uuid.uuid4().hex}")
    folder.rename(aside)
    shutil.rmtree(aside)


def check_served(setup: FaultSetup, index: PassageIndex, attempt: int, reference: Reference | None) -> None:
    """Record a violation unless a served index contains its encoder's embeddings, belongs to the
    lineage of `attempt`, and is not older than the index of the checkpoint that it resumed from."""
    expected = np.load(setup.expected_embeddings(index.version))
    found = index.embeddings(np.arange(len(expected)))
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-5):
        setup.record("violations", f"{index.version} was served with embeddings that differ from its encoder's")
    if not Lineage.load(setup.run).allows(index.version, attempt):
        setup.record("violations", f"{index.version} was served to attempt {attempt}, which abandoned it")
    if reference is not None and index.step < reference.index.step:
        setup.record("violations", f"{index.version} was served after a checkpoint that used {reference.index}")
    setup.record("served", index.version)


def run_silently(target: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Run `target` in a child process without output: a kill would leave partial progress lines."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    target(*arguments, **options)
