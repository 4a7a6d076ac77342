"""``bert-fast tokenizer``: a WordPiece vocabulary from a corpus."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bert_fast.cli.corpus import (
    STRIPPED,
    add_corpus_arguments,
    corpus_bytes,
    corpus_files,
    read_twice,
    reading,
    tell_share,
)
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, Progress, add_command, writable_folder


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "tokenizer",
        run,
        "train a WordPiece tokenizer on a corpus",
        details="The folder loads with transformers.AutoTokenizer and in every command here. The corpus is streamed "
        "twice (characters, then words), never held in memory; a pipe is copied to a temporary file. The same corpus "
        "gives the same vocabulary.",
        examples="""
bert-fast tokenizer corpus/ --vocab-size 30522 --out tok
bert-fast tokenizer 'wiki/*.jsonl.zst' --text-field text --cased --out tok
bert-fast tokenizer zh.txt.gz --limit-alphabet 8000 --vocab-size 21128 --out tok""",
    )
    add_corpus_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where the tokenizer goes")
    parser.add_argument("--vocab-size", metavar="N", type=positive, default=30522, help="pieces, at most")
    parser.add_argument(
        "--cased",
        action="store_true",
        help="keep upper case and accents (default: lower case, accents stripped, with vowel signs as those of Hindi)",
    )
    parser.add_argument("--keep-accents", action="store_true", help="lower case, but with accents")
    parser.add_argument(
        "--min-frequency", metavar="N", type=positive, default=2, help="least occurrences of a pair to join"
    )
    parser.add_argument(
        "--limit-alphabet",
        metavar="N",
        type=positive,
        default=1000,
        help="characters to keep, if they fit in --vocab-size; about 8000 for Chinese",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is in DIR")


def run(options: argparse.Namespace) -> None:
    """Trains and saves the tokenizer."""
    from bert_fast.data import save_tokenizer, tokenizer_files, train_tokenizer

    out = Output.of(options)
    files = corpus_files(options, without=tokenizer_files(options.out))
    folder = writable_folder(options.out)
    if (folder / "tokenizer.json").exists() and not options.overwrite:
        raise ValueError(f"{folder} holds a tokenizer already: choose another --out, or --overwrite it")
    size, learned = corpus_bytes(files), Counter()
    with (
        read_twice(files) as copies,
        out.progress(None if size is None else 2 * size, "reading", "bytes") as bar,
    ):
        texts = _Texts(dict(zip(files, copies, strict=True)), reading(options), bar)
        try:
            tokenizer = train_tokenizer(
                texts,
                options.vocab_size,
                lowercase=not options.cased,
                min_frequency=options.min_frequency,
                limit_alphabet=options.limit_alphabet,
                strip_accents=False if options.keep_accents else None,
                counts=learned,
            )
        except ValueError as error:
            raise ValueError("; ".join([str(error), *texts.counts.described()])) from error
    for lost in texts.counts.described():
        out.warn(lost)
    save_tokenizer(tokenizer, folder)
    pieces = tokenizer.get_vocab_size(with_added_tokens=True)
    _tell(out, learned)
    if pieces < options.vocab_size:
        out.note(
            f"{pieces:,} pieces, not {options.vocab_size:,}: no other pair of pieces occurs --min-frequency "
            f"{options.min_frequency} times"
        )
    kind = "cased" if options.cased else "uncased"
    facts = {"out": str(folder), "vocab_size": pieces, "vocab_size_asked": options.vocab_size}
    facts |= {"documents": texts.counts["documents"], "bytes": texts.counts["bytes"]}
    facts["counts"] = {k: v for k, v in {**texts.counts, **learned}.items() if k not in facts}
    facts["places"] = texts.counts.places
    megabytes = f"{texts.counts['bytes'] / 1e6:,.1f} MB"
    out.result(
        facts, f"{folder}: {pieces:,} pieces, {kind}, from {texts.counts['documents']:,} documents ({megabytes})"
    )


def _tell(out: Output, learned: Counter) -> None:
    """Says what of the text the vocabulary does not tell."""
    for name, of, text in (
        (
            "characters_dropped",
            "characters",
            f"({learned['alphabet_dropped']:,} different ones) are in no piece, and words with them become [UNK] "
            "(--limit-alphabet, --vocab-size)",
        ),
        (
            "long_word_characters",
            "characters",
            f"are in {learned['long_words']:,} words of more than 100, which are [UNK] to BERT and were left out",
        ),
        ("marks_stripped", "text_characters", STRIPPED),
    ):
        tell_share(out, learned[name], learned[of], text)


class _Texts:
    """The documents of a corpus as text, read again each time they are gone through; counts those of one pass.

    ``files`` are by what they are called; ``reading`` is how, for :func:`bert_fast.data.stream_documents`.
    """

    def __init__(self, files: dict[Path, Path], reading: dict, bar: Progress):
        from bert_fast.data.losses import Tally

        self.files, self.reading, self.bar = files, reading, bar
        self.counts = Tally()

    def __iter__(self) -> Iterator[str]:
        from bert_fast.data.corpus import decoded, located_documents

        self.counts.clear()
        for name, path in self.files.items():
            for raw, within, number in located_documents(path, self.counts, name=str(name), **self.reading):
                self.bar.advance(len(raw))
                text = decoded(raw, within, number, self.counts)
                if text is not None:
                    self.counts.update({"documents": 1, "bytes": len(raw)})
                    yield text
