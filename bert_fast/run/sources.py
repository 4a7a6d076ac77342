"""The prepared folders of a run: one, or several with weights; what is trained on of each, and what is held out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bert_fast.data import Corpus, load_tokenizer, open_corpus, read_manifest
from bert_fast.data.pairs import document_tokens
from bert_fast.data.tokenizer import differences
from bert_fast.run.config import ConfigError, PretrainConfig, sources
from bert_fast.run.validation import hold_out


@dataclass
class Source:
    """A prepared ``folder``: what the run calls it, its part of the tokens trained on, and its documents."""

    folder: str
    name: str
    share: float
    manifest: dict
    corpus: Corpus
    held_out: Corpus | None


def open_sources(config: PretrainConfig) -> tuple[list[Source], Tokenizer]:
    """The sources of ``config`` in its order, and the tokenizer that they have in common; ConfigError where not."""
    weights, found = sources(config), []
    tokenizer = None
    for folder, name in zip(weights, _names(list(weights)), strict=True):
        manifest, corpus = read_manifest(folder), open_corpus(folder)
        if tokenizer is None:
            tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        else:
            require_tokenizer(folder, tokenizer, found[0].folder, "--data")
        corpus, held_out = hold_out(corpus, config.validation, seed=config.seed, nsp=config.nsp)
        share = weights[folder] or float(document_tokens(corpus).sum())
        found.append(Source(folder, name, share, manifest, corpus, held_out))
    assert tokenizer is not None  # there is a folder
    total = sum(source.share for source in found)
    for source in found:
        source.share /= total
    return found, tokenizer


def require_tokenizer(folder: str, tokenizer: Tokenizer, theirs: str, option: str) -> None:
    """ConfigError where ``folder``, of ``option``, was prepared with another one than ``tokenizer``, of ``theirs``."""
    if differing := differences(tokenizer, load_tokenizer(Path(folder) / "tokenizer")):
        raise ConfigError(
            f"{option} {folder} was prepared with another tokenizer than {theirs} ({'; '.join(differing)})"
        )


def digest(config: PretrainConfig) -> str:
    """Of the data of ``config``: the manifest's, or of several folders each one's, in order, and its weight."""
    weights = sources(config)
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
