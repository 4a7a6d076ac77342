"""Tokenizers: loaded from any form, compared, and saved so that `transformers` gives the same ids."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bert_fast.data.files import write_atomically

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100  # characters of a normalized word; a longer one is [UNK]
# What a PreTrainedTokenizerFast of transformers must be told to serve a BERT.
SPECIAL_NAMES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
MODEL_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]


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


def own_tokenizer(tokenizer) -> Tokenizer:
    """A copy of :func:`bare_tokenizer` that the caller may change, without padding and truncation."""
    own = Tokenizer.from_str(bare_tokenizer(tokenizer).to_str())
    own.no_padding()
    own.no_truncation()
    return own


def berts_tokenizer(
    vocabulary: dict[str, int],
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese_characters_apart: bool = True,
) -> Tokenizer:
    """BERT's own tokenizer, as ``transformers.BertTokenizerFast`` makes it of these settings.

    ``strip_accents`` None means as ``lowercase``. ValueError where ``vocabulary`` lacks a special token.
    """
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese_characters_apart,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _completed(tokenizer)


def _completed(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` itself, changed to encode whole texts, with its special tokens and [CLS] and [SEP] around them.

    A post-processor that puts other tokens there stays as it is.
    """
    ids = special_ids(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.num_special_tokens_to_add(is_pair=False) == 0:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids.cls), ("[SEP]", ids.sep)],
        )
    return tokenizer


def require_berts_frame(tokenizer: Tokenizer) -> None:
    """ValueError where ``tokenizer`` puts other tokens around texts than pre-training does."""
    if not _frames_as_bert(_completed(Tokenizer.from_str(tokenizer.to_str()))):
        raise ValueError(
            "the tokenizer's post-processor does not make [CLS] A [SEP] of a text and [CLS] A [SEP] B [SEP], types 0 "
            "and 1, of a pair, as pre-training does: set it so, or to none"
        )


def _frames_as_bert(tokenizer: Tokenizer) -> bool:
    _, unk, cls, sep, _ = special_ids(tokenizer)
    single, pair = tokenizer.encode("[UNK]"), tokenizer.encode("[UNK]", "[UNK]")
    return (single.ids, single.type_ids, pair.ids, pair.type_ids) == (
        [cls, unk, sep], [0, 0, 0], [cls, unk, sep, unk, sep], [0, 0, 0, 1, 1],
    )  # fmt: skip


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids of the special tokens; raises ValueError naming those the vocabulary lacks or names otherwise."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    present = [number for number in ids.values() if number is not None]
    if missing := [token for token, number in ids.items() if number is None]:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}, which pre-training needs: use a BERT vocabulary")
    if (unknown := getattr(tokenizer.model, "unk_token", None)) not in (None, "[UNK]"):
        raise ValueError(f"the tokenizer makes {unknown} of what it does not know, not BERT's [UNK]: rename it there")
    return SpecialIds(*present)


def strips_accents(tokenizer: Tokenizer) -> bool:
    """Whether ``tokenizer`` takes accents, and with them the marks of other scripts, from letters."""
    return tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("\u00e9") == "e"


def token_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int64 (tokens,): the ids that have a token, sorted; a repeated or blank line of a vocab.txt leaves a gap."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return np.array(sorted(number for token, number in vocabulary.items() if token), dtype=np.int64)


def replacement_ids(tokenizer: Tokenizer) -> np.ndarray:
    """int64, sorted: the ids that have a token which is not special, those that may stand in a token's place."""
    added = tokenizer.get_added_tokens_decoder().items()
    special = {*special_ids(tokenizer), *(number for number, token in added if token.special)}
    return np.setdiff1d(token_ids(tokenizer), sorted(special))


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """The rows that an embedding of the ids needs: the largest id and one, whatever gaps there are below."""
    return int(token_ids(tokenizer)[-1]) + 1


