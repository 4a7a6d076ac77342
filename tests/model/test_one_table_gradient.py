"""One gradient of a tied word table: the bits of two that autograd adds, in one buffer, and still autograd's own."""

import contextlib
import copy
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig

from bert_fast import BertForMaskedLM, BertForPreTraining, dispatch, ops
from bert_fast.data import Capacities, Sample, pack_samples
from bert_fast.train.distributed import Ranks
from bert_fast.train.recorded import make_step
from bert_fast.train.step import Step
from tests.support.parity import DEVICE, assert_near_truth, available_backends

optim = pytest.importorskip("bert_fast.optim")

FULL, BF16 = torch.float32, torch.bfloat16
LONGEST, WORDS, COLUMNS = 24, 128, 32  # few words: Triton's interpreter takes a millisecond a table row
SIZE = Capacities(tokens=72, sequences=4, masked=12)
BACKENDS = available_backends("embedding_layernorm")
DTYPES = {"fp32": (FULL, None), "autocast-bf16": (FULL, BF16), "bf16": (BF16, None)}


def build(dtype=FULL, kind=BertForPreTraining, **fields):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=COLUMNS, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=LONGEST, **fields,
    )  # fmt: skip
    return kind(config).to(DEVICE, dtype).train()


def packed(masked: int = 3) -> dict:
    """Three sequences, with hot ids and the padding's id among the others, and unused tails in all capacities."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(3):
        ids = torch.randint(0, WORDS // 2, (18 + number,), generator=generator)
        ids[::3] = 7
        ids[5] = 0
        at = torch.arange(1, 1 + masked)
        samples.append(Sample(ids.numpy(), (ids % 2).numpy(), at.numpy(), ids[at].numpy(), number % 2, number))
    batch = pack_samples(samples, SIZE, pad_id=0)
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@contextlib.contextmanager
def apart():
    """Forwards in here have two gradients of the table, as traced ones have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "one_table_gradient", contextlib.nullcontext)
        yield


