"""The prepared folders of a run: one, or several with weights; what is trained on of each, and what is held out.

So are those of ``--validation-data``, of which nothing is trained on.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bert_fast.data import Corpus, load_tokenizer, open_corpus, read_manifest
from bert_fast.data.pairs import document_tokens
from bert_fast.data.tokenizer import differences
from bert_fast.run.config import ConfigError, PretrainConfig, flag, sources
from bert_fast.run.validation import hold_out


@dataclass
class Source:
    """A prepared ``folder``: what the run calls it, its part of the tokens (of the loss, where it is validated on), and
    its documents."""

    folder: str
    name: str
    share: float
    manifest: dict
    corpus: Corpus
    held_out: Corpus | None


def open_sources(config: PretrainConfig) -> tuple[list[Source], Tokenizer]:
    """The sources of ``config`` in its order, and the tokenizer that they have in common; ConfigError where not."""
    first, *_ = sources(config)
    tokenizer = _tokenizer(first, "data")
    return _opened(config, "data", config.share_held_out, tokenizer, first), tokenizer


def open_validation(config: PretrainConfig, tokenizer: Tokenizer, theirs: str) -> list[Source]:
    """Those of ``--validation-data``, prepared with ``tokenizer`` as ``theirs`` was; ConfigError where not."""
    return _opened(config, "validation_data", 0.0, tokenizer, theirs)


def _opened(config: PretrainConfig, option: str, held_out: float, tokenizer: Tokenizer, theirs: str) -> list[Source]:
    weights, found = sources(config, option), []
    for folder, name in zip(weights, _names(list(weights)), strict=True):
        if folder != theirs and (differing := differences(tokenizer, _tokenizer(folder, option))):
            raise ConfigError(
                f"{flag(option)} {folder} was prepared with another tokenizer than {theirs} ({'; '.join(differing)})"
            )
        corpus, held = hold_out(open_corpus(folder), held_out, seed=config.seed, nsp=config.nsp)
        share = weights[folder] or float(document_tokens(corpus).sum())
        found.append(Source(folder, name, share, read_manifest(folder), corpus, held))
    total = sum(source.share for source in found)
    for source in found:
        source.share /= total
    return found


def _tokenizer(folder: str, option: str) -> Tokenizer:
    """That which ``folder`` was prepared with; FileNotFoundError where nothing was."""
    try:
        read_manifest(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{flag(option)} {folder}: {error}") from error
    return load_tokenizer(Path(folder) / "tokenizer")


def digest(config: PretrainConfig, option: str = "data") -> str:
    """Of the folders of ``option``: the manifest's, or of several each one's, in order, and its weight."""
    weights = sources(config, option)
    total = sum(weight or 0 for weight in weights.values())
    found = []
    for folder, weight in weights.items():
        manifest = (Path(folder) / "manifest.json").read_bytes()
        share = f":{weight / total!r}" if weight and len(weights) > 1 else ""
        found.append(hashlib.blake2b(manifest, digest_size=16).hexdigest() + share)
    return " ".join(found)


def _names(folders: list[str]) -> list[str]:
    """Short names, where they tell the folders apart."""
    short = [Path(folder).name for folder in folders]
    return short if len(set(short)) == len(short) and all(short) else folders


def described(config: PretrainConfig) -> str:
    """The data of ``config``, in words."""
    return " and ".join(sources(config))
