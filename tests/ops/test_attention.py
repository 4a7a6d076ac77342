"""attention: each backend against float64 with the same dropout mask, forward and gradient, on packed sequences."""

import pytest
import torch

from bert_fast import dispatch, dropout_mask, ops, reference
from tests.support.operators import BF16, FULL, HALF, assert_same_bits, differentiate, of_backend
from tests.support.packed_attention import SITE, assert_gradient_near_truth, packed, plain
from tests.support.parity import DEVICE, assert_near_truth, available_backends

BACKENDS = available_backends("attention")
# and dropout; that of PyTorch's kernels has masks of its own (test_torch_attention.py), which on a GPU lack float32
CASES = [(backend, p) for backend in BACKENDS for p in (0.0, 0.1)] + [("torch", 0.0)] * (DEVICE == "cpu")
LENGTHS = {
    "one token in all": [1],
    "two": [2],
    "prime": [17],
    "around a block": [127, 129],
    "around a dropout block": [63, 64, 65],
    "many tiny": [1, 2, 3, 5, 1, 1, 4],
    "empty ones": [0, 9, 0, 0, 20, 0],
    "all empty": [0, 0],
    "no sequence": [],
}


def compare(backend, lengths, heads, size, dtype, p, tail=0, scale=1.0):
    qkv, cu_seqlens, row_key, rng_key, longest = packed(lengths, heads, size, dtype, tail, scale)
    grad_out = torch.randn(qkv.shape[0], heads * size, device=DEVICE).to(dtype)
    keys = {"row_key": row_key, "rng_key": rng_key}
    arguments = (cu_seqlens, longest, row_key, rng_key, size**-0.5, p, SITE)
    inputs = {"qkv": qkv, "bias": torch.randn(3, heads, size, device=DEVICE).to(dtype)}

    def operator(qkv, bias):
        return ops.attention(qkv, cu_seqlens, longest, p=p, site=SITE, bias=bias, **keys)

    ours = of_backend("attention", backend, operator, inputs, grad_out)
    with dispatch.use_backend(attention=backend):
        _, lse = torch.ops.bert_fast.attention_fwd(qkv, *arguments, None)
    same_dtype = differentiate(lambda qkv: plain(qkv, cu_seqlens, row_key, rng_key, p), {"qkv": qkv}, grad_out)
    doubles = {"qkv": qkv.double()}
    truth = differentiate(lambda qkv: reference.attention_fwd(qkv, *arguments)[0], doubles, grad_out.double())
    _, true_lse = reference.attention_fwd(doubles["qkv"], *arguments)

    floor = 2.0 if size <= 128 else 4.0  # scores of more terms, added in one run where PyTorch's library splits it
    assert_near_truth(f"out ({backend})", ours["out"], same_dtype["out"], truth["out"], floor=floor)
    grad, grad_bias, same_grad, true_grad = ours["d qkv"], ours["d bias"], same_dtype["d qkv"], truth["d qkv"]
    assert_gradient_near_truth(f"qkv ({backend})", lengths, grad, same_grad, true_grad)
    sums = same_grad.sum(0), true_grad.sum(0)  # what a linear layer of that dtype gives its bias, and the truth
    assert_gradient_near_truth(f"the bias ({backend})", lengths, grad_bias, *sums, but=("dk",))
    assert (grad_bias[1] == 0).all(), "the keys' bias has a gradient"
    assert float(sums[1][1].abs().max()) <= 1e-12 * float(true_grad.abs().sum())  # as it is in truth
    floor = 64.0 if backend == "torch" and dtype != FULL else 16.0  # PyTorch's exponential for 16 bits on a CPU
    assert_near_truth(f"lse ({backend})", lse, true_lse.float(), true_lse, floor=floor)
    used = sum(lengths)
    for name, rows in (("out", ours["out"][used:]), ("dqkv", grad[used:]), ("lse", lse[:, used:])):
        assert (rows == 0).all(), f"{name} ({backend}): rows past cu_seqlens[-1] are not all zero"


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("backend", "p"), CASES)
def test_lengths(backend, lengths, p):
    compare(backend, LENGTHS[lengths], 1, 16, FULL, p, tail=3 if lengths != "prime" else 0)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL], ids=str)
