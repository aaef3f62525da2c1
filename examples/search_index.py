"""Search the newest index version of a run with a question.

python examples/search_index.py runs/demo "Who was the discoverer of hydrogen?"
"""

import argparse
from pathlib import Path

import torch

import realm


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the newest index version of a run with a question.")
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("question")
    parser.add_argument("-k", type=int, default=5, help="passages to find (default: 5)")
    options = parser.parse_args()

    run = realm.Run.open(options.run)
    versions = realm.versions_in(run.folder / "indexes")  # oldest first
    if not versions:
        raise realm.UserError(f"{run.folder} has no index version; train it with `realm pretrain`.")
    # A version is searched with queries of the encoder it was built from.
    retriever, tokenizer = realm.load_retriever(run.folder / "encoders" / versions[-1].encoder.name)
    index = realm.PassageIndex.open(run.folder / "indexes" / versions[-1].name, run.passages.fingerprint)
    query = tokenizer([options.question], truncation=True, return_tensors="pt")
    with torch.inference_mode():
        query_emb_BD = retriever.embed_queries(query["input_ids"], query["attention_mask"]).numpy()
    scores_BK, rows_BK = index.search(query_emb_BD, min(options.k, len(index)))

    print(f"{versions[-1]}: {len(index):,} passages")
    for score, row in zip(scores_BK[0].tolist(), rows_BK[0].tolist(), strict=True):
        if row >= 0:  # an approximate index may find fewer than k
            print(f"  {score:8.3f}  [{run.passages.ids[row]}] {run.passages.title(row)}: {run.passages.text(row)}")


if __name__ == "__main__":
    try:
        main()
    except realm.UserError as error:
        raise SystemExit(str(error)) from None
