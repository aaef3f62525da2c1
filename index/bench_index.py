"""`realm bench index`: encoding, searching and opening, each beside what it is measured against, in one run on a run's own index.

Shape legend: N passages, Q queries, K results a query, D dimension of the embeddings.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from index.build import INDEX_FILE, build_index, index_bytes, set_search_parameters
from index.encode import encode_passages, load_encoder
from index.manage import Entry, entries
from index.search import PassageIndex
from realm.corpus import PreparedCorpus
from realm.errors import UserError
from realm.inputs import pad_batch, query_input
from realm.retriever import embed_plain
from realm.run import Run
from realm.telemetry import console, peak_memory, print_table

RECALL_AT = 8
WANTED_RECALL = 0.99
_QUERY_WORDPIECES = 32
_REPEATS = 3


def bench_index(
    run: Run, passages: int, queries: int, scale: int, synthetic: str | None, json_file: Path | None, picture: Path | None
) -> dict[str, Any]:
    """Measure and print tables; the figures also go to `json_file`, the recall/speed curves to `picture`.

    `passages`: to encode; `queries`: to search; `scale`: rows that the embeddings are repeated to, with jitter; `synthetic`: `NxD` random
    vectors to build and search an index of. Raises UserError where the run has no index, or its encoder is gone.
    """
    usable = [entry for entry in entries(run.folder) if entry.manifest is not None and entry.manifest.corpus == run.passages.fingerprint]
    usable = [entry for entry in usable if (entry.store / "encoders" / entry.version.encoder.name).is_dir()]
    if not usable:
        raise UserError(f"run {run.folder} has no index of its corpus whose encoder is still there; train it, or let a refresher build one.")
    entry = usable[-1]
    index = PassageIndex.open(entry.path, run.passages.fingerprint)
    console.print(f"index {entry.path}, {len(index):,} passages, {torch.get_num_threads()} threads")
    figures: dict[str, Any] = {"index": entry.version.name, "passages": len(index), "threads": torch.get_num_threads()}
    figures["encoding"] = bench_encoding(run.passages, entry.store / "encoders" / entry.version.encoder.name, passages)
    figures["opening"] = bench_opening(entry, run.passages)
    real_ND = index.embeddings(np.arange(len(index)))
    query_emb_QD = sample_queries(run.passages, entry, queries)
    curves = {}
    for count in sorted({len(real_ND), max(scale, len(real_ND))}):
        embeddings_ND = real_ND if count == len(real_ND) else jittered(real_ND, count)
        curves[count] = bench_search(embeddings_ND, query_emb_QD)
    figures["search"] = {str(count): rows for count, rows in curves.items()}
    if synthetic is not None:
        figures["synthetic"] = bench_synthetic(synthetic)
    if picture is not None:
        draw(curves, picture)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def bench_encoding(corpus: PreparedCorpus, encoder_folder: Path, count: int) -> list[dict[str, Any]]:
    """Passages a second: ours from prepared tokens, sentence-transformers from text, the same passages, weights and inputs."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(encoder_folder)
    rows = np.random.default_rng(0).choice(corpus.rows, min(count, len(corpus.rows)), replace=False)
    pairs = [(corpus.title(row), corpus.text(row)) for row in rows.tolist()]
    device = next(encoder.retriever.parameters()).device

    def ours(precision: torch.dtype | None) -> np.ndarray:
        return encode_passages(encoder.retriever, corpus, rows, encoder.wordpieces, encoder.max_passage_tokens, 4096, precision)

    def theirs(dtype: torch.dtype) -> Callable[[], np.ndarray]:
        model = SentenceTransformer(str(encoder_folder), device=device.type, model_kwargs={"torch_dtype": dtype}, local_files_only=True)
        return lambda: model.encode_document(pairs, convert_to_tensor=True, show_progress_bar=False).float().cpu().numpy()

    ways: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("realm, bf16", lambda: ours(torch.bfloat16)),
        ("realm, fp32", lambda: ours(None)),
        ("sentence-transformers, bf16", theirs(torch.bfloat16)),
        ("sentence-transformers, default (fp32)", theirs(torch.float32)),
    ]
    results = []
    for name, way in ways:
        console.print(f"  encoding: {name}")
        way()  # the first pass allocates
        seconds, embeddings_ND = min((_timed(way) for _ in range(_REPEATS)), key=lambda pair: pair[0])
        results.append({"what": name, "passages/s": len(rows) / seconds, "embeddings": embeddings_ND})
    exact = next(result["embeddings"] for result in results if result["what"] == "realm, fp32")
    for result in results:
        result["speed of default"] = result["passages/s"] / results[-1]["passages/s"]
        result["1 - cosine to fp32, worst"] = float(np.max(1 - _cosine(result.pop("embeddings"), exact)))
    print_table(
        f"Encoding {len(rows):,} passages",
        ["what", "passages/s", "times the default", "worst 1 - cosine to fp32"],
        [[r["what"], r["passages/s"], f"{r['speed of default']:.2f}", f"{r['1 - cosine to fp32, worst']:.1e}"] for r in results],
    )
    return results


