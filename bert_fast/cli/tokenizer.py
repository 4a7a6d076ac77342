"""``bert-fast tokenizer``: a WordPiece vocabulary from a corpus, or more pieces for that of a checkpoint."""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from bert_fast.cli.corpus import (
    MUCH,
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

TRAINED = {"vocab_size": 30522, "min_frequency": 2, "limit_alphabet": 1000}
EXTENDED = {"add": 3000, "min_frequency": 5}


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "tokenizer",
        run,
        "train a WordPiece tokenizer on a corpus, or extend that of a checkpoint",
        details="The folder loads with transformers.AutoTokenizer and in every command here. The corpus is streamed "
        "twice (characters, then words), never held in memory; a pipe is copied to a temporary file. The same corpus "
        "gives the same vocabulary. With --extend it is read once: the pieces that save most tokens on it go behind "
        "the vocabulary of a checkpoint, whose ids all stay: prepare the text with the result, and `bert-fast pretrain "
        "--init-from CHECKPOINT` goes on with it.",
        examples="""
bert-fast tokenizer corpus/ --vocab-size 30522 --out tok
bert-fast tokenizer 'wiki/*.jsonl.zst' --text-field text --cased --out tok
bert-fast tokenizer zh.txt.gz --limit-alphabet 8000 --vocab-size 21128 --out tok
bert-fast tokenizer clinical/ --extend google-bert/bert-base-uncased --add 3000 --out tok""",
    )
    add_corpus_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where the tokenizer goes")
    parser.add_argument("--vocab-size", metavar="N", type=positive, help="pieces, at most [default: 30522]")
    parser.add_argument(
        "--cased",
        action="store_true",
        help="keep upper case and accents (default: lower case, accents stripped, with vowel signs as those of Hindi)",
    )
    parser.add_argument("--keep-accents", action="store_true", help="lower case, but with accents")
    parser.add_argument(
        "--min-frequency",
        metavar="N",
        type=positive,
        help="least occurrences of a pair to join [default: 2]; with --extend, of a piece to add [default: 5]",
    )
    parser.add_argument(
        "--limit-alphabet",
        metavar="N",
        type=positive,
        help="characters to keep, if they fit in --vocab-size; about 8000 for Chinese [default: 1000]",
    )
    parser.add_argument(
        "--extend",
        metavar="CHECKPOINT",
        help="add pieces to the WordPiece tokenizer of a checkpoint (folder or name on the Hub)",
    )
    parser.add_argument("--add", metavar="N", type=positive, help="pieces to add, at most [default: 3000]")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is in DIR")


def run(options: argparse.Namespace) -> None:
    """Trains or extends a tokenizer, and saves it."""
    from bert_fast.data import save_tokenizer, tokenizer_files

    _complete(options)
    out = Output.of(options)
    no_text = [file for path in (options.out, options.extend) if path for file in tokenizer_files(path)]
    files = corpus_files(options.corpus, options.format, without=no_text)
    folder = writable_folder(options.out)
    if (folder / "tokenizer.json").exists() and not options.overwrite:
        raise ValueError(f"{folder} holds a tokenizer already: choose another --out, or --overwrite it")
    make, passes = (_extend, 1) if options.extend else (_train, 2)
    size, counts = corpus_bytes(files), Counter[str]()
    with (
        nullcontext(files) if passes == 1 else read_twice(files) as copies,
        out.progress(None if size is None else passes * size, "reading", "bytes") as bar,
    ):
        texts = _Texts(dict(zip(files, copies, strict=True)), reading(options), bar)
        try:
            tokenizer = make(texts, options, counts, out)
        except ValueError as error:
            raise ValueError("; ".join([str(error), *texts.counts.described()])) from error
    for lost in texts.counts.described():
        out.warn(lost)
    save_tokenizer(tokenizer, folder)
    pieces = tokenizer.get_vocab_size(with_added_tokens=True)
    made, text = (_tell_extended if options.extend else _tell_trained)(out, options, pieces, counts)
    facts = {"out": str(folder), "vocab_size": pieces, **made}
    facts |= {"documents": texts.counts["documents"], "bytes": texts.counts["bytes"]}
    facts["counts"] = {k: v for k, v in {**texts.counts, **counts}.items() if k not in facts}
    facts["places"] = texts.counts.places
    megabytes = f"{texts.counts['bytes'] / 1e6:,.1f} MB"
    out.result(
        facts, f"{folder}: {pieces:,} pieces, {text}, from {texts.counts['documents']:,} documents ({megabytes})"
    )


