"""PyTorch's attention as a backend: what it is called with on a GPU, that its dropout's backward has the forward's
mask, and what it refuses. Its numbers on a CPU are tested beside the other backends' (test_attention.py)."""

import contextlib

import pytest
import torch

import bert_fast
from bert_fast import choice, dispatch, ops, reference
from bert_fast.peers import torch_attention
from tests.support.packed_attention import packed

BF16 = torch.bfloat16
LENGTHS, TAIL, HEADS, SIZE = [5, 0, 9], 3, 2, 16


def switches() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip


def switch(deterministic: bool, warn_only: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def reference_forward(q, k, v, cu_seqlens, longest, keep, scale):
    """reference.attention_fwd, whose dropout has the mask ``keep`` (heads, keys) of whole values in its place."""
    none = torch.empty(0, dtype=torch.int64)
    qkv = torch.stack([q, k, v * keep[None]], dim=1)
    out, lse = reference.attention_fwd(qkv, cu_seqlens, longest, none, none, scale, 0.0, 0)
    end = int(cu_seqlens[-1])
    out[end:], lse[:, end:] = float("nan"), float("nan")  # neither kernel writes them
    return out.view(q.shape), lse


def reference_backward(grad, q, k, v, cu_seqlens, longest, keep, scale):
    none, keep = torch.empty(0, dtype=torch.int64), keep.to(q.dtype)
    qkv = torch.stack([q, k, v * keep[None]], dim=1)
    given = (cu_seqlens, longest, none, none, scale, 0.0, 0)
    grads, _ = reference.attention_bwd(grad.flatten(1), qkv, *reference.attention_fwd(qkv, *given), *given)
    end = int(cu_seqlens[-1])
    grads[end:] = float("nan")
    return grads[:, 0], grads[:, 1], grads[:, 2] * keep[None]


class OnAGpu:
    """The four operators of PyTorch with their contracts, computed on a CPU: a mask follows from the state that was
    drawn, and hides whole channels of the values, which the backward has to know."""

    def __init__(self, p: float):
        self.p, self.calls = p, []

    def keep(self, seed: int) -> torch.Tensor:
        drawn = torch.rand(HEADS, SIZE, generator=torch.Generator().manual_seed(int(seed)))
        return ((drawn >= self.p) / (1 - self.p)).to(BF16)

    def forward(self, name, q, k, v, cu, cu_k, longest, longest_k, p, scale):
        self.calls.append(name)
        assert (cu is cu_k, longest == longest_k == 9, p == self.p) == (True,) * 3
        seed = torch.randint(2**40, ())
        return *reference_forward(q, k, v, cu, longest, self.keep(seed), scale), seed

    def backward(self, name, grad, q, k, v, out, lse, cu, longest, seed, scale):
        self.calls.append(name)
        assert grad.shape == out.shape == q.shape
        _, sums = reference_forward(*(x.double() for x in (q, k, v)), cu, longest, self.keep(seed).double(), scale)
        end = int(cu[-1])
        torch.testing.assert_close(lse[:, :end].double(), sums[:, :end], rtol=1e-2, atol=1e-2)
        grads = reference_backward(grad.double(), *(x.double() for x in (q, k, v)), cu, longest, self.keep(seed), scale)
        return tuple(g.to(q.dtype) for g in grads)

    def _flash_attention_forward(self, q, k, v, cu, cu_k, longest, longest_k, p, causal, debug, *, scale):
        assert not causal
        assert not debug
        out, lse, seed = self.forward("flash forward", q, k, v, cu, cu_k, longest, longest_k, p, scale)
        return out, lse, torch.stack([seed, seed + 1]).view(torch.uint64), torch.empty((), dtype=torch.uint64), None

    def _flash_attention_backward(
        self, grad, q, k, v, out, lse, cu, cu_k, longest, longest_k, p, causal, state, unused, *, scale
    ):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert state.dtype == unused.dtype == torch.uint64
        seed, offset = state.view(torch.int64).tolist()
        assert offset == (seed + 1 if p else 0)
        return self.backward("flash backward", grad, q, k, v, out, lse, cu, longest, seed, scale)

    def _cudnn_attention_forward(self, q, k, v, bias, cu, cu_k, longest, longest_k, sums, p, causal, debug, *, scale):
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        assert bias is None
        assert sums
        assert not causal
        assert not debug
        out, lse, seed = self.forward("cudnn forward", q, k, v, cu, cu_k, longest, longest_k, p, scale)
        return out, lse.T.contiguous()[..., None], cu, cu_k, longest, longest_k, seed.reshape(1), seed.reshape(1), None

    def _cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cu, cu_k, longest, longest_k, p, causal, *, scale
    ):
        assert bias is None
        assert lse.shape == (q.shape[0], HEADS, 1)
        assert seed.dim() == offset.dim() == 0
        return self.backward("cudnn backward", grad, q, k, v, out, lse[..., 0].T, cu, longest, seed, scale)


