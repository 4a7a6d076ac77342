"""What the parts of a run cost on this machine, measured with a copy of its model before the first update."""

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence

from torch import nn

from bert_fast.data import Capacities
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.graph_shapes import examples, spaced_documents
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.phase import Phase
from bert_fast.data.updates import Place
from bert_fast.run.config import PretrainConfig
from bert_fast.run.optimizer import build_optimizer
from bert_fast.run.validation import Validation
from bert_fast.train import recorded
from bert_fast.train.distributed import Ranks

SKIPPED, TIMED = 2, 6  # updates: the first ones are slow
DISK = 2e8  # bytes a second, until a checkpoint is timed


@dataclasses.dataclass
class Costs:
    """Seconds of an update by (longest sequence, batch size), of a validation by longest sequence, of a checkpoint."""

    update: dict[tuple[int, int], float]
    validation: dict[int, float]
    checkpoint: float


def rehearsed(
    config: PretrainConfig, found: Sequence[Phase], model: nn.Module, dataset: PretrainingDataset,
    validation: Validation | None, ranks: Ranks, *, bf16: bool, tokens: int,
    sizes: Mapping[tuple[int, int], Sequence[Capacities]] | None,
) -> Costs:  # fmt: skip
    """The costs of the phases ``found``. ``model`` stays as it is: a copy with an optimiser of its own trains.

    The batches are samples of a few documents, and making them is not timed: a run makes them ahead. ``tokens`` and
    ``sizes`` are those of :func:`bert_fast.data.loader.load_updates`. Every process calls it.
    """
    model = copy.deepcopy(model)
    update = recorded.make_step(model, build_optimizer(model, config, ranks), ranks, bf16=bf16, capture=config.capture)
    costs = Costs({}, {}, 3 * 4 * sum(p.numel() for p in model.parameters()) / DISK)  # weights and two moments
    for phase in found:
        shape = phase.seq, phase.batch_size
        if shape in costs.update:
            continue
        few = dataset.replanned(corpus=spaced_documents(dataset.corpus, nsp=dataset.nsp), max_length=phase.seq)
        if sizes is not None:
            update.prepare(examples(dataset, sizes[shape], phase.seq))
        short, seconds = dataclasses.replace(phase, first=0, last=SKIPPED + TIMED), 0.0
        for work in load_updates(
            BatchMaker(few), updates(few, [short], 0, Place()), rank=ranks.rank, ranks=ranks.world, tokens=tokens,
            workers=0, pin=ranks.device.type == "cuda", sizes=sizes,
        ):  # fmt: skip
            began = time.perf_counter()
            update(
                work.batches, seed=0, lr=0.0, predicted=int(work.update.masked.sum()),
                sequences=len(work.update) if config.nsp else 0,
            ).scalars.tolist()  # fmt: skip
            seconds += (time.perf_counter() - began) * (work.update.step >= SKIPPED)
        costs.update[shape] = seconds / TIMED
        if validation is not None and phase.seq not in costs.validation:
            began = time.perf_counter()
            validation(model, phase.seq)
            costs.validation[phase.seq] = time.perf_counter() - began
    return costs
