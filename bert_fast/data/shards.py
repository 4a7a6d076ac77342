"""Token shards on disk: safetensors files, memory-mapped, with an index, checksums and a manifest.

manifest.json        how the data were made, what is kept and what was dropped, size and BLAKE2b of every other file,
                     and the BLAKE2b of all that
settings.json        how the data are made
sentence_ends.npy    int64 (sentences + 1,): token offset at which each sentence of the shards ends, after a leading 0
documents.npy        int64 (documents, 2): first sentence and the one after the last, duplicates left out
tokenizer/           the tokenizer
shards/00000000.safetensors ...   tokens (uint16 or uint32); sentence_lengths and document_sentences (uint32);
                     document_counts uint32 (documents, 4): COUNTED of each; digests uint8 (documents, 16): BLAKE2b-128
                     of each document's token ids

Folders of the first version open as well: their manifests have the checksums of shards alone, their totals count the
duplicates (documents of equal text) that were left out, and their shards have no document_counts.
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bert_fast.data.files import checksum, write_atomically, written_aside
from bert_fast.data.losses import Tally
from bert_fast.data.tokenizer import load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from bert_fast.data.pairs import Corpus

TENSORS = {"tokens", "sentence_lengths", "document_sentences", "digests"}  # of every shard
COUNTED = ("unknown_tokens", "text_characters", "long_words", "marks_stripped")
INDEX = ("sentence_ends.npy", "documents.npy")
CHECKED_AT_ONCE = 1 << 20  # elements of an index
# What a manifest and each of its shards say, of which kind.
MANIFEST = {
    "made_by": dict,
    "documents": int,
    "duplicate_documents": int,
    "sentences": int,
    "tokens": int,
    "shards": list,
}
ENTRY = {"file": str, "bytes": int, "blake2b": str, "tokens": int, "sentences": int, "documents": int}
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
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        maps = {}
        for name, about in header.items():
            kind, shape, begin = kinds[about["dtype"]], tuple(about["shape"]), 8 + size + about["data_offsets"][0]
            empty = 0 in shape  # the system cannot map nothing
            maps[name] = np.zeros(shape, kind) if empty else np.memmap(path, kind, "r", offset=begin, shape=shape)
        if lacks := TENSORS - maps.keys():
            raise KeyError(*lacks)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"shard {path} is damaged or cut short ({error}): delete it and run prepare again") from error
    return maps


def recorded_shards(folder: Path) -> dict[str, dict]:
    """What the manifest says of each shard, by its name; nothing where there is none, or a damaged one."""
    try:
        return {entry["file"]: entry for entry in read_manifest(folder)["shards"]}
    except (FileNotFoundError, ValueError):
        return {}


def require_as_recorded(path: Path, entry: dict | None) -> None:
    """ValueError where a shard cannot be read, contradicts itself, or is not what ``entry`` of a manifest says."""
    maps = map_tensors(path)
    for counts, counted in (("sentence_lengths", "tokens"), ("document_sentences", "sentence_lengths")):
        if maps[counts].sum(dtype=np.int64) != len(maps[counted]):
            raise ValueError(f"shard {path} is damaged ({counts}): delete it and run prepare again")
    if entry is not None:
        _require_whole(path, entry, True)


def shard_made(path: Path) -> tuple[Tally, str]:
    """What the header of a shard says: its counts, and the digest of the text it was made from."""
    try:
        with safe_open(path, framework="np") as file:
            made = json.loads(file.metadata()["made"])
        return Tally(made["counts"], made.get("places")), made["text"]
    except (SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"shard {path} does not say what it was made from: delete it and run prepare again") from error


class ShardedTokens:
    """The tokens of all shards as one array of which slices within a shard can be taken; opened when first used."""

    def __init__(self, paths: list[Path], ends: list[int]):
        self.paths, self.ends = paths, ends
        self.maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, which: slice) -> np.ndarray:
        shard = bisect.bisect_right(self.ends, which.start)
        begin = self.ends[shard - 1] if shard else 0
        if shard not in self.maps:
            tokens = map_tensors(self.paths[shard])["tokens"]
            if tokens.shape != (self.ends[shard] - begin,):
                raise ValueError(
                    f"shard {self.paths[shard]} is damaged ({len(tokens):,} tokens, the manifest says "
                    f"{self.ends[shard] - begin:,}): delete it and run prepare again"
                )
            self.maps[shard] = tokens.view(np.ndarray)  # still mapped; slices of a memmap cost ten times as much
        return self.maps[shard][which.start - begin : which.stop - begin]

    def file_of(self, token: int) -> Path:
        """The shard that holds ``token``, counted from the first of all."""
        return self.paths[bisect.bisect_right(self.ends, token)]

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
        sizes = {name: len(maps[key]) for name, key in (("tokens", "tokens"), ("sentences", "sentence_lengths"))}
        sizes["documents"] = len(maps["document_sentences"])
        entries.append({"file": path.name, **_size_and_sum(path), **sizes})
    total: Counter[str] = Counter()
    for entry in entries:
        total.update({key: entry[key] for key in ("tokens", "sentences", "documents")})
    if not total["documents"]:
        raise ValueError(f"the corpus holds no usable document: {'; '.join(counts.described()) or 'it is empty'}")
    keep = _first_of_each(paths, total["documents"])
    kept: Counter = Counter()
    with (
        _index(folder / "sentence_ends.npy", (total["sentences"] + 1,)) as ends,
        _index(folder / "documents.npy", (int(keep.sum()), 2)) as documents,
    ):
        ends.write(np.zeros(1, np.int64).tobytes())
        for path, part, sentences, bounds in _index_parts(paths, keep):
            ends.write(sentences.tobytes())
            documents.write(bounds.tobytes())
            kept.update(_kept(path, part))
    others = [folder / "settings.json", *(folder / name for name in INDEX), *(folder / "tokenizer").glob("[!.]*")]
    others = sorted(path for path in others if path.is_file())
    manifest = {
        "made_by": made_by,
        "documents": kept["documents"],
        "duplicate_documents": total["documents"] - kept["documents"],
        "duplicate_tokens": total["tokens"] - kept["tokens"],
        **{key: kept[key] for key in ("sentences", "tokens", "one_sentence_documents", "one_sentence_tokens")},
        "counts": {key: kept.get(key, counts[key]) for key in sorted(counts)},
        **_places(counts),
        "shards": entries,
        "files": {str(path.relative_to(folder)): _size_and_sum(path) for path in others},
    }
    manifest["blake2b"] = _sum_of(manifest)
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _kept(path: Path, keep: np.ndarray) -> Counter:
    """Totals over the documents of a shard for which ``keep``, bool (documents,), holds."""
    maps = map_tensors(path)
    numbers = maps["document_sentences"]
    tokens = np.diff(sums_before(maps["sentence_lengths"])[sums_before(numbers)])
    alone = keep & (numbers == 1)
    return Counter(
        documents=int(keep.sum()),
        sentences=int(numbers[keep].sum()),
        tokens=int(tokens[keep].sum()),
        **dict(zip(COUNTED, maps["document_counts"][keep].sum(axis=0, dtype=np.int64).tolist(), strict=True)),
        one_sentence_documents=int(alone.sum()),
        one_sentence_tokens=int(tokens[alone].sum()),
    )


def _index_parts(paths: list[Path], keep: np.ndarray) -> Iterator[tuple[Path, np.ndarray, np.ndarray, np.ndarray]]:
    """Each shard, its part of ``keep``, of sentence_ends.npy, int64 (sentences,), and of documents.npy, (kept, 2)."""
    sentence = document = end = 0
    for path in paths:
        maps = map_tensors(path)
        ends, bounds = end + sums_before(maps["sentence_lengths"]), sentence + sums_before(maps["document_sentences"])
        part = keep[document : document + len(bounds) - 1]
        yield path, part, ends[1:], np.stack([bounds[:-1], bounds[1:]], axis=1)[part]
        sentence, document, end = int(bounds[-1]), document + len(part), int(ends[-1])


def sums_before(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 (n + 1,): the sum of ``counts`` (n,) before each, and of all at the end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


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

    Index and tokenizer are always compared with their checksums. Raises FileNotFoundError where there is no manifest
    (prepare has not finished) and ValueError naming a shard whose size or checksum differs, or another damaged file.
    """
    manifest = read_manifest(folder)
    try:
        return _open(Path(folder), manifest, verify)
    except ValueError as error:
        raise ValueError(f"{error} (`bert-fast verify {folder}` tells of every file)") from error


