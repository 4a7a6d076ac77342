"""Fine-tuning from a pre-trained model and labelled examples to a Hugging Face folder and its measures."""

import hashlib
import json
import shutil
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bert_fast.data.files import write_atomically
from bert_fast.data.tokenizer import own_tokenizer, save_tokenizer
from bert_fast.devices import in_bfloat16
from bert_fast.run.process import Stop, locked, stop_on_signals
from bert_fast.run.weights import silent_transformers
from bert_fast.tasks.choice import Choice
from bert_fast.tasks.examples import fractions
from bert_fast.tasks.network import Network, make_network
from bert_fast.tasks.prediction import require_length
from bert_fast.tasks.questions import Question
from bert_fast.tasks.task import TASKS, Task, make_task, task_class
from bert_fast.tasks.training import Parts, Settings, State, Training, rank, require_same
from bert_fast.tasks.words import Sentence
from bert_fast.train.distributed import Ranks
from bert_fast.use.inference import model_folder

TOKENS = {"cpu": 4096, "cuda": 16384}  # of a micro-batch
RECORD = "finetune.json"  # in the folder that is written: options, and the results of seeds


@dataclass(frozen=True)
class _Plan:
    """What all seeds have in common."""

    task: Task
    train: list
    validation: list
    folder: Path
    out: Path | None
    network: dict[str, Any]
    max_length: int | None
    settings: dict[str, Any]
    ranks: Ranks
    identity: dict[str, Any]


class _Hooks(NamedTuple):
    """The caller's."""

    tell: Callable[[str], None]
    warn: Callable[[str], None]
    on_step: Callable[[int, int, float], None] | None
    on_epoch: Callable[[dict], None] | None


def guess_task(examples: Sequence[Any]) -> str:
    """The task of examples: "tokens" of Sentences, "qa" of Questions, "choice" of Choices. Of labelled sentences it is
    "multilabel" where labels are lists, "regress" where they are numbers and some have a fraction, else "classify".
    ValueError where the first alone is no number: the name of a column."""
    kinds: dict[type, str] = {Sentence: "tokens", Question: "qa", Choice: "choice"}
    if type(examples[0]) in kinds:
        return kinds[type(examples[0])]
    labels = [example.label for example in examples]
    if any(isinstance(label, tuple) for label in labels):
        return "multilabel"
    if fractions(labels):
        return "regress"
    if len(labels) > 2 and fractions(labels[1:]):
        raise ValueError(
            f"the first label, {labels[0]!r}, is no number and all others are: name the columns (--text, --label)"
        )
    return "classify"


def read_task(
    name: str, train: str | Path, validation: str | Path, *, columns: dict | None = None, **options
) -> tuple[Task, list, list]:
    """(the task, its examples of both files); ``name`` "auto" has the task told by ``train``.

    ``columns`` go to the task's ``read`` and ``options`` to the task, those that are not None. ValueError where a file
    has a line that does not fit, naming both, and for what the task does not take.
    """
    given = {key: value for key, value in (columns or {}).items() if value is not None}
    if name == "auto":
        name = next((task for task in TASKS if task_class(task).recognises(Path(train))), "auto")
    if name != "auto":
        task = make_task(name, **options)
        return task, task.read(train, **given), task.read(validation, **given)
    first = make_task("classify").read(train, **given)  # once, as a pipe can be; it reads what the others take
    task = make_task(guess_task(first), **options)
    return task, first, task.read(validation, **given)


