"""Weight gradients summed in place: as exact as autograd's, in one buffer, and autograd's where hooks look."""

import contextlib
import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig

from bert_fast import BertForPreTraining, optim
from bert_fast.data import Capacities, Sample, pack_samples
from bert_fast.linear import gradients_in_place, linear, linear_with_residual
from bert_fast.products import multiply
from bert_fast.train.distributed import Ranks
from bert_fast.train.step import Step
from tests.support.parity import DEVICE, assert_near_truth

FULL, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": (FULL, None), "autocast-bf16": (FULL, BF16), "bf16": (BF16, None)}
LONGEST, COLUMNS, INNER = 24, 32, 88
SIZE = Capacities(tokens=72, sequences=4, masked=12)
QUERY, KEY, VALUE, OUTPUT, IN, OUT = (
    f"bert.encoder.layer.1.{name}.weight"
    for name in (*(f"attention.self.{n}" for n in ("query", "key", "value")), "attention.output.dense",
                 "intermediate.dense", "output.dense")
)  # fmt: skip


class _Kept(optim.AdamW):
    """Leaves weights and gradients as they are, so that both can be looked at after an update."""

    def step(self, closure=None, *, grad_norm=None):
        return None

    def zero_grad(self, set_to_none=True):
        return None


def build(dtype=FULL, **fields):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=COLUMNS, num_hidden_layers=2, num_attention_heads=2, intermediate_size=INNER,
        max_position_embeddings=LONGEST, **fields,
    )  # fmt: skip
    return BertForPreTraining(config).to(DEVICE, dtype).train()


def step_of(model, autocast=None) -> Step:
    place = Ranks(0, 1, next(model.parameters()).device)
    return Step(model, _Kept(model.parameters()), place, bf16=autocast == BF16)


def batches(count: int = 3) -> list[dict]:
    """Packed micro-batches of one size, with unused tails in all capacities."""
    generator, packed = torch.Generator().manual_seed(1), []
    for batch in range(count):
        samples = []
        for number in range(3):
            ids = torch.randint(5, 128, (16 + batch + number,), generator=generator)
            at = torch.arange(1, 4)
            samples.append(Sample(ids.numpy(), (ids % 2).numpy(), at.numpy(), ids[at].numpy(), number % 2, number))
        packed.append({**pack_samples(samples, SIZE, pad_id=0), "max_length_q": LONGEST})
    return packed


def run(step: Step, made: list[dict]) -> dict[str, torch.Tensor]:
    """The gradients of an update, whose dropout masks are the same each time."""
    step(made, seed=2, lr=0.0, predicted=sum(int((b["masked_labels"] >= 0).sum()) for b in made), sequences=9)
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def by_autograd():
    """Steps in here have gradients by autograd alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert_fast.train.step.gradients_in_place", lambda *_: contextlib.nullcontext())
        yield


def weights_of(model) -> dict[str, torch.nn.Parameter]:
    """Those of the layers and of the MLM head's transform."""
    return {n: p for n, p in model.named_parameters() if p.dim() == 2 and (".layer." in n or "transform" in n)}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_as_near_to_the_truth_as_autograd(dtypes, count):
    dtype, autocast = DTYPES[dtypes]
    model, made = build(dtype), batches(count)
    ours = run(step_of(model, autocast), made)
    exact, theirs = copy.deepcopy(model).double(), copy.deepcopy(model)
    with by_autograd():
        theirs = run(step_of(theirs, autocast), made)
        truth = run(step_of(exact), made)
    assert ours.keys() == truth.keys()
    assert len(weights_of(model)) == 13
    for name, expected in truth.items():
        assert ours[name].dtype == dtype
        assert_near_truth(f"d {name}", ours[name], theirs[name], expected)
    # and the weights' errors taken together
    error = {key: sum(float((found[n].double() - truth[n]).square().sum()) for n in weights_of(model)) ** 0.5
             for key, found in (("ours", ours), ("theirs", theirs))}  # fmt: skip
    assert 0 < error["ours"] <= 1.2 * error["theirs"]


