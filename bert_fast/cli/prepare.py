"""``bert-fast prepare``: a corpus to token shards."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator

from bert_fast.cli import INTERRUPTED, TERMINATED, Terminated
from bert_fast.cli.corpus import STRIPPED, add_corpus_arguments, corpus_bytes, corpus_files, reading, tell_share
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, add_command, writable_folder

ALONE = 0.25  # a share of documents or tokens that is worth a warning, in documents of one sentence
COPIES = 0.5  # a share of documents that were dropped, as well
UNKNOWN = 0.01  # a share of [UNK] that is worth a warning; a vocabulary made for the text gives far less


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "prepare",
        run,
        "turn a corpus into memory-mapped shards of token ids",
        details="It splits documents into sentences and encodes them on all cores, in bounded memory; it drops exact "
        "duplicates and counts them. A run that was stopped or killed goes on where it was when started again. "
        "Machines share the work by --shard in one common folder, with the same result as one machine. A pipe is read "
        "once and not copied: give the same again to go on. The command says what it skipped or changed, with the "
        "first places. [SEP], [MASK] and the other special tokens of BERT are text where the corpus holds them; a "
        "tokenizer's other added tokens are tokens.",
        examples="""
bert-fast prepare corpus/ --tokenizer tok --dry-run
bert-fast prepare corpus/ --tokenizer tok --out data
bert-fast prepare corpus.txt --tokenizer vocab.txt --uncased --out data
bert-fast prepare 'zh/*.jsonl.zst' --tokenizer tok --language zh --out data
zstdcat dump.jsonl.zst | bert-fast prepare - --format jsonl --text-field meta.text --tokenizer tok --out data
bert-fast prepare hf://owner/notes@train --text-field note --tokenizer tok --out data
bert-fast prepare corpus/ --tokenizer tok --out /shared/data --shard 0/4     # and 1/4, 2/4, 3/4 elsewhere""",
    )
    add_corpus_arguments(parser)
    parser.add_argument(
        "--tokenizer", metavar="PATH", required=True, help="folder, tokenizer.json or vocab.txt (BERT's will do)"
    )
    case = parser.add_mutually_exclusive_group()
    case.add_argument("--cased", action="store_true", help="a vocab.txt is cased (default: seen from what is in it)")
    case.add_argument("--uncased", action="store_true", help="a vocab.txt is uncased")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", metavar="DIR", help="where shards, index and manifest go")
    goal.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: show the first documents of each CORPUS with their sentences and pieces, and count what "
        "is in its first megabyte",
    )
    parser.add_argument("--workers", metavar="N", type=positive, help="processes (default: one a core)")
    parser.add_argument(
        "--shard", metavar="I/N", type=_shard, help="make every N-th shard, from the I-th (0 to N-1) (default: all)"
    )
    parser.add_argument(
        "--language", metavar="CODE", type=_language, default="en", help="of the sentences (ISO 639), as en, de, zh"
    )
    parser.add_argument(
        "--sentences",
        choices=("auto", "lines", "split"),
        default="auto",
        help="what ends one: split: marks (. ! ? and other scripts') and blank lines; lines: the line alone; auto: as "
        "split, and the line where most lines of a document lack a mark and were not filled up to a width, as in mail",
    )


def _language(text: str) -> str:
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", text):  # sentencex takes any text, and English rules for it
        raise argparse.ArgumentTypeError(f"{text!r} is no code of a language, as en, de, zh")
    return text


def _shard(text: str) -> tuple[int, int]:
    try:
        index, of = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as in 0/4") from None
    if not 0 <= index < of:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number must be 0 to {of - 1}")
    return index, of