def finetune(
    model: str | Path,
    train: list,
    validation: list,
    out: str | Path | None = None,
    *,
    task: str | Task = "auto",
    epochs: float = 3,
    batch_size: int = 32,
    learning_rate: float = 3e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    layer_decay: float = 1.0,
    reinit_layers: int = 0,
    keep: str = "best",
    patience: int | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    seeds: int = 1,
    precision: str = "auto",
    device: str = "cpu",
    from_scratch: bool = False,
    checkpoint_every: int | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] = warnings.warn,
    **options,
) -> dict:
    """Trains a model for ``task`` from the run or Hugging Face folder ``model`` and measures it on ``validation``.

    ``task`` is one of :data:`bert_fast.tasks.task.TASKS`, "auto" (:func:`guess_task`) or a task itself; ``options`` are
    its own, such as ``class_weights``. Examples are as its ``read`` gives them, cut to ``max_length`` tokens (None:
    what the task says, or the model's positions if fewer). A head that ``model`` has keeps its rows for the labels
    that it names; others are drawn. Weights are float32, whatever they were saved as. ``dropout`` is that of hidden
    states and attention (None: the model's own). ``from_scratch`` keeps the architecture and the tokenizer, with random
    weights: what pre-training is worth is the difference; ``reinit_layers`` draws the top layers alone. ``precision``
    is "fp32", "bf16" (products and hidden states), or "auto": bf16 where the device multiplies it in hardware. For the
    rest see :class:`bert_fast.tasks.training.Settings`.

    The model is measured after each epoch, and the best epoch's is kept, or with ``keep`` "last" the last one's, as
    published scores have it. ``out`` gets it with its tokenizer, as a
    Hugging Face folder, and meanwhile checkpoints: the same call goes on from the last one, to the bits that it would
    have reached at once, and one with other options is a ValueError. Of ``seeds`` (from ``seed`` on) the best one is
    kept. The same seed gives the same weights. Returns

    the task's metrics       of the best epoch on ``validation``, with "loss", and what else the task tells
    task, examples, labels   its name; how many ``validation`` has; the names of the classes
    epochs, best_epoch, history   as trained; the epoch that was kept; the measures of each
    seq, cut                 ``max_length``; how many examples of "train" and of "validation" were cut, and what else
                             the task counts (:attr:`.Task.counted`)
    head                     where the weights of the head come from, in words
    precision, skipped       as trained; updates that were left out because they were not finite
    seeds                    of several: "values" of the metric by seed, their "mean" and "deviation" (of the sample)

    ``on_step(step, steps, loss)`` is called after every update, ``on_epoch`` with the measures after every epoch,
    ``on_note`` with what is good to know, ``on_warning`` with what is doubtful. With ``out`` SIGINT, SIGTERM and
    SIGUSR1 write a checkpoint after the update at hand, and :class:`bert_fast.tasks.training.Stopped` is raised. Raises
    ValueError for examples that do not fit together and options out of range, FloatingPointError where the loss is not
    finite in the end.
    """
    _check(dropout=dropout, layer_decay=layer_decay, patience=patience, seeds=seeds, keep=keep)
    tell = on_note or (lambda text: None)
    if not isinstance(task, Task):
        task = make_task(guess_task(train) if task == "auto" else task, **options)
    train, validation, doubtful = task.settle(train, validation)
    for text in doubtful:
        on_warning(text)
    where = torch.device(device)
    bf16 = in_bfloat16(precision, where)
    settings = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": warmup,
        "weight_decay": weight_decay, "layer_decay": layer_decay, "keep": keep, "patience": patience,
        "checkpoint_every": checkpoint_every, "bf16": bf16, "tokens": TOKENS[where.type],
    }  # fmt: skip
    network = {"dropout": dropout, "from_scratch": from_scratch, "reinit_layers": reinit_layers}
    folder = model_folder(model)
    identity = settings | network | {
        "task": task.name, "model": str(folder.resolve()), "max_length": max_length, "seed": seed, "seeds": seeds,
        "train": _digest(train), "validation": _digest(validation),
        "options": {name: str(getattr(task, name)) for name in task.options},
    }  # fmt: skip
    identity.pop("checkpoint_every")
    kept = None if out is None else Path(out)
    plan = _Plan(task, train, validation, folder, kept, network, max_length, settings, Ranks(0, 1, where), identity)
    hooks = _Hooks(tell, on_warning, on_step, on_epoch)
    if kept is None:
        return _all_seeds(plan, range(seed, seed + seeds), hooks)
    with locked(kept, plan.ranks), stop_on_signals() as asked_to_stop:
        try:
            return _all_seeds(plan, range(seed, seed + seeds), hooks, asked_to_stop)
        except FloatingPointError:
            shutil.rmtree(kept / "checkpoints", ignore_errors=True)
            raise
        finally:
            (kept / ".lock").unlink(missing_ok=True)


def _check(*, dropout, layer_decay, patience, seeds, keep) -> None:
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    if keep not in ("best", "last"):
        raise ValueError(f"keep must be 'best' or 'last', got {keep!r}")
    if keep == "last" and patience is not None:
        raise ValueError("patience waits for a better epoch, and keep='last' for none: give one of them")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    if (patience is not None and patience < 1) or seeds < 1:
        raise ValueError(f"patience and seeds must be 1 or more, got {patience} and {seeds}")


