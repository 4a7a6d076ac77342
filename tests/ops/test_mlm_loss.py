"""mlm_loss of every backend against float64: loss, gradients, ignored labels, chunks, memory, determinism."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import dispatch, ops, reference
from tests.support.operators import assert_same_bits
from tests.support.parity import DEVICE, assert_near_truth, available_backends

BACKENDS = available_backends("mlm_loss")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHAT = ("loss", "d hidden", "d word", "d bias")


def _inputs(positions, vocabulary, columns, dtype, *, scale=1.0, param_dtype=torch.float32, ignored=0.2):
    hidden = (torch.randn(positions, columns, device=DEVICE) * scale).to(dtype)
    word = (torch.randn(vocabulary, columns, device=DEVICE) * columns**-0.5).to(param_dtype)
    bias = torch.randn(vocabulary, device=DEVICE).to(param_dtype)
    labels = torch.randint(vocabulary, (positions,), device=DEVICE)
    labels[torch.rand(positions, device=DEVICE) < ignored] = -100
    return hidden, word, bias, labels


def _truth(hidden, word, bias, labels, normalizer=None):
    """Loss and gradients in float64 of the values that the products see, by PyTorch's own cross-entropy."""
    tensors = [hidden.double(), word.to(hidden.dtype).double(), bias.double()]
    tensors = [t.detach().requires_grad_() for t in tensors]
    logits = F.linear(tensors[0], tensors[1], tensors[2])
    count = (labels != -100).sum().clamp(min=1) if normalizer is None else normalizer.reshape(())
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / count
    return (loss.detach(), *torch.autograd.grad(loss, tensors))


def _run(backend, *args):
    with dispatch.use_backend(mlm_loss=backend):
        return torch.ops.bert_fast.mlm_loss_fwd(*args)


def _check(backend, inputs, normalizer=None, chunk=64):
    ours = _run(backend, *inputs, normalizer, -100, chunk, True)
    with pytest.MonkeyPatch.context() as patch:  # PyTorch's own product, which is what ours is held against
        patch.setattr(reference, "long_product", torch.matmul)
        same = reference.mlm_loss_fwd(*inputs, normalizer, -100, chunk, True)
    for what, a, b, truth in zip(WHAT, ours, same, _truth(*inputs, normalizer), strict=True):
        assert_near_truth(f"{backend} {what}", a, b, truth)
    return ours


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "vocabulary", "columns", "chunk"),
    [(1, 50, 32, 64), (5, 257, 48, 2), (130, 257, 64, 66), (33, 50, 7, 1024), (9, 2500, 64, 8)],
)
def test_loss_and_gradients(backend, dtype, positions, vocabulary, columns, chunk):
    _check(backend, _inputs(positions, vocabulary, columns, dtype), chunk=chunk)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [3, 8])
def test_bert_vocabulary(backend, dtype, chunk):
    _check(backend, _inputs(5, 30522, 64, dtype), chunk=chunk)


