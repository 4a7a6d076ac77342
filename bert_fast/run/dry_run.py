"""What a run will be, before it starts: its size, its data, its speed as measured for some seconds, and its end."""

from collections.abc import Iterator
from typing import Any

import torch

from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.graph_shapes import sample_lengths
from bert_fast.data.pairs import document_tokens
from bert_fast.data.phase import Phase
from bert_fast.devices import peak_memory, reset_peak_memory
from bert_fast.output import Output
from bert_fast.run.config import PretrainConfig
from bert_fast.run.optimizer import state_tensors
from bert_fast.run.pretrain import Run, kernels_of
from bert_fast.run.rehearsal import Costs, rehearsed
from bert_fast.run.sources import Source
from bert_fast.run.tracking import require_installed
from bert_fast.train.distributed import started

SECONDS = 1.0  # of the updates that are measured, about, in all, beside the first


def dry_run(config: PretrainConfig, output: Output | None = None) -> dict:
    """Says what :func:`bert_fast.run.pretrain.pretrain` would do with ``config``, and writes nothing.

    Returns the facts by name: ``parameters`` by part; ``data``, of an epoch at the first phase's length, and by source;
    ``phases``, with a budget of hours those that fit in it; ``speed``, of eager updates; ``memory`` of one process, in
    bytes; ``hours`` and ``updates`` to the end, without validation and checkpoints; ``disk``, in bytes. Raises what
    pretrain raises before its first update; trackers and the Hub are not asked.
    """
    output = output or Output()
    with started(config.device) as ranks, kernels_of(config):
        if ranks.first:
            require_installed(config)
        else:
            output = Output(silent=True)
        run = Run(config, ranks, output, few=True)
        facts: dict[str, Any] = {"parameters": _parameters(run.model), "data": _data(run)}
        costs, memory = _measured(run)
        if config.max_hours and run.state.step < run.total:
            run.plan_in_time(costs)
        facts["phases"] = phases = [_phase(run, phase, costs) for phase in run.phases]
        first = phases[-len(run.phases_left)]
        micro = max(first["seconds_an_update"] - costs.optimizer, 1e-9)
        facts["speed"] = {
            "tokens_per_s": first["tokens_an_update"] / micro, "seconds_of_the_optimizer": costs.optimizer,
            "tokens_at_a_time": costs.tokens,
        }  # fmt: skip
        facts["memory"] = memory
        facts["updates"] = sum(phase["updates_left"] for phase in phases)
        facts["hours"] = sum(phase["updates_left"] * phase["seconds_an_update"] for phase in phases) / 3600
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
    """Of an epoch of each source and of all of them; both are the same of one."""
    parts = [_source(source, dataset) for source, dataset in zip(run.sources, run.datasets, strict=True)]
    names = ("documents", "tokens", "tokens_looked_at", "samples_an_epoch", "tokens_an_epoch")
    found = {name: sum(part[name] for part in parts) for name in names}
    found["held"] = sum(part["held"] * part["tokens"] for part in parts) / found["tokens"]
    return found | {"sources": {source.name: part for source, part in zip(run.sources, parts, strict=True)}}


def _source(source: Source, few: PretrainingDataset) -> dict:
    """What an epoch of ``source`` has, by the ``few`` of its documents."""
    tokens, looked_at = document_tokens(source.corpus), int(document_tokens(few.corpus).sum())
    scale = float(tokens.sum()) / looked_at
    return {
        "documents": len(tokens), "tokens": int(tokens.sum()), "tokens_looked_at": looked_at,
        "samples_an_epoch": round(len(few.plan) * scale), "held": float(few.plan.held) / looked_at,
        "tokens_an_epoch": round(float(few.plan.length.sum()) * scale), "share": source.share,
    }  # fmt: skip


def _phase(run: Run, phase: Phase, costs: Costs) -> dict:
    lengths = sample_lengths(run.dataset, phase.seq)
    found: dict[str, Any] = {
        "seq": phase.seq, "batch_size": phase.batch_size, "updates": phase.last - phase.first,
        "updates_left": phase.last - max(phase.first, min(run.state.step, phase.last)),
        "tokens_an_update": float(lengths.mean()) * phase.batch_size,
        "seconds_an_update": costs.update.get((phase.seq, phase.batch_size), 0.0),  # none of those that are done
    }  # fmt: skip
    tokens, found["epochs_of"] = found["updates"] * found["tokens_an_update"], {}
    for source, few in zip(run.sources, run.datasets, strict=True):
        scale = float(document_tokens(source.corpus).sum() / document_tokens(few.corpus).sum())
        an_epoch = few.replanned(max_length=phase.seq).plan.length.sum() * scale
        found["epochs_of"][source.name] = float(source.share * tokens / an_epoch)
    return found | {"epochs": sum(source.share * found["epochs_of"][source.name] for source in run.sources)}


def _measured(run: Run) -> tuple[Costs, dict]:
    """What updates take, and the memory of a process that does them, in bytes by what it is for."""
    before, left = _memory(run), run.phases_left or run.phases
    costs = rehearsed(run.rehearsal(run.step), left, None, seconds=SECONDS / len(left))
    peak = _memory(run)
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(run.optimizer, run.model).values())
    memory = {"weights": weights, "gradients": weights, "optimizer": state}
    everywhere = torch.tensor(float(state), dtype=torch.float64, device=run.ranks.device)
    memory["optimizer_all"] = int(run.ranks.sum(everywhere))
    if peak is not None and before is not None:
        at_a_time = min(run.tokens, costs.tokens // run.ranks.world)
        memory |= {"activations": max(0, peak - before - weights - state), "tokens_at_a_time": at_a_time}
    held = _held_out_tokens(run)
    for phase in left:  # no held-out sample is made: a forward pass is a third of what an update does for a token
        length = float(sample_lengths(run.dataset, phase.seq).mean())
        tokens = min(held, run.config.validation_sequences * length)
        update = costs.update[phase.seq, phase.batch_size] - costs.optimizer
        costs.validation[phase.seq] = tokens / (length * phase.batch_size) * update / 3
    return costs, memory


def _held_out_tokens(run: Run) -> int:
    return sum(int(document_tokens(corpus).sum()) for corpus in run.held_out)


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
    for name, part in data["sources"].items():
        about = "" if part["tokens_looked_at"] == part["tokens"] else "about "
        of = f"{name}, {part['share']:.1%} of the tokens: " if len(data["sources"]) > 1 else ""
        yield (
            f"{of}{part['documents']:,} documents, {part['tokens']:,} tokens; an epoch at {run.phases[0].seq} tokens "
            f"is {about}{part['samples_an_epoch']:,} samples of {part['tokens_an_epoch']:,} tokens, and holds "
            f"{part['held']:.2%} of the text"
        )
    for phase in facts["phases"]:
        epochs = ", ".join(
            f"{n:,.1f} epochs" + (f" of {name}" if len(data["sources"]) > 1 else "")
            for name, n in phase["epochs_of"].items()
        )
        yield (
            f"  {phase['updates']:,} updates of {phase['batch_size']:,} sequences of at most {phase['seq']} tokens: "
            f"{epochs}, {phase['tokens_an_update']:,.0f} tokens an update"
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