def _open(folder: Path, manifest: dict, verify: bool) -> "Corpus":
    from bert_fast.data.pairs import Corpus  # here: it imports torch, which writing shards does not need

    paths = [folder / "shards" / entry["file"] for entry in manifest["shards"]]
    for path, entry in zip(paths, manifest["shards"], strict=True):
        _require_whole(path, entry, verify)
    for name, entry in manifest.get("files", {}).items():
        if name != "settings.json":  # for prepare alone
            _require_whole(folder / name, entry, True)
    ends = np.cumsum([entry["tokens"] for entry in manifest["shards"]]).tolist()
    corpus = Corpus(ShardedTokens(paths, ends), *_read_index(folder, manifest))
    if "files" not in manifest:
        _require_order(folder, corpus)
    return corpus


def _read_index(folder: Path, manifest: dict) -> list[np.ndarray]:
    """The memory-mapped arrays of ``INDEX``; ValueError naming a file that is none of the manifest's sizes."""
    sentences = sum(entry["sentences"] for entry in manifest["shards"])
    arrays = []
    for name, shape in zip(INDEX, ((sentences + 1,), (manifest["documents"], 2)), strict=True):
        path = folder / name
        try:
            array = np.load(path, mmap_mode="r")
            if array.dtype != np.int64 or array.shape != shape:
                raise ValueError(f"{array.dtype} {array.shape}, the manifest says int64 {shape}")
            if path.stat().st_size != array.offset + array.nbytes:
                raise ValueError(f"{path.stat().st_size} bytes, its header says {array.offset + array.nbytes}")
        except OSError:
            raise
        except Exception as error:  # NumPy raises many kinds, and says EOF where a file is empty
            raise ValueError(f"{path} is damaged ({error}): delete it and run prepare again") from error
        arrays.append(array)
    return arrays


