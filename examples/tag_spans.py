"""Mark the salient spans of a text, which pretraining masks.

python examples/tag_spans.py "Marie Curie discovered radium in Paris in December 1898."
"""

import argparse

import realm

TEXT = "Marie Curie discovered radium in Paris in December 1898, and two Nobel Prizes followed."


def main() -> None:
    parser = argparse.ArgumentParser(description="Mark the salient spans of a text.")
    parser.add_argument("texts", nargs="*", default=[TEXT], help="texts to tag (default: one about Marie Curie)")
    parser.add_argument("--pipeline", default="builtin", help="builtin, or a spaCy pipeline by name or path")
    options = parser.parse_args()

    tagger = realm.SpanTagger.load(realm.SpanConfig(pipeline=options.pipeline))
    for text, spans in zip(options.texts, tagger.tag(options.texts), strict=True):
        marked, done = "", 0
        for start, end, kind in spans:
            marked += f"{text[done:start]}[{text[start:end]}]({kind})"
            done = end
        print(marked + text[done:])


if __name__ == "__main__":
    main()
