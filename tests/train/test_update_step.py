"""One update: accumulation over micro-batches is the large batch's, dropout on; what is not finite is not applied."""

import dataclasses

import pytest
import torch
from transformers import BertConfig

from bert_fast.data import PretrainingDataset, load_tokenizer, open_corpus
from bert_fast.data.loader import BatchMaker, load_updates, updates
from bert_fast.data.phase import Phase
from bert_fast.data.updates import Place
from bert_fast.model import BertForPreTraining
from bert_fast.products import sums_in_float32
from bert_fast.run.config import PretrainConfig
from bert_fast.run.optimizer import build_optimizer, load_state, owned, state_tensors
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Step, derived_seed

ALONE = Ranks(0, 1, torch.device("cpu"))
BATCH = 24


def works(prepared, tokens: int, count: int = 3, **options):
    """The first updates in micro-batches of ``tokens``."""
    tokenizer = load_tokenizer(prepared / "data" / "tokenizer")
    dataset = PretrainingDataset(open_corpus(prepared / "data"), tokenizer, max_length=32, **options)
    stream = updates(dataset, [Phase(32, 0, count, BATCH, 1e-3, 0, 0, count)], 0, Place())
    return list(load_updates(BatchMaker(dataset), stream, rank=0, ranks=1, tokens=tokens, workers=0, pin=False))


def new_step(prepared, clip: float = 1.0, bf16: bool = False, dropout: float = 0.1, optimizer: str = "adamw") -> Step:
    torch.manual_seed(1)
    config = BertConfig.from_json_file(prepared / "tiny.json")
    config.vocab_size = load_tokenizer(prepared / "data" / "tokenizer").get_vocab_size()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model = BertForPreTraining(config)
    options = PretrainConfig(data="d", out="r", clip=clip, optimizer=optimizer)
    return Step(model, build_optimizer(model, options, ALONE), ALONE, bf16=bf16)


def apply(step: Step, work, number: int, nsp: bool = True):
    predicted = sum(int((batch["masked_labels"] >= 0).sum()) for batch in work.batches)
    return step(
        work.batches, seed=derived_seed(0, number), lr=1e-3, predicted=predicted,
        sequences=len(work.update) if nsp else 0,
    )  # fmt: skip


def parameters(step: Step) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"nsp": False}, {"whole_word": True}])
def test_micro_batches_give_the_large_batchs_update(prepared, options):
    nsp = options.get("nsp", True)
    large, small = new_step(prepared), new_step(prepared)
    one, many = works(prepared, 4096, **options), works(prepared, 96, **options)
    assert {len(work.batches) for work in one} == {1}
    assert min(len(work.batches) for work in many) >= 4
    for number, (whole, parts) in enumerate(zip(one, many, strict=True)):
        a, b = apply(large, whole, number, nsp), apply(small, parts, number, nsp)
        torch.testing.assert_close(b.scalars, a.scalars, rtol=2e-5, atol=1e-6)
        assert bool(a.finite.all())
    after = parameters(small)
    for name, expected in parameters(large).items():
        # Adam divides by the root of the second moment: a gradient that is nothing but rounding may move 1e-3
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=2e-4, msg=name)


def test_losses_are_the_models_own(prepared):
    step, (work, *_) = new_step(prepared, dropout=0.0), works(prepared, 4096)
    (batch,) = work.batches
    step.model.train()
    both = step.model(**batch)
    mlm = step.model(**{k: v for k, v in batch.items() if k != "next_sentence_label"})
    scalars = apply(step, work, 0).scalars
    assert scalars[0].item() == pytest.approx(mlm.loss.item(), rel=1e-5)
    assert (scalars[0] + scalars[1]).item() == pytest.approx(both.loss.item(), rel=1e-5)
    assert scalars[2] == 0


def test_the_dropout_masks_depend_on_seed_and_slot_alone(prepared):
    work = works(prepared, 96)[0]
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(torch.initial_seed() + 17)  # whatever the generator's state was
        step = new_step(prepared)
        outcomes.append(step(work.batches, seed=seed, lr=1e-3, predicted=100, sequences=BATCH).scalars)
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_bf16_keeps_weights_and_moments_in_float32(prepared):
    step = new_step(prepared, bf16=True)
    outcome = apply(step, works(prepared, 4096)[0], 0)
    assert bool(torch.isfinite(outcome.scalars).all())
    assert {parameter.dtype for parameter in step.model.parameters()} == {torch.float32}
    moments = {v.dtype for k, v in state_tensors(step.optimizer, step.model).items() if k.startswith("exp_avg")}
    assert moments == {torch.float32}


def test_a_gpus_products_add_in_float32(prepared):
    """Forward and backward; outside of updates the process has the settings that it had."""
    seen = []

    def see(*_):
        matmul = torch.backends.cuda.matmul
        seen.append([matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction])

    step = new_step(prepared, bf16=True)
    layer = step.model.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(see)
    layer.weight.register_hook(see)
    work = works(prepared, 4096)[0]
    apply(step, work, 0)
    see()
    with sums_in_float32():
        apply(step, work, 1)
        see()
    see()
    allowed, refused = [True, True], [False, False]
    assert seen == [refused, refused, allowed, refused, refused, refused, allowed]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_neither_weights_nor_moments(prepared, poison):
    step, (first, second, third) = new_step(prepared), works(prepared, 96)
    apply(step, first, 0)
    before, moments = parameters(step), state_tensors(step.optimizer, step.model)
    moments = {name: tensor.clone() for name, tensor in moments.items()}
    table = step.model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():  # one word of one micro-batch is broken for the length of one update
        word = second.batches[0]["input_ids"][0, 1]
        kept = table[word].clone()
        table[word] = poison
    outcome = apply(step, second, 1)
    with torch.no_grad():
        table[word] = kept
    assert not bool(torch.isfinite(outcome.scalars).all())
    assert not bool(outcome.finite.all())
    after = parameters(step)
    assert all(torch.equal(after[name], before[name]) for name in before)
    now = state_tensors(step.optimizer, step.model)
    assert all(torch.equal(now[name], moments[name]) for name in moments)
    assert bool(torch.isfinite(apply(step, third, 2).scalars).all())
    assert not torch.equal(parameters(step)["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lamb-nvidia"])
def test_the_optimisers_state_goes_on_by_name(prepared, optimizer):
    made = works(prepared, 4096)
    whole, before, after = (new_step(prepared, optimizer=optimizer) for _ in range(3))
    for number, work in enumerate(made):
        apply(whole, work, number)
    apply(before, made[0], 0)
    saved = {name: tensor.clone() for name, tensor in state_tensors(before.optimizer, before.model).items()}
    assert {name.partition("/")[2] for name in saved} == owned(before.optimizer, before.model)
    after.model.load_state_dict(before.model.state_dict())
    load_state(after.optimizer, after.model, saved)
    for number in (1, 2):
        apply(after, made[number], number)
    expected = parameters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(after).items())


def test_masks_by_place_have_a_seed_of_their_own_in_each_micro_batch_and_rank():
    """A library's masks are the same function of place in all micro-batches of one seed; the engine's are not."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())

    def seeds(**how) -> list[int]:
        ranks = [dataclasses.replace(Ranks(0, 1, torch.device("cpu")), rank=rank) for rank in range(2)]
        steps = [Step(model, optimizer, rank, bf16=False, **how) for rank in ranks]
        return [step._seed(seed, number) for step in steps for number in range(3) for seed in (5, 6)]

    assert sorted(set(seeds())) == [5, 6]
    assert len(set(seeds(masks_by_place=True))) == 12
    assert seeds(masks_by_place=True) == seeds(masks_by_place=True)
