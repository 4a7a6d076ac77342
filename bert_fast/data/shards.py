"""Token shards on disk: safetensors files, memory-mapped, with an index, checksums and a manifest.

manifest.json        how the data were made, counts, and size and BLAKE2b of every shard
sentence_ends.npy    int64 (sentences + 1,): token offset at which each sentence ends, after a leading 0
documents.npy        int64 (documents, 2): first sentence and the one after the last, duplicates left out
tokenizer/           the tokenizer
shards/00000000.safetensors ...   tokens (uint16 or uint32), sentence_lengths and document_sentences (uint32),
                     digests uint8 (documents, 16): BLAKE2b-128 of each document's text
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bert_fast.data.files import write_atomically, written_aside
from bert_fast.data.losses import Tally
from bert_fast.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from bert_fast.data.pairs import Corpus

DOCUMENTS_A_PASS = 1 << 21  # documents of which digests are held in memory at a time while duplicates are looked for


def shard_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` lies."""
    return folder / "shards" / f"{number:08d}.safetensors"


def prepared_files(folder: str | Path) -> list[Path]:
    """What ``prepare`` writes into ``folder``."""
    names = ("manifest.json", "sentence_ends.npy", "documents.npy", "tokenizer", "shards", "settings.json")
    return [Path(folder) / name for name in names]


def write_shard(folder: Path, number: int, arrays: dict[str, np.ndarray], counts: Tally, text: str) -> None:
    """Writes one shard, in its header its ``counts`` and ``text``, the digest of what it was made from."""
    made = {"counts": counts, "text": text} | _places(counts)
    # One entry: safetensors orders them at random.
    contents = save(arrays, metadata={"made": json.dumps(made, sort_keys=True)})
    write_atomically(shard_path(folder, number), contents)


def _places(counts: Tally) -> dict:
    """The entry of a header or manifest for the places of what was lost; none where nothing was."""
    return {"places": dict(sorted(counts.places.items()))} if counts.places else {}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only memory maps; ValueError naming a file cut short or damaged."""
    kinds = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
    try:
        with safe_open(path, framework="np"):  # checks header and size
            pass
    except SafetensorError as error:
        raise ValueError(f"shard {path} is damaged or cut short ({error}): delete it and run prepare again") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    maps = {}
    for name, about in header.items():
        kind, shape, begin = kinds[about["dtype"]], tuple(about["shape"]), 8 + size + about["data_offsets"][0]
        empty = 0 in shape  # the system cannot map nothing
        maps[name] = np.zeros(shape, kind) if empty else np.memmap(path, kind, "r", offset=begin, shape=shape)
    return maps


def shard_made(path: Path) -> tuple[Tally, str]:
    """What the header of a shard says: its counts, and the digest of the text it was made from."""
    with safe_open(path, framework="np") as file:
        about = file.metadata() or {}
    if "made" not in about:
        raise ValueError(f"shard {path} does not say what it was made from: delete it and run prepare again")
    made = json.loads(about["made"])
    return Tally(made["counts"], made.get("places")), made["text"]


class ShardedTokens:
    """The tokens of all shards as one array of which slices within a shard can be taken; opened when first used."""

    def __init__(self, paths: list[Path], ends: list[int]):
        self.paths, self.ends, self.maps = paths, ends, {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, which: slice) -> np.ndarray:
        shard = bisect.bisect_right(self.ends, which.start)
        if shard not in self.maps:
            tokens = map_tensors(self.paths[shard])["tokens"]
            self.maps[shard] = tokens.view(np.ndarray)  # still mapped; slices of a memmap cost ten times as much
        begin = self.ends[shard - 1] if shard else 0
        return self.maps[shard][which.start - begin : which.stop - begin]

    def __getstate__(self):  # memory maps would be pickled with all their data
        return {**self.__dict__, "maps": {}}


@contextmanager
def _index(path: Path, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """An int64 ``.npy`` file whose elements are written in order; there when the block ends without an error.

    Ordinary writes: into a memory map, a full disk would be SIGBUS, which ends the process without a word.
    """
    with written_aside(path) as file:
        about = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, about)
        yield file


def finish(folder: Path, shards: int, made_by: dict) -> dict:
    """Finds duplicates over all shards, writes index and manifest, and returns the manifest."""
    paths = [shard_path(folder, number) for number in range(shards)]
    counts = Tally()
    entries = []
    for path in paths:
        maps = map_tensors(path)
        counts.update(shard_made(path)[0])
        checksum = _checksum(path)
        sizes = {name: len(maps[key]) for name, key in (("tokens", "tokens"), ("sentences", "sentence_lengths"))}
        sizes["documents"] = len(maps["document_sentences"])
        entries.append({"file": path.name, "bytes": path.stat().st_size, "blake2b": checksum, **sizes})
    total = Counter()
    for entry in entries:
        total.update({key: entry[key] for key in ("tokens", "sentences", "documents")})
    if not total["documents"]:
        raise ValueError(f"the corpus holds no usable document: {'; '.join(counts.described()) or 'it is empty'}")
    keep = _first_of_each(paths, total["documents"])
    kept = int(keep.sum())
    sizes = (total["sentences"] + 1,), (kept, 2)
    with (
        _index(folder / "sentence_ends.npy", sizes[0]) as ends,
        _index(folder / "documents.npy", sizes[1]) as documents,
    ):
        ends.write(np.zeros(1, np.int64).tobytes())
        for sentences, bounds in _index_parts(paths, keep):
            ends.write(sentences.tobytes())
            documents.write(bounds.tobytes())
    manifest = {
        "made_by": made_by,
        "documents": kept,
        "duplicate_documents": total["documents"] - kept,
        "sentences": total["sentences"],
        "tokens": total["tokens"],
        "counts": dict(sorted(counts.items())),
        **_places(counts),
        "shards": entries,
    }
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _index_parts(paths: list[Path], keep: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each shard its part of sentence_ends.npy, int64 (sentences,), and of documents.npy, int64 (documents, 2)."""
    sentence = document = end = 0
    for path in paths:
        maps = map_tensors(path)
        ends = end + np.cumsum(maps["sentence_lengths"], dtype=np.int64)
        last = sentence + np.cumsum(maps["document_sentences"], dtype=np.int64)
        first = np.concatenate([[sentence], last[:-1]]) if len(last) else last
        yield ends, np.stack([first, last], axis=1)[keep[document : document + len(last)]].astype(np.int64)
        sentence, document = sentence + len(ends), document + len(last)
        end = int(ends[-1]) if len(ends) else end


