"""Encoding beside sentence-transformers, and what opening an index costs in time and memory."""

import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index.admin import VersionInfo
from index.bench.timing import timed
from index.build import INDEX_FILE
from index.encode import encode_passages, encoding_tower, load_encoder
from index.search import PassageIndex
from realm.corpus.prepared import PreparedCorpus
from realm.errors import UserError
from realm.models.precision import Precision
from realm.runtime.telemetry import console, print_table

_REPEATS = 3


def bench_encoding(corpus: PreparedCorpus, encoder_folder: Path, count: int) -> list[dict[str, Any]]:
    """Passages a second: ours from prepared tokens, sentence-transformers from text, the same
    passages, weights and inputs."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(encoder_folder)
    rows = np.random.default_rng(0).choice(corpus.rows, min(count, len(corpus.rows)), replace=False)
    pairs = [(corpus.title(row), corpus.text(row)) for row in rows.tolist()]
    device = next(encoder.retriever.parameters()).device

    def ours(precision: Precision, compiled: bool = False) -> Callable[[], np.ndarray]:
        tower = encoding_tower(encoder.retriever, precision, compiled)
        return lambda: encode_passages(tower, corpus, rows, encoder.wordpieces, encoder.max_passage_tokens)

    def theirs(dtype: torch.dtype) -> Callable[[], np.ndarray]:
        model = SentenceTransformer(
            str(encoder_folder), device=device.type, model_kwargs={"torch_dtype": dtype}, local_files_only=True
        )
        return lambda: (
            model.encode_document(pairs, convert_to_tensor=True, show_progress_bar=False).float().cpu().numpy()
        )

    def compiled() -> tuple[tuple[str, Callable[[], np.ndarray]], ...]:
        try:
            return (("realm, bf16, compiled", ours("bf16", compiled=True)),)
        except UserError as error:
            console.print(f"  without compilation: {error}")
            return ()

    ways: list[tuple[str, Callable[[], np.ndarray]]] = [
        *compiled(),
        ("realm, bf16", ours("bf16")),
        ("realm, fp32", ours("fp32")),
        ("sentence-transformers, bf16", theirs(torch.bfloat16)),
        ("sentence-transformers, default (fp32)", theirs(torch.float32)),
    ]
    results: list[dict[str, Any]] = []
    for name, way in ways:
        console.print(f"  encoding: {name}")
        way()  # the first pass allocates
        seconds, embeddings_ND = min((timed(way) for _ in range(_REPEATS)), key=lambda pair: pair[0])
        results.append({"what": name, "passages/s": len(rows) / seconds, "embeddings": embeddings_ND})
    exact = next(result["embeddings"] for result in results if result["what"] == "realm, fp32")
    for result in results:
        result["speed of default"] = result["passages/s"] / results[-1]["passages/s"]
        result["1 - cosine to fp32, worst"] = float(np.max(1 - _cosine(result.pop("embeddings"), exact)))
    print_table(
        f"Encoding {len(rows):,} passages",
        ["what", "passages/s", "times the default", "worst 1 - cosine to fp32"],
        [
            [r["what"], r["passages/s"], f"{r['speed of default']:.2f}", f"{r['1 - cosine to fp32, worst']:.1e}"]
            for r in results
        ],
    )
    return results


def bench_opening(info: VersionInfo, corpus: PreparedCorpus) -> dict[str, float]:
    """Mapping alone, mapping with all checks (which a trainer does on a thread), and what a
    second process adds to memory."""
    mapped = min(
        timed(lambda: faiss.read_index(str(info.path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC))[0] for _ in range(_REPEATS)
    )
    checked = min(timed(lambda: PassageIndex.open(info.path, corpus.fingerprint))[0] for _ in range(_REPEATS))
    size = (info.path / INDEX_FILE).stat().st_size
    alone, shared = _proportional_bytes(info.path / INDEX_FILE, 1), _proportional_bytes(info.path / INDEX_FILE, 2)
    result = {
        "mapped, ms": 1000 * mapped,
        "mapped and checked, ms": 1000 * checked,
        "index, MiB": size / 2**20,
        "of it in memory (PSS), one process, MiB": alone[0] / 2**20,
        "of it in memory (PSS), each of two, MiB": statistics.mean(shared) / 2**20,
    }
    print_table("Opening", ["what", "value"], [[name, value] for name, value in result.items()])
    return result


def _proportional_bytes(path: Path, processes: int) -> list[int]:
    """Proportional set size of the mapped index file in each of some processes that have read
    all of it."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes + 1), context.Queue()
    children = [context.Process(target=_hold_and_measure, args=(str(path), barrier, results)) for _ in range(processes)]
    for child in children:
        child.start()
    barrier.wait(120)  # all have read the file
    measured = [results.get(timeout=120) for _ in children]
    barrier.wait(120)
    for child in children:
        child.join()
    return measured


def _hold_and_measure(path: str, barrier: Any, results: Any) -> None:
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    index.search(np.zeros((1, index.d), np.float32), 1)
    barrier.wait(120)
    results.put(_mapped_pss(path))
    barrier.wait(120)


def _mapped_pss(path: str) -> int:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            inside = fields[-1] == path
        elif inside and fields[0] == "Pss:":
            total += int(fields[1]) * 1024
    return total


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    return (a_ND * b_ND).sum(1) / (np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1))
