"""`realm bench index`: benchmark encoding, opening and searching on a run's own index.

Shape legend: N passages, Q queries, D embedding dimension.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index.admin import list_versions
from index.bench.encoding import bench_encoding, bench_opening
from index.bench.searching import bench_search, bench_synthetic, jittered_copies, plot_recall, sample_queries
from index.search import PassageIndex
from realm.errors import UserError
from realm.run.folder import Run
from realm.runtime.telemetry import console


def bench_index(
    run: Run,
    passages: int,
    queries: int,
    scale: int,
    synthetic: tuple[int, int] | None,
    json_file: Path | None,
    picture: Path | None,
) -> dict[str, Any]:
    """Run the benchmarks and print tables; writes the figures to `json_file` and the recall/speed
    curves to `picture`.

    `passages`: number to encode. `queries`: number to search. `scale`: rows of the jittered copies.
    `synthetic`: number and dimension of the random vectors to build and search an index of. Raises
    UserError if the run has no index, or if its encoder was removed.
    """
    usable = [
        info
        for info in list_versions(run.folder)
        if info.manifest is not None and info.manifest.corpus == run.passages.fingerprint
    ]
    usable = [info for info in usable if (info.store / "encoders" / info.version.encoder.name).is_dir()]
    if not usable:
        raise UserError(
            f"run {run.folder} has no index of its corpus whose encoder still exists; "
            f"train the run, or build an index with `realm refresh --run {run.folder}`."
        )
    info = usable[-1]
    index = PassageIndex.open(info.path, run.passages.fingerprint)
    console.print(f"index {info.path}, {len(index):,} passages, {torch.get_num_threads()} threads")
    figures: dict[str, Any] = {"index": info.version.name, "passages": len(index), "threads": torch.get_num_threads()}
    figures["encoding"] = bench_encoding(run.passages, info.store / "encoders" / info.version.encoder.name, passages)
    figures["opening"] = bench_opening(info, run.passages)
    real_ND = index.embeddings(np.arange(len(index)))
    query_emb_QD = sample_queries(run.passages, info, queries)
    curves = {}
    for count in sorted({len(real_ND), max(scale, len(real_ND))}):
        embeddings_ND = real_ND if count == len(real_ND) else jittered_copies(real_ND, count)
        curves[count] = bench_search(embeddings_ND, query_emb_QD)
    figures["search"] = {str(count): rows for count, rows in curves.items()}
    if synthetic is not None:
        figures["synthetic"] = bench_synthetic(*synthetic)
    if picture is not None:
        plot_recall(curves, picture)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    return figures
