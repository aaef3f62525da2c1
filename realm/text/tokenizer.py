"""The WordPiece tokenizer: trained on the corpus or a BERT's own, and the one way in which
users' text becomes wordpieces."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer

from realm.errors import UserError
from realm.runtime.hub import require_on_hub
from realm.runtime.publish import published, write_json_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SETTINGS = "tokenizer_settings.json"

Encoded: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Wordpiece ids `(L,)` and the character offsets `(L, 2)`, end exclusive, of one text; both int32."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which WordPiece tokenizer turns text into wordpieces."""

    path: str | None = None
    """Hub name, local folder or vocabulary file of a BERT WordPiece tokenizer; without one it is
    trained on the corpus."""
    vocab_size: int = 8000
    """Wordpieces of a trained tokenizer, at most."""
    min_frequency: int = 2
    """How often a pair must occur for a trained tokenizer to join it; 1 keeps the rarest names
    of a small corpus whole."""
    lowercase: bool = True
    """Fold case and strip accents, when trained or read from a bare vocabulary file."""


def obtain_tokenizer(
    config: TokenizerConfig, folder: Path, texts: Callable[[], Iterable[str]]
) -> "PreTrainedTokenizerBase":
    """The tokenizer saved in `folder`; on the first call it is loaded or trained on `texts()` as
    `config` says, and saved there.

    Raises UserError where the saved one was made from another config, or `config.path` cannot be
    loaded.
    """
    if folder.exists():
        settings = folder / _SETTINGS
        if not settings.is_file() or json.loads(settings.read_bytes()) != asdict(config):
            raise UserError(
                f"the tokenizer in {folder} was made with other settings; restore them or prepare into another folder"
            )
        return load_tokenizer(str(folder))
    tokenizer = (
        train_wordpiece(texts(), config) if config.path is None else load_tokenizer(config.path, config.lowercase)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with published(folder) as temporary:
        tokenizer.save_pretrained(temporary)
        write_json_atomic(temporary / _SETTINGS, asdict(config))
    return tokenizer


def train_wordpiece(texts: Iterable[str], config: TokenizerConfig) -> "PreTrainedTokenizerBase":
    """Trains a BERT tokenizer of at most `config.vocab_size` wordpieces; `texts` is read twice, so
    an iterator is held in memory.

    `tokenizers` numbers the characters in the order of a randomly seeded hash table, and these
    numbers break the ties between merges. Given the characters beforehand, in a fixed order, the
    same texts make the same vocabulary; another version of `tokenizers` may still make another, so
    what was trained is saved. Raises UserError where `vocab_size` is too small or no text holds a
    character.
    """
    from tokenizers import models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    if config.vocab_size < 100:
        raise UserError(f"tokenizer vocab_size must be at least 100, got {config.vocab_size}")
    texts = texts if isinstance(texts, Sequence) else list(texts)
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    visible = sorted(
        (character for character in counts if not character.isspace()),
        key=lambda character: (-counts[character], character),
    )
    if not visible:
        raise UserError("the texts to train a tokenizer on hold no character")
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
    # The trainer marks the characters as special tokens; only the vocabulary is kept.
    return _plain(BertTokenizer(vocab=model.get_vocab(with_added_tokens=False), do_lower_case=config.lowercase))


def load_tokenizer(path: str, lowercase: bool = True) -> "PreTrainedTokenizerBase":
    """Loads a BERT WordPiece tokenizer: a folder, a bare vocabulary file (one wordpiece a line,
    folded if `lowercase`) or a hub name.

    A hub name is looked for in the local cache first. Raises UserError where there is nothing to
    load or no BERT tokenizer.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _from_vocabulary(local, lowercase)
    if local.is_dir():
        names = {file.name for file in local.iterdir()}
        if names.isdisjoint({"tokenizer.json", "tokenizer_config.json", "config.json"}):
            if "vocab.txt" in names:
                return _from_vocabulary(local / "vocab.txt", lowercase)
            raise UserError(f"the folder {path} holds no tokenizer: neither tokenizer.json nor vocab.txt")
        return _checked(_from_pretrained(str(local), path), path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((".txt", ".json")):
        raise UserError(
            f"tokenizer {path} does not exist; give a folder, a vocab.txt or a hub name such as google-bert/bert-base-uncased"
        )
    return _checked(_from_hub(path), path)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over all that decides how plain text becomes wordpieces: vocabulary, normaliser,
    pre-tokeniser, added tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def tokenize(tokenizer: "PreTrainedTokenizerBase | Tokenizer", texts: list[str]) -> list[Encoded]:
    """Wordpieces of each text, without special tokens: "[MASK]" written by a user becomes plain
    wordpieces. Nothing is cut."""
    backend: Tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [_arrays(encoding) for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _arrays(encoding: Encoding) -> Encoded:
    return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)


def _plain(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer as it is used here and saved: the names of special tokens in a text are text."""
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def _from_vocabulary(file: Path, lowercase: bool) -> "PreTrainedTokenizerBase":
    from transformers import BertTokenizer

    try:
        wordpieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no WordPiece vocabulary: it is not UTF-8 text") from None
    vocabulary = {wordpiece.rstrip("\r"): i for i, wordpiece in enumerate(wordpieces)}
    if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
        raise UserError(f"{file} is no BERT vocabulary: it has no line {', '.join(missing)}")
    if len(vocabulary) < len(wordpieces):
        raise UserError(
            f"{file} is no BERT vocabulary: {len(wordpieces) - len(vocabulary)} of its lines stand there twice"
        )
    return _checked(BertTokenizer(vocab=vocabulary, do_lower_case=lowercase), str(file))


def _from_pretrained(location: str, path: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        # transformers has no error of its own for files that do not fit together.
        raise UserError(f"the tokenizer in {path} cannot be loaded ({_first_line(error)})") from error


def _from_hub(name: str) -> "PreTrainedTokenizerBase":
    """From the cache, else downloaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        require_on_hub(name, "tokenizer")
    return _from_pretrained(name, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _checked(tokenizer: "PreTrainedTokenizerBase", path: str) -> "PreTrainedTokenizerBase":
    """Refuses what is no WordPiece tokenizer with BERT's special tokens, or makes special tokens
    out of text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordPiece":
        raise UserError(f"tokenizer {path} is no WordPiece tokenizer, as BERT's are; give a BERT's")
    if backend.get_vocab_size() <= len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer {path} has no vocabulary beside its special tokens: its tokenizer.json or vocab.txt is missing"
        )
    names = ("pad", "cls", "sep", "mask")
    if missing := [name for name in names if getattr(tokenizer, f"{name}_token_id") is None]:
        raise UserError(f"tokenizer {path} has no {', '.join(missing)} token; give a BERT's")
    special_ids = [getattr(tokenizer, f"{name}_token_id") for name in names]
    text = " ".join(tokenizer.convert_ids_to_tokens(special_ids))
    if np.isin(tokenize(tokenizer, [text])[0][0], special_ids).any():
        raise UserError(
            f"tokenizer {path} makes special tokens out of the text {text!r}, so text of users could not be told from them"
        )
    return _plain(tokenizer)
