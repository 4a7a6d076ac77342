"""The loss of every step over some hundred updates of real text, ours and the reference's from the same weights."""

import torch
import transformers

from benchmarks.contenders import CONTENDERS, Built, Setting, build, our_optimizer, precision
from benchmarks.workload import Batch, Workload, model_config
from bert_fast import optim

HIGHEST_RATE, WARM_UP = 1e-4, 50


def curve(name: str, model: str, setting: Setting, *, sequences: int, seq: int, count: int) -> list[float]:
    """Under AdamW with a linear warm-up: the same weights, batches and schedule, each with masks of its own."""
    config = model_config(model, dropout=0.1)
    config.vocab_size = max(config.vocab_size, 30522)
    batches = Workload().batches(count, sequences, seq, setting.device)
    torch.manual_seed(0)
    weights = transformers.BertForPreTraining(config).state_dict()
    train = trainer(build(name, config, setting, weights=weights), batches[0])
    return [train(batch, HIGHEST_RATE * min(1.0, (n + 1) / WARM_UP)) for n, batch in enumerate(batches)]


def trainer(built: Built, first: Batch):
    """A function that trains on a batch at a rate and gives the loss."""
    if CONTENDERS[built.name].ours:
        step = built.trainer(first, our_optimizer(built.model, built.setting))
        return lambda batch, rate: float(step(batch, rate).scalars[:2].sum())
    optimizer = optim.AdamW(optim.parameter_groups(built.model), lr=0.0, max_grad_norm=1.0)

    def train(batch: Batch, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with precision(built.setting.device, built.setting.dtype):
            loss = built.model(**built.inputs(batch)).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return train
