"""The WordPiece tokenizer: training, loading, and tokenization of text."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer

from realm.errors import UserError, first_line
from realm.runtime.hub import require_on_hub
from realm.runtime.publish import check_folder, published, read_json, write_json_atomic, write_manifest
from realm.runtime.section import PathText, Section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_VOCAB_SIZE = 100
MAX_WORD_LENGTH = 100
"""Words of more characters are encoded as `[UNK]`, as in BERT."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SETTINGS = "tokenizer_settings.json"

Encoded: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Wordpiece ids `(L,)` and character offsets `(L, 2)`, end exclusive, of a text; both int32."""


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """Which WordPiece tokenizer to use."""

    path: PathText | None = None
    """Hub name, local folder or vocabulary file of a BERT WordPiece tokenizer; default: train one
    on the corpus."""
    vocab_size: int = 8000
    """Maximum vocabulary size of a trained tokenizer."""
    min_frequency: int = 2
    """Minimum frequency of a pair to be merged in training; with 1, even the rarest names of a
    small corpus become single wordpieces."""
    lowercase: bool = True
    """Lowercase and strip accents, if trained or loaded from a bare vocabulary file."""

    def problems(self) -> Iterator[str]:
        yield from self.at_least(MIN_VOCAB_SIZE, "vocab_size")
        yield from self.at_least(1, "min_frequency")


def load_or_train_tokenizer(
    config: TokenizerConfig, folder: Path, texts: Callable[[], Iterable[str]]
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer from `folder`, or create it from `config` and save it there.

    A new tokenizer is loaded or trained on `texts()`, depending on `config`. Raises UserError if
    the saved tokenizer was created with a different config, or if `config.path` cannot be loaded.
    """
    if folder.exists():
        remedy = "restore it from a copy, or prepare into another folder"
        check_folder(folder, remedy)
        if read_json(folder / _SETTINGS, remedy) != asdict(config):
            raise UserError(
                f"the tokenizer in {folder} was created with different `tokenizer` settings; "
                "restore them or prepare into another folder."
            )
        return load_tokenizer(str(folder))
    tokenizer = (
        train_wordpiece(texts(), config) if config.path is None else load_tokenizer(config.path, config.lowercase)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with published(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        write_json_atomic(temporary / _SETTINGS, asdict(config))
        write_manifest(temporary, {"format": 1})
    return tokenizer


def train_wordpiece(texts: Iterable[str], config: TokenizerConfig) -> "PreTrainedTokenizerBase":
    """Train a BERT tokenizer with at most `config.vocab_size` wordpieces.

    Words of more than `MAX_WORD_LENGTH` characters are not used.

    `texts` is read twice, so an iterator is kept in memory. The `tokenizers` library numbers the
    characters in the order of a randomly seeded hash table and breaks ties between merges by these
    numbers. With the characters given in advance in a fixed order, the same texts produce the same
    vocabulary. A different version of `tokenizers` may still produce another one, so the trained
    tokenizer is saved. Raises UserError if `vocab_size` is too small or the texts contain no
    visible character.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    if config.vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"tokenizer.vocab_size must be at least {MIN_VOCAB_SIZE}, got {config.vocab_size}.")
    texts = texts if isinstance(texts, Sequence) else list(texts)
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    model.normalizer = normalizer
    # The trainer's time grows with the square of a word's length.
    too_long = pre_tokenizers.Split(Regex(rf"(?m:.{{{MAX_WORD_LENGTH + 1},}})"), behavior="removed")
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), too_long])
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    visible = sorted(
        (character for character in counts if not character.isspace()),
        key=lambda character: (-counts[character], character),
    )
    if not visible:
        raise UserError("the texts to train the tokenizer on contain no visible characters.")
    alphabet = visible[: min(1000, (config.vocab_size - len(SPECIAL_TOKENS)) // 3)]
    fixed = [*SPECIAL_TOKENS, *alphabet, *("##" + character for character in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        special_tokens=fixed,
        limit_alphabet=len(alphabet),
        min_frequency=config.min_frequency,
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer=trainer)
    # The trainer marks the characters as special tokens, so only the vocabulary is reused.
    return _enable_split_special_tokens(
        BertTokenizer(vocab=model.get_vocab(with_added_tokens=False), do_lower_case=config.lowercase)
    )


def load_tokenizer(path: str, lowercase: bool = True) -> "PreTrainedTokenizerBase":
    """Load a BERT WordPiece tokenizer from a folder, a vocabulary file or a hub name.

    A vocabulary file contains one wordpiece per line; `lowercase` applies only to it. A hub name is
    looked up in the local cache first. Raises UserError if there is no tokenizer or it is not a
    BERT tokenizer.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _from_vocabulary(local, lowercase)
    if local.is_dir():
        names = {file.name for file in local.iterdir()}
        if names.isdisjoint({"tokenizer.json", "tokenizer_config.json", "config.json"}):
            if "vocab.txt" in names:
                return _from_vocabulary(local / "vocab.txt", lowercase)
            raise UserError(f"the folder {path} contains no tokenizer: neither tokenizer.json nor vocab.txt.")
        return _checked(_from_pretrained(str(local), path), path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((".txt", ".json")):
        raise UserError(
            f"tokenizer {path} does not exist; "
            "give a folder, a vocab.txt or a hub name such as google-bert/bert-base-uncased."
        )
    return _checked(_from_hub(path), path)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over what determines the wordpieces of a text.

    These are the vocabulary, normalizer, pre-tokenizer and added tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def tokenize(tokenizer: "PreTrainedTokenizerBase | Tokenizer", texts: list[str]) -> list[Encoded]:
    """Tokenize texts without special tokens and without truncation.

    "[MASK]" in a text becomes plain wordpieces.
    """
    backend: Tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [_arrays(encoding) for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _arrays(encoding: Encoding) -> Encoded:
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)


def _enable_split_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Encode the names of special tokens in a text as plain text, also after saving."""
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def _from_vocabulary(file: Path, lowercase: bool) -> "PreTrainedTokenizerBase":
    from transformers import BertTokenizer

    try:
        wordpieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a WordPiece vocabulary: it is not UTF-8 text.") from None
    vocabulary = {wordpiece.rstrip("\r"): i for i, wordpiece in enumerate(wordpieces)}
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise UserError(f"{file} is not a BERT vocabulary: it has no line {', '.join(missing)}.")
    if len(vocabulary) < len(wordpieces):
        raise UserError(f"{file} is not a BERT vocabulary: it has {len(wordpieces) - len(vocabulary)} duplicate lines.")
    return _checked(BertTokenizer(vocab=vocabulary, do_lower_case=lowercase), str(file))


def _from_pretrained(location: str, path: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except Exception as error:  # transformers and tokenizers have no specific exception for damaged files
        raise UserError(f"the tokenizer in {path} cannot be loaded ({first_line(error)}).") from error


def _from_hub(name: str) -> "PreTrainedTokenizerBase":
    """Load from the local cache, else from the hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        require_on_hub(name, "tokenizer")
    return _from_pretrained(name, name)


def _checked(tokenizer: "PreTrainedTokenizerBase", path: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer if it is a WordPiece tokenizer with BERT's special tokens.

    Raises UserError if not, or if it encodes the names of special tokens in a text as special
    tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordPiece":
        raise UserError(f"tokenizer {path} is not a WordPiece tokenizer; use a BERT tokenizer.")
    longest = backend.model.max_input_chars_per_word
    if longest > 10 * MAX_WORD_LENGTH:
        raise UserError(
            f"tokenizer {path} splits words of up to {longest:,} characters, which takes minutes for a long one; "
            f"set max_input_chars_per_word in its tokenizer.json to {MAX_WORD_LENGTH}, as in BERT."
        )
    if backend.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise UserError(f"tokenizer {path} has only special tokens: its tokenizer.json or vocab.txt is missing.")
    names = ("pad", "cls", "sep", "mask")
    if missing := [name for name in names if getattr(tokenizer, f"{name}_token_id") is None]:
        raise UserError(f"tokenizer {path} has no {', '.join(missing)} token; use a BERT tokenizer.")
    special_ids = [getattr(tokenizer, f"{name}_token_id") for name in names]
    text = " ".join(tokenizer.convert_ids_to_tokens(special_ids))
    if np.isin(tokenize(tokenizer, [text])[0][0], special_ids).any():
        raise UserError(
            f"tokenizer {path} encodes the text {text!r} as special tokens, "
            "so they cannot be distinguished from text in documents; use a BERT tokenizer."
        )
    return _enable_split_special_tokens(tokenizer)