def _digest(examples: list) -> str:
    return hashlib.blake2b(repr(examples).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _all_seeds(plan: _Plan, seeds: range, hooks: _Hooks, asked_to_stop: Stop | None = None) -> dict:
    """The result of the best of ``seeds``, which ``plan.out`` has in the end; what is done is not done again."""
    done: dict[str, dict] = {} if plan.out is None else _done_before(plan.out, plan.identity)
    metric = plan.task.metric
    for seed in seeds:
        if str(seed) in done:
            continue
        if len(seeds) > 1:
            hooks.tell(f"seed {seed}, {seed - seeds[0] + 1} of {len(seeds)}")
        before = max((rank(plan.task, found) for found in done.values()), default=None)
        found, network = _one_seed(plan, seed, hooks, asked_to_stop)
        done[str(seed)] = found
        if plan.out is not None:
            if before is None or rank(plan.task, found) > before:
                _write_model(plan.out, network)
            record = {"options": plan.identity, "done": seed == seeds[-1], "seeds": done}
            write_atomically(plan.out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
            shutil.rmtree(plan.out / "checkpoints", ignore_errors=True)
    values = {seed: found[metric] for seed, found in done.items()}
    best = max(done, key=lambda seed: rank(plan.task, done[seed]))
    if len(seeds) == 1:
        return done[best]
    mean, deviation = statistics.fmean(values.values()), statistics.stdev(values.values())
    return done[best] | {"seeds": {"metric": metric, "values": values, "mean": mean, "deviation": deviation}}


def _done_before(out: Path, identity: dict) -> dict[str, dict]:
    """The results of the seeds that an interrupted call has finished."""
    path = out / RECORD
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"done": True}
    if record["done"]:
        return {}
    require_same(out, record["options"], json.loads(json.dumps(identity)))
    return record["seeds"]


def _one_seed(plan: _Plan, seed: int, hooks: _Hooks, asked_to_stop: Stop | None) -> tuple[dict, Network]:
    task = plan.task
    torch.manual_seed(seed)
    network = make_network(task, plan.folder, **plan.network)
    hooks.tell(network.head)
    positions = network.model.config.max_position_embeddings
    length = min(task.max_length, positions) if plan.max_length is None else plan.max_length
    require_length(length, positions)
    counts: dict[str, Counter] = {"train": Counter(cut=0), "validation": Counter(cut=0)}
    train, validation = (
        task.encode(part, own_tokenizer(network.tokenizer), length, counts[name])
        for name, part in (("train", plan.train), ("validation", plan.validation))
    )
    training = Training(
        task, network.model, network.tokenizer, Parts(train, validation, plan.validation),
        Settings(seed=seed, **plan.settings), plan.ranks, folder=plan.out,
        identity=json.loads(json.dumps(plan.identity | {"this seed": seed})), tell=hooks.tell,
    )  # fmt: skip
    state = training.run(hooks.on_step, hooks.on_epoch, asked_to_stop)
    if state.skipped:
        hooks.warn(f"{state.skipped:,} of {state.step:,} updates were left out: their loss or gradient was not finite")
    network.model.config.update(task.learnt(state.history[state.best]))
    return _result(plan, state, network.head, length, counts), network


def _result(plan: _Plan, state: State, head: str, length: int, counts: dict[str, Counter]) -> dict:
    best = state.history[state.best]
    return {
        **{name: value for name, value in best.items() if name not in ("epoch", "step", "train_loss")},
        "task": plan.task.name,
        "metric": plan.task.metric,
        "examples": len(plan.validation),
        "labels": plan.task.labels if plan.task.named else None,
        "epochs": state.history[-1]["epoch"],
        "best_epoch": best["epoch"],
        "history": state.history,
        "seq": length,
        "head": head,
        "precision": "bf16" if plan.settings["bf16"] else "fp32",
        "skipped": state.skipped,
        **{
            name: {part: found[name] for part, found in counts.items()}
            for name in sorted({*counts["train"], *counts["validation"]})
        },
        **plan.task.about(plan.train, plan.validation),
    }


def _write_model(out: Path, network: Network) -> None:
    with silent_transformers():
        network.model.save_pretrained(out)
        save_tokenizer(network.tokenizer, out, max_length=network.model.config.max_position_embeddings)
