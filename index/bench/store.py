"""`realm bench index`: encoding, searching and opening, each beside what it is measured against, in
one run on a run's own index.

Shape legend: N passages, Q queries, K results a query, D dimension of the embeddings.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index.admin import list_versions
from index.bench.encoding import bench_encoding, bench_opening
from index.bench.searching import bench_search, bench_synthetic, draw, jittered, sample_queries
from index.search import PassageIndex
from realm.errors import UserError
from realm.run.folder import Run
from realm.runtime.telemetry import console


def bench_index(
    run: Run,
    passages: int,
    queries: int,
    scale: int,
    synthetic: str | None,
    json_file: Path | None,
    picture: Path | None,
) -> dict[str, Any]:
    """Measure and print tables; the figures also go to `json_file`, the recall/speed curves to
    `picture`.

    `passages`: to encode; `queries`: to search; `scale`: rows that the embeddings are repeated to,
    with jitter; `synthetic`: `NxD` random vectors to build and search an index of. Raises UserError
    where the run has no index, or its encoder is gone.
    """
    usable = [
        info
        for info in list_versions(run.folder)
        if info.manifest is not None and info.manifest.corpus == run.passages.fingerprint
    ]
    usable = [info for info in usable if (info.store / "encoders" / info.version.encoder.name).is_dir()]
    if not usable:
        raise UserError(
            f"run {run.folder} has no index of its corpus whose encoder is still there; train it, or let a refresher build one."
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
