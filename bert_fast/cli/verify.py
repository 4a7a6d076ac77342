"""``bert-fast verify``: whether prepared data and checkpoints are what was written."""

import argparse
from pathlib import Path

from bert_fast.output import Output, Progress, add_command


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "verify",
        run,
        "compare prepared data and checkpoints with their checksums",
        details="Reads every file of prepared data, its index and tokenizer included, or every checkpoint of a run. "
        "The exit code is 0 where all is as it was written, 1 where something is damaged, which is named. (`pretrain` "
        "compares the checksums of index and tokenizer and of the checkpoint that it goes on from, but of shards the "
        "sizes alone. Of a run, RUN/model, config.json, the metrics and loss.png have no checksums.)",
        examples="""
bert-fast verify data
bert-fast verify data run --json
bert-fast verify run/checkpoints/step-00001000""",
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="prepared data, a run's folder or one of its checkpoints"
    )


def run(options: argparse.Namespace) -> None:
    """Reads and compares."""
    out = Output.of(options)
    damaged = 0
    for name in options.folders:
        kind, files = _contents(Path(name))
        size = sum(path.stat().st_size for path in files if path.is_file())
        with out.progress(size, "verifying", "bytes") as bar:
            number, found = (_prepared if kind == "shard" else _checkpoints)(Path(name), bar)
        damaged += len(found)
        what = f"{name}: {number:,} {kind}{'' if number == 1 else 's'}, {bar.done / 1e6:,.1f} MB"
        text = "\n  ".join([f"{what}, damaged:", *found]) if found else f"{what}, whole"
        out.result({"dir": name, f"{kind}s": number, "bytes": bar.done, "damaged": found}, text)
    if damaged:
        raise ValueError(f"{damaged} damaged, named in the result")


def _contents(folder: Path) -> tuple[str, list[Path]]:
    """What ``folder`` is made of, "shard" or "checkpoint", and the files that are read."""
    if (folder / "manifest.json").is_file():
        return "shard", [path for path in folder.rglob("*") if path.name != "manifest.json"]
    if (folder / "checkpoints").is_dir():
        return "checkpoint", list(folder.glob("checkpoints/step-*/*"))
    if (folder / "state.json").is_file() or (folder / "checksums.json").is_file():
        return "checkpoint", list(folder.iterdir())
    raise FileNotFoundError(f"{folder} is neither prepared data nor a run or a checkpoint of one")


def _prepared(folder: Path, bar: Progress) -> tuple[int, list[str]]:
    from bert_fast import data
    from bert_fast.data.shards import damages

    return len(data.read_manifest(folder)["shards"]), damages(folder, bar.advance)


def _checkpoints(folder: Path, bar: Progress) -> tuple[int, list[str]]:
    from bert_fast.run import checkpoint

    number, found = 0, []
    for path in checkpoint.folders(folder) if (folder / "checkpoints").is_dir() else [folder]:
        size = 0
        try:
            size = sum(file.stat().st_size for file in path.iterdir())
            checkpoint.read(path)
        except (OSError, ValueError) as error:
            if not path.exists():  # a run that goes on has removed it meanwhile
                continue
            found.append(f"checkpoint {path} is damaged: {error}")
        number += 1
        bar.advance(size)
    return number, found