def allocated(run, size: int) -> int:
    """How many blocks of exactly ``size`` bytes are allocated while ``run`` runs, by whomever."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as found:
        run()
    return sum(e.name() == "[memory]" and e.nbytes() == size for e in found.profiler.kineto_results.events())


def test_later_micro_batches_make_no_gradient_of_their_own():
    """A weight (88, 32) has a size of its own among the tensors of a step."""
    model, (one, two, three) = build(), batches()
    step, size = step_of(model), 4 * INNER * COLUMNS
    assert allocated(lambda: run(step, [one]), size) == 4  # of two layers, each of two such weights
    assert allocated(lambda: run(step, [one, two, three]), size) == 4
    with by_autograd():
        assert allocated(lambda: run(step, [one, two, three]), size) == 12


def test_gradients_stay_where_they_are():
    model, made = build(), batches()
    step, places = step_of(model), []
    first = step._differentiate

    def looked_at(*arguments):
        parts = first(*arguments)
        places.append({name: p.grad.data_ptr() for name, p in model.named_parameters()})
        return parts

    step._differentiate = looked_at
    found = run(step, made)
    assert places[0] == places[1] == places[2]
    size = 4 * COLUMNS * COLUMNS
    assert [found[name].data_ptr() - found[QUERY].data_ptr() for name in (KEY, VALUE)] == [size, 2 * size]


@pytest.mark.parametrize("dtypes", ["fp32", "autocast-bf16"])
def test_hooks_see_gradients_and_may_change_them(dtypes):
    dtype, autocast = DTYPES[dtypes]
    made = batches(2)

    def hooked(hooks: bool):
        model, seen = build(dtype), {}
        weights = weights_of(model)
        if hooks:
            weights[KEY].register_hook(lambda grad: seen.setdefault("key", []).append(grad.clone()))
            weights[IN].register_hook(lambda grad: 3.0 * grad)
            weights[OUT].register_post_accumulate_grad_hook(lambda p: seen.setdefault("out", []).append(p.grad.clone()))
        return run(step_of(model, autocast), made), seen

    (ours, seen), (plain, _) = hooked(True), hooked(False)
    with by_autograd():
        theirs, expected = hooked(True)
    factor = {IN: 3.0}
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], factor.get(name, 1.0) * grad, rtol=2e-2 if autocast else 1e-5, atol=1e-5)
    assert [len(seen[key]) for key in ("key", "out")] == [2, 2]
    for key, found in seen.items():
        for grad, other in zip(found, expected[key], strict=True):
            torch.testing.assert_close(grad, other, rtol=2e-2 if autocast else 1e-5, atol=1e-5)
    assert torch.equal(seen["out"][1], ours[OUT])
    assert torch.equal(seen["key"][0] + seen["key"][1], ours[KEY])
    torch.testing.assert_close(ours[IN], theirs[IN], rtol=2e-2 if autocast else 1e-5, atol=1e-5)


def test_a_hook_that_comes_between_two_micro_batches():
    model, (one, two, _) = build(), batches()
    step, seen = step_of(model), []
    expected = {name: grad.clone() for name, grad in run(step, [one, two]).items()}
    moved = step._differentiate

    def with_hook(*arguments):
        parts = moved(*arguments)
        if not seen:
            weights_of(model)[VALUE].register_hook(lambda grad: seen.append(grad))
        return parts

    step._differentiate = with_hook
    found = run(step, [one, two])
    assert len(seen) == 1
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)


def watched(dropout: float, place: str) -> list[torch.Tensor]:
    """The gradients that a module's hook keeps during an update, looked at after it."""
    model, kept = build(hidden_dropout_prob=dropout), []
    layer = model.bert.encoder.layer[1]
    module = {"layer": layer, "attention": layer.attention, "output": layer.output, "dense": layer.output.dense,
              "norm": layer.attention.output.LayerNorm, "inner": layer.intermediate}[place]  # fmt: skip
    module.register_full_backward_hook(
        lambda _, inputs, outputs: kept.extend(x for x in (*inputs, *outputs) if x is not None)
    )
    run(step_of(model), batches(1))
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("place", ["layer", "attention", "output", "dense", "norm", "inner"])
def test_gradients_that_hooks_keep_stay_as_they_were(place, dropout):
    ours = watched(dropout, place)
    with by_autograd():
        theirs = watched(dropout, place)
    assert len(ours) == len(theirs) > 0
    for grad, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("autocast", [None, BF16])