@pytest.mark.parametrize("size", [8, 32, 40, 64, 128])
@pytest.mark.parametrize(("backend", "p"), CASES)
def test_head_sizes_and_dtypes(backend, size, dtype, p):
    compare(backend, [5, 70], 1, size, dtype, p, tail=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_length(backend):
    compare(backend, [511], 1, 32, HALF, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [BF16, HALF, FULL], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "size"),
    [([511, 512, 3], 1, 64), ([127, 128, 129], 3, 32), ([100, 1, 65], 2, 256), ([90], 2, 200), ([40, 33], 5, 1)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large(backend, lengths, heads, size, dtype, p):
    compare(backend, lengths, heads, size, dtype, p, tail=130)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tail_longer_than_every_sequence(backend):
    compare(backend, [3, 2], 2, 8, FULL, 0.1, tail=300)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token(backend):
    qkv, cu_seqlens, *_ = packed([], 2, 16)
    qkv.requires_grad_()
    with dispatch.use_backend(attention=backend):
        bias = torch.randn(96, device=DEVICE, requires_grad=True)
        out = ops.attention(qkv, cu_seqlens, 0, bias=bias)
        grad, grad_bias = torch.autograd.grad(out.sum(), (qkv, bias))
    assert out.shape == (0, 32)
    assert grad.shape == qkv.shape
    assert torch.equal(grad_bias, torch.zeros_like(bias))


@pytest.mark.parametrize(("backend", "p"), CASES)
def test_no_sequence_sees_another(backend, p):
    """Changing one sequence changes no bit of any other, forward or backward."""
    lengths = [9, 70, 20]
    qkv, cu_seqlens, row_key, rng_key, longest = packed(lengths, 1, 32)
    grad_out = torch.randn(qkv.shape[0], 32, device=DEVICE)
    changed, changed_grad = qkv.clone(), grad_out.clone()
    changed[9:79] = 50 * torch.randn(70, 3, 1, 32, device=DEVICE)
    changed_grad[9:79] += 1
    keys = {"row_key": row_key, "rng_key": rng_key}
    results = [
        of_backend(
            "attention", backend, lambda qkv: ops.attention(qkv, cu_seqlens, longest, p=p, **keys), {"qkv": x}, g
        ).values()
        for x, g in ((qkv, grad_out), (changed, changed_grad))
    ]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:9], after[:9])
        assert torch.equal(before[79:], after[79:])
        assert not torch.equal(before[9:79], after[9:79])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_sees_left_and_right(backend):
    qkv, cu_seqlens, *_, longest = packed([70], 1, 16)
    with dispatch.use_backend(attention=backend):
        before = ops.attention(qkv, cu_seqlens, longest)
        for changed in (0, 69):
            other = qkv.clone()
            other[changed] = torch.randn(3, 1, 16, device=DEVICE)
            assert (ops.attention(other, cu_seqlens, longest) != before).any(dim=1).all()


