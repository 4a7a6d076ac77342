"""CapturedStep: the bits of plain steps, batches that do not fit, and nothing that waits for the device."""

import contextlib
import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import BertConfig

from bert_fast import BertForPreTraining
from bert_fast.data import Capacities, Sample, pack_samples
from bert_fast.train.captured import CapturedStep
from tests.parity import DEVICE

optim = pytest.importorskip("bert_fast.optim")

SIZE = Capacities(tokens=96, sequences=6, masked=20)
LONGEST = 32
CONFIG = BertConfig(
    vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=LONGEST,
)  # fmt: skip


def batches(count: int) -> list[dict]:
    """Packed batches of different lengths, with unused tails in all capacities."""
    generator = torch.Generator().manual_seed(0)
    packed = []
    for number in range(count):
        samples = []
        for index in range(3 + number % 2):
            n = int(torch.randint(8, 24, (1,), generator=generator))
            ids = torch.randint(5, CONFIG.vocab_size, (n,), generator=generator).numpy()
            at = torch.randperm(n - 2, generator=generator)[:3].sort().values.numpy() + 1
            samples.append(Sample(ids, ids % 2, at, ids[at], index % 2, 10 * number + index))
        packed.append(pack_samples(samples, SIZE, pad_id=0))
    return packed


def trained(step, model, count: int) -> list[torch.Tensor]:
    """Losses and final parameters of ``count`` steps with a changing learning rate."""
    torch.manual_seed(3)
    losses = [step(batch, 1e-2 / (1 + i)).clone() for i, batch in enumerate(batches(count))]
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def build(kind: str = "AdamW", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE, dtype).train()
    groups = optim.parameter_groups(model, weight_decay=0.01)
    return model, getattr(optim, kind)(groups, lr=1.0, max_grad_norm=1.0)


@pytest.mark.parametrize("kind", ["AdamW", "Lamb"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "capture", [False, pytest.param(True, marks=pytest.mark.skipif(DEVICE != "cuda", reason="no GPU"))]
)
def test_the_same_bits_as_plain_steps(kind, autocast, capture):
    model, optimizer = build(kind)
    rate = torch.zeros((), device=DEVICE)

    def plain(batch, learning_rate):
        for group in optimizer.param_groups:
            group["lr"] = rate.fill_(learning_rate)
        model.zero_grad(set_to_none=True)
        on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        context = contextlib.nullcontext() if autocast is None else torch.autocast(DEVICE, autocast)
        with context:
            loss = model(**{**on_device, "max_length_q": LONGEST}).loss
        loss.backward()
        optimizer.step()
        return loss.detach().float()

    expected = trained(plain, model, 6)
    again, optimizer = build(kind)
    step = CapturedStep(
        again, optimizer, batches(1)[0], max_length=LONGEST, autocast=autocast, capture=capture, warmup=2
    )
    found = trained(step, again, 6)
    assert step.captured == capture
    assert len(expected) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert float(expected[5]) < float(expected[0])


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
def test_the_graph_is_recorded_again_where_its_addresses_are_gone():
    model, optimizer = build()
    step = CapturedStep(model, optimizer, batches(1)[0], max_length=LONGEST, warmup=1)
    for batch in batches(3):
        step(batch, 1e-3)
    assert step.captured
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(batches(1)[0], 1e-3)
    assert not step.captured
    before = [p.clone() for p in model.parameters()]
    step(batches(1)[0], 1e-3)
    assert step.captured
    assert any(not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_loaded_optimizer_gets_the_learning_rate_of_the_step():
    model, optimizer = build()
    step = CapturedStep(model, optimizer, batches(1)[0], max_length=LONGEST, capture=False)
    step(batches(1)[0], 1e-3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in model.parameters()]
    step(batches(1)[0], 0.0)
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_seed_fixes_the_masks():
    model, optimizer = build()
    step = CapturedStep(model, optimizer, batches(1)[0], max_length=LONGEST, capture=False)
    losses = [float(step(batches(1)[0], 0.0, seed=seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_batches_that_do_not_fit_are_refused_before_anything_changes():
    model, optimizer = build()
    good = batches(1)[0]
    step = CapturedStep(model, optimizer, good, max_length=LONGEST, capture=False)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"input_ids is \(1, 95\).*expected \(1, 96\)"):
        step({**good, "input_ids": good["input_ids"][:, :95]}, 1e-3)
    with pytest.raises(ValueError, match=r"masked_labels is .*int32"):
        step({**good, "masked_labels": good["masked_labels"].int()}, 1e-3)
    with pytest.raises(ValueError, match="sequence of 33 tokens, more than max_length 32"):
        step({**good, "max_length_q": 33}, 1e-3)
    with pytest.raises(ValueError, match=r"expected .*sample_ids"):
        step({k: v for k, v in good.items() if k != "sample_ids"}, 1e-3)
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_captured_is_said():
    model, optimizer = build()
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="only a GPU has CUDA graphs"):
            CapturedStep(model, optimizer, batches(1)[0], max_length=LONGEST)
    with pytest.raises(ValueError, match="warmup is 0"):
        CapturedStep(model, optimizer, batches(1)[0], max_length=LONGEST, capture=False, warmup=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_reads_no_value_of_a_packed_batch(autocast):
    """Fake tensors have shapes and no values: whatever would wait for a GPU raises here."""
    batch = batches(1)[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = BertForPreTraining(copy.deepcopy(CONFIG)).train()
        fake = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**fake).loss
        loss.backward()
        with pytest.raises(DataDependentOutputException):  # the check itself works
            float(loss.detach())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


class _Launch:
    """In place of a kernel: takes any grid and arguments, and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_no_launcher_reads_a_value(monkeypatch):
    """The host code of the Triton operators, its kernels taken out, on tensors without values."""
    pytest.importorskip("triton")
    from bert_fast.kernels import attention, bias_gelu, embedding_layernorm, mlm_loss, residual_layernorm, rows

    for module in (attention, bias_gelu, embedding_layernorm, mlm_loss, residual_layernorm, rows):
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
        assert attention.attention_bwd(out, qkv, out, lse, cu, 16, ids, key, 0.1, 0.1, 0).shape == qkv.shape
        _, z, mean, rstd = residual_layernorm.residual_layernorm_fwd(x, row, x, row, row, ids, key, 1e-12, 0.1, 0)
        residual_layernorm.residual_layernorm_bwd(x, z, mean, rstd, row, ids, key, 0.1, 0, torch.float32, True)
        bias_gelu.bias_gelu_bwd(bias_gelu.bias_gelu_fwd(x, row), x, row)
        loss, *grads = mlm_loss.mlm_loss_fwd(x, word, torch.empty(vocabulary), ids, None, -100, 16, True)
        assert [g.shape for g in mlm_loss.mlm_loss_bwd(loss, *grads)] == [x.shape, word.shape, (vocabulary,)]
        mlm_loss.mlm_loss_bwd_(loss, *grads)