def _complete(options: argparse.Namespace) -> None:
    """Gives the options that were not given their defaults; ValueError for those that do not go together."""
    defaults, others = (EXTENDED, TRAINED) if options.extend else (TRAINED, EXTENDED)
    given = [name for name in others if name not in defaults and getattr(options, name) is not None]
    given += [name for name in ("cased", "keep_accents") if options.extend and getattr(options, name)]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{named} beside --extend: the checkpoint's tokenizer says that, and --add how many pieces are added"
            if options.extend
            else f"{named} without --extend CHECKPOINT, whose tokenizer gets so many pieces"
        )
    if options.extend and Path(options.out).resolve() == Path(options.extend).resolve():
        raise ValueError(f"--out {options.out} is the checkpoint itself, which needs its own tokenizer: choose another")
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def _train(texts: "_Texts", options: argparse.Namespace, counts: Counter, out: Output):
    from bert_fast.data import train_tokenizer

    return train_tokenizer(
        texts,
        options.vocab_size,
        lowercase=not options.cased,
        min_frequency=options.min_frequency,
        limit_alphabet=options.limit_alphabet,
        strip_accents=False if options.keep_accents else None,
        counts=counts,
    )


def _extend(texts: "_Texts", options: argparse.Namespace, counts: Counter, out: Output):
    from bert_fast.data import extend_tokenizer, load_tokenizer
    from bert_fast.data.tokenizer import find_tokenizer

    try:
        path = find_tokenizer(options.extend)
    except OSError as error:
        raise ValueError(f"--extend {options.extend} is no folder, and no name on the Hub: {error}") from error
    if path is None:
        raise ValueError(
            f"--extend {options.extend} has neither tokenizer.json nor vocab.txt, or the Hub cannot be reached: give "
            "the folder of a checkpoint, or a tokenizer's"
        )
    return extend_tokenizer(
        load_tokenizer(path, tell=out.warn),
        texts,
        options.add,
        min_frequency=options.min_frequency,
        counts=counts,
        progress=lambda chosen: texts.bar.update(texts.bar.done, f"{chosen:,} pieces chosen", pieces=chosen),
    )


def _tell_extended(out: Output, options: argparse.Namespace, pieces: int, counts: Counter) -> tuple[dict, str]:
    """(facts, text) of a tokenizer with ``pieces``, of which some were added; says what is not as expected."""
    added, before, after = (counts[name] for name in ("pieces_added", "tokens_before", "tokens"))
    if added < options.add:
        out.note(
            f"{added:,} pieces added, not {options.add:,}: no other occurs --min-frequency {options.min_frequency} "
            "times and saves a token"
        )
    for name, text in (
        ("words_forgotten", "rare ones, were forgotten, as there are more than two million different ones"),
        ("unknown_words", f"have characters that {options.extend} lacks, and stay [UNK]"),
    ):
        if number := counts[name]:
            share = number / (counts["words"] + counts["words_forgotten"])
            (out.warn if share > MUCH else out.note)(f"{number:,} words ({share:.2%}) {text}")
    facts = {"extends": options.extend, "pieces_asked": options.add, "pieces_added": added}
    facts |= {name: counts[name] for name in ("words", "tokens_before", "tokens")}
    text = (
        f"{added:,} of them added to those of {options.extend}: {1 - after / before:.1%} fewer tokens, {after:,} where "
    )
    return facts, text + f"there were {before:,}"


def _tell_trained(out: Output, options: argparse.Namespace, pieces: int, counts: Counter) -> tuple[dict, str]:
    """(facts, text) of a tokenizer with ``pieces``; says what of the text it does not tell."""
    for name, of, text in (
        (
            "characters_dropped",
            "characters",
            f"({counts['alphabet_dropped']:,} different ones) are in no piece, and words with them become [UNK] "
            "(--limit-alphabet, --vocab-size)",
        ),
        (
            "long_word_characters",
            "characters",
            f"are in {counts['long_words']:,} words of more than 100, which are [UNK] to BERT and were left out",
        ),
        ("marks_stripped", "text_characters", STRIPPED),
    ):
        tell_share(out, counts[name], counts[of], text)
    if pieces < options.vocab_size:
        out.note(
            f"{pieces:,} pieces, not {options.vocab_size:,}: no other pair of pieces occurs --min-frequency "
            f"{options.min_frequency} times"
        )
    return {"vocab_size_asked": options.vocab_size}, "cased" if options.cased else "uncased"


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
        from bert_fast.data.hub_datasets import called

        self.counts.clear()
        for name, path in self.files.items():
            for raw, within, number in located_documents(path, self.counts, name=called(name), **self.reading):
                self.bar.advance(len(raw))
                text = decoded(raw, within, number, self.counts)
                if text is not None:
                    self.counts.update({"documents": 1, "bytes": len(raw)})
                    yield text