def _require_order(folder: Path, corpus: "Corpus") -> None:
    """ValueError naming an index that points beyond its tokens or sentences, or back."""
    ends, documents = corpus.sentence_ends, corpus.documents
    whole = ends[0] == 0 and ends[-1] == len(corpus.tokens) and _rises(ends, 1)
    bounds = documents.reshape(-1)
    in_order = (
        bounds[0] >= 0 and bounds[-1] < len(ends) and _rises(bounds, 0) and (documents[:, 0] < documents[:, 1]).all()
    )
    for name, right in zip(INDEX, (whole, in_order), strict=True):
        if not right:
            raise ValueError(f"{folder / name} is not the index of its shards: delete it and run prepare again")


def _rises(array: np.ndarray, least: int) -> bool:
    """Whether each element of ``array`` (n,) is at least ``least`` more than the one before it."""
    starts = range(0, len(array) - 1, CHECKED_AT_ONCE)
    return all((np.diff(array[start : start + CHECKED_AT_ONCE + 1]) >= least).all() for start in starts)


def _require_whole(path: Path, entry: dict, verify: bool) -> None:
    """ValueError where the file has another size than ``entry`` of the manifest says, or checksum if ``verify``."""
    what = f"shard {path}" if path.suffix == ".safetensors" else path
    size = path.stat().st_size if path.is_file() else 0
    if size != entry["bytes"]:
        raise ValueError(
            f"{what} has {size} bytes, the manifest says {entry['bytes']}: delete it and run prepare again"
        )
    if verify and checksum(path) != entry["blake2b"]:
        raise ValueError(f"{what} is damaged (checksum): delete it and run prepare again")


