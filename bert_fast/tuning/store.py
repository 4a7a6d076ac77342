"""What was decided, kept: by machine, versions, kernels and sizes, so that nothing is taken for what it is not.

A file a decision, JSON, in $BERT_FAST_CACHE, else $XDG_CACHE_HOME/bert_fast, else ~/.cache/bert_fast; before those
that bert_fast brings (shipped/, of the same form). A file that cannot be read, or is of another key, is as none.
"""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from bert_fast import choice, compilers

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).resolve().with_name("shipped")
MODEL = ("hidden", "inner", "heads", "vocabulary")  # the sizes that a model has whatever its batches

Decided = list[tuple[str, dict, dict]]


def folder() -> Path:
    """Where decisions are kept."""
    named = os.environ.get("BERT_FAST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_fast"


@functools.cache
def kernels_hash() -> str:
    """Of the source of everything that is chosen from."""
    paths = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "tuning").glob("*.py"), ROOT / "peers" / "torch_attention.py"]
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def machine(device: torch.device) -> dict:
    """What a decision on a GPU holds for beside its sizes: the device, what drives it, and what compiles for it."""
    facts = torch.cuda.get_device_properties(device)
    capability = 10 * facts.major + facts.minor
    return {
        "device": facts.name, "capability": capability, "multiprocessors": facts.multi_processor_count,
        "driver": _driver(), "torch": torch.__version__, "triton": compilers.triton_version(),
        "ptxas": compilers.ptxas_version(capability), "kernels": kernels_hash(),
    }  # fmt: skip


def _driver() -> str:
    """The version of NVIDIA's driver; "unknown" where nothing says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        pass
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "unknown"


def write(key: dict, chosen: Decided, rows: list[dict]) -> Path | None:
    """Keeps a decision; None where the disk does not take it: the next run decides again."""
    path = _path(folder(), key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps({"key": key, "chosen": chosen, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        return None
    return path


def read(key: dict) -> dict | None:
    """{"chosen", "rows"} that was decided for ``key``; None where nothing was, or what there is cannot be read."""
    for place in (folder(), SHIPPED):
        if (found := _read(_path(place, key))) is not None and same(found["key"], key):
            return found
    return None


def of_model(here: dict, sizes: dict) -> Decided:
    """All that was decided on this machine for a model of ``sizes`` (MODEL), of whatever batches, the newest last; but
    for attention by a library that was asked for by name."""
    found = []
    for place in (SHIPPED, folder()):
        for _, kept in sorted(_all(place), key=lambda pair: pair[0]):
            key = kept["key"]
            fits = all(key["sizes"].get(name) == sizes[name] for name in MODEL)
            if fits and key["sizes"].get("attention") != "library" and same(key["machine"], here):
                found += kept["chosen"]
    return found


def settle_kept(config, device: torch.device) -> None:
    """Has what was decided on this machine for models of the sizes of ``config`` (a BertConfig) serve."""
    if choice.is_held() or not any(any(place.glob("*.json")) for place in (SHIPPED, folder())):
        return
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.vocab_size)
    choice.settle(of_model(machine(device), dict(zip(MODEL, sizes, strict=True))))


def same(key: dict, other: dict) -> bool:
    """Whether two keys are one; either may come from JSON."""
    return json.loads(json.dumps(key)) == json.loads(json.dumps(other))


def decided(values) -> Decided:
    """What was chosen, as JSON has it: tables have numbers as keys again. ValueError or TypeError for anything else."""
    found = []
    for name, default, instead in values:
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is no name of a choice")
        found.append((name, table(default), table(instead)))
    return found


def table(values: dict) -> dict:
    """A choice as JSON has it, whose numbers are numbers again."""
    return {int(key) if str(key).isdigit() else key: value for key, value in values.items()}


def _path(place: Path, key: dict) -> Path:
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return place / f"{digest}.json"


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept: dict = {"key": dict(found["key"]), "chosen": decided(found["chosen"]), "rows": list(found["rows"])}
        return kept if {"machine", "sizes"} <= kept["key"].keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _all(place: Path) -> Iterator[tuple[float, dict]]:
    try:
        paths = list(place.glob("*.json"))
    except OSError:
        return
    for path in paths:
        if (found := _read(path)) is not None:
            yield path.stat().st_mtime, found
