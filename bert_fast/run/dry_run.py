"""What a run will be, before it starts: its size, its data, its speed as measured for some seconds, and its end."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from bert_fast.data.batches import pack_samples
from bert_fast.data.bins import Capacities
from bert_fast.data.pairs import document_tokens
from bert_fast.devices import peak_memory, reset_peak_memory
from bert_fast.output import Output
from bert_fast.run.config import PretrainConfig
from bert_fast.run.optimizer import state_tensors
from bert_fast.run.pretrain import Run
from bert_fast.run.tracking import require_installed
from bert_fast.train.distributed import started

SECONDS = 1.0  # of one update: long enough to be measured


def dry_run(config: PretrainConfig, output: Output | None = None) -> dict:
    """Says what :func:`bert_fast.run.pretrain.pretrain` would do with ``config``, and writes nothing.

    Returns the facts by name: ``parameters`` by part; ``data``, of an epoch at the first phase's length; ``phases``;
    ``speed``, of eager updates; ``memory`` of one process, in bytes; ``hours`` and ``updates`` to the end, without
    validation and checkpoints; ``disk``, in bytes. Raises what pretrain raises before its first update;
    trackers and the Hub are not asked.
    """
    output = output or Output()
    with started(config.device) as ranks:
        if ranks.first:
            require_installed(config)
        else:
            output = Output(silent=True)
        run = Run(config, ranks, output, few=True)
        facts: dict[str, Any] = {"parameters": _parameters(run.model), "data": (data := _data(run))}
        facts["phases"] = list(_phases(run, data["tokens"] / data["tokens_looked_at"]))
        facts |= _measured(run)
        speed, memory = facts["speed"], facts["memory"]
        facts["updates"] = sum(phase["updates_left"] for phase in facts["phases"])
        facts["hours"] = sum(
            phase["updates_left"]
            * (phase["tokens_an_update"] / speed["tokens_per_s"] + speed["seconds_of_the_optimizer"])
            for phase in facts["phases"]
        ) / 3600  # fmt: skip
        checkpoint = memory["weights"] + memory["optimizer_all"]
        # those kept, the best by validation, the one that is being written; and RUN/model
        facts["disk"] = {"checkpoint": checkpoint, "most": checkpoint * (config.keep + 2) + memory["weights"]}
        output.result(facts, "\n".join(_described(run, facts)))
    return facts


def _parameters(model: torch.nn.Module) -> dict[str, int]:
    found = {"embeddings": 0, "encoder": 0, "heads": 0}
    for name, parameter in model.named_parameters():
        part = name.split(".")[1] if name.startswith("bert.") else ""
        found[part if part in found else "heads"] += parameter.numel()
    return found


def _data(run: Run) -> dict:
    plan, tokens = run.dataset.plan, document_tokens(run.corpus)
    looked_at = int(document_tokens(run.dataset.corpus).sum())
    scale = float(tokens.sum()) / looked_at
    return {
        "documents": len(tokens), "tokens": int(tokens.sum()), "tokens_looked_at": looked_at,
        "samples_an_epoch": round(len(plan) * scale), "tokens_an_epoch": round(float(plan.length.sum()) * scale),
        "held": float(plan.held) / looked_at,
    }  # fmt: skip


def _phases(run: Run, scale: float) -> Iterator[dict]:
    for phase in run.phases:
        lengths = run.dataset.replanned(max_length=phase.seq).plan.length
        yield {
            "seq": phase.seq, "batch_size": phase.batch_size, "updates": phase.last - phase.first,
            "updates_left": phase.last - max(phase.first, min(run.state.step, phase.last)),
            "tokens_an_update": float(lengths.mean()) * phase.batch_size,
            "epochs": (phase.last - phase.first) * phase.batch_size / (len(lengths) * scale),
        }  # fmt: skip


def _measured(run: Run) -> dict:
    """Speed and memory, from updates of one and of two micro-batches, of more and more sequences until they are long
    enough or a micro-batch is full. The difference of the two is a micro-batch, what is left is the optimiser."""
    sequences, before = 1, _memory(run)
    while True:
        batch, tokens = _batch(run, sequences)
        _timed(run, [batch])  # makes the optimiser's state, compiles kernels
        one, two = (min(_timed(run, [batch] * number) for _ in range(2)) for number in (1, 2))
        if two >= SECONDS or tokens >= run.tokens or sequences >= len(run.dataset):
            break
        sequences *= 2
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(run.optimizer, run.model).values())
    memory = {"weights": weights, "gradients": weights, "optimizer": state}
    memory["optimizer_all"] = int(
        run.ranks.sum(torch.tensor(float(state), dtype=torch.float64, device=run.ranks.device))
    )
    peak = _memory(run)
    if peak is not None and before is not None:
        memory |= {"activations": max(0, peak - before - weights - state), "tokens_at_a_time": tokens}
    micro = max(two - one, 1e-9)
    speed = {
        "tokens_per_s": tokens * run.ranks.world / micro, "seconds_of_the_optimizer": max(0.0, one - micro),
        "tokens_at_a_time": tokens,
    }  # fmt: skip
    return {"speed": speed, "memory": memory}


def _batch(run: Run, sequences: int) -> tuple[dict, int]:
    samples = run.dataset.__getitems__(range(min(sequences, len(run.dataset))))
    tokens = sum(len(sample.input_ids) for sample in samples)
    predicted = sum(len(sample.masked_labels) for sample in samples)
    batch = pack_samples(samples, Capacities(tokens, len(samples), predicted), pad_id=run.dataset.special.pad)
    if not run.config.nsp:
        del batch["next_sentence_label"]
    return batch, tokens


def _timed(run: Run, batches: list[dict]) -> float:
    """Seconds of an update, those of the slowest process."""
    predicted = sum(int((batch["masked_labels"] >= 0).sum()) for batch in batches) * run.ranks.world
    sequences = sum(len(batch["cls_positions"]) for batch in batches) * run.ranks.world if run.config.nsp else 0
    began = time.perf_counter()
    outcome = run.step(batches, seed=0, lr=0.0, predicted=predicted, sequences=sequences)
    outcome.scalars.tolist()  # waits for a GPU
    taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=run.ranks.device)
    return float(run.ranks.greatest(taken))


def _memory(run: Run) -> int | None:
    """The most bytes that this process has had since the last call; None where the system does not say."""
    kind = run.ranks.device.type
    try:
        peak = peak_memory(kind)
        reset_peak_memory(kind)
    except OSError:
        return None
    return peak


def _described(run: Run, facts: dict) -> Iterator[str]:
    data, speed, memory, disk = facts["data"], facts["speed"], facts["memory"], facts["disk"]
    parts = ", ".join(f"{name} {number / 1e6:,.1f}" for name, number in facts["parameters"].items())
    yield f"{sum(facts['parameters'].values()) / 1e6:,.1f} million parameters ({parts}), {run.precision} on " + (
        f"{run.ranks.world} x {run.ranks.device.type}"
    )
    about = "" if data["tokens_looked_at"] == data["tokens"] else "about "
    yield (
        f"{data['documents']:,} documents, {data['tokens']:,} tokens; an epoch at {run.phases[0].seq} tokens is {about}"
        f"{data['samples_an_epoch']:,} samples of {data['tokens_an_epoch']:,} tokens, and holds {data['held']:.2%} of "
        "the text"
    )
    for phase in facts["phases"]:
        yield (
            f"  {phase['updates']:,} updates of {phase['batch_size']:,} sequences of at most {phase['seq']} tokens: "
            f"{phase['epochs']:,.1f} epochs, {phase['tokens_an_update']:,.0f} tokens an update"
        )
    yield (
        f"{speed['tokens_per_s']:,.0f} tokens a second, {speed['tokens_at_a_time']:,} at a time, and "
        f"{speed['seconds_of_the_optimizer']:.3f} s an update for the optimiser"
    )
    yield f"{facts['updates']:,} updates to the end take {_hours(facts['hours'])}, without validation and checkpoints"
    told = {"weights": "weights", "gradients": "gradients", "optimizer": "optimiser", "activations": "activations"}
    listed = ", ".join(f"{name} {memory[key] / 1e9:.2f}" for key, name in told.items() if key in memory)
    yield f"memory of a process in GB: {listed}" + (
        f" (at {memory['tokens_at_a_time']:,} tokens at a time)" if "activations" in memory else ""
    )
    yield (
        f"disk: {disk['checkpoint'] / 1e9:.2f} GB a checkpoint, at most {disk['most'] / 1e9:.2f} GB in all "
        f"(--keep {run.config.keep})"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
