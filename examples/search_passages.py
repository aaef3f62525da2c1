"""Rank a few passages for a question with an exported retriever.

python examples/search_passages.py runs/demo/pretrain/model/retriever
"""

import argparse
from pathlib import Path

import torch

import realm

PASSAGES = [
    ("Marie Curie", "Marie Curie was a physicist and chemist. She discovered polonium and radium in Paris in 1898."),
    ("Danube", "The Danube is the second-longest river of Europe. It rises in the Black Forest."),
    ("Ada Lovelace", "Ada Lovelace wrote the first published program. It was meant for the Analytical Engine."),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank a few passages for a question with an exported retriever.")
    parser.add_argument("retriever", type=Path, help="exported retriever, such as RUN/pretrain/model/retriever")
    parser.add_argument("--question", default="Who discovered radium?")
    options = parser.parse_args()

    retriever, tokenizer = realm.load_retriever(options.retriever)
    # A pair of texts becomes `[CLS] title [SEP] text [SEP]`, as passages are encoded in training.
    titles, texts = map(list, zip(*PASSAGES, strict=True))
    passages = tokenizer(titles, texts, padding=True, truncation=True, return_tensors="pt")
    query = tokenizer([options.question], truncation=True, return_tensors="pt")
    with torch.inference_mode():
        passage_emb_ND = retriever.embed_passages(passages["input_ids"], passages["attention_mask"])
        query_emb_BD = retriever.embed_queries(query["input_ids"], query["attention_mask"])
        p_N = retriever.score(query_emb_BD, passage_emb_ND[None])[0].softmax(-1)

    print(options.question)
    for n in p_N.argsort(descending=True).tolist():
        print(f"  p(z|x) = {p_N[n]:.2f}  {titles[n]}: {texts[n]}")


if __name__ == "__main__":
    main()