def without_ids_from(tokenizer: Tokenizer, first: int) -> Tokenizer:
    """``tokenizer`` without the pieces whose ids are ``first`` or more; itself where it is no WordPiece as BERT's."""
    if not isinstance(tokenizer.model, models.WordPiece) or not tokenizer.model.continuing_subword_prefix:
        return tokenizer
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {piece: number for piece, number in vocabulary.items() if number < first}
    return Tokenizer.from_str(json.dumps(described))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """BLAKE2b-128 of all that ``tokenizer`` is, in hexadecimal."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()


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


def find_tokenizer(source: str | Path) -> Path | None:
    """The ``tokenizer.json``, else ``vocab.txt``, of a checkpoint, a folder or a name on the Hub; None if it has none.

    What says how a ``vocab.txt`` is read comes with it.
    """
    from transformers.utils import cached_file  # takes seconds to import

    optional = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    names = ("tokenizer_config.json", "vocab.txt", "tokenizer.json")  # the first tells the case of the second
    _, vocabulary, described = (cached_file(str(source), name, **optional) for name in names)
    found = described or vocabulary
    return Path(found) if found else None


def differences(tokenizer: Tokenizer, other: Tokenizer) -> list[str]:
    """What may give text other ids in ``other`` ("that one") than in ``tokenizer`` ("this one"); empty where nothing.

    Vocabulary, added tokens, normalizer, pre-tokenizer and model are compared, post-processor and decoder are not.
    """
    ours, theirs = (one.get_vocab(with_added_tokens=True) for one in (tokenizer, other))
    moved = sorted(token for token in ours.keys() | theirs.keys() if token and ours.get(token) != theirs.get(token))
    found = [f"{len(moved)} tokens have other ids there, {moved[0]!r} for one"] if moved else []
    return found + _other_rules(tokenizer, other, ("normalizer", "pre-tokenizer", "model", "added tokens"))


# Of BERT's normalizer: what False and True mean.
MEANINGS = {
    "lowercase": ("is cased", "is uncased"),
    "strip_accents": ("keeps accents", "strips accents"),
    "handle_chinese_chars": ("keeps Chinese characters together", "sets Chinese characters apart"),
    "clean_text": ("keeps control characters", "removes control characters"),
}


def _other_rules(tokenizer: Tokenizer, other: Tokenizer, parts: Sequence[str]) -> list[str]:
    """:func:`differences` beside the vocabulary, in ``parts`` of :func:`_rules`."""
    ours, theirs = _rules(tokenizer), _rules(other)
    found = []
    for part in parts:
        here, there = ours[part], theirs[part]
        if here.get("type") != there.get("type"):
            found.append(f"the {part} of that one is {there.get('type')}, of this one {here.get('type')}")
            continue
        for name in sorted(here.keys() | there.keys()):
            a, b = here.get(name), there.get(name)
            if a == b:
                continue
            if name in MEANINGS and isinstance(a, bool) and isinstance(b, bool):
                found.append(f"that one {MEANINGS[name][b]}, this one {MEANINGS[name][a]}")
            elif isinstance(a, (list, dict)) or isinstance(b, (list, dict)):
                found.append(f"{name} of the {part} differs")
            else:
                found.append(f"{name} of the {part} is {b!r} in that one, {a!r} in this one")
    return found


def _rules(tokenizer: Tokenizer) -> dict[str, dict]:
    """What makes ids of text, without the vocabulary, by part."""
    described = json.loads(tokenizer.to_str())
    normalizer = dict(described["normalizer"] or {})
    if normalizer.get("type") == "BertNormalizer" and normalizer["strip_accents"] is None:
        normalizer["strip_accents"] = normalizer["lowercase"]
    added = {token.pop("content"): token for token in described["added_tokens"]}
    for token in added.values():
        del token["id"], token["special"]
    return {
        "normalizer": normalizer,
        "pre-tokenizer": described["pre_tokenizer"] or {},
        "model": {key: value for key, value in described["model"].items() if key != "vocab"},
        "added tokens": {token: about for token, about in added.items() if token not in SPECIAL_TOKENS},
    }


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, max_length: int = 512) -> Path:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and, of BERT's own tokenizer, ``vocab.txt``.

    ``transformers.AutoTokenizer.from_pretrained(folder)`` gives the ids that ``tokenizer`` gives to whole texts; its
    truncation and padding are left out. ``[CLS]`` and ``[SEP]`` are put around texts where it has no rule of its own. A
    ``vocab.txt`` that would give other ids is removed. Returns the folder.
    """
    folder = Path(folder)
    contents = tokenizer_contents(tokenizer, max_length=max_length)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    if "vocab.txt" not in contents:
        (folder / "vocab.txt").unlink(missing_ok=True)
    return folder


