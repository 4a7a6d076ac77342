"""`prepare`: a corpus of any size to token shards, on all cores, in bounded memory, resumable and splittable.

The corpus is read in order and dealt into units of about ``unit_bytes`` of text, whatever the number of workers or
machines; each unit becomes one shard, written atomically. So a run that was killed makes only the shards that
are missing, and machine I of N makes every N-th. A shard says by a digest which text it was made from, and every run
reads the whole corpus: one that changed meanwhile is noticed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from bert_fast.data.corpus import decoded, located_documents
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.files import sole_writer, write_atomically
from bert_fast.data.formats import Reading, require_text
from bert_fast.data.hub_datasets import called, is_hub
from bert_fast.data.losses import Places, Tally
from bert_fast.data.paths import expand_paths, is_pipe
from bert_fast.data.sentences import RULES, split_sentences
from bert_fast.data.shards import (
    COUNTED,
    finish,
    prepared_files,
    recorded_shards,
    require_as_recorded,
    shard_made,
    shard_path,
    sums_before,
    write_shard,
)
from bert_fast.data.tokenizer import (
    bare_tokenizer,
    load_tokenizer,
    require_berts_frame,
    save_tokenizer,
    special_ids,
    tokenizer_digest,
    tokenizer_files,
)
from bert_fast.data.workers import in_processes

PARALLELISM = "TOKENIZERS_PARALLELISM"  # of the environment: whether `tokenizers` uses threads
_encoder: SentenceEncoder | None = None  # of a worker process


@dataclass
class Unit:
    """What becomes one shard: consecutive documents, where they are, what reading them counted, and their files."""

    number: int
    documents: list[bytes] = field(default_factory=list)
    places: Places = field(default_factory=Places)
    counts: Tally = field(default_factory=Tally)
    files: list[Path] = field(default_factory=list)


def prepare(
    paths: str | Path | Iterable[str | Path],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    workers: int | None = None,
    language: str = "en",
    sentences: str = "auto",
    one_per_file: bool = False,
    text_field: str = "text",
    file_format: str | None = None,
    unit_bytes: int = 8 << 20,
    progress: Callable[[dict], None] | None = None,
) -> dict | None:
    """Writes the shards of a corpus to ``out`` and returns the manifest.

    ``shard=(I, N)`` makes only every N-th shard (I from 0); the call that finds all of them made (in a common
    ``out``) writes index and manifest, the others return None. ``progress`` is called after each shard with
    ``units``, ``units_skipped`` (made before), ``bytes``, ``documents``, ``tokens``. ``workers`` defaults to all cores;
    above 1 the calling script needs the usual ``if __name__ == "__main__":``.

    ``sentences`` and ``language`` are those of :func:`split_sentences`. Of documents with the same token ids, however
    they are split and whatever the tokenizer drops (line ends, white space, case), the first one is kept.

    Stopped by a signal or an error, it kills its workers and leaves the shards that are made.

    Memory, whatever the size of the corpus: with U = ``unit_bytes`` + 16 MiB (the longest document) at most
    ``workers`` + 3 units of U in the calling process, which reads, and 12 U + 128 MiB in each worker (text, sentences,
    ids and the shard's bytes, :class:`SentenceEncoder`'s words); a document counts 49 bytes more than its text. Reading
    takes up to 8 times the longest JSON line or array, or 4 times the longest line or field of a table (at most 64 MiB
    of them), or 256 rows of Parquet. At the end come the pages
    of two shards, mapped one after another to write the index from them (the index itself is not mapped, but written),
    92 bytes a document, or 184 MiB where that is less, while duplicates are looked for, and throughout a byte a
    document and about 1 KiB a file and a shard.

    The corpus is read once, so that it may be ``-`` (standard input) or a pipe: nothing of it is kept, and a run goes
    on where it was if the same is given again. ``text_field`` and ``file_format`` are those of
    :func:`stream_documents`.

    ``documents``, ``sentences`` and ``tokens`` of the manifest, and of its ``counts`` ``text_characters``, those of the
    sentences, ``unknown_tokens`` ([UNK]), and what a :class:`SentenceEncoder` says is lost, are those kept;
    ``duplicate_documents`` and ``duplicate_tokens`` were dropped; ``one_sentence_documents`` and
    ``one_sentence_tokens`` are kept, and their pairs are pieces of a sentence. Counted of all that was read: ``bytes``,
    ``invalid_utf8`` and ``empty_documents`` (skipped), ``nul_bytes`` and ``lone_surrogates`` (documents from which they
    were removed, in which U+FFFD took their place), and what :func:`stream_documents` counts; ``places``, if any, are
    the first three of each ("FILE, line 3: why"), kept in the shards' headers. ``tokenizer`` may be a fast one of
    ``transformers``.

    Raises FileNotFoundError for missing input; ValueError for a damaged file, for a corpus without text, where another
    process makes the same part in ``out`` (``FolderInUse``), where ``out`` holds shards of other settings or of text
    that has changed since (modification times do not matter), and where a file changes while being read;
    ChildProcessError where a worker is killed.
    """
    index, of = shard
    if not 0 <= index < of:
        raise ValueError(f"shard {index}/{of}: the first number must be 0 to {of - 1}")
    if sentences not in RULES:
        raise ValueError(f"sentences {sentences!r} is none of {', '.join(RULES)}")
    out, no_text = Path(out), prepared_files(out)
    if isinstance(tokenizer, (str, Path)):
        no_text += tokenizer_files(tokenizer)
    files = expand_paths(paths, without=no_text)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, Path)) else bare_tokenizer(tokenizer)
    require_berts_frame(tokenizer)
    require_text(files, file_format)
    versions = {path: _version(path) for path in files}
    reading: Reading = {"one_per_file": one_per_file, "text_field": text_field, "file_format": file_format}
    made_by = {
        "files": [[_name(path), size] for path, (size, _) in versions.items()],
        "tokenizer": tokenizer_digest(tokenizer),
        "language": language,
        "sentences": sentences,
        "one_per_file": one_per_file,
        "text_field": text_field,
        "unit_bytes": unit_bytes,
    }
    if file_format is not None:  # else as earlier versions wrote it
        made_by["file_format"] = file_format
    part = _Part(out, index, of, progress)
    with sole_writer(out, index, of):
        _same_settings(out / "settings.json", made_by)
        save_tokenizer(tokenizer, out / "tokenizer")
        missing = ((out, unit, language, sentences) for unit in part.missing(_units(files, reading, unit_bytes)))
        with closing(_made(tokenizer, missing, workers)) as made:
            for counts in made:
                part.report(counts, skipped=False)
        if not part.all_made():
            return None
        _same_settings(out / "settings.json", made_by)  # of machines that start at once, one wrote it last
        if changed := [path for path, before in versions.items() if _version(path) != before]:
            raise ValueError(f"{_some(changed)} changed while being read: the same again compares it with what is made")
        return finish(out, part.units, made_by)


class _Part:
    """The shards ``index``, ``index + of`` and so on in ``out``, which one call makes or finds made, and tells of."""

    def __init__(self, out: Path, index: int, of: int, progress: Callable[[dict], None] | None):
        self.out, self.index, self.of, self.progress = out, index, of, progress
        self.recorded, self.done = recorded_shards(out), Counter[str]()
        self.units = 0  # of the whole corpus, as far as it is read
        self.elsewhere: list[tuple[int, str, list[Path]]] = []  # other parts' units: number, digest of the text, files

    def missing(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """Those of ``units`` that are to be made; what is there is checked and counted."""
        for unit in units:
            self.units += 1
            if unit.number % self.of != self.index:
                self.elsewhere.append((unit.number, _digest(unit), unit.files))
            elif (path := shard_path(self.out, unit.number)).is_file():
                require_as_recorded(path, self.recorded.get(path.name))
                self.report(_same_text(path, _digest(unit), unit.files), skipped=True)
            else:
                yield unit

    def report(self, counts: Counter, skipped: bool) -> None:
        """One more shard of this part is there."""
        self.done.update(
            {"units": 1, "units_skipped": int(skipped), **{k: counts[k] for k in ("bytes", "documents", "tokens")}}
        )
        if self.progress is not None:
            self.progress(dict(self.done))

    def all_made(self) -> bool:
        """Every part's shards are there; ValueError where another's was made from another text."""
        if not all(shard_path(self.out, number).is_file() for number in range(self.units)):
            return False
        for number, digest, within in self.elsewhere:
            _same_text(shard_path(self.out, number), digest, within)
        return True


def _made(tokenizer: Tokenizer, tasks: Iterator[tuple], workers: int | None) -> Generator[Counter, None, None]:
    """The counts of each shard, made by :func:`_make_shard` in ``workers`` processes (None: one a core)."""
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers <= 1:
        return _make_here(SentenceEncoder(tokenizer), tasks)
    return in_processes(workers, _start_process, (tokenizer.to_str(),), _make_in_process, tasks)


def _same_settings(path: Path, settings: dict) -> None:
    if not path.is_file():
        write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        was, now = ([f"{name} ({size} bytes)" for name, size in about["files"]] for about in (before, settings))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): use another folder") from error
    if before == settings:
        return
    said = [{key: repr(value) for key, value in about.items()} for about in (before, settings)]
    keys = [key for key in settings | before if said[0].get(key) != said[1].get(key)]
    what = [f"{key} was {said[0].get(key, 'not said')}, now {said[1].get(key, 'not said')}" for key in keys]
    if was != now:
        gone, new = (", ".join(list(Counter(a) - Counter(b))[:3]) or "none" for a, b in ((was, now), (now, was)))
        what[0] = f"files gone or changed: {gone}; new or changed: {new}"
    raise ValueError(f"{path.parent} holds shards made otherwise ({'; '.join(what)}): use another folder")


def _same_text(path: Path, digest: str, files: list[Path]) -> Counter:
    """The counts of a shard that is there; ValueError where it was made from another text than ``files`` hold now."""
    counts, before = shard_made(path)
    if before != digest:
        made = path.stat().st_mtime_ns
        changed = [file for file in files if is_pipe(file) or file.stat().st_mtime_ns >= made] or files
        raise ValueError(
            f"{_some(changed)} changed since shard {path} was made from it, or an earlier version of bert_fast read it "
            "otherwise: use another folder"
        )
    return counts


def _name(path: Path) -> str:
    """What the settings call a file; of a pipe nothing is known."""
    return called(path) if is_hub(path) else "-" if is_pipe(path) else path.name


def _version(path: Path) -> tuple[int, int] | tuple[None, None]:
    """Size and time of change; of a pipe nothing is known."""
    if is_pipe(path):
        return None, None
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _some(files: list[Path]) -> str:
    names = ", ".join(str(file) for file in files[:3])
    return names if len(files) <= 3 else f"{names} or others ({len(files)} files)"


def _units(files: list[Path], reading: Reading, unit_bytes: int) -> Iterator[Unit]:
    """Units of at least ``unit_bytes`` (the last may be less)."""
    unit, size = Unit(0), 0
    counts = Tally()  # the reader of a file goes on counting into it
    for path in files:
        unit.files.append(path)
        for document, within, number in located_documents(path, counts, **reading):
            unit.documents.append(document)
            unit.places.append(within, number)
            size += len(document)
            if size >= unit_bytes:
                unit.counts.update(counts)
                counts.clear()
                yield unit
                unit, size = Unit(unit.number + 1, files=[path]), 0
    if unit.documents or counts:
        unit.counts.update(counts)
        yield unit


def _digest(unit: Unit) -> str:
    """SHA-256 (today's processors compute it in hardware) of documents and of what reading them cut and skipped.

    Of the counts those alone that have always been counted: the shards of earlier versions are known again.
    """
    counts = {reason: unit.counts[reason] for reason in ("documents_cut", "invalid_json") if unit.counts[reason]}
    digest = hashlib.sha256(json.dumps(counts, sort_keys=True).encode())
    for document in unit.documents:
        digest.update(b"%d:" % len(document))
        digest.update(document)
    return digest.hexdigest()


def _start_process(tokenizer: str) -> None:
    global _encoder
    os.environ[PARALLELISM] = "false"  # one process a core does better than threads
    _encoder = SentenceEncoder(Tokenizer.from_str(tokenizer))


def _make_in_process(*task) -> Counter:
    assert _encoder is not None  # _start_process made it
    return _make_shard(_encoder, *task)


def _make_here(encoder: SentenceEncoder, tasks: Iterator[tuple]) -> Generator[Counter, None, None]:
    """Makes the shards in this process, in one thread, and leaves its environment as it is."""
    for task in tasks:
        before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = "false"
        try:
            counts = _make_shard(encoder, *task)
        finally:
            if before is None:
                del os.environ[PARALLELISM]
            else:
                os.environ[PARALLELISM] = before
        yield counts


def _make_shard(encoder: SentenceEncoder, out: Path, unit: Unit, language: str, rule: str) -> Tally:
    """Splits, encodes and writes one unit; returns its counts."""
    text, counts = _digest(unit), unit.counts
    sentences: list[str] = []
    numbers: list[int] = []  # of sentences, a document
    kept: list[int] = []  # of documents
    for index, raw in enumerate(unit.documents):
        counts["bytes"] += len(raw)
        content = decoded(raw, *unit.places[index], counts)
        if content is None:
            continue
        content = content.strip()
        found = split_sentences(content, language, rule)
        sentences += found
        numbers.append(len(found))
        kept.append(index)
    tokens, lengths = encoder(sentences)
    bounds = sums_before(numbers)  # of documents, in sentences
    with_token, ends = (sums_before(of_each)[bounds] for of_each in (lengths > 0, lengths))
    full = np.diff(ends) > 0
    for number in np.flatnonzero(~full):
        counts.note("empty_documents", "{} {}".format(*unit.places[kept[number]]))
    unknown = np.searchsorted(np.flatnonzero(tokens == special_ids(encoder.tokenizer).unk), ends)
    of_sentences = {"text_characters": map(len, sentences), **encoder.lost}
    sums = {name: sums_before(list(of_each))[bounds] for name, of_each in of_sentences.items()}
    sums["unknown_tokens"] = unknown
    counts.update({name: int(before[-1]) for name, before in sums.items() if before[-1]})
    digests = [hashlib.blake2b(tokens[a:b].data, digest_size=16).digest() for a, b in pairwise(ends) if a < b]
    arrays = {
        "tokens": tokens,
        "sentence_lengths": lengths[lengths > 0].astype(np.uint32),
        "document_sentences": np.diff(with_token)[full].astype(np.uint32),
        "document_counts": np.stack([np.diff(sums[name])[full] for name in COUNTED], axis=1).astype(np.uint32),
        "digests": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16),
    }
    counts.update(documents=int(full.sum()), tokens=len(tokens))
    write_shard(out, unit.number, arrays, counts, text)
    return counts