def _size_and_sum(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "blake2b": checksum(path)}


def damages(folder: str | Path, progress: Callable[[int], None] = lambda size: None) -> list[str]:
    """A line for each file that is not what the manifest says, for an index that is not what whole shards give, and for
    a tokenizer that is not the manifest's. ``progress`` gets the bytes of each file that has been read.

    FileNotFoundError where there is no manifest, ValueError where that is damaged.
    """
    folder = Path(folder)
    manifest, found = read_manifest(folder), []

    def compare(path: Path, entry: dict) -> None:
        try:
            _require_whole(path, entry, True)
        except (OSError, ValueError) as error:  # the first: the disk does not give what it has
            found.append(str(error))
        progress(entry["bytes"])

    paths = [folder / "shards" / entry["file"] for entry in manifest["shards"]]
    for path, entry in zip(paths, manifest["shards"], strict=True):
        compare(path, entry)
    if "files" not in manifest:
        return found + _damages_without_checksums(folder, manifest, None if found else paths)
    for name, entry in manifest["files"].items():
        compare(folder / name, entry)
    return found


def _damages_without_checksums(folder: Path, manifest: dict, paths: list[Path] | None) -> list[str]:
    """A line for an index that is not what shards ``paths`` (None: damaged) give, and for another tokenizer."""
    found = []
    try:
        index = _read_index(folder, manifest)
        if paths is not None:
            keep = _first_of_each(paths, sum(entry["documents"] for entry in manifest["shards"]))
            ends = chain([np.zeros(1, np.int64)], (ends for _, _, ends, _ in _index_parts(paths, keep)))
            bounds = (bounds for _, _, _, bounds in _index_parts(paths, keep))
            for name, array, parts in zip(INDEX, index, (ends, bounds), strict=True):
                if not _holds(array, parts):
                    found.append(f"{folder / name} is not the index of its shards: delete it and run prepare again")
    except (OSError, ValueError) as error:
        found.append(str(error))
    try:
        if tokenizer_digest(load_tokenizer(folder / "tokenizer")) != manifest["made_by"].get("tokenizer"):
            found.append(f"{folder / 'tokenizer'} is not the manifest's tokenizer: delete it and run prepare again")
    except (OSError, ValueError) as error:
        found.append(str(error))
    return found


def _holds(array: np.ndarray, parts: Iterable[np.ndarray]) -> bool:
    """Whether ``array`` is ``parts`` one after another, and nothing else."""
    place = 0
    for part in parts:
        if not np.array_equal(array[place : place + len(part)], part):
            return False
        place += len(part)
    return place == len(array)


def read_manifest(folder: str | Path) -> dict:
    """The manifest of prepared data; FileNotFoundError if prepare has not finished, ValueError if it is damaged."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: prepare has not been run there, or not to its end")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _require_kinds(manifest, MANIFEST)
        _require_kinds(manifest["made_by"], {"files": list})
        for entry in manifest["shards"]:
            _require_kinds(entry, ENTRY)
        if ("files" in manifest or "blake2b" in manifest) and manifest.get("blake2b") != _sum_of(manifest):
            raise ValueError("checksum")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run prepare again") from error
    return manifest


def _require_kinds(about: dict, kinds: dict[str, type]) -> None:
    if not isinstance(about, dict):
        raise ValueError(f"{about!r:.50} in place of an object")
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise ValueError(f"{key} is {about.get(key)!r:.50}")


def _sum_of(manifest: dict) -> str:
    """BLAKE2b of a manifest but for its own ``blake2b``."""
    content = {key: value for key, value in manifest.items() if key != "blake2b"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
