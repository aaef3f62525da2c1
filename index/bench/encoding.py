"""Benchmark encoding against sentence-transformers, and the time and memory of opening an index."""

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
    """Measure passages per second of this encoder (from prepared tokens) and of
    sentence-transformers (from text), with the same passages, weights and inputs."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(encoder_folder)
    rows = np.random.default_rng(0).choice(corpus.rows, min(count, len(corpus.rows)), replace=False)
    pairs = [(corpus.title(row), corpus.text(row)) for row in rows.tolist()]
    device = next(encoder.retriever.parameters()).device

    def realm_encoder(precision: Precision, compiled: bool = False) -> Callable[[], np.ndarray]:
        tower = encoding_tower(encoder.retriever, precision, compiled)
        return lambda: encode_passages(tower, corpus, rows, encoder.wordpieces, encoder.max_passage_tokens)

    def sentence_transformers_encoder(dtype: torch.dtype) -> Callable[[], np.ndarray]:
        model = SentenceTransformer(
            str(encoder_folder), device=device.type, model_kwargs={"torch_dtype": dtype}, local_files_only=True
        )
        return lambda: (
            model.encode_document(pairs, convert_to_tensor=True, show_progress_bar=False).float().cpu().numpy()
        )

    def compiled() -> tuple[tuple[str, Callable[[], np.ndarray]], ...]:
        try:
            return (("realm, bf16, compiled", realm_encoder("bf16", compiled=True)),)
        except UserError as error:
            console.print(f"  skipping the compiled encoder: {error}")
            return ()

    methods: list[tuple[str, Callable[[], np.ndarray]]] = [
        *compiled(),
        ("realm, bf16", realm_encoder("bf16")),
        ("realm, fp32", realm_encoder("fp32")),
        ("sentence-transformers, bf16", sentence_transformers_encoder(torch.bfloat16)),
        ("sentence-transformers, default (fp32)", sentence_transformers_encoder(torch.float32)),
    ]
    results: list[dict[str, Any]] = []
    for name, encode in methods:
        console.print(f"  encoding: {name}")
        encode()  # warm-up
        seconds, embeddings_ND = min((timed(encode) for _ in range(_REPEATS)), key=lambda pair: pair[0])
        results.append({"what": name, "passages/s": len(rows) / seconds, "embeddings": embeddings_ND})
    exact = next(result["embeddings"] for result in results if result["what"] == "realm, fp32")
    for result in results:
        result["speed of default"] = result["passages/s"] / results[-1]["passages/s"]
        result["1 - cosine to fp32, worst"] = float(np.max(1 - _cosine(result.pop("embeddings"), exact)))
    print_table(
        f"Encoding {len(rows):,} passages",
        ["encoder", "passages/s", "speed-up over default", "max. 1 - cosine to fp32"],
        [
            [r["what"], r["passages/s"], f"{r['speed of default']:.2f}", f"{r['1 - cosine to fp32, worst']:.1e}"]
            for r in results
        ],
    )
    return results


def bench_opening(info: VersionInfo, corpus: PreparedCorpus) -> dict[str, float]:
    """Measure mapping an index with and without verification (which a trainer runs on a thread),
    and its memory use with one and two processes."""
    mapped = min(
        timed(lambda: faiss.read_index(str(info.path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC))[0] for _ in range(_REPEATS)
    )
    verified = min(timed(lambda: PassageIndex.open(info.path, corpus.fingerprint))[0] for _ in range(_REPEATS))
    size = (info.path / INDEX_FILE).stat().st_size
    alone, shared = _proportional_bytes(info.path / INDEX_FILE, 1), _proportional_bytes(info.path / INDEX_FILE, 2)
    result = {
        "mapped, ms": 1000 * mapped,
        "mapped and checked, ms": 1000 * verified,
        "index, MiB": size / 2**20,
        "of it in memory (PSS), one process, MiB": alone[0] / 2**20,
        "of it in memory (PSS), each of two, MiB": statistics.mean(shared) / 2**20,
    }
    print_table("Opening an index", ["measurement", "value"], [[name, value] for name, value in result.items()])
    return result


def _proportional_bytes(path: Path, num_processes: int) -> list[int]:
    """Proportional set size (PSS) of the mapped file in each process, after all have read it."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes + 1), context.Queue()
    children = [
        context.Process(target=_map_and_measure, args=(str(path), barrier, results)) for _ in range(num_processes)
    ]
    for child in children:
        child.start()
    barrier.wait(120)  # all processes have read the file
    measured = [results.get(timeout=120) for _ in children]
    barrier.wait(120)
    for child in children:
        child.join()
    return measured


def _map_and_measure(path: str, barrier: Any, results: Any) -> None:
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    index.search(np.zeros((1, index.d), np.float32), 1)
    barrier.wait(120)
    results.put(_mapped_pss(path))
    barrier.wait(120)


def _mapped_pss(path: str) -> int:
    """PSS of this process's mappings of a file in bytes."""
    total, in_mapping = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            in_mapping = fields[-1] == path
        elif in_mapping and fields[0] == "Pss:":
            total += int(fields[1]) * 1024
    return total


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    return (a_ND * b_ND).sum(1) / (np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1))