@pytest.fixture(params=["flash", "cudnn"])
def kernel(request):
    with choice.use({"attention.torch": {"kernel": request.param}}):
        yield request.param


@pytest.fixture(params=[0.0, 0.3])
def on_a_gpu(request, monkeypatch, kernel):
    """PyTorch's kernels for a GPU, on the CPU: the module believes that no tensor is on one."""
    found = OnAGpu(request.param)
    monkeypatch.setattr(torch_attention, "_aten", found)
    monkeypatch.setattr(torch_attention, "_on_cpu", lambda x: False)
    return found


def test_both_kernels_are_called_as_they_want_to_be(on_a_gpu, kernel):
    qkv, cu_seqlens, _, _, longest = packed(LENGTHS, HEADS, SIZE, BF16, TAIL)
    qkv.requires_grad_()
    bias = torch.randn(3, HEADS, SIZE, requires_grad=True)
    grad_out = torch.randn(qkv.shape[0], HEADS * SIZE).to(BF16)
    before, torch_before = torch.random.get_rng_state(), switches()
    with dispatch.use_backend(attention="torch"):
        keys = torch.zeros(17, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        out = ops.attention(qkv, cu_seqlens, longest, p=on_a_gpu.p, row_key=keys[0], rng_key=keys[1], bias=bias)
        grad, grad_bias = torch.autograd.grad(out, (qkv, bias), grad_out)
    assert on_a_gpu.calls == [f"{kernel} forward", f"{kernel} backward"]
    assert switches() == torch_before
    torch.random.set_rng_state(before)
    keep = on_a_gpu.keep(torch.randint(2**40, ()))
    end, doubles = sum(LENGTHS), qkv.detach().double().unbind(1)
    expected, _ = reference_forward(*doubles, cu_seqlens, longest, keep.double(), SIZE**-0.5)
    truth = torch.stack(reference_backward(
        grad_out.double().view(expected.shape), *doubles, cu_seqlens, longest, keep, SIZE**-0.5
    ), 1)  # fmt: skip
    torch.testing.assert_close(out[:end].double(), expected[:end].flatten(1), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad[:end].double(), truth[:end], rtol=2e-2, atol=2e-2)
    assert not out[end:].any()
    assert not grad[end:].any()
    torch.testing.assert_close(grad_bias.double()[[0, 2]], truth[:end].sum(0)[[0, 2]], rtol=0, atol=5e-2)
    assert not grad_bias[1].any()


def test_nothing_to_attend_calls_no_kernel(on_a_gpu):
    with dispatch.use_backend(attention="torch"):
        for lengths in ([], [0, 0]):
            qkv, cu_seqlens, row_key, rng_key, longest = packed(lengths, HEADS, SIZE, BF16, TAIL)
            qkv.requires_grad_()
            out = ops.attention(qkv, cu_seqlens, longest, p=on_a_gpu.p, row_key=row_key, rng_key=rng_key)
            (grad,) = torch.autograd.grad(out.sum(), qkv)
            assert not out.any()
            assert not grad.any()
    assert on_a_gpu.calls == []


def test_shapes_are_those_that_a_compiler_is_told(on_a_gpu):
    qkv, cu_seqlens, _, _, longest = packed(LENGTHS, HEADS, SIZE, BF16, TAIL)
    given = (cu_seqlens, longest, 0.25, on_a_gpu.p)
    found = torch.ops.bert_fast.library_attention_fwd(qkv, *given, None)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = torch.ops.bert_fast.library_attention_fwd(
            mode.from_tensor(qkv), mode.from_tensor(cu_seqlens), *given[1:], None
        )
    for real, fake in zip(found, fakes, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize(
    ("device", "dtype", "size", "p", "message"),
    [
        ("cpu", torch.float32, 8, 0.1, "CPU has no dropout, and 0.1"),
        ("cuda", torch.float32, 8, 0.0, "not torch.float32"),
        ("cuda", BF16, 12, 0.0, "multiples of 8, not 12"),
        ("cuda", BF16, 64, 0.1, None),
        ("cpu", torch.float64, 12, 0.0, None),
    ],
)
def test_it_says_what_it_does_not_have(device, dtype, size, p, message):
    found = torch_attention.why_unfit(device == "cpu", dtype, size, p)
    assert found is None if message is None else message in found


def test_dropout_on_a_cpu_is_refused_and_not_left_out():
    qkv, cu_seqlens, row_key, rng_key, longest = packed([4], 1, 8)
    with dispatch.use_backend(attention="torch"), pytest.raises(NotImplementedError, match="no dropout"):
        ops.attention(qkv, cu_seqlens, longest, p=0.1, row_key=row_key, rng_key=rng_key)
    with dispatch.use_backend(attention="torch"), pytest.raises(NotImplementedError, match="library_attention_fwd"):
        torch.ops.bert_fast.attention_fwd(qkv, cu_seqlens, longest, row_key, rng_key, 1.0, 0.1, 0, None)


@pytest.mark.parametrize("before", [(False, False, True), (True, True, False)])
def test_an_error_in_the_backward_leaves_the_global_switch(before):
    ours = switches()
    try:
        switch(*before)
        with contextlib.suppress(KeyError), torch_attention._deterministic():
            assert switches() == (True, False, False)
            raise KeyError
        assert switches() == before
    finally:
        switch(*ours)


@pytest.mark.parametrize("preserved", [False, True])
def test_a_layer_that_is_computed_again_needs_the_same_mask(monkeypatch, preserved):
    """model.recompute("layers") leaves torch's generator as it is, which draws PyTorch's masks."""
    config = bert_fast.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    model = bert_fast.BertModel(config).train()
    model.recompute("layers")
    if preserved:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
    expected = "no dropout" if preserved else 'recompute."layers".*generator'  # a CPU has none at all
    with dispatch.use_backend(attention="torch"), pytest.raises(NotImplementedError, match=expected):
        model(torch.randint(30, (2, 5)))
    config.attention_probs_dropout_prob = 0.0
    model = bert_fast.BertModel(config).train()
    model.recompute("layers")
    with dispatch.use_backend(attention="torch"):
        model(torch.randint(30, (2, 5))).last_hidden_state.sum().backward()


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_choice_takes_the_library_without_dropout_alone(monkeypatch, direction):
    """Both directions agree on which calls are its: of that GPU, from the length on, in 16 bits, without dropout."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch_attention, f"attention_{direction}", lambda *given: "library")
    serve = dispatch._or_library(direction, lambda *given: "own")

    def call(table, dtype=BF16, longest=9, p=0.0, size=16) -> str:
        qkv = torch.zeros(9, 3, 2, size, dtype=dtype)
        given = [qkv, None, longest, None, None, 1.0, p, 0]
        given = given if direction == "fwd" else [None, qkv, None, None, None, longest, None, None, 1.0, p, 0, None]
        with choice.use({"attention.library": table}) as served:
            found = serve(*given)
        assert served["attention.library"] == (found == "library")
        return found

    assert call({90: 9}) == "library"
    for own in (call({}), call({80: 9}), call({90: 10}), call({90: 9}, p=0.1), call({90: 9}, torch.float32),
                call({90: 9}, size=12), call({90: 9}, longest=8)):  # fmt: skip
        assert own == "own"
