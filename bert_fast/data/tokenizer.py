"""BERT's WordPiece tokenizer: trained with `tokenizers`, saved as `transformers` loads it, loaded from any form."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bert_fast.data.files import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class SpecialIds(NamedTuple):
    """Ids that samples and batches need."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int


def bare_tokenizer(tokenizer) -> Tokenizer:
    """``tokenizer`` itself, or the one inside a fast tokenizer of ``transformers``; TypeError for anything else."""
    bare = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(bare, Tokenizer):
        raise TypeError(
            f"a tokenizer is a tokenizers.Tokenizer (bert_fast.data.load_tokenizer reads every form) or a fast one of "
            f"transformers, got {type(tokenizer).__name__}"
        )
    return bare


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 30522,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    strip_accents: bool | None = None,
) -> Tokenizer:
    """A WordPiece tokenizer of at most ``vocab_size`` pieces, five special tokens first, trained on ``texts``.

    Text is treated as BERT does: control characters removed, CJK characters apart, with ``lowercase`` also
    lower-cased and stripped of accents (``strip_accents`` True or False says otherwise); split at white space and
    punctuation. The most frequent ``limit_alphabet`` characters (at most a quarter of the vocabulary) are kept:
    raise it to about 8000 for Chinese. The same texts give the same vocabulary. ``texts`` are gone through twice: a
    one-pass iterator is read into memory first.
    Raises ValueError where the vocabulary cannot hold the special tokens or the texts hold no word.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size {vocab_size} leaves no room beside the {len(SPECIAL_TOKENS)} special tokens")
    if iter(texts) is texts:
        texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    _as_bert(tokenizer, lowercase, strip_accents)
    # The trainer numbers "##x" in the order of a randomly seeded hash table and breaks ties by these numbers. Naming
    # them beforehand fixes both; they must not stay special tokens, so the vocabulary goes into a new tokenizer.
    alphabet = _alphabet(texts, tokenizer, min(limit_alphabet, max(1, vocab_size // 4)))
    continuing = [f"##{character}" for character in alphabet if _continues_word(character, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    _as_bert(tokenizer, lowercase, strip_accents)
    _add_template(tokenizer)
    return tokenizer


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """The ``limit`` most frequent characters of the normalized texts, white space left out, sorted."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    characters = sorted((-number, character) for character, number in counts.items() if not character.isspace())
    if not characters:
        raise ValueError("the texts hold no word to train a tokenizer on")
    return sorted(character for _, character in characters[:limit])


def _continues_word(character: str, tokenizer: Tokenizer) -> bool:
    """Whether ``character`` can stand inside a word: punctuation and CJK characters are always words by themselves."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{character}"))) == 1


def _as_bert(
    tokenizer: Tokenizer, lowercase: bool, strip_accents: bool | None = None, chinese_characters_apart: bool = True
) -> None:
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese_characters_apart,
        strip_accents=strip_accents,  # None: as lowercase
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")


def _add_template(tokenizer: Tokenizer) -> None:
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids.cls), ("[SEP]", ids.sep)],
    )


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of the special tokens; raises ValueError naming those the vocabulary lacks."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    if missing := [token for token, number in ids.items() if number is None]:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}, which pre-training needs: use a BERT vocabulary")
    return SpecialIds(*ids.values())


def token_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int64 (tokens,): the ids that have a token, sorted; a repeated or blank line of a vocab.txt leaves a gap."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return np.array(sorted(number for token, number in vocabulary.items() if token), dtype=np.int64)


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """The rows that an embedding of the ids needs: the largest id and one, whatever gaps there are below."""
    return int(token_ids(tokenizer)[-1]) + 1


def continuation_table(tokenizer: Tokenizer) -> np.ndarray:
    """bool (rows,): True for the ids of pieces that continue a word (``##...``).

    ValueError where the tokenizer marks no such pieces (byte-level BPE): whole words cannot be told.
    """
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if not prefix:
        raise ValueError(
            "whole-word masking needs a tokenizer whose pieces say that they continue a word, as WordPiece's ## does; "
            f"this one is {type(tokenizer.model).__name__} without such a prefix"
        )
    table = np.zeros(vocabulary_rows(tokenizer), dtype=bool)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table[[number for token, number in vocabulary.items() if token.startswith(prefix) and token != prefix]] = True
    return table


def tokenizer_files(path: str | Path) -> list[Path]:
    """The files of a tokenizer at ``path``, a folder or a file, if it is there: no text where they lie in a corpus."""
    path = Path(path)
    folder = path.parent if path.is_file() else path
    names = {"tokenizer.json", "vocab.txt", "tokenizer_config.json"} | ({path.name} if path.is_file() else set())
    return [folder / name for name in sorted(names)]


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int = 512) -> Path:
    """Writes ``tokenizer.json``, ``vocab.txt`` (if ids have no gap) and ``tokenizer_config.json``; returns the folder.

    ``transformers.BertTokenizerFast.from_pretrained(folder)`` gives the ids that ``tokenizer`` gives.
    """
    folder = Path(folder)
    contents = tokenizer_contents(tokenizer, max_length=max_length)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return folder


def tokenizer_contents(tokenizer: Tokenizer, *, max_length: int = 512) -> dict[str, bytes]:
    """What :func:`save_tokenizer` writes, by the names of the files."""
    special_ids(tokenizer)
    contents = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if [number for _, number in vocabulary] == list(range(len(vocabulary))):
        contents["vocab.txt"] = "".join(f"{token}\n" for token, _ in vocabulary).encode()
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": bool(normalizer.get("lowercase", False)),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": bool(normalizer.get("handle_chinese_chars", True)),
        "model_max_length": max_length,
        **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
    }
    return contents | {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def load_tokenizer(path: str | Path, *, lowercase: bool | None = None) -> Tokenizer:
    """A tokenizer from ``tokenizer.json``, ``vocab.txt`` or a folder that holds one of them.

    A ``vocab.txt`` does not say whether it is cased: ``lowercase`` tells; None takes ``do_lower_case`` of a
    ``tokenizer_config.json`` beside it, else upper-case letters in the vocabulary mean cased. ``strip_accents`` and
    ``tokenize_chinese_chars`` of that file hold in any case. A ``tokenizer.json`` says it itself. Raises
    FileNotFoundError where there is none, ValueError where the file is damaged, special tokens are missing, or
    ``lowercase`` contradicts a ``tokenizer.json``.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.txt")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    if path.suffix == ".json":
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} is not a tokenizer of the `tokenizers` library: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        special_ids(tokenizer)
        does = bool((json.loads(tokenizer.to_str())["normalizer"] or {}).get("lowercase", False))
        if lowercase is not None and does != lowercase:
            asked, is_now = ("uncased", "cased") if lowercase else ("cased", "uncased")
            raise ValueError(f"{path} says itself that it is {is_now}, but {asked} was asked for: take its vocab.txt")
        return tokenizer
    try:
        pieces = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a vocabulary: not UTF-8 at byte {error.start}") from error
    pieces = [piece.removesuffix("\r") for piece in (pieces[:-1] if pieces[-1] == "" else pieces)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{path} is not a vocabulary: {len(pieces) - len(vocabulary)} lines repeat another")
    config_file = path.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if lowercase is None:
        lowercase = config.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    special_ids(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    _as_bert(tokenizer, lowercase, config.get("strip_accents"), config.get("tokenize_chinese_chars", True))
    _add_template(tokenizer)
    return tokenizer