def tokenizer_contents(tokenizer: Tokenizer, *, max_length: int = 512) -> dict[str, bytes]:
    """What :func:`save_tokenizer` writes, by the names of the files."""
    tokenizer = _completed(Tokenizer.from_str(bare_tokenizer(tokenizer).to_str()))
    contents = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    if berts := _berts_settings(tokenizer):
        about = {"tokenizer_class": "BertTokenizerFast", **berts}
        vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        lines = "".join(f"{token}\n" for token, _ in vocabulary)
        if {piece: number for number, piece in enumerate(_lines(lines))} == dict(vocabulary):
            contents["vocab.txt"] = lines.encode()
    else:  # of BERT's classes, transformers reads the vocabulary in tokenizer.json alone
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": MODEL_INPUTS}
    config = about | {"model_max_length": max_length, **SPECIAL_NAMES}
    return contents | {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _berts_settings(tokenizer: Tokenizer) -> dict | None:
    """The arguments of ``BertTokenizerFast`` that make it of its vocabulary; None where it is another tokenizer."""
    described = json.loads(tokenizer.to_str())
    normalizer = described["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer" or described["model"]["type"] != "WordPiece":
        return None
    settings = [normalizer[name] for name in ("lowercase", "strip_accents", "handle_chinese_chars")]
    if any(token not in described["model"]["vocab"] for token in SPECIAL_TOKENS):
        return None
    berts = json.loads(berts_tokenizer(described["model"]["vocab"], *settings).to_str())
    if any(described[part] != berts[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")):
        return None
    return dict(zip(SETTINGS, settings, strict=True)) if _frames_as_bert(tokenizer) else None


# Of a tokenizer_config.json, with what ``transformers`` takes where it does not say.
SETTINGS: dict[str, Any] = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


def load_tokenizer(
    path: str | Path, *, lowercase: bool | None = None, tell: Callable[[str], object] = warnings.warn
) -> Tokenizer:
    """A tokenizer from ``tokenizer.json``, ``vocab.txt`` or a folder that holds one of them.

    A ``vocab.txt`` does not say whether it is cased: ``lowercase`` tells; None takes ``do_lower_case`` of a
    ``tokenizer_config.json`` beside it, else upper-case letters in the vocabulary mean cased. ``strip_accents`` and
    ``tokenize_chinese_chars`` of that file hold in any case. A ``tokenizer.json`` says it itself; its truncation and
    padding are left out, and ``[CLS]`` and ``[SEP]`` put around texts where it has no rule of its own. ``tell`` is
    called with what is odd: lines of a ``vocab.txt`` that are blank or come again (line numbers are ids, as in
    ``transformers``, and the last one of a piece is its id), a ``tokenizer_config.json`` by which ``transformers``
    gives other ids. Raises FileNotFoundError where there is none, ValueError where the file is damaged, special tokens
    are missing, or ``lowercase`` contradicts a ``tokenizer.json``.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.txt")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    config = _configuration(path.with_name("tokenizer_config.json"))
    if path.suffix == ".json":
        tokenizer = _from_json(path, lowercase)
        _tell_other_reading(path, tokenizer, config, tell)
        return tokenizer
    vocabulary = _read_vocabulary(path, tell)
    if lowercase is None:
        lowercase = config.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(piece != piece.lower() for piece in vocabulary if not piece.startswith("["))
    return berts_tokenizer(
        vocabulary, lowercase, config.get("strip_accents"), config.get("tokenize_chinese_chars", True)
    )


def _configuration(path: Path) -> dict:
    """What a ``tokenizer_config.json`` says, nulls left out; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        return {name: value for name, value in json.loads(path.read_bytes()).items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a tokenizer: {error}") from error


def _from_json(path: Path, lowercase: bool | None) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is not a tokenizer of the `tokenizers` library: {error}") from error
    tokenizer = _completed(tokenizer)
    does = bool((json.loads(tokenizer.to_str())["normalizer"] or {}).get("lowercase", False))
    if lowercase is not None and does != lowercase:
        asked, is_now = ("uncased", "cased") if lowercase else ("cased", "uncased")
        raise ValueError(f"{path} says itself that it is {is_now}, but {asked} was asked for: take its vocab.txt")
    return tokenizer


def _tell_other_reading(path: Path, tokenizer: Tokenizer, config: dict, tell: Callable[[str], object]) -> None:
    """Tells where the class that ``tokenizer_config.json`` names makes another tokenizer of the vocabulary."""
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "BertTokenizer":
        return
    settings = (config.get(name, default) for name, default in SETTINGS.items())
    theirs = berts_tokenizer({token: number for number, token in enumerate(SPECIAL_TOKENS)}, *settings)
    if other := _other_rules(tokenizer, theirs, ("normalizer", "pre-tokenizer", "model")):
        tell(
            f"{path} holds here; transformers goes by {config['tokenizer_class']} of the tokenizer_config.json beside "
            f"it, and gives other ids: {'; '.join(other)}"
        )


def _lines(text: str) -> list[str]:
    """The pieces of a ``vocab.txt``, without white space after them, as `tokenizers` reads them."""
    lines = text.split("\n")
    return [line.rstrip() for line in (lines if lines[-1] else lines[:-1])]


def _read_vocabulary(path: Path, tell: Callable[[str], object]) -> dict[str, int]:
    """The ids of a ``vocab.txt`` by their pieces: the numbers of the lines from 0, of a piece's last line."""
    try:
        pieces = _lines(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a vocabulary: not UTF-8 at byte {error.start}") from error
    vocabulary = {piece: number for number, piece in enumerate(pieces) if piece}
    again = [f"{n} ({p!r})" for n, p in enumerate(pieces, 1) if p and vocabulary[p] != n - 1]
    blank = [str(n) for n, piece in enumerate(pieces, 1) if not piece]
    for lines, what in ((again, "have a piece that comes again, and takes its later id"), (blank, "are blank")):
        if lines:
            more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
            tell(f"{path}: lines {', '.join(lines[:5])}{more} {what}: no token has the ids of these lines")
    return vocabulary