@pytest.mark.skipif(DEVICE == "cuda", reason="about products on a CPU")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("positions", [1, 3, 7, 11])
def test_few_positions_are_as_exact_as_many(backend, positions):
    """MKL adds the V terms of a product with fewer than 12 rows one by one, at up to ten times the error."""
    inputs = _inputs(64, 30522, 64, torch.float32, ignored=0.0)
    few = (inputs[0][:positions], inputs[1], inputs[2], inputs[3][:positions])
    norm_error = {}
    for name, case in (("many", inputs), ("few", few)):
        ours = _run(backend, *case, None, -100, 64, True)[1].double()
        true = _truth(*case)[1]
        norm_error[name] = float((ours - true).norm() / true.norm())
    assert norm_error["few"] <= 2 * norm_error["many"] + 1e-7, norm_error


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [768, 1024])
def test_bert_sizes(backend, dtype, columns):
    _check(backend, _inputs(20, 30522, columns, dtype), chunk=16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_in_sixteen_bits(backend, param_dtype):
    _check(backend, _inputs(21, 257, 32, param_dtype, param_dtype=param_dtype), chunk=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalizer_replaces_the_count(backend, dtype):
    _check(backend, _inputs(13, 100, 16, dtype), normalizer=torch.tensor([37.0], device=DEVICE), chunk=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [0, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [None, 0.0])
def test_nothing_labelled_is_zero(backend, positions, dtype, count):
    hidden, word, bias, labels = _inputs(positions, 60, 16, dtype, ignored=1.1)
    normalizer = None if count is None else torch.tensor(count, device=DEVICE)
    loss, *grads = _run(backend, hidden, word, bias, labels, normalizer, -100, 4, True)
    assert loss.item() == 0.0
    for grad, like in zip(grads, (hidden, word, bias), strict=True):
        assert torch.equal(grad, torch.zeros_like(like))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_index_is_the_callers(backend):
    hidden, word, bias, labels = _inputs(9, 60, 16, torch.float32)
    labels = labels.where(labels != -100, 3)
    loss, grad_hidden, _, _ = _run(backend, hidden, word, bias, labels, None, 3, 4, True)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, word, bias), labels, ignore_index=3))
    assert not grad_hidden[labels == 3].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(backend, dtype):
    inputs = _inputs(12, 300, 32, dtype, scale=1e4)
    assert float(F.linear(*(t.float() for t in inputs[:3])).abs().max()) > 1e4
    _check(backend, inputs, chunk=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_probabilities_keep_their_gradient(backend):
    """A word with probability e^-80 still moves: its row is off by rounding, not by its size."""
    hidden = torch.ones(6, 8, device=DEVICE)
    word = torch.zeros(200, 8, device=DEVICE)
    word[1:] = -10.0
    labels = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    bias = torch.zeros(200, device=DEVICE)
    _, _, grad_word, _ = _run(backend, hidden, word, bias, labels, None, -100, 4, True)
    truth = _truth(hidden, word, bias, labels)[2]
    assert 0 < float(truth[1:].max()) < 1e-30
    torch.testing.assert_close(grad_word[1:].double(), truth[1:], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_cross_entropy(backend):
    hidden, word, bias, labels = _inputs(23, 119, 24, torch.float32)
    tensors = [t.clone().requires_grad_() for t in (hidden, word, bias)]
    expected = F.cross_entropy(F.linear(*tensors), labels)
    expected_grads = torch.autograd.grad(expected * 3.5, tensors)
    with dispatch.use_backend(mlm_loss=backend):
        loss = ops.mlm_loss(*tensors, labels, chunk=8)
        grads = torch.autograd.grad(loss * 3.5, tensors)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_only_the_loss(backend):
    inputs = _inputs(11, 77, 16, torch.float32)
    loss, *grads = _run(backend, *inputs, None, -100, 4, False)
    torch.testing.assert_close(loss, _run(backend, *inputs, None, -100, 4, True)[0], rtol=1e-6, atol=0)
    assert [g.numel() for g in grads] == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_scales(backend, dtype):
    grads = [torch.randn(shape, device=DEVICE).to(d) for shape, d in
             (((5, 9), dtype), ((700, 9), torch.float32), ((700,), dtype))]  # fmt: skip
    grad_loss = torch.tensor(-2.25, device=DEVICE)
    with dispatch.use_backend(mlm_loss=backend):
        scaled = torch.ops.bert_fast.mlm_loss_bwd(grad_loss, *grads)
    for a, b in zip(scaled, grads, strict=True):
        assert a.data_ptr() != b.data_ptr()
        assert torch.equal(a, (b.float() * -2.25).to(b.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, -2.25, float("nan")])
def test_backward_scales_in_place(backend, factor):
    grads = [torch.randn(shape, device=DEVICE).to(d) for shape, d in
             (((5, 9), torch.bfloat16), ((700, 9), torch.float32), ((700,), torch.bfloat16))]  # fmt: skip
    grad_loss, ours = torch.tensor(factor, device=DEVICE), [g.clone() for g in grads]
    with dispatch.use_backend(mlm_loss=backend):
        torch.ops.bert_fast.mlm_loss_bwd_(grad_loss, *ours)
        expected = torch.ops.bert_fast.mlm_loss_bwd(grad_loss, *grads)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    inputs = _inputs(37, 257, 32, torch.bfloat16)
    first = _run(backend, *inputs, None, -100, 16, True)
    second = _run(backend, *inputs, None, -100, 16, True)
    assert_same_bits(first, second)


class _LargestLogits(TorchDispatchMode):
    """Rows of the tallest tensor with at least ``width`` columns that any PyTorch operator returns."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] >= self.width:
                self.rows = max(self.rows, tensor.shape[0])
        return result


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
@pytest.mark.parametrize("chunk", [16, 32])
def test_logits_exist_for_one_chunk_at_most(backend, chunk):
    hidden, word, bias, labels = _inputs(60, 300, 16, torch.float32)
    # The implementation itself, so that the mode sees its allocations. word^T, a view of the table, has 16 rows too.
    forward = _implementation(backend)
    with _LargestLogits(300) as largest:
        forward(hidden, word, bias, labels, None, -100, chunk, True)
    assert 1 <= largest.rows <= chunk, f"a tensor with {largest.rows} rows of logits, chunk is {chunk}"


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ operators")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_the_tables_gradient_is_the_only_memory_of_its_size(dtype):
    """Neither a rounded table nor a product of 16 bits lies beside it."""
    inputs, activities = _inputs(6, 30522, 64, dtype), [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        _run("cpu", *inputs, None, -100, 8, True)
    blocks = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    size = inputs[1].numel() * inputs[1].itemsize
    assert [b for b in blocks if b >= size // 2] == [size]


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("positions", [0, 1, 100, 128, 1000, 4096, 4097, 4915, 30000])
@pytest.mark.parametrize("chunk", [1, 7, 1024, 4096])
def test_chunks_are_few_and_even(positions, chunk):
    from bert_fast.kernels import mlm_loss

    size = mlm_loss._even(positions, chunk)
    fewest = -(-positions // chunk)
    assert 1 <= size <= chunk
    assert -(-positions // size) == fewest
    if chunk % 128 == 0 and positions > size:
        assert size % 128 == 0
        assert size - positions / fewest < 128


def _implementation(backend):
    with dispatch.use_backend(mlm_loss=backend):
        return dispatch.implementation("mlm_loss", "fwd", DEVICE)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("label", [-1, 60, 2**40])
def test_label_out_of_range_is_nan_on_a_gpu(label):
    """Called past the check of values that CPU tensors get, as on a GPU: no access out of bounds, loss NaN."""
    hidden, word, bias, labels = _inputs(9, 60, 16, torch.float32)
    labels[4] = label
    loss, grad_hidden, _, _ = _implementation("triton")(hidden, word, bias, labels, None, -100, 4, True)
    assert loss.isnan()
    assert grad_hidden[4].isnan().all()
    assert not grad_hidden[:4].isnan().any()


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on CPU tensors")
@pytest.mark.parametrize("label", [-1, 60])
def test_label_out_of_range_raises_on_a_cpu(label):
    hidden, word, bias, labels = _inputs(9, 60, 16, torch.float32)
    labels[4] = label
    with pytest.raises(IndexError, match=rf"labels\[4\] is {label}"):
        ops.mlm_loss(hidden, word, bias, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, word, bias, labels = _inputs(6, 40, 8, torch.float32)
    tensors = [t.requires_grad_() for t in (hidden, word, bias)]
    with dispatch.use_backend(mlm_loss=backend):
        for with_grads in (True, False):
            arguments = [*tensors] if with_grads else [t.detach() for t in tensors]
            torch.library.opcheck(
                torch.ops.bert_fast.mlm_loss_fwd.default, (*arguments, labels, None, -100, 4, with_grads)
            )
        grads = [torch.randn_like(t) for t in arguments]
        for operator in (torch.ops.bert_fast.mlm_loss_bwd, torch.ops.bert_fast.mlm_loss_bwd_):
            torch.library.opcheck(operator, (torch.tensor(2.5, device=DEVICE), *grads))


@pytest.mark.parametrize("factor", [1.0, -2.25])
def test_gradients_are_the_callers_own(factor):
    """A factor of one hands the saved gradients over: never where the graph is kept, so no caller can change them."""
    hidden, word, bias, labels = _inputs(9, 50, 32, torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, word, bias)]
    truth = [g * factor for g in _truth(hidden, word, bias, labels)[1:]]
    loss = ops.mlm_loss(*leaves, labels) * factor
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        for leaf, g in zip(leaves, truth, strict=True):
            assert not leaf.grad.requires_grad
            torch.testing.assert_close(leaf.grad.double(), times * g, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    once = torch.autograd.grad(ops.mlm_loss(*leaves, labels) * factor, leaves)
    for ours, g in zip(once, truth, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours.double(), g, rtol=1e-5, atol=1e-6)
