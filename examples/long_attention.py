"""Run a long text through a BERT checkpoint with each attention variant.

python examples/long_attention.py google-bert/bert-base-uncased --tokens 4096
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

import realm

VARIANTS: dict[str, realm.AttentionConfig] = {
    "dense": realm.DenseAttention(),
    "longformer": realm.LongformerAttention(window=128),
    "performer": realm.PerformerAttention(num_features=256),
    "linformer": realm.LinformerAttention(projected_tokens=128),
    "infini": realm.InfiniAttention(segment=256),
}
SENTENCE = "The Danube rises in the Black Forest, passes ten countries and ends in the Black Sea. "


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a long text through a BERT with each attention variant.")
    parser.add_argument("bert", help="BERT checkpoint: a folder or a hub name")
    parser.add_argument("--text", type=Path, help="UTF-8 text file (default: one sentence, repeated)")
    parser.add_argument("--tokens", type=int, default=2048, help="wordpieces to read at most (default: 2048)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()

    text = SENTENCE * (options.tokens // 10) if options.text is None else options.text.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(options.bert)
    batch = tokenizer([text], truncation=True, max_length=options.tokens, return_tensors="pt")
    for name in options.variants:
        bert = BertModel.from_pretrained(options.bert, add_pooling_layer=False).eval()
        realm.extend_positions(bert, options.tokens)  # learned positions beyond the checkpoint's repeat
        realm.bind_attention(bert, VARIANTS[name])  # in place, keeping the pretrained projections
        started = time.perf_counter()
        with torch.inference_mode():
            hidden_BLH = bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        seconds = time.perf_counter() - started
        print(f"{name:>10}: {hidden_BLH.shape[1]:,} wordpieces of width {hidden_BLH.shape[2]} in {seconds:.2f} s")


if __name__ == "__main__":
    main()
