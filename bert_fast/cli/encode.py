"""``bert-fast encode``: sentences to vectors."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bert_fast.cli.device import add_device_argument, chosen_device
from bert_fast.cli.lines import decoded, numbered_lines, warn_of_columns
from bert_fast.cli.model import add_model_argument
from bert_fast.cli.numbers import positive
from bert_fast.output import Output, Progress, add_command, writable_folder

NOTHING = "no sentences: the input is empty"

if TYPE_CHECKING:
    from bert_fast.use.pooling import Recipe


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "encode",
        run,
        "turn sentences into vectors",
        details="One sentence a line, from FILE or stdin; vectors come in the same order. A folder of "
        "sentence-transformers says how they are made (pooling, scaling, length, prompts), and SentenceTransformer "
        "makes the same; of any other model they are the mean over the last hidden states of all tokens. Flags "
        "override both. Any number of sentences in bounded memory, packed by length, without padding. [SEP] and other "
        "special tokens in a sentence are such tokens, as in transformers.",
        examples="""
bert-fast encode run sentences.txt --out vectors.npy
cut -f1 reviews.tsv | bert-fast encode run --out vectors.npy --quiet
echo "A sentence." | bert-fast encode path/to/all-MiniLM-L6-v2
bert-fast encode run documents.txt --out vectors.npy --long mean --precision auto
bert-fast encode run --pooling mean --normalize --save-sentence-transformer my-encoder
bert-fast encode path/to/e5-base-v2 questions.txt --out questions.npy --prompt "query: \"""",
    )
    add_model_argument(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="sentences, one a line (default: stdin)")
    parser.add_argument(
        "--out",
        metavar="FILE.npy",
        help='float32 (sentences, hidden), written whole or not at all (default: a line {"kind": "vector", "index", '
        '"vector"} each on stdout)',
    )
    parser.add_argument(
        "--pooling",
        choices=("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        help="what of the tokens' last hidden states becomes the vector (default: the model's, else mean)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale vectors to length 1 (default: the model's, else not)",
    )
    parser.add_argument(
        "--seq", metavar="N", type=int, help="cut sentences to N tokens (default: the model's, else its positions)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="goes before each sentence (default: the model's, if any)")
    parser.add_argument("--prompt-name", metavar="NAME", help="that of the model's prompts, such as query")
    parser.add_argument(
        "--long",
        choices=("first", "mean"),
        default="first",
        help="of sentences of more than --seq tokens: the first tokens, or the mean of the vectors of windows of so "
        "many, weighted by their tokens (default first)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help="of weights and hidden states; auto: bf16 where the device multiplies it in hardware (default: what the "
        "weights are saved in)",
    )
    parser.add_argument(
        "--save-sentence-transformer",
        metavar="DIR",
        help="write the model as a folder of sentence-transformers, whose SentenceTransformer(DIR).encode gives these "
        "vectors; without FILE and --out nothing else is done",
    )
    parser.add_argument("--batch-tokens", metavar="N", type=positive, default=8192, help="tokens of a packed batch")
    add_device_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Encodes and writes."""
    import torch

    from bert_fast import BertModel
    from bert_fast.devices import in_bfloat16
    from bert_fast.use.inference import encode_sentences, load_model, sentence_recipe
    from bert_fast.use.pooling import recipe_of

    out = Output.of(options)
    if options.out is not None:
        writable_folder(Path(options.out).parent)
    # no vector reads the pooler, so its weights may be missing
    model, tokenizer, drawn = load_model(
        BertModel, options.model, optional=("pooler.",), device=chosen_device(options), output=out
    )
    given: dict[str, Any] = {
        "pooling": options.pooling, "normalize": options.normalize, "max_length": options.seq,
        "prompt": options.prompt, "prompt_name": options.prompt_name,
    }  # fmt: skip
    recipe = sentence_recipe(model, **given)
    if options.prompt is not None and recipe.prompt != options.prompt:
        out.warn("--prompt holds bytes that are not UTF-8: they became U+FFFD")
    _tell(options, out, recipe_of(model.name_or_path or options.model), recipe)
    facts: dict[str, Any] = {"pooling": list(recipe.pooling), "normalize": recipe.normalize, "prompt": recipe.prompt}
    facts |= {"seq": recipe.max_length, "hidden": len(recipe.pooling) * model.config.hidden_size, "long": options.long}
    if options.save_sentence_transformer is not None:
        _save(options, out, model, tokenizer, recipe, drawn)
        if options.file is None and options.out is None:
            shown = f"{options.save_sentence_transformer}: a model of sentence-transformers, {recipe}"
            out.result({"saved": options.save_sentence_transformer} | facts, shown)
            return
    if options.precision is not None:  # after saving, which keeps the weights as they are
        cast(Any, model).to(torch.bfloat16 if in_bfloat16(options.precision, model.device) else torch.float32)
    facts["dtype"] = str(model.dtype).removeprefix("torch.")
    counts: Counter[str] = Counter()
    warn_of_columns(options.file or "stdin", out)
    with open(options.file, "rb") if options.file else nullcontext(sys.stdin.buffer) as stream:
        numbered = numbered_lines(stream, options.file or "stdin", out)
        lines = (decoded(line, f"{options.file or 'stdin'}: line {number}") for number, line in numbered)
        with out.progress(None, "encoding", "sentences") as bar:
            vectors = encode_sentences(
                model, tokenizer, lines, **given, long=options.long, tokens=options.batch_tokens, counts=counts
            )
            count = _write(options, out, _counted(vectors, bar), facts["hidden"])
    if not count:
        raise ValueError(NOTHING)
    told = _told_of_lengths(counts, count, recipe.max_length, options.long)
    facts |= {"sentences": count} | {n: counts[n] for n in ("cut", "cut_tokens", "windowed", "windows", "empty")}
    if options.out is None and not options.json:  # stdout holds vectors alone
        (out.warn if counts["cut"] else out.note)(told)
    else:
        shown = f"{options.out}: {count:,} vectors of {facts['hidden']}; {told}"
        out.result({"out": options.out} | facts, shown)


def _told_of_lengths(counts: Counter, count: int, length: int | None, long: str) -> str:
    """What became of sentences that are too long, and how many are empty."""
    if long == "mean":
        told = f"{counts['windowed']:,} of {count:,} sentences have more than {length} tokens"
        told += f": means over their {counts['windows']:,} windows" if counts["windowed"] else ""
    else:
        told = f"{counts['cut']:,} of {count:,} sentences were cut to {length} tokens"
    told += f"; {counts['empty']:,} are empty" if counts["empty"] else ""
    return told + (f"; {counts['cut_tokens']:,} tokens were left out" if counts["cut_tokens"] else "")


def _save(options: argparse.Namespace, out: Output, model, tokenizer, recipe: "Recipe", drawn: list[str]) -> None:
    """Writes the folder of sentence-transformers, and warns of what it does otherwise."""
    from bert_fast.use.sentence_folder import save_sentence_transformer

    folder = save_sentence_transformer(model, tokenizer, recipe, options.save_sentence_transformer, drawn=drawn)
    if options.long == "mean":
        out.warn(f"sentence-transformers cuts texts to {recipe.max_length} tokens: --long mean is not in {folder}")


def _tell(options: argparse.Namespace, out: Output, own: "Recipe | None", recipe: "Recipe") -> None:
    """What a sentence-transformers model says of its vectors, and what goes before that."""
    if own is None:
        return
    flags = ("pooling", "normalize", "seq", "prompt", "prompt_name")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name) is not None]
    out.note(f"{options.model} is a model of sentence-transformers: {own if given else recipe}")
    if given:
        out.note(f"{', '.join(given)} go{'es' if len(given) == 1 else ''} before that: {recipe}")
    elif own.prompts and not own.prompt:
        out.note(f"it has the prompts {', '.join(own.prompts)}, and none by default: --prompt-name takes one")


def _counted(vectors: Iterable, bar: Progress) -> Iterator:
    for some in vectors:
        bar.advance(len(some))
        yield some


def _write(options: argparse.Namespace, out: Output, vectors: Iterable, width: int) -> int:
    """Writes ``vectors`` to the file, or as JSON lines; how many there were."""
    if options.out is not None:
        return write_npy(Path(options.out), vectors, width)
    count = 0
    for some in vectors:
        for vector in some.tolist():
            numbers = [float(f"{x:.9g}") for x in vector]  # nine digits tell float32 numbers apart
            out.json_line({"kind": "vector", "index": count, "vector": numbers})
            count += 1
    return count


def write_npy(path: Path, arrays: Iterable, width: int) -> int:
    """Writes float32 ``arrays`` (n, width) one after another as one .npy file and returns the number of rows.

    The file is written aside and renamed, so ``path`` is whole or as it was; no rows are a ValueError.
    """
    import numpy as np

    from bert_fast.data.files import written_aside

    def header(rows: int) -> None:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, shape)

    rows = 0
    with written_aside(path) as file:
        header(0)  # padded, so that the right one fits in its place
        begin = file.tell()
        for array in arrays:
            file.write(array.astype("<f4", copy=False).tobytes())
            rows += len(array)
        if not rows:
            raise ValueError(NOTHING)
        file.seek(0)
        header(rows)
        if file.tell() != begin:
            raise ValueError(f"{path}: the header of {rows} rows does not fit")
    return rows
