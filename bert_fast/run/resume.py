"""Whether a folder's run can go on: with the same data, tokenizer and model, from its last good checkpoint."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from bert_fast.data.samples import RULE
from bert_fast.data.tokenizer import tokenizer_digest
from bert_fast.output import Output
from bert_fast.run import checkpoint, new_model, sources
from bert_fast.run.config import ConfigError, PretrainConfig, effective, fields, flag
from bert_fast.run.plan import SHAPE
from bert_fast.train.distributed import Ranks

SAMPLES = (  # decide what is trained on
    "seed", "nsp", "whole_word", "mask_prob", "mask_shares", "short_seq_prob", "validation", "validation_data",
)  # fmt: skip
SILENT = (  # may change from one start to the next without a word
    "out", "data", "steps", "keep", "resume", "workers", "log_every", "peak_tflops", "device", "recompute",
    "capture", "tune", "track", "track_project", "push_to_hub", "hub_private",
)  # fmt: skip


BEGINNING = ("data", "model", "init_from", "decay_from", "continue_from")  # decide how a run begins


class NotTheSameRun(ValueError):
    """The folder holds a run of other data, tokenizer or model; the message names what differs."""


def identity(config: PretrainConfig, tokenizer: Tokenizer, made) -> dict:
    """What a run that goes on must have in common with the one that began; ``made`` is the model's configuration."""
    return {
        "data": sources.digest(config),
        "tokenizer": tokenizer_digest(tokenizer),
        "model": new_model.comparable(made),
        "samples": {name: getattr(config, name) for name in SAMPLES}
        | {"validation": config.share_held_out, "validation_data": sources.digest(config, "validation_data") or None},
        "rule": RULE,
        "optimizer": config.optimizer,
    }


def last_checkpoint(config: PretrainConfig, ranks: Ranks, output: Output) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: the folder's newest good one, else that which ``config`` begins at, else None.

    The first process looks for it, and all take the same. Raises NotTheSameRun where there is a run that must not go
    on, and ConfigError for a damaged checkpoint to begin at.
    """
    folder, found = Path(config.out), None
    if ranks.first:
        if config.resume == "never" and (folder / "config.json").exists():
            raise NotTheSameRun(f"{folder} has a run already (--resume never): choose another --out")
        found, complaints = checkpoint.newest(folder)
        for complaint in complaints:
            output.warn(complaint)
        if found is None:
            _same_options_if_begun(config)
            if config.origin:
                found = _origin(config)
    name = ranks.broadcast("" if found is None else str(found.folder))
    if not name:
        return None
    if found is None:
        state = json.loads((Path(name) / "state.json").read_text(encoding="utf-8"))
        found = checkpoint.Checkpoint(Path(name), state)
    return found


def _origin(config: PretrainConfig) -> checkpoint.Checkpoint:
    assert config.origin is not None  # asked by the caller
    try:
        return checkpoint.read(Path(config.origin))
    except (OSError, ValueError) as error:
        which = "decay_from" if config.decay_from else "continue_from"
        raise ConfigError(f"{flag(which)} {config.origin} is no whole checkpoint: {error}") from error


def _same_options_if_begun(config: PretrainConfig) -> None:
    """A run that was killed before its first checkpoint begins anew, but not with other data or model."""
    folder = Path(config.out)
    path = folder / "config.json"
    if not path.exists():
        return
    before, now = effective(json.loads(path.read_text(encoding="utf-8"))), effective(config.as_dict())
    differing = [flag(name) for name in BEGINNING if before.get(name) != now.get(name)]
    if differing:
        raise NotTheSameRun(f"{folder} has a run with another {', '.join(differing)}: choose another --out")


def _differing_data(before: str, now: str, config: PretrainConfig) -> str:
    if before.count(" ") == now.count(" ") == 0:
        return f"the data (the manifest of {sources.described(config)} is not the one it was trained on)"
    was, wanted = ([part.partition(":")[0] for part in data.split()] for data in (before, now))
    if was == wanted:
        return "the weights of --data"
    if sorted(was) == sorted(wanted):
        return "the order of --data"
    return f"the data (the manifests of {sources.described(config)} are not those it was trained on)"


def require_same_run(
    config: PretrainConfig, found: checkpoint.Checkpoint, own: dict, total: int, output: Output
) -> None:
    """Raises NotTheSameRun where ``found`` is of another run than that whose identity is ``own``, ConfigError where it
    is beyond the ``total`` updates. A run that begins at another one's checkpoint may have other data than that."""
    begins = config.origin is not None and found.folder == Path(config.origin)
    folder = found.folder if begins else Path(config.out)
    before, now = found.state["identity"], json.loads(json.dumps(own))
    if before.get("rule") != now["rule"]:
        raise NotTheSameRun(
            f"{folder} was begun by another version of bert_fast, which draws other samples from the same data: finish "
            f"it with that version, or begin a new run with its weights: --init-from {found.folder} and another --out"
        )
    differing = []
    if before["data"] != now["data"] and not begins:
        differing.append(_differing_data(before["data"], now["data"], config))
    if before["tokenizer"] != now["tokenizer"]:
        differing.append("the tokenizer")
    if before["optimizer"] != now["optimizer"]:
        differing.append(f"--optimizer (was {before['optimizer']}, now {now['optimizer']})")
    for part, what in (("model", "the model's "), ("samples", "")):
        for key in sorted(set(before[part]) | set(now[part])):
            was, wanted = before[part].get(key), now[part].get(key)
            if was != wanted:
                differing.append(f"{what or ''}{key if what else flag(key)} (was {was!r}, now {wanted!r})")
    if differing:
        raise NotTheSameRun(
            f"{folder} holds a run that differs in {'; '.join(differing)}: "
            + ("" if begins else "choose another --out, or ")
            + "the options that it was started with"
        )
    if found.step > total:
        raise ConfigError(f"{folder} is at update {found.step} already, beyond the {total} asked for")
    defaults = {field.name: field.default for field, _ in fields() if field.default is not None}  # of a newer version
    before, now = effective(defaults | found.state["options"]), effective(config.as_dict())
    plan, silent = found.state.get("plan", {}), SILENT + (SHAPE if begins else ())
    changed = [
        k for k in sorted(set(before) | set(now))
        if now.get(k) not in (before.get(k), plan.get(k, before.get(k))) and k not in silent
    ]  # fmt: skip
    if changed:
        listed = ", ".join(f"{flag(k)} (was {before.get(k)}, now {now.get(k)})" for k in changed)
        output.warn(f"going on with other options than before: {listed}")
