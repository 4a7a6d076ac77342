"""Recorded steps: the bits of eager ones, on a GPU from graphs and on a CPU from their stand-in; nothing that waits."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import BertConfig

from bert_fast import BertForPreTraining, dispatch, optim
from bert_fast.data import Capacities, Sample, pack_samples
from bert_fast.train.cuda_graphs import Recorder
from bert_fast.train.distributed import Ranks
from bert_fast.train.recorded import RecordedStep, recordable
from bert_fast.train.step import Step
from tests.support.parity import DEVICE
from tests.support.recorded_runs import Rerun

SIZES = (Capacities(tokens=96, sequences=6, masked=20), Capacities(tokens=128, sequences=8, masked=24))
LONGEST = 32
CONFIG = BertConfig(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=LONGEST,
)  # fmt: skip
UPDATES = (1, 3, 2, 1, 2, 4)  # micro-batches of each


def batches(update: int, nsp: bool = True) -> list[dict]:
    """An update's packed batches, of different lengths and one size, with unused tails in all capacities."""
    generator = torch.Generator().manual_seed(update)
    packed = []
    for number in range(UPDATES[update]):
        samples = []
        for index in range(3 + number % 2):
            n = int(torch.randint(8, 24, (1,), generator=generator))
            ids = torch.randint(5, CONFIG.vocab_size, (n,), generator=generator).numpy()
            at = torch.randperm(n - 2, generator=generator)[:3].sort().values.numpy() + 1
            samples.append(Sample(ids, ids % 2, at, ids[at], index % 2, 10 * number + index))
        batch = {**pack_samples(samples, SIZES[update % 2], pad_id=0), "max_length_q": LONGEST}
        if not nsp:
            del batch["next_sentence_label"]
        packed.append(batch)
    return packed


def build(
    kind: str = "AdamW", bf16: bool = False, dtype: torch.dtype = torch.float32, recorder=None, tell=pytest.fail
) -> Step:
    torch.manual_seed(0)
    model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE, dtype).train()
    optimizer = getattr(optim, kind)(optim.parameter_groups(model, weight_decay=0.01), lr=1.0, max_grad_norm=1.0)
    place = Ranks(0, 1, next(model.parameters()).device)
    if recorder is None:
        return Step(model, optimizer, place, bf16=bf16)
    return RecordedStep(model, optimizer, place, bf16=bf16, recorder=recorder(model.parameters()), tell=tell)


def recorders() -> list:
    return [Rerun, pytest.param(Recorder, marks=pytest.mark.skipif(DEVICE != "cuda", reason="no GPU"))]


def prepare(step: Step, nsp: bool = True) -> Step:
    step.prepare([batches(1, nsp)[0], batches(0, nsp)[0]])
    return step


def apply(step: Step, update: int, nsp: bool = True, **changes):
    made = batches(update, nsp)
    predicted = sum(int((batch["masked_labels"] >= 0).sum()) for batch in made)
    given = {"seed": update, "lr": 1e-2 / (1 + update), "predicted": predicted, "sequences": 4 * len(made) * nsp}
    return step(made, **{**given, **changes})