def test_gradient_checkpointing_gives_the_same_bits(use_reentrant, autocast):
    model, made = build(), batches()
    expected = {name: grad.clone() for name, grad in run(step_of(model, autocast), made).items()}
    again = build()
    again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    size = 4 * INNER * COLUMNS
    found = run(step_of(again, autocast), made)
    assert found.keys() == expected.keys()
    different = [name for name, grad in expected.items() if not torch.equal(found[name], grad)]
    assert not different, different
    if autocast is None:
        assert allocated(lambda: run(step_of(again), made), size) == 4


@pytest.mark.parametrize("case", ["frozen key", "frozen layer", "frozen embeddings", "no bias", "untied"])
def test_cases(case):
    made = batches()

    def found():
        model = build(tie_word_embeddings=case != "untied")
        attention = model.bert.encoder.layer[1].attention.self
        if case == "frozen key":
            attention.key.weight.requires_grad_(False)
        elif case == "frozen layer":
            model.bert.encoder.layer[1].requires_grad_(False)
        elif case == "frozen embeddings":
            model.bert.embeddings.requires_grad_(False)
        elif case == "no bias":
            attention.query.bias = attention.key.bias = attention.value.bias = None
        return run(step_of(model), made)

    ours = found()
    with by_autograd():
        theirs = found()
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------
# linear alone


def tensors(dtype=torch.float64, rows=(5, 3, 7), columns: int = 6, tokens: int = 11):
    torch.manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(n, columns, device=DEVICE, dtype=dtype)) for n in rows]
    x = torch.randn(tokens, columns, device=DEVICE, dtype=dtype, requires_grad=True)
    return weights, x, torch.randn(sum(rows), device=DEVICE, dtype=dtype, requires_grad=True)


def gradients(use, weights, x, bias, times: int = 2, **options) -> list[torch.Tensor]:
    leaves = [*weights, x, bias]
    for leaf in leaves:
        leaf.grad = None
    for seed in range(times):
        torch.manual_seed(seed)
        with gradients_in_place(weights, **options) if options else contextlib.nullcontext():
            y = use()
            (y * torch.randn_like(y)).sum().backward()
    return [leaf.grad.clone() for leaf in leaves]


@pytest.mark.parametrize(
    "use",
    [
        lambda weights, x, bias: linear(x, weights, bias),
        lambda weights, x, bias: linear(linear(x, weights[:1])[:, :5].repeat(1, 2)[:, :6], weights, bias),  # used twice
        lambda weights, x, bias: linear(x, weights, bias) + weights[0].square().sum(),  # and otherwise
        lambda weights, x, bias: linear(x, weights[::-1], bias) + linear(x, weights, bias),  # in another order
        lambda weights, x, bias: linear(x, (*weights[:2], weights[0])).sum() + linear(x, weights, bias),  # twice in one
        lambda weights, x, bias: linear(x[:0], weights, bias).sum() + linear(x, weights, bias),  # without a token
    ],
)
@pytest.mark.parametrize("kept", [False, True])
def test_whatever_the_use(use, kept):
    weights, x, bias = tensors()
    memory = torch.full((15, 6), torch.nan, device=DEVICE, dtype=torch.float64).split((5, 3, 7))
    first = dict(zip(weights, memory, strict=True)) if kept else {}
    found = gradients(lambda: use(weights, x, bias), weights, x, bias, times=3, first=first)
    expected = gradients(lambda: use(weights, x, bias), weights, x, bias, times=3)
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "use",
    [
        lambda y, x: y.square().sum() + x.square().sum(),
        lambda y, x: y.square().sum() + x.sum(),  # a gradient that is one number, repeated
        lambda y, x: y.square().sum() + (x * x[:, :1]).sum() + x.square().sum(),  # several that autograd adds
        lambda y, x: y.square().sum() + x.t().contiguous().square().sum(),  # transposed
        lambda y, x: y.square().sum(),
        lambda y, x: x.square().sum(),
        lambda y, x: (y[:, :6] * x).sum(),
    ],
)
@pytest.mark.parametrize("leaf", [False, True])
def test_a_product_with_its_residual(use, leaf):
    weights, x, bias = tensors()

    def run(in_place) -> list:
        for w in (*weights, x, bias):
            w.grad = None
        with gradients_in_place(weights) if in_place else contextlib.nullcontext():
            given = x if leaf else x.exp()
            y, again = linear_with_residual(given, weights, bias) if in_place else (linear(given, weights, bias), given)
            use(y, again).backward()
        return [w.grad for w in (*weights, x, bias)]

    for name, grad, expected in zip(("w0", "w1", "w2", "x", "bias"), run(True), run(False), strict=True):
        if expected is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_a_residual_of_another_dtype_is_autograds():
    """Under autocast a float32 residual keeps its own gradient: the product's has 16 bits."""
    weights, x, bias = tensors(FULL)
    with gradients_in_place(weights), torch.autocast(DEVICE, BF16):
        y, again = linear_with_residual(x, weights, bias)
        assert (y.dtype, again) == (BF16, x)
        y, again = linear_with_residual(x.to(BF16), weights, bias)
    assert type(again.grad_fn).__name__ == type(y.grad_fn).__name__ == "_LinearBackward"


