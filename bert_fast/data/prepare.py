"""`prepare`: a corpus of any size to token shards, on all cores, in bounded memory, resumable and splittable.

The corpus is read in order and dealt into units of about ``unit_bytes`` of text, whatever the number of workers or
machines; each unit becomes one shard, written atomically. So a run that was killed makes only the shards that
are missing, and machine I of N makes every N-th.
"""

import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bert_fast.data.corpus import expand_paths, stream_documents
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.sentences import split_sentences
from bert_fast.data.shards import finish, map_tensors, shard_counts, shard_path, write_atomically, write_shard
from bert_fast.data.tokenizer import load_tokenizer, save_tokenizer

_encoder: SentenceEncoder | None = None  # of this process


def prepare(
    paths: str | Path | Iterable[str | Path],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    language: str = "en",
    one_per_file: bool = False,
    text_field: str = "text",
    unit_bytes: int = 8 << 20,
    progress: Callable[[dict], None] | None = None,
) -> dict | None:
    """Writes the shards of a corpus to ``out`` and returns the manifest.

    ``shard=(I, N)`` makes only every N-th shard (I from 0); the call that finds all of them made (in a common
    ``out``) writes index and manifest, the others return None. ``progress`` is called after each shard with
    ``units``, ``units_skipped`` (made before), ``bytes``, ``documents``, ``tokens``. ``workers`` defaults to all cores;
    above 1 the calling script needs the usual ``if __name__ == "__main__":``.

    Memory, whatever the size of the corpus: with U = ``unit_bytes`` + 16 MiB (the longest document) at most 2 *
    ``workers`` + 3 units of U in the calling process, which reads, and 12 U + 128 MiB in each worker (text, sentences,
    ids and the shard's bytes, :class:`SentenceEncoder`'s words); a document counts 41 bytes more than its text. On top
    of it come 16 bytes a document, or 128 MiB where that is less, and a byte a document while duplicates are looked
    for, and the pages of the shards and of the index, which are mapped: the system takes those back when it needs them.

    Counted in the manifest: ``invalid_utf8`` and ``empty_documents`` (skipped), ``nul_bytes`` (documents from which
    they were removed), ``documents_cut``, ``invalid_json``. Raises FileNotFoundError for missing input, ValueError
    for a damaged file, for a corpus without text, and where ``out`` holds shards of other input or settings.
    """
    index, of = shard
    if not 0 <= index < of:
        raise ValueError(f"shard {index}/{of}: the first number must be 0 to {of - 1}")
    out, files = Path(out), expand_paths(paths)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    made_by = {
        "files": [[path.name, path.stat().st_size] for path in files],
        "tokenizer": hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest(),
        "language": language,
        "one_per_file": one_per_file,
        "text_field": text_field,
        "unit_bytes": unit_bytes,
    }
    _same_settings(out / "settings.json", made_by)
    save_tokenizer(tokenizer, out / "tokenizer")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    done: Counter = Counter()

    def report(counts: Counter, skipped: bool) -> None:
        done.update(
            {"units": 1, "units_skipped": int(skipped), **{k: counts[k] for k in ("bytes", "documents", "tokens")}}
        )
        if progress is not None:
            progress(dict(done))

    units = 0
    pool, started = None, False
    running: set[Future] = set()
    try:
        for number, documents, counts in _units(files, one_per_file, text_field, unit_bytes):
            units += 1
            if number % of != index:
                continue
            path = shard_path(out, number)
            if path.is_file():
                map_tensors(path)
                report(shard_counts(path), True)
            elif workers <= 1:
                if not started:
                    _start_worker(tokenizer.to_str())
                    started = True
                report(_make_shard(out, number, documents, counts, language), False)
            else:
                if pool is None:
                    pool = ProcessPoolExecutor(
                        workers, get_context("spawn"), initializer=_start_process, initargs=(tokenizer.to_str(),)
                    )
                running.add(pool.submit(_make_shard, out, number, documents, counts, language))
                if len(running) >= 2 * workers:
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        report(future.result(), False)
        for future in running:
            report(future.result(), False)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    if not all(shard_path(out, number).is_file() for number in range(units)):
        return None
    return finish(out, units, made_by)


def _same_settings(path: Path, settings: dict) -> None:
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := [key for key in settings if before.get(key) != settings[key]]:
            what = "; ".join(f"{key} was {before.get(key)!r}, now {settings[key]!r}" for key in differing)
            raise ValueError(f"{path.parent} holds shards made otherwise ({what}): use another folder")
    else:
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())


def _units(
    files: list[Path], one_per_file: bool, text_field: str, unit_bytes: int
) -> Iterator[tuple[int, list[bytes], Counter]]:
    """(number, documents, what reading them counted) for units of at least ``unit_bytes`` (the last may be less)."""
    number, size = 0, 0
    documents: list[bytes] = []
    counts: Counter = Counter()
    for path in files:
        for document in stream_documents(path, one_per_file=one_per_file, text_field=text_field, counts=counts):
            documents.append(document)
            size += len(document)
            if size >= unit_bytes:
                yield number, documents, Counter(counts)
                counts.clear()  # the reader of this file goes on counting into it
                number, size, documents = number + 1, 0, []
    if documents or counts:
        yield number, documents, counts


def _start_process(tokenizer: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the caller ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core does better than threads
    _start_worker(tokenizer)


def _start_worker(tokenizer: str) -> None:
    global _encoder
    _encoder = SentenceEncoder(Tokenizer.from_str(tokenizer))


def _make_shard(out: Path, number: int, documents: list[bytes], counts: Counter, language: str) -> Counter:
    """Splits, encodes and writes one unit; returns its counts."""
    sentences: list[str] = []
    numbers: list[int] = []  # of sentences, a document
    digests: list[bytes] = []
    for raw in documents:
        counts["bytes"] += len(raw)
        try:
            text = raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            counts["invalid_utf8"] += 1
            continue
        if "\0" in text:
            counts["nul_bytes"] += 1
            text = text.replace("\0", "")
        text = text.strip()
        found = split_sentences(text, language)
        sentences += found
        numbers.append(len(found))
        digests.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
    tokens, lengths = _encoder(sentences)
    before = np.concatenate([[0], np.cumsum(lengths > 0)])  # sentences with a token, before each
    last = np.cumsum(numbers, dtype=np.int64)
    document_sentences = before[last] - before[last - np.array(numbers, dtype=np.int64)]
    full = document_sentences > 0
    if empty := int((~full).sum()):
        counts["empty_documents"] += empty
    arrays = {
        "tokens": tokens,
        "sentence_lengths": lengths[lengths > 0].astype(np.uint32),
        "document_sentences": document_sentences[full].astype(np.uint32),
        "digests": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16)[full],
    }
    counts.update(documents=int(full.sum()), tokens=len(tokens))
    write_shard(out, number, arrays, counts)
    return counts