def bench_opening(entry: Entry, corpus: PreparedCorpus) -> dict[str, float]:
    """Mapping alone, mapping with all checks (which a trainer does on a thread), and what a second process adds to memory."""
    mapped = min(_timed(lambda: faiss.read_index(str(entry.path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC))[0] for _ in range(_REPEATS))
    checked = min(_timed(lambda: PassageIndex.open(entry.path, corpus.fingerprint))[0] for _ in range(_REPEATS))
    size = (entry.path / INDEX_FILE).stat().st_size
    alone, shared = _proportional_bytes(entry.path / INDEX_FILE, 1), _proportional_bytes(entry.path / INDEX_FILE, 2)
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
    """Proportional set size of the mapped index file in each of some processes that have read all of it."""
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


def sample_queries(corpus: PreparedCorpus, entry: Entry, count: int) -> np.ndarray:
    """The first words of some passages, by the query tower of the index's encoder, (Q, D)."""
    encoder = load_encoder(entry.store / "encoders" / entry.version.encoder.name)
    rows = np.random.default_rng(1).choice(corpus.rows, min(count, len(corpus.rows)), replace=False).tolist()
    words = encoder.wordpieces
    inputs = [query_input(corpus.text_ids(row), words.cls, words.sep, _QUERY_WORDPIECES) for row in rows]
    parts = [embed_plain(encoder.retriever.query_tower, *pad_batch(inputs[at : at + 64], words.pad)) for at in range(0, len(inputs), 64)]
    return np.concatenate(parts)


def jittered(real_ND: np.ndarray, count: int) -> np.ndarray:
    """Embeddings repeated to `count` rows, each copy moved as far as neighbours lie apart.

    The distance is measured: the median over a sample of that between a passage and its nearest neighbour.
    """
    rng = np.random.default_rng(2)
    sample = real_ND[rng.choice(len(real_ND), min(1000, len(real_ND)), replace=False)]
    flat = faiss.IndexFlatL2(real_ND.shape[1])
    flat.add(real_ND)
    distance = float(np.median(np.sqrt(np.maximum(flat.search(sample, 2)[0][:, 1], 0))))
    console.print(f"  {count:,} rows: copies moved by {distance:.3f}, the median distance of nearest neighbours")
    parts = [real_ND]
    length_N1 = np.linalg.norm(real_ND, axis=1, keepdims=True)
    for start in range(len(real_ND), count, len(real_ND)):
        step_ND = rng.standard_normal(real_ND.shape, dtype=np.float32)
        moved_ND = real_ND + distance * step_ND / np.linalg.norm(step_ND, axis=1, keepdims=True)
        moved_ND *= length_N1 / np.linalg.norm(moved_ND, axis=1, keepdims=True)
        parts.append(moved_ND[: count - start])
    return np.concatenate(parts)


def settings_for(count: int) -> list[tuple[str, list[str]]]:
    """Factory strings worth trying for `count` rows, with search parameters from fast to exact."""
    lists = 2 ** int(min(round(np.log2(4 * np.sqrt(count))), max(0, np.log2(count / 39))))  # FAISS asks for 39 vectors a centroid
    probes = [f"nprobe={n}" for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= lists]
    return [
        (f"IVF{lists},Flat", probes),
        (f"IVF{lists},SQ8", probes),
        (f"IVF{lists},PQ96x4fs,RFlat", [f"{probe},k_factor_rf={k}" for probe in probes for k in (4, 16)]),
        ("HNSW32", [f"efSearch={ef}" for ef in (16, 32, 64, 128, 256, 512)]),
        ("SQ8", [""]),
    ]


def bench_search(
    embeddings_ND: np.ndarray, query_emb_QD: np.ndarray, settings: Sequence[tuple[str, list[str]]] | None = None
) -> list[dict[str, Any]]:
    """Recall@8 against exact search, and queries a second, of every setting; exact search first."""
    count, dim = embeddings_ND.shape
    flat = build_index(embeddings_ND)
    seconds, exact_QK = _search(flat, query_emb_QD)
    results: list[dict[str, Any]] = [_result("Flat", "", 1.0, len(query_emb_QD) / seconds, 0.0, embeddings_ND.nbytes)]
    del flat
    for factory, grid in settings or settings_for(count):
        if "PQ96" in factory and dim % 96:
            continue
        console.print(f"  {count:,} rows: {factory}")
        build_seconds, index = _timed(lambda factory=factory: build_index(embeddings_ND, factory))  # type: ignore[misc]
        size = index_bytes(index)
        for parameters in grid:
            set_search_parameters(index, parameters)
            seconds, found_QK = _search(index, query_emb_QD)
            recall = float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found_QK.tolist(), exact_QK.tolist(), strict=True)]))
            results.append(_result(factory, parameters, recall, len(query_emb_QD) / seconds, build_seconds, size))
        del index
    exact = results[0]["queries/s"]
    for result in results:
        result["times exact"] = result["queries/s"] / exact
    good = [result for result in results if result["recall@8"] >= WANTED_RECALL]
    best = max(good, key=lambda result: result["queries/s"])
    best["best"] = True
    shown = [results[0], *_fastest_per_factory(results)]
    print_table(
        f"Searching {count:,} x {dim}, {len(query_emb_QD)} queries at a time; of each factory the fastest with recall@8 of {WANTED_RECALL} or more",
        ["factory", "parameters", "recall@8", "queries/s", "times exact", "build, s", "MiB"],
        [[r["factory"], r["parameters"] or None, f"{r['recall@8']:.4f}", r["queries/s"], r["times exact"], r["build, s"], r["MiB"]] for r in shown],
    )
    console.print(f"  best: {best['factory']} {best['parameters']}: {best['times exact']:.1f} times exact at recall@8 {best['recall@8']:.4f}")
    return results