@pytest.mark.parametrize("p", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_the_function_of_what_an_element_is(backend, p):
    """Each key's value is a unit vector, so out shows which (query, key) were kept; the backwards use the same."""
    lengths, heads, size = [66, 10], 2, 72
    qkv, cu_seqlens, row_key, rng_key, longest = packed(lengths, heads, size, scale=0.05)
    for start, length in ((0, 66), (66, 10)):
        qkv[start : start + length, 2] = torch.eye(length, size, device=DEVICE)[:, None]
    arguments = (cu_seqlens, longest, row_key, rng_key, 1.0, p, 9)
    grad_out = torch.zeros(76, heads * size, device=DEVICE)
    grad_out[0, :size] = grad_out[65, :size] = 1.0  # queries 0 and 65 of the first sequence, first head
    with dispatch.use_backend(attention=backend):
        out, lse = torch.ops.bert_fast.attention_fwd(qkv, *arguments, None)
        grad, no_bias = torch.ops.bert_fast.attention_bwd(grad_out, qkv, out, lse, *arguments, None)
    assert no_bias.shape == (0,)
    for start, length in ((0, 66), (66, 10)):
        rows = slice(start, start + length)
        keep = dropout_mask.attention_keep_mask(rng_key, row_key[rows], heads, length, p, 9)
        kept = out[rows].view(length, heads, size).transpose(0, 1)[..., :length] != 0
        assert torch.equal(kept, keep)
    keep = dropout_mask.attention_keep_mask(rng_key, row_key[:66], heads, 66, p, 9)[0]
    assert torch.equal(grad[:66, 2, 0, 0] != 0, keep[0] | keep[65])  # dV: a key either query kept
    assert (grad[:, 2, 1] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, FULL], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, dtype):
    qkv, cu_seqlens, row_key, rng_key, longest = packed([33, 70], 1, 32, dtype, tail=5)
    arguments = (cu_seqlens, longest, row_key, rng_key, 0.2, 0.1, SITE)
    grad_out = torch.randn(qkv.shape[0], 32, device=DEVICE).to(dtype)
    with dispatch.use_backend(attention=backend):
        runs = []
        for _ in range(2):
            out, lse = torch.ops.bert_fast.attention_fwd(qkv, *arguments, None)
            grads = torch.ops.bert_fast.attention_bwd(grad_out, qkv, out, lse, *arguments, dtype)
            runs.append((out, lse, *grads))
    assert_same_bits(*runs)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_give_no_nan(backend, sign):
    """Scores of +-1e4: a softmax that is nearly one-hot, and rows whose every score is far below 0."""
    qkv, cu_seqlens, row_key, rng_key, longest = packed([70, 3], 1, 16)
    qkv[:, 0], qkv[:, 1] = 100.0, sign * 25.0 * (1 + torch.rand(73, 1, 1, device=DEVICE))
    arguments = (cu_seqlens, longest, row_key, rng_key, 0.25, 0.1, SITE)
    grad_out = torch.randn(73, 16, device=DEVICE)
    with dispatch.use_backend(attention=backend):
        out, lse = torch.ops.bert_fast.attention_fwd(qkv, *arguments, None)
        grad, no_bias = torch.ops.bert_fast.attention_bwd(grad_out, qkv, out, lse, *arguments, None)
    assert no_bias.shape == (0,)
    true_out, true_lse = reference.attention_fwd(qkv.double(), *arguments)
    assert float(true_lse.abs().min()) > 9e3
    assert out.isfinite().all()
    assert grad.isfinite().all()
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), true_out, rtol=0, atol=2e-2)  # a score of 2e4 in fp32 has ulp 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_unaligned_qkv(backend):
    qkv, cu_seqlens, row_key, rng_key, longest = packed([20, 7], 2, 24)
    expected, _ = reference.attention_fwd(qkv, cu_seqlens, longest, row_key, rng_key, 24**-0.5, 0.0, 0)
    strided = torch.randn(27, 3, 2, 30, device=DEVICE)[..., 3:27]
    strided.copy_(qkv)
    unaligned = torch.empty(qkv.numel() + 1, device=DEVICE)[1:].view(qkv.shape)
    unaligned.copy_(qkv)
    with dispatch.use_backend(attention=backend):
        for x in (strided, unaligned):
            torch.testing.assert_close(ops.attention(x, cu_seqlens, longest), expected)


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_bias_of_16_bit_qkv(backend, dtype):
    """As under autocast: the gradient is the sum of what is rounded to 16 bits only where it is qkv's."""
    qkv, cu_seqlens, row_key, rng_key, longest = packed([70, 5, 64], 2, 32, dtype, tail=3)
    grad_out = torch.randn(qkv.shape[0], 64, device=DEVICE).to(dtype)
    keys = {"p": 0.1, "row_key": row_key, "rng_key": rng_key, "site": SITE}
    inputs = {"qkv": qkv, "bias": torch.randn(192, device=DEVICE)}
    _, grad, grad_bias = of_backend(
        "attention", backend, lambda qkv, bias: ops.attention(qkv, cu_seqlens, longest, bias=bias, **keys), inputs,
        grad_out,
    ).values()  # fmt: skip
    assert grad_bias.shape == (192,)
    assert grad_bias.dtype == FULL
    rounded = grad.sum(0, dtype=FULL).flatten()
    arguments = (cu_seqlens, longest, row_key, rng_key, 32**-0.5, 0.1, SITE)
    doubles = {"qkv": qkv.double()}
    truth = differentiate(lambda qkv: reference.attention_fwd(qkv, *arguments)[0], doubles, grad_out.double())
    truth = truth["d qkv"].sum(0).flatten()
    for part in (slice(0, 64), slice(128, 192)):
        assert_near_truth(f"bias ({backend})", grad_bias[part], rounded[part], truth[part], factor=1.2)
    assert not grad_bias[64:128].any()
    assert rounded[64:128].any()  # the rounding that a sum would give