def gradients(model, batch, autocast=None, one: bool = True, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The loss and every parameter's gradient; dropout is on, its masks the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    products = contextlib.nullcontext() if autocast is None else torch.autocast(DEVICE, autocast)
    with products, contextlib.nullcontext() if one else apart():
        loss = model(**batch).loss
    (loss if scale == 1.0 else loss * scale).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


def table_of(found: dict) -> torch.Tensor:
    return found["bert.embeddings.word_embeddings.weight"]


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, different


@pytest.mark.parametrize(
    ("backend", "dtypes"),
    [pytest.param(b, d, marks=pytest.mark.slow if b == "triton" and d != "fp32" else ()) for b in BACKENDS
     for d in DTYPES],
)  # fmt: skip
def test_the_bits_of_two_gradients_made_apart(backend, dtypes):
    dtype, autocast = DTYPES[dtypes]
    model, batch = build(dtype), packed()
    with dispatch.use_backend(embedding_layernorm=backend, mlm_loss=backend):
        two = gradients(model, batch, autocast, one=False)
        ours = gradients(model, batch, autocast)
        assert_same_bits(ours, two)
        assert_same_bits(gradients(model, batch, autocast), ours)
    exact = build(torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = gradients(exact, batch, one=False)
    assert_near_truth("d table", table_of(ours), table_of(two), table_of(truth), factor=1.0)
    assert_same_bits(gradients(exact, batch), truth)
    assert float((table_of(truth)[7]).abs().max()) > 0


def large_blocks(run, size: int) -> int:
    """How many blocks of exactly ``size`` bytes are allocated while ``run`` runs, by whomever."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as found:
        run()
    return sum(e.name() == "[memory]" and e.nbytes() == size for e in found.profiler.kineto_results.events())


@pytest.mark.parametrize("dtypes", ["fp32", "autocast-bf16"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_one_buffer_of_the_tables_size_is_made(backend, dtypes):
    dtype, autocast = DTYPES[dtypes]
    if (backend, autocast, DEVICE) == ("triton", BF16, "cpu"):
        pytest.skip("a CPU that stands in for a GPU makes float32 copies to multiply bfloat16")
    model, batch = build(dtype), packed()
    size = WORDS * COLUMNS * dtype.itemsize
    with dispatch.use_backend(embedding_layernorm=backend, mlm_loss=backend):
        gradients(model, batch, autocast)
        assert large_blocks(lambda: gradients(model, batch, autocast), size) == 1
        assert large_blocks(lambda: gradients(model, batch, autocast, one=False), size) >= 2


class _NoUpdate(optim.AdamW):
    """Leaves weights and gradients as they are, so that both can be looked at after a step."""

    def step(self, closure=None, *, grad_norm=None):
        return None

    def zero_grad(self, set_to_none=True):
        return None


def step_of(model, optimizer, autocast, capture=False) -> Step:
    """A step like pre-training's, of the whole batch at once."""
    place = Ranks(0, 1, next(model.parameters()).device)
    return make_step(model, optimizer, place, bf16=autocast == BF16, capture=capture)


def apply(step: Step, batch: dict, lr: float, seed: int) -> torch.Tensor:
    """The loss, as the mean over what is predicted."""
    batch = {**batch, "max_length_q": LONGEST}
    predicted = int((batch["masked_labels"] >= 0).sum())
    labelled = int((batch["next_sentence_label"] >= 0).sum()) if "next_sentence_label" in batch else 0
    return step([batch], seed=seed, lr=lr, predicted=predicted, sequences=labelled).scalars[:2].sum()


@pytest.mark.parametrize("autocast", [None, BF16])
def test_captured_steps_make_one_buffer(autocast):
    model, batch = build(), packed()
    step = step_of(model, _NoUpdate(model.parameters()), autocast)
    apply(step, batch, 0.0, 2)
    assert large_blocks(lambda: apply(step, batch, 0.0, 2), WORDS * COLUMNS * 4) == 1
    found = model.bert.embeddings.word_embeddings.weight.grad
    with apart():
        apply(step, batch, 0.0, 2)
    two = model.bert.embeddings.word_embeddings.weight.grad
    assert found is not two
    assert torch.equal(found, two)


@pytest.mark.parametrize("kind", ["AdamW", "Lamb"])
@pytest.mark.parametrize("dtypes", ["autocast-bf16", "bf16"])
def test_training_does_not_notice(kind, dtypes):
    dtype, autocast = DTYPES[dtypes]
    batch = packed()

    def trained():
        model = build(dtype)
        optimizer = getattr(optim, kind)(optim.parameter_groups(model), lr=1.0, max_grad_norm=1.0)
        step = step_of(model, optimizer, autocast, capture=True)
        step.prepare([{**batch, "max_length_q": LONGEST}])
        losses = [apply(step, batch, 1e-2, i).clone() for i in range(5)]
        return losses, [p.detach().clone() for p in model.parameters()]

    ours, ours_parameters = trained()
    with apart():
        two, parameters = trained()
    assert all(torch.equal(a, b) for a, b in zip(ours, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours_parameters, parameters, strict=True))
    assert float(ours[4]) < float(ours[0])


@pytest.mark.parametrize("one", [False, True])
def test_hooks_see_the_whole_gradient_once(one):
    model, batch = build(), packed()
    expected = table_of(gradients(model, batch, one=False)).clone()
    seen = []
    word = model.bert.embeddings.word_embeddings.weight
    word.register_hook(lambda grad: seen.append(grad.clone()))
    word.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    gradients(model, batch, one=one)
    assert len(seen) == 2
    assert all(torch.equal(grad, expected) for grad in seen)


def ways(loss, word) -> int:
    """How many gradients autograd adds up for the table ``word``."""
    found, seen, todo = 0, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            found += getattr(following, "variable", None) is word
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def test_forwards_are_joined_and_operators_alone_are_not():
    model, batch = build(), packed()
    word = model.bert.embeddings.word_embeddings.weight
    assert ways(model(**batch).loss, word) == 1
    with apart():
        assert ways(model(**batch).loss, word) == 2
    ids = torch.arange(4, device=DEVICE)
    row = torch.zeros(COLUMNS, device=DEVICE)
    table = torch.zeros(4, COLUMNS, device=DEVICE)
    hidden = ops.embedding_layernorm(ids, ids, ids, word, table, table, row, row, eps=1e-12)
    assert ways(ops.mlm_loss(hidden, word, torch.zeros(WORDS, device=DEVICE), ids), word) == 2


def test_threads_do_not_meet():
    """A forward in another thread, while one is between its embedding and its loss here, joins its own alone."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # torch has one generator
    model, other, batch = build(**still), build(**still), packed()
    found = []

    def elsewhere(*_):
        thread = threading.Thread(target=lambda: found.append(gradients(other, batch)))
        thread.start()
        thread.join()

    with_hook = model.bert.encoder.register_forward_pre_hook(lambda *_: None)  # layers with hooks take another path
    expected = gradients(model, batch)
    with_hook.remove()
    model.bert.encoder.register_forward_pre_hook(elsewhere)
    assert_same_bits(gradients(model, batch), expected)
    assert_same_bits(found[0], gradients(other, batch))


@pytest.mark.parametrize(
    "case", ["untied", "frozen table", "frozen embeddings", "no padding_idx", "all frozen but the table", "unmasked",
             "scaled", "unpacked", "masked LM alone"]
)  # fmt: skip
def test_cases(case):
    batch, scale = packed(), 1.0
    model = build(kind=BertForMaskedLM if case == "masked LM alone" else BertForPreTraining,
                  tie_word_embeddings=case != "untied")  # fmt: skip
    embeddings = model.bert.embeddings
    if case == "frozen table":
        embeddings.word_embeddings.weight.requires_grad_(False)
    elif case == "frozen embeddings":
        embeddings.requires_grad_(False)
    elif case == "all frozen but the table":
        model.requires_grad_(False)
        embeddings.word_embeddings.weight.requires_grad_(True)
    elif case == "no padding_idx":
        embeddings.word_embeddings.padding_idx = None
    elif case == "unmasked":
        batch["masked_labels"] = torch.full_like(batch["masked_labels"], -100)
    elif case == "scaled":
        scale = -2.5
    elif case == "unpacked":
        ids = batch["input_ids"][:, :40].reshape(2, 20)
        batch = {"input_ids": ids, "labels": ids.where(ids % 3 == 0, -100),
                 "next_sentence_label": torch.tensor([0, 1], device=DEVICE)}  # fmt: skip
    elif case == "masked LM alone":
        batch.pop("next_sentence_label")
    tied = model.cls.predictions.decoder.weight is embeddings.word_embeddings.weight
    assert tied == (case != "untied")
    two = gradients(model, batch, one=False, scale=scale)
    assert_same_bits(gradients(model, batch, scale=scale), two)
    assert len(two) > 1


def test_gradients_of_micro_batches_add_up():
    """Two forwards, and two backwards of the first."""
    model, batches = build(), [packed(3), packed(2)]

    def accumulated(one):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        with contextlib.nullcontext() if one else apart():
            losses = [model(**batch).loss for batch in batches]
        losses[0].backward(retain_graph=True)
        for loss in losses:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    assert_same_bits(accumulated(True), copy.deepcopy(accumulated(False)))


def test_the_table_alone():
    """mlm_loss of hidden states that the embedding did not make: the embedding's backward has nothing of its own."""
    word, hidden = (torch.randn(shape, device=DEVICE) for shape in ((WORDS, COLUMNS), (5, COLUMNS)))
    bias, position = torch.zeros(WORDS, device=DEVICE), torch.randn(4, COLUMNS, device=DEVICE)
    ids = torch.arange(4, device=DEVICE)
    word.requires_grad_()

    def gradient(one):
        with ops.one_table_gradient() if one else contextlib.nullcontext():
            ops.embedding_layernorm(ids, ids, ids, word, position, position, position[0], position[1], eps=1e-12)
            loss = ops.mlm_loss(hidden, word, bias, torch.arange(5, device=DEVICE))
        return torch.autograd.grad(loss, word)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_a_second_derivative_is_refused_as_ever():
    """A penalty on the table's gradient must not be dropped in silence."""
    word, row = torch.randn(WORDS, COLUMNS, device=DEVICE, requires_grad=True), torch.randn(4, COLUMNS, device=DEVICE)
    ids = torch.arange(4, device=DEVICE)

    def gradient(one, create_graph):
        with ops.one_table_gradient() if one else contextlib.nullcontext():
            x = ops.embedding_layernorm(ids, ids, ids, word, row, row, row[0], row[1], eps=1e-12)
            loss = ops.mlm_loss(x, word, torch.zeros(WORDS, device=DEVICE), ids)
        return loss, torch.autograd.grad(loss, word, create_graph=create_graph)[0]

    expected = gradient(False, False)[1]
    for one in (False, True):
        loss, grad = gradient(one, True)
        assert torch.equal(grad, expected)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            (loss + grad.square().sum()).backward()