def trained(step: Step, nsp: bool = True) -> list[torch.Tensor]:
    """What the updates told, and what they left: parameters, moments, steps."""
    outcomes = [apply(step, update, nsp) for update in range(len(UPDATES))]
    told = [t for outcome in outcomes for t in (outcome.scalars.clone(), outcome.finite.clone())]
    states = [t for p in step.parameters for t in step.optimizer.state[p].values()]
    return [*told, *(p.detach().clone() for p in step.parameters), *(t.clone() for t in states)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit, the sign of zero too."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.cpu().numpy().tobytes() == y.cpu().numpy().tobytes() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("recorder", recorders())
@pytest.mark.parametrize(
    ("kind", "bf16", "dtype"),
    [("AdamW", False, torch.float32), ("Lamb", True, torch.float32), ("Lamb", False, torch.bfloat16)],
)
def test_the_same_bits_as_eager(kind, bf16, dtype, recorder):
    nsp = dtype == torch.float32
    expected = [t.float() for t in trained(build(kind, bf16, dtype), nsp)]
    step = prepare(build(kind, bf16, dtype, recorder=recorder), nsp)
    assert same([t.float() for t in trained(step, nsp)], expected)
    # whole updates of one size, and first and last parts of either, and middle ones of the larger
    assert step.captured == 7
    assert expected[-1].isfinite().all()
    assert float(step.optimizer.skipped) == 0
    assert all(p.grad is None or p.grad is step._gradients[p] for p in step.parameters)


@pytest.mark.parametrize("bf16", [False, True])
def test_weight_gradients_are_made_where_the_next_micro_batch_finds_them(bf16, monkeypatch):
    """Of an update's first micro-batch too; those that autograd makes are copied there."""
    step = prepare(build(bf16=bf16, recorder=Rerun))
    weights = {
        p for n, p in step.model.named_parameters() if p.dim() == 2 and ("encoder.layer" in n or "transform" in n)
    }
    assert len(weights) == 6 * 2 + 1
    differentiate, elsewhere = step._differentiate, []

    def looked_at(batch, into=None):
        if into is not None:  # what was left there by the update before
            for memory in into.values():
                memory.fill_(torch.nan)
        parts = differentiate(batch, into)
        kept = step._gradients
        if kept is not None:
            elsewhere.append({p for p in step.parameters if p.grad is not kept[p]})
        return parts

    monkeypatch.setattr(step, "_differentiate", looked_at)
    assert same(trained(step), trained(build(bf16=bf16)))
    for update in (0, 1, 2):
        apply(step, update)
    begun = [found for found in elsewhere if found]
    assert len(begun) > 4
    assert any(not found for found in elsewhere)  # all of the later ones
    assert all(found == set(step.parameters) - weights or found == set(step.parameters) for found in begun)
    assert set(step.parameters) - weights in begun


@pytest.mark.parametrize("recorder", recorders())
def test_preparing_trains_nothing(recorder):
    step, untouched = build(recorder=recorder), build()
    before = torch.get_rng_state()
    prepare(step)
    assert torch.equal(before, torch.get_rng_state())
    assert same([p.detach() for p in step.parameters], [p.detach() for p in untouched.parameters])
    states = [step.optimizer.state[p] for p in step.parameters]
    assert all(not state[key].any() for state in states for key in ("step", "exp_avg", "exp_avg_sq"))
    assert int(step.optimizer.skipped) == 0
    assert all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize("broken", range(7))
def test_where_recording_fails_the_run_goes_on_eagerly_to_the_same_bits(broken, monkeypatch):
    """The recording of each kind of function fails: alone, first, middle and last of an update, of either size."""
    expected = trained(build())
    monkeypatch.setattr(Rerun, "broken", (broken,))
    told = []
    step = prepare(build(recorder=Rerun, tell=told.append))
    recorder = step.recorder
    assert same(trained(step), expected)
    assert recorder.recordings == broken + 1
    assert step.recorder is None
    assert step.captured == 0
    (message,) = told
    assert "could not be recorded as a CUDA graph: RuntimeError: operation not permitted" in message
    assert "--no-capture" in message


def test_graphs_that_are_replayed_are_waited_for_before_they_go():
    """The recorder waits; until then the step still has the graphs and what they read."""
    held = []

    class Waiting(Rerun):
        def forget(self):
            held.append((step.captured, len(step._inputs)))

    step = build(recorder=Waiting)
    prepare(step)
    apply(step, 0)
    apply(step, 1)
    captured = step.captured
    prepare(step)
    assert captured > 0
    assert held == [(0, 0), (captured, 2)]
    assert step.captured == 0


def test_batches_of_other_shapes_run_eagerly():
    expected = trained(build())
    step = build(recorder=Rerun)
    step.prepare([batches(0)[0]])  # one size of two
    assert same(trained(step), expected)
    assert step.captured == 3
    assert step.recorder is not None


def test_an_update_that_is_not_finite_is_decided_inside():
    found = []
    for recorder in (None, Rerun):
        step = prepare(build(recorder=recorder))
        apply(step, 1)
        before = [p.detach().clone() for p in step.parameters]
        outcome = apply(step, 2, predicted=float("nan"))
        assert not bool(outcome.scalars.isfinite().all())
        assert same(before, [p.detach() for p in step.parameters])
        assert int(step.optimizer.skipped) == 1
        found.append(trained(step))
    assert same(*found)


@pytest.mark.parametrize("recorder", [None, *recorders()])
def test_an_update_without_labels_is_a_loss_of_zero(recorder):
    """As of a corpus without words that fit: every micro-batch is like that, and their counts are 0."""
    step = prepare(build(recorder=recorder))
    before = [p.detach().clone() for p in step.parameters]
    none = [b | {k: torch.full_like(b[k], -100) for k in ("masked_labels", "next_sentence_label")} for b in batches(1)]
    outcome = step(none, seed=1, lr=1e-2, predicted=0, sequences=0)
    assert outcome.scalars.tolist() == [0.0] * 4
    assert outcome.finite.all()
    decayed = [p for group in step.optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    for p, old in zip(step.parameters, before, strict=True):
        expected = (1 - 1e-2 * 0.01) * old if any(p is d for d in decayed) else old
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-8)
    assert not int(step.optimizer.skipped)


@pytest.mark.parametrize("recorder", recorders())
def test_recorded_again_where_addresses_are_gone(recorder):
    """The optimiser's state was loaded, as when a run goes on."""
    found = []
    for kind in (None, recorder):
        step = prepare(build(recorder=kind))
        apply(step, 0)
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        apply(step, 3)
        found.append(trained(step))
        assert kind is None or step.captured == 7
    assert same(*found)


def test_the_seed_fixes_the_masks():
    step = prepare(build(recorder=Rerun))
    losses = [float(apply(step, 0, seed=seed, lr=0.0).scalars[0]) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_what_cannot_be_recorded():
    assert not recordable(Ranks(0, 1, torch.device("cpu")))
    assert not recordable(Ranks(0, 2, torch.device("cuda", 0)))
    assert recordable(Ranks(0, 1, torch.device("cuda", 0)))
    with pytest.raises(ValueError, match="the parameters are on cpu, and only a GPU has CUDA graphs"):
        Recorder([torch.zeros(1)])


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_hook_that_waits_for_the_gpu_costs_the_graph_alone(where):
    """A recording that really breaks: the generator draws, the allocator serves and graphs are recorded after it."""

    def hooked(step: Step) -> Step:
        layer = step.model.bert.encoder.layer[1].output
        if where == "forward":
            layer.register_forward_hook(lambda module, given, out: out * (1.0 if float(out.sum()) < 1e30 else 0.0))
        else:
            layer.dense.weight.register_hook(lambda grad: grad * (1.0 if float(grad.sum()) < 1e30 else 0.0))
        return step

    expected = trained(hooked(build()))
    told = []
    step = prepare(hooked(build(recorder=Recorder, tell=told.append)))
    assert same(trained(step), expected)
    assert len(told) == 1
    assert step.recorder is None
    torch.rand(4, device=DEVICE)
    torch.cuda.empty_cache()
    after = prepare(build(recorder=Recorder))
    assert same(trained(after), trained(build()))
    assert after.captured == 7


@pytest.mark.parametrize("bf16", [False, True])
def test_an_update_reads_no_value(bf16):
    """Fake tensors have shapes and no values: whatever would wait for a GPU raises here. The optimiser is the plain
    one, as kernels need addresses."""
    made = batches(1)
    with FakeTensorMode(allow_non_fake_inputs=True), dispatch.use_backend(optimizer="reference"):
        model = BertForPreTraining(copy.deepcopy(CONFIG)).train()
        optimizer = optim.Lamb(optim.parameter_groups(model), lr=1.0, max_grad_norm=1.0)
        step = Step(model, optimizer, Ranks(0, 1, torch.device("cpu")), bf16=bf16)
        fake = [
            {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in made
        ]
        outcome = step(fake, seed=1, lr=1e-3, predicted=30, sequences=12)
        with pytest.raises(DataDependentOutputException):  # the check itself works
            float(outcome.scalars[0])
    assert outcome.finite.shape == (3,)


class _Launch:
    """In place of a kernel: takes any grid and arguments, and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_no_launcher_reads_a_value(monkeypatch):
    """The host code of the Triton operators, its kernels taken out, on tensors without values."""
    pytest.importorskip("triton")
    from bert_fast.kernels import (
        attention,
        bias_gelu,
        embedding_layernorm,
        mlm_loss,
        residual_layernorm,
        rows,
        sum_rows,
    )

    for module in (attention, bias_gelu, embedding_layernorm, mlm_loss, residual_layernorm, rows, sum_rows):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Launch())
    tokens, h, vocabulary = 40, 64, 300
    with FakeTensorMode():
        x, row = torch.empty(tokens, h), torch.empty(h)
        ids, key = torch.empty(tokens, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        word, small = torch.empty(vocabulary, h), torch.empty(16, h)
        _, mean, rstd = embedding_layernorm.embedding_layernorm_fwd(
            ids, ids, ids, word, small, small, row, row, ids, key, 1e-12, 0.1, 0, 0, torch.float32
        )
        arguments = (x, ids, ids, ids, word, small, small, row, mean, rstd, ids, key, 0.1, 0, 0)
        grads = embedding_layernorm.embedding_layernorm_bwd(*arguments)
        assert grads[0].shape == word.shape
        assert len(embedding_layernorm.embedding_layernorm_bwd_add(*arguments, grads[0])) == 4
        qkv, cu = torch.empty(tokens, 3, 2, 32), torch.empty(4, dtype=torch.int32)
        out, lse = attention.attention_fwd(qkv, cu, 16, ids, key, 0.1, 0.1, 0)
        grads = attention.attention_bwd(out, qkv, out, lse, cu, 16, ids, key, 0.1, 0.1, 0, torch.float32)
        assert [g.shape for g in grads] == [qkv.shape, qkv.shape[1:]]
        _, z, mean, rstd = residual_layernorm.residual_layernorm_fwd(x, row, x, row, row, ids, key, 1e-12, 0.1, 0)
        residual_layernorm.residual_layernorm_bwd(x, z, mean, rstd, row, ids, key, 0.1, 0, torch.float32, True)
        bias_gelu.bias_gelu_bwd(bias_gelu.bias_gelu_fwd(x, row), x, row)
        loss, *grads = mlm_loss.mlm_loss_fwd(x, word, torch.empty(vocabulary), ids, None, -100, 16, True)
        assert [g.shape for g in mlm_loss.mlm_loss_bwd(loss, *grads)] == [x.shape, word.shape, (vocabulary,)]
        mlm_loss.mlm_loss_bwd_(loss, *grads)
