"""The beginning of a corpus as ``prepare`` will see it: documents, their sentences and the pieces of these."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack, cast

import numpy as np
from tokenizers import Tokenizer

from bert_fast.data.corpus import decoded, located_documents
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.formats import Reading
from bert_fast.data.losses import Tally
from bert_fast.data.sentences import split_sentences
from bert_fast.data.tokenizer import bare_tokenizer, require_berts_frame, special_ids

SHOWN = 5  # sentences of a document


@dataclass
class Preview:
    """What was read of a source.

    ``counts`` are ``bytes``, ``documents``, ``sentences``, ``tokens``, ``unknown_tokens`` ([UNK]), and what was skipped
    or changed; ``whole`` says whether that is all of the source. ``documents`` are the first of them: where each is,
    its first sentences with their pieces, and how many sentences it has.
    """

    counts: Tally = field(default_factory=Tally)
    documents: list[tuple[str, list[tuple[str, list[str]]], int]] = field(default_factory=list)
    whole: bool = True


def preview(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    language: str = "en",
    sentences: str = "auto",
    documents: int = 3,
    most_bytes: int = 1 << 20,
    seconds: float = 2.0,
    **reading: Unpack[Reading],
) -> Preview:
    """Reads ``files`` until ``most_bytes`` of text or ``seconds`` are reached, and keeps the first ``documents``; one
    document at least is read.

    A pipe is used up. The other arguments are those of :func:`bert_fast.data.prepare`; it raises the same.
    """
    tokenizer = bare_tokenizer(tokenizer)
    require_berts_frame(tokenizer)
    encoder, unknown, found = SentenceEncoder(tokenizer), special_ids(tokenizer).unk, Preview()
    counts, until = found.counts, time.monotonic() + seconds
    for path in files:
        for raw, within, number in located_documents(path, counts, **reading):
            if counts["documents"] and (counts["bytes"] >= most_bytes or time.monotonic() > until):
                found.whole = False
                return found
            counts["bytes"] += len(raw)
            text = decoded(raw, within, number, counts)
            split = [] if text is None else split_sentences(text.strip(), language, sentences)
            ids, lengths = encoder(split)
            if not len(ids):
                continue
            counts["documents"] += 1
            counts["sentences"] += int((lengths > 0).sum())
            counts["tokens"] += len(ids)
            counts["unknown_tokens"] += int((ids == unknown).sum())
            if len(found.documents) < documents:
                parts = np.split(ids, np.cumsum(lengths)[:SHOWN])[:-1]
                pieces = [[cast(str, tokenizer.id_to_token(int(piece))) for piece in part] for part in parts]
                found.documents.append((f"{within} {number}", list(zip(split, pieces, strict=False)), len(split)))
    return found