@pytest.mark.parametrize("shape", [(3, 2, 16), (96,)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_needs_a_gradient(backend, shape):
    """qkv, the bias or both: each has the same bits, and no part in the forward; a bias may be strided."""
    qkv, cu_seqlens, *_, longest = packed([20, 7], 2, 16, tail=2)
    grad_out = torch.randn(29, 32, device=DEVICE)
    spread = torch.full((*shape, 2), float("nan"), device=DEVICE)
    found = {}
    with dispatch.use_backend(attention=backend):
        plain_out = ops.attention(qkv, cu_seqlens, longest)
        for wanted in ("qkv", "bias", "qkv and bias"):
            x, b = qkv.clone().requires_grad_("qkv" in wanted), spread[..., 0].detach().requires_grad_("bias" in wanted)
            out = ops.attention(x, cu_seqlens, longest, bias=b)
            assert torch.equal(out, plain_out)
            out.backward(grad_out)
            found[wanted] = (x.grad, b.grad)
    assert found["qkv"][1] is None
    assert found["bias"][0] is None
    assert torch.equal(found["qkv"][0], found["qkv and bias"][0])
    assert torch.equal(found["bias"][1], found["qkv and bias"][1])
    assert found["bias"][1].shape == shape
    expected = found["qkv"][0].sum(0)
    expected[1] = 0.0
    torch.testing.assert_close(found["bias"][1], expected.view(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, p):
    qkv, cu_seqlens, row_key, rng_key, longest = packed([3, 4], 1, 8)
    qkv.requires_grad_()
    bias = torch.randn(3, 1, 8, device=DEVICE, requires_grad=True)
    arguments = (cu_seqlens, longest, row_key, rng_key, 0.3, p, SITE)
    with dispatch.use_backend(attention=backend):
        for given in (bias, None):
            torch.library.opcheck(torch.ops.bert_fast.attention_fwd, (qkv, *arguments, given))
        with torch.no_grad():
            out, lse = torch.ops.bert_fast.attention_fwd(qkv, *arguments, None)
        for bias_dtype in (FULL, BF16, None):
            torch.library.opcheck(
                torch.ops.bert_fast.attention_bwd,
                (torch.randn_like(out), qkv.detach(), out, lse, *arguments, bias_dtype),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
def test_triton_says_what_it_does_not_have():
    qkv, cu_seqlens, *_, longest = packed([4], 1, 8)
    with dispatch.use_backend(attention="triton"):
        with pytest.raises(TypeError, match="reference"):
            ops.attention(qkv.double(), cu_seqlens, longest)
        with pytest.raises(ValueError, match="scale"):
            ops.attention(qkv, cu_seqlens, longest, scale=0.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on CPU tensors alone")
@pytest.mark.parametrize(("bounds", "longest"), [([1, 4], 3), ([0, 3, 2], 3), ([0, 9], 9), ([0, 4], 3)])
def test_bounds_that_do_not_add_up(bounds, longest):
    with pytest.raises(ValueError, match=r"cu_seqlens"):
        ops.attention(torch.randn(4, 3, 1, 8), torch.tensor(bounds, dtype=torch.int32), longest)
