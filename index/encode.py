"""Encode the passages of a prepared corpus for the index, sorted by length, without gradient.

Shape legend: R requested rows, B batch, L padded length, D embedding dimension.
"""

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._inductor import config as inductor_config

from index.workers import WorkerGroup
from realm.errors import UserError
from realm.models.bert import first_line
from realm.models.precision import Precision
from realm.runtime.publish import write_file_atomic, write_json_atomic
from realm.text.inputs import Wordpieces, pad_batch, token_budget_batches

if TYPE_CHECKING:
    from realm.corpus.prepared import PreparedCorpus
    from realm.models.retriever import Retriever, Tower

SINGLE_PROCESS = WorkerGroup()
_ALIGN_FROM_TOKENS, _ALIGN_TOKENS = 64, 16
"""Passages of 64 tokens or more are padded to a multiple of 16: on a CPU, matrix tiles of odd
lengths run at half the speed."""


class NonFiniteEmbeddings(UserError):
    """An exported retriever produces NaN or infinite embeddings; a newer export may not."""


class Encoder(NamedTuple):
    """A loaded export of the retriever, ready to encode."""

    retriever: "Retriever"
    wordpieces: Wordpieces
    max_passage_tokens: int
    tokenizer_fingerprint: str


def load_encoder(folder: Path) -> Encoder:
    """Load an exported retriever. Raises UserError if `folder` does not contain one."""
    from realm.models.retriever_files import load_retriever, read_retriever_settings
    from realm.text.tokenizer import tokenizer_fingerprint

    retriever, tokenizer = load_retriever(folder)
    if torch.cuda.is_available():
        retriever.to("cuda")
    max_tokens = read_retriever_settings(folder)["max_passage_tokens"]
    return Encoder(retriever, Wordpieces.from_tokenizer(tokenizer), max_tokens, tokenizer_fingerprint(tokenizer))


def encoding_tower(retriever: "Retriever", precision: Precision, compiled: bool = False) -> "Tower | CompiledTower":
    """The passage tower of a retriever in evaluation mode, prepared for encoding.

    For bf16 it is a copy whose weights are cast once, not at every product. `compiled`: use
    torch.compile with the weights as constants and dynamic shapes; a process can use one such tower
    at a time. Raises UserError if compilation fails on this machine.
    """
    tower = retriever.passage_tower
    if precision == "bf16":
        tower = copy.deepcopy(tower)
        tower.bert.bfloat16()
    return CompiledTower(tower) if compiled else tower


class CompiledTower(nn.Module):
    """A tower compiled with its weights as constants, which inductor packs.

    Discards everything compiled before.
    """

    def __init__(self, tower: "Tower") -> None:
        super().__init__()
        # Without the reset the towers of earlier versions stay in the cache, and after eight of
        # them nothing more is compiled.
        torch._dynamo.reset()
        self.tower, self.dim = tower, tower.dim
        ids_BL = torch.ones((2, _ALIGN_TOKENS), dtype=torch.int64, device=next(tower.parameters()).device)
        try:
            self.compiled = torch.compile(tower, dynamic=True)
            with torch.inference_mode():
                self(ids_BL, ids_BL)
        except RuntimeError as error:
            reason = first_line(error)[:200]
            raise UserError(
                f"refresh.compile: torch cannot compile the encoder on this machine ({reason}); "
                "install a C++ compiler, or set it to false."
            ) from error

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        with inductor_config.patch(freezing=True):  # read again for every new shape
            return self.compiled(ids_BL, mask_BL)


def encode_passages(
    tower: "Tower | CompiledTower",
    corpus: "PreparedCorpus",
    rows: np.ndarray,
    wordpieces: Wordpieces,
    max_tokens: int,
    token_budget: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed `[CLS] title [SEP] text [SEP]` of the given corpus rows; returns (R, D) float32 in the
    order of `rows`.

    `tower`: in evaluation mode (see `encoding_tower`), used on its own device. `max_tokens`:
    maximum wordpieces of a passage, special tokens included. `token_budget`: padded tokens per
    batch. `progress(num_done)` is called after each batch. Raises NonFiniteEmbeddings if an
    embedding is not finite.
    """
    device = next(tower.parameters()).device
    width_R = np.minimum(np.asarray(corpus.lengths)[rows] + 3, max_tokens)
    aligned_R = np.minimum(-(-width_R // _ALIGN_TOKENS) * _ALIGN_TOKENS, max_tokens)
    width_R = np.where(width_R < _ALIGN_FROM_TOKENS, width_R, aligned_R)
    embeddings_RD = np.empty((len(rows), tower.dim), dtype=np.float32)
    num_done = 0
    with torch.inference_mode():
        for batch in token_budget_batches(width_R, token_budget):
            sequences = [
                wordpieces.passage(corpus.title_ids(row), corpus.text_ids(row), max_tokens)
                for row in rows[batch].tolist()
            ]
            ids_BL, mask_BL = pad_batch(sequences, wordpieces.pad, int(width_R[batch].max()))
            embeddings_RD[batch] = tower(ids_BL.to(device), mask_BL.to(device)).float().cpu().numpy()
            num_done += len(batch)
            if progress is not None:
                progress(num_done)
    finite_R = np.isfinite(embeddings_RD).all(axis=1)
    if not finite_R.all():
        row = int(np.asarray(rows)[~finite_R][0])
        raise NonFiniteEmbeddings(
            f"the embedding of passage {row} is not finite: the encoder diverged; resume from an earlier checkpoint"
        )
    return embeddings_RD


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _is_array(path: Path) -> bool:
    """Whether a file exists and is an array of numbers, complete to its last row."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return False
    return True


def encode_in_shards(
    work: Path,
    rows: range,
    shard_rows: int,
    plan: dict[str, Any],
    encode: Callable[[np.ndarray], np.ndarray],
    before_round: Callable[[float], None],
    workers: WorkerGroup = SINGLE_PROCESS,
) -> tuple[list[np.ndarray], int]:
    """Embed consecutive corpus rows shard by shard into files of the folder `work`, keeping shards
    that an earlier process finished.

    `plan`: everything that determines the embeddings; shards of a different plan are deleted.
    `encode(rows)` returns (R, D) embeddings. A round is one shard per worker; before each round the
    first worker calls `before_round` with the fraction of shards done, which may raise. Returns the
    shards, memory-mapped, and the number of shards kept.
    """
    plan = {**plan, "rows": [rows.start, rows.stop], "shard_rows": shard_rows}
    num_shards = -(-len(rows) // shard_rows)
    path = [work / f"shard-{number:05d}.npy" for number in range(num_shards)]

    def find_missing() -> list[int]:
        plan_file = work / "plan.json"
        if _read_json(plan_file) != plan:
            if work.exists():
                shutil.rmtree(work)
            work.mkdir(parents=True)
            write_json_atomic(plan_file, plan)
        return [number for number in range(num_shards) if not _is_array(path[number])]

    def encode_shard(number: int) -> None:
        part = rows[number * shard_rows : (number + 1) * shard_rows]
        write_file_atomic(
            path[number], partial(np.save, arr=encode(np.arange(part.start, part.stop)), allow_pickle=False)
        )

    missing = workers.run_on_first(find_missing)
    for start in range(0, len(missing), workers.size):
        fraction_done = (num_shards - len(missing) + start) / num_shards
        workers.run_on_first(partial(before_round, fraction_done))
        mine = start + workers.rank
        workers.run_on_all(partial(encode_shard, missing[mine]) if mine < len(missing) else lambda: None)
    return [np.load(file, mmap_mode="r", allow_pickle=False) for file in path], num_shards - len(missing)