def _fastest_per_factory(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = []
    for factory in dict.fromkeys(result["factory"] for result in results[1:]):
        mine = [result for result in results if result["factory"] == factory]
        good = [result for result in mine if result["recall@8"] >= WANTED_RECALL]
        chosen.append(max(good, key=lambda r: r["queries/s"]) if good else max(mine, key=lambda r: r["recall@8"]))
    return chosen


def _result(factory: str, parameters: str, recall: float, speed: float, build_seconds: float, size: int) -> dict[str, Any]:
    return {
        "factory": factory,
        "parameters": parameters,
        "recall@8": recall,
        "queries/s": speed,
        "build, s": build_seconds,
        "MiB": size / 2**20,
    }


def _search(index: faiss.Index, query_emb_QD: np.ndarray) -> tuple[float, np.ndarray]:
    """Best time of some, and the rows found, (Q, K)."""
    timed = [_timed(lambda: index.search(query_emb_QD, RECALL_AT)[1]) for _ in range(_REPEATS)]
    return min(seconds for seconds, _ in timed), timed[0][1]


def bench_synthetic(shape: str) -> dict[str, Any]:
    """Build an index of random unit vectors shard by shard from disk, write it, map it, search it; peak memory with it."""
    try:
        count, dim = map(int, shape.lower().split("x"))
    except ValueError as error:
        raise UserError(f"--synthetic {shape!r} is no NxD, such as 10000000x128") from error
    shard_rows, rng = 500_000, np.random.default_rng(3)
    factory = f"IVF{2 ** round(np.log2(4 * np.sqrt(count)))},SQ8"
    with tempfile.TemporaryDirectory(prefix="realm-synthetic-", dir=os.environ.get("TMPDIR")) as folder:
        shards = []
        for number, start in enumerate(range(0, count, shard_rows)):
            vectors = rng.standard_normal((min(shard_rows, count - start), dim), dtype=np.float32)
            np.save(Path(folder) / f"{number}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
            shards.append(np.load(Path(folder) / f"{number}.npy", mmap_mode="r"))
        console.print(f"  {shape}: {factory}")
        build_seconds, index = _timed(lambda: build_index(shards, factory, parameters="nprobe=64"))
        began = time.perf_counter()
        faiss.write_index(index, f"{folder}/index")
        write_seconds = time.perf_counter() - began
        del index
        mapped = faiss.read_index(f"{folder}/index", faiss.IO_FLAG_MMAP_IFC)
        set_search_parameters(mapped, "nprobe=64")
        queries = np.ascontiguousarray(shards[0][:64])
        search_seconds, found = _search(mapped, queries)
        result = {
            "factory": factory,
            "build, s": build_seconds,
            "write, s": write_seconds,
            "queries/s": len(queries) / search_seconds,
            "own row found first, %": 100.0 * float((found[:, 0] == np.arange(64)).mean()),
            "GiB on disk": os.path.getsize(f"{folder}/index") / 2**30,
            **peak_memory(),
        }
    print_table(f"{count:,} x {dim} random vectors", ["what", "value"], [[name, value] for name, value in result.items()])
    return result


def draw(curves: dict[int, list[dict[str, Any]]], picture: Path) -> None:
    """Recall against queries a second, a panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(7 * len(curves), 5), constrained_layout=True, squeeze=False)
    for panel, (count, results) in zip(panels[0], curves.items(), strict=True):
        for factory in dict.fromkeys(result["factory"] for result in results):
            mine = sorted((result["recall@8"], result["queries/s"]) for result in results if result["factory"] == factory)
            panel.plot([recall for recall, _ in mine], [speed for _, speed in mine], marker="o", markersize=4, label=factory)
        panel.axvline(WANTED_RECALL, color="grey", linewidth=0.5)
        panel.set(title=f"{count:,} passages", xlabel="recall@8 of exact search", ylabel="queries a second", yscale="log", xlim=(0.5, 1.01))
        panel.legend(fontsize=8)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    return (a_ND * b_ND).sum(1) / (np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
