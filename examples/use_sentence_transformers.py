"""Load an exported retriever in sentence-transformers.

python examples/use_sentence_transformers.py runs/demo/pretrain/model/retriever
"""

import argparse

from sentence_transformers import SentenceTransformer

PASSAGES = [
    ("Marie Curie", "Marie Curie was a physicist and chemist. She discovered polonium and radium in Paris in 1898."),
    ("Danube", "The Danube is the second-longest river of Europe. It rises in the Black Forest."),
    ("Ada Lovelace", "Ada Lovelace wrote the first published program. It was meant for the Analytical Engine."),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank passages with a retriever in sentence-transformers.")
    parser.add_argument("retriever", help="exported retriever, such as RUN/pretrain/model/retriever")
    parser.add_argument("--question", default="Who discovered radium?")
    options = parser.parse_args()

    model = SentenceTransformer(options.retriever)
    # Passages are (title, text) pairs. With two towers the method chooses the tower.
    passage_emb_ND = model.encode_document(PASSAGES)
    query_emb_BD = model.encode_query([options.question])
    score_BN = model.similarity(query_emb_BD, passage_emb_ND)  # inner products

    print(options.question)
    for n in score_BN[0].argsort(descending=True).tolist():
        print(f"  {score_BN[0, n]:8.3f}  {PASSAGES[n][0]}: {PASSAGES[n][1]}")


if __name__ == "__main__":
    main()