def run(options: argparse.Namespace) -> int:
    """Makes the shards; a signal leaves those that are made."""
    if options.dry_run:
        return _show(options)
    try:
        _prepare(options)
    except (KeyboardInterrupt, Terminated) as stop:
        print("bert-fast prepare: stopped; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    return 0


def _tokenizer(options: argparse.Namespace, out: Output):
    from bert_fast import data

    lowercase = False if options.cased else True if options.uncased else None
    return data.load_tokenizer(options.tokenizer, lowercase=lowercase, tell=out.warn)


def _prepare(options: argparse.Namespace) -> None:
    from bert_fast import data
    from bert_fast.data.losses import Tally

    out = Output.of(options)
    made_here = [*data.prepared_files(options.out), *data.tokenizer_files(options.tokenizer)]
    files = corpus_files(options.corpus, options.format, without=made_here)
    tokenizer = _tokenizer(options, out)
    folder = writable_folder(options.out)
    size, (index, of) = corpus_bytes(files), options.shard or (0, 1)
    done: dict = {}
    with out.progress(None if size is None else size / of, "preparing", "bytes") as bar:

        def show(counts: dict) -> None:
            done.update(counts)
            facts = {key: counts[key] for key in ("units", "units_skipped", "documents", "tokens")}
            bar.update(counts["bytes"], f"{counts['documents']:,} documents, {counts['tokens']:,} tokens", **facts)

        manifest = data.prepare(
            files,
            tokenizer,
            folder,
            shard=(index, of),
            workers=options.workers,
            language=options.language,
            sentences=options.sentences,
            progress=show,
            **reading(options),
        )
    made = {"shards_made": done.get("units", 0), "shards_found": done.get("units_skipped", 0)}
    made["shards_made"] -= made["shards_found"]
    if manifest is None:
        text = f"{folder}: part {index}/{of} is made; the manifest comes with the last part"
        out.result({"out": str(folder), "complete": False} | made, text)
        return
    for lost in Tally(manifest["counts"], manifest.get("places")).described():
        out.warn(lost)
    _tell_unknown(out, manifest)
    counts = Counter(manifest["counts"])
    tell_share(out, counts["marks_stripped"], counts["text_characters"], STRIPPED)
    copies, alone = _copies(manifest), _alone(manifest)
    _warn(copies, alone, out)
    facts = {key: value for key, value in manifest.items() if key not in ("made_by", "shards", "files", "blake2b")}
    facts = {"out": str(folder), "complete": True, "shards": len(manifest["shards"])} | made | facts
    facts["places"] = manifest.get("places", {})
    lines = [
        f"{folder}: {_number(manifest['documents'], 'document')}, {_number(manifest['sentences'], 'sentence')}, "
        f"{_number(manifest['tokens'], 'token')} in {_number(len(manifest['shards']), 'shard')}",
        f"  {_number(manifest['duplicate_documents'], 'duplicate document')} dropped ({copies[1]:.1%} of the tokens)",
        f"  {_number(manifest['one_sentence_documents'], 'document')} of one sentence ({alone[1]:.1%} of the tokens)",
        f"  how they were made, with checksums: {folder / 'manifest.json'}",
    ]
    if made["shards_found"]:
        lines.insert(1, f"  {_number(made['shards_found'], 'shard')} made before, kept")
    out.result(facts, "\n".join(lines))


def _show(options: argparse.Namespace) -> int:
    """The beginning of each source as it will be seen; in all some eight seconds, however many there are. Returns the
    exit code: 1 where one of them cannot be read."""
    out, code = Output.of(options), 0
    tokenizer = _tokenizer(options, out)
    for source in options.corpus:
        try:
            _show_source(source, tokenizer, options, out)
        except (OSError, ValueError) as error:
            out.error({"source": source, "error": str(error)}, str(error))
            code = 1
    return code


def _show_source(source: str, tokenizer, options: argparse.Namespace, out: Output) -> None:
    from bert_fast import data
    from bert_fast.data.preview import preview

    files = corpus_files(source, options.format, without=data.tokenizer_files(options.tokenizer))
    found = preview(
        files, tokenizer, language=options.language, sentences=options.sentences,
        seconds=min(2.0, 8 / len(options.corpus)), **reading(options),
    )  # fmt: skip
    counts, size = found.counts, corpus_bytes(files)
    facts = {"source": source, "files": len(files), "bytes": size, "whole": found.whole, "read": dict(counts)}
    names = ("place", "sentences", "of")
    facts["documents"] = [dict(zip(names, document, strict=True)) for document in found.documents]
    out.result(facts, "\n".join(_described(source, len(files), size, found)))
    for lost in counts.described():
        out.warn(f"{source}: {lost}")


def _described(source: str, files: int, size: int | None, found) -> Iterator[str]:
    counts = found.counts
    whole = "" if size is None else f", {size / 1e6:,.1f} MB"
    yield f"{source}: {_number(files, 'file')}{whole}"
    for place, sentences, number in found.documents:
        yield f"  {place}: {_number(number, 'sentence')}"
        for text, pieces in sentences:
            yield f"    {text}"
            yield f"      {' '.join(pieces)}"
        if number > len(sentences):
            yield f"    and {number - len(sentences):,} more"
    read = "in all" if found.whole else f"in the first {counts['bytes'] / 1e6:.1f} MB of text"
    yield (
        f"  {read}: {_number(counts['documents'], 'document')}, {_number(counts['sentences'], 'sentence')}, "
        f"{_number(counts['tokens'], 'token')} ({counts['unknown_tokens'] / max(1, counts['tokens']):.2%} [UNK])"
    )
    if not found.whole and size is not None:
        yield f"  at that rate about {counts['tokens'] * size / counts['bytes'] / 1e6:,.1f} million tokens"


def _copies(manifest: dict) -> tuple[float, float]:
    """The shares of what was read that were dropped as copies: of the documents, of the tokens."""
    dropped = [manifest["duplicate_documents"], manifest["duplicate_tokens"]]
    return tuple(number / (number + manifest[of]) for number, of in zip(dropped, ("documents", "tokens"), strict=True))


def _alone(manifest: dict) -> tuple[float, float]:
    """The shares of what is kept that are documents of one sentence: of the documents, of the tokens."""
    return tuple(manifest[f"one_sentence_{of}"] / manifest[of] for of in ("documents", "tokens"))


def _warn(copies: tuple[float, float], alone: tuple[float, float], out: Output) -> None:
    """Warns of an unexpected share of copies or of single sentences."""
    if copies[0] > COPIES:
        out.warn(
            f"{copies[0]:.1%} of the documents were dropped, as they are copies of others (the same token ids): is the "
            "same file or header there more than once?"
        )
    if max(alone) > ALONE:
        out.warn(
            f"{alone[0]:.1%} of the documents are one sentence ({alone[1]:.1%} of the tokens): their pairs are pieces "
            "of it. Keep in one document what belongs together (no blank lines in it, --one-per-file, or JSON lines), "
            "and give --sentences lines where each line is a sentence"
        )


def _tell_unknown(out: Output, manifest: dict) -> None:
    """Says which tokens are [UNK], by the two causes: a warning where it is many of them."""
    long, tokens = manifest["counts"].get("long_words", 0), manifest["counts"]["tokens"]
    unknown = manifest["counts"].get("unknown_tokens", 0) - long
    if unknown / tokens > UNKNOWN:
        out.warn(
            f"{unknown / tokens:.1%} of the tokens are [UNK], of which a model learns nothing: the tokenizer was made "
            "for other text, or keeps too few of its characters (`bert-fast tokenizer --limit-alphabet`)"
        )
    if long:
        (out.warn if long / tokens > UNKNOWN else out.note)(
            f"{_number(long, 'word')} ({long / tokens:.1%} of the tokens) of more characters than the tokenizer takes "
            "(BERT's: 100) became [UNK]"
        )


def _number(number: int, of: str) -> str:
    return f"{number:,} {of}" if number == 1 else f"{number:,} {of}s"