def _first_of_each(paths: list[Path], total: int) -> np.ndarray:
    """bool (total,): False for documents whose digest an earlier one has; passes over ranges of the first two bytes."""
    keep = np.ones(total, dtype=bool)
    passes = min(1 << 16, -(-total // DOCUMENTS_A_PASS))
    for part in range(passes):
        low, high = (65536 * part // passes, 65536 * (part + 1) // passes)
        digests, numbers, start = [], [], 0
        for path in paths:
            found = map_tensors(path)["digests"]
            lead = found[:, 0].astype(np.uint16) * np.uint16(256) + found[:, 1]
            here = np.flatnonzero((lead >= low) & (lead < high))
            digests.append(found[here].view(np.uint64))
            numbers.append(start + here)
            start += len(found)
        words, number = np.concatenate(digests), np.concatenate(numbers)
        del digests, numbers
        order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ones stay in the order of the corpus
        words = words[order]
        same = (words[1:] == words[:-1]).all(axis=1)
        keep[number[order[1:][same]]] = False
    return keep


def open_corpus(folder: str | Path, *, verify: bool = False) -> "Corpus":
    """The corpus that ``prepare`` wrote, memory-mapped; ``verify`` reads every shard and compares checksums.

    Raises FileNotFoundError where there is no manifest (prepare has not finished) and ValueError naming a shard
    whose size or checksum differs.
    """
    from bert_fast.data.pairs import Corpus  # here: it imports torch, which writing shards does not need

    folder = Path(folder)
    manifest = read_manifest(folder)
    paths = [folder / "shards" / entry["file"] for entry in manifest["shards"]]
    for path, entry in zip(paths, manifest["shards"], strict=True):
        _require_whole(path, entry, verify)
    ends = np.cumsum([entry["tokens"] for entry in manifest["shards"]]).tolist()
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("sentence_ends", "documents"))
    return Corpus(ShardedTokens(paths, ends), *arrays)


def _require_whole(path: Path, entry: dict, verify: bool) -> None:
    """ValueError where the shard has another size than ``entry`` of the manifest says, or checksum if ``verify``."""
    size = path.stat().st_size if path.is_file() else 0
    if size != entry["bytes"]:
        raise ValueError(f"shard {path} has {size} bytes, the manifest says {entry['bytes']}: run prepare again")
    if verify and _checksum(path) != entry["blake2b"]:
        raise ValueError(f"shard {path} is damaged (checksum): delete it and run prepare again")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def damages(folder: str | Path, progress: Callable[[int], None] = lambda size: None) -> list[str]:
    """A line for each shard that is not what the manifest says, for an index that is not what whole shards give, and
    for a tokenizer that cannot be read. ``progress`` is told the bytes of a shard when it has been read.

    FileNotFoundError where there is no manifest.
    """
    folder = Path(folder)
    manifest, found = read_manifest(folder), []
    paths = [folder / "shards" / entry["file"] for entry in manifest["shards"]]
    for path, entry in zip(paths, manifest["shards"], strict=True):
        try:
            _require_whole(path, entry, True)
        except (OSError, ValueError) as error:  # the first: the disk does not give what it has
            found.append(str(error))
        progress(entry["bytes"])
    if not found:
        keep = _first_of_each(paths, sum(entry["documents"] for entry in manifest["shards"]))
        ends = chain([np.zeros(1, np.int64)], (ends for ends, _ in _index_parts(paths, keep)))
        bounds = (bounds for _, bounds in _index_parts(paths, keep))
        for name, parts in (("sentence_ends.npy", ends), ("documents.npy", bounds)):
            if not _is_array_of(folder / name, parts):
                found.append(f"{folder / name} is not the index of its shards: run prepare again")
    try:
        load_tokenizer(folder / "tokenizer")
    except (OSError, ValueError) as error:
        found.append(str(error))
    return found


def _is_array_of(path: Path, parts: Iterable[np.ndarray]) -> bool:
    """Whether the .npy file holds int64 ``parts`` one after another, and nothing else."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    place = 0
    for part in parts:
        if not np.array_equal(array[place : place + len(part)], part):
            return False
        place += len(part)
    return array.dtype == np.int64 and place == len(array)


def read_manifest(folder: str | Path) -> dict:
    """The manifest of prepared data; FileNotFoundError where prepare has not finished, ValueError if it is no JSON."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: prepare has not been run there, or not to its end")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run prepare again") from error
