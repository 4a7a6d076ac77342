"""Our batches on transformers' model and on ours: the same loss curve over 200 updates."""

import copy

import numpy as np
import pytest
import torch
import transformers

from bert_fast.data import PretrainingDataset, load_tokenizer, open_corpus, pad_samples
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.updates import Place, Stream
from bert_fast.model import BertForPreTraining
from bert_fast.run.config import PretrainConfig, phases
from bert_fast.run.optimizer import build_optimizer
from bert_fast.train.distributed import Ranks
from bert_fast.train.schedule import learning_rate
from bert_fast.train.step import Step

UPDATES, BATCH = 200, 16


@pytest.mark.slow
def test_the_loss_curve_is_that_of_transformers(prepared):
    """Packed micro-batches with the masked-only head against padded batches with the full one, torch's AdamW and
    clip_grad_norm_; dropout 0."""
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    config = transformers.BertConfig.from_json_file(prepared / "tiny.json")
    config.vocab_size = tokenizer.get_vocab_size()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(3)
    theirs = transformers.BertForPreTraining(copy.deepcopy(config)).train()
    ours = BertForPreTraining(copy.deepcopy(config))
    ours.load_state_dict(theirs.state_dict())

    options = PretrainConfig(data="d", out="r", steps=UPDATES, batch_size=BATCH, seq=32, lr=2e-3, warmup=20.0)
    (phase,) = phases(options)
    dataset = PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=32)
    alone = Ranks(0, 1, torch.device("cpu"))
    step = Step(ours, build_optimizer(ours, options, alone), alone, bf16=False)
    works = load_updates(
        BatchMaker(dataset), updates(dataset, [phase], 0, Place()), rank=0, ranks=1, tokens=128, workers=0, pin=False
    )
    decays = [p for p in theirs.parameters() if p.dim() > 1]
    plain = [p for p in theirs.parameters() if p.dim() <= 1]
    reference = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], lr=0.0, eps=1e-6
    )
    epochs: dict[int, PretrainingDataset] = {}
    curve, expected = [], []
    for work in works:
        update = work.update
        lr = learning_rate(update.step, phase)
        scalars = step(work.batches, seed=0, lr=lr, predicted=int(update.masked.sum()), sequences=BATCH).scalars
        curve.append(float(scalars[0] + scalars[1]))
        samples = []
        for epoch, index in zip(update.epochs.tolist(), update.indices.tolist(), strict=True):
            if epoch not in epochs:
                epochs[epoch] = Stream(dataset, 32, Place(epoch)).dataset
            samples.append(epochs[epoch][index])
        loss = theirs(**pad_samples(samples, pad_id=dataset.special.pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), options.clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        expected.append(loss.item())
    curve, expected = np.array(curve), np.array(expected)
    assert len(curve) == UPDATES
    assert expected[-20:].mean() < expected[:20].mean() - 0.5  # it learns
    np.testing.assert_allclose(curve, expected, rtol=1e-4)  # 2e-6 where it was written