def test_the_first_gradient_is_written_to_the_memory_given():
    weights, x, bias = tensors()
    memory = torch.full((15, 6), torch.nan, device=DEVICE, dtype=torch.float64)
    first = dict(zip(weights, memory.split((5, 3, 7)), strict=True))
    gradients(lambda: linear(x, weights, bias), weights, x, bias, times=1, first=first)
    assert all(w.grad is first[w] for w in weights)
    assert memory.isfinite().all()
    apart = {w: torch.full_like(w, torch.nan) for w in weights}  # not one after the other
    gradients(lambda: linear(x, weights, bias), weights, x, bias, times=1, first=apart)
    assert all(w.grad is not apart[w] and w.grad.isfinite().all() for w in weights)


def test_gradients_that_do_not_lie_together_are_added_by_autograd():
    weights, x, bias = tensors()
    expected = gradients(lambda: linear(x, weights, bias), weights, x, bias, times=2)[:3]
    gradients(lambda: linear(x, weights, bias), weights, x, bias, times=1)
    weights[1].grad = weights[1].grad.clone()
    places = [w.grad.data_ptr() for w in weights]
    with gradients_in_place(weights):
        torch.manual_seed(1)
        y = linear(x, weights, bias)
        (y * torch.randn_like(y)).sum().backward()
    assert [w.grad.data_ptr() for w in weights] == places
    for w, grad in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.grad, grad, rtol=1e-12, atol=1e-12)


def test_elsewhere_gradients_are_autograds():
    weights, x, bias = tensors()
    others, *_ = tensors()
    with gradients_in_place(weights[:2]):  # not of all that are multiplied together
        grads = torch.autograd.grad(linear(x, weights, bias).sum(), weights)
        assert all(grad is not None for grad in grads)
        grads = torch.autograd.grad(linear(x, others, bias).sum(), others)
        assert all(grad is not None for grad in grads)
        with torch.no_grad():
            assert not linear(x, weights[:2]).requires_grad
    with gradients_in_place(weights), gradients_in_place(weights[:1]):
        pass
    y = linear(x, weights, bias)
    assert type(y.grad_fn).__name__ == "AddmmBackward0"
    (grad,) = torch.autograd.grad(y.square().sum(), weights[0], create_graph=True)
    grad.sum().backward()
    with gradients_in_place(weights):
        y = linear(x, weights, bias)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("rows", [0, 5, 8, 21])
@pytest.mark.parametrize("add", [False, True])
def test_a_product_that_is_converted_goes_by_blocks(monkeypatch, rows, add):
    monkeypatch.setattr("bert_fast.products.BLOCK", 8)
    a, b = torch.randn(11, rows, device=DEVICE).to(BF16), torch.randn(11, 6, device=DEVICE).to(BF16)
    before = torch.randn(rows, 6, device=DEVICE) if add else torch.full((rows, 6), torch.nan, device=DEVICE)
    out = before.clone()
    multiply(a.t(), b, out, add=add)
    expected = a.double().t() @ b.double() + (before.double() if add else 0.0)
    torch.testing.assert_close(out, expected.float(), rtol=2**-7, atol=2**-7)


def test_places_are_forgotten():
    from bert_fast import linear as module

    weights, x, _ = tensors()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), gradients_in_place(weights):
        linear(x[:, :2], weights)
    assert module._in_place == {}


def test_one_product_reads_no_value():
    """Fake tensors have no values and no addresses."""
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(8, 4)) for _ in range(3)]
        for _ in range(2):
            with gradients_in_place(weights), torch.autocast("cpu", BF16):
                linear(torch.empty(5, 4), weights).sum().backward()
        assert weights[2].grad.storage_offset() == 64
