"""bias_gelu: GELU(x + bias) with erf, each backend against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from bert_fast import dispatch, ops, reference
from tests.support.operators import BF16, FULL, HALF, assert_same_bits, compare, differentiate, of_backend
from tests.support.parity import DEVICE, available_backends

DTYPES = {  # x, bias
    "fp32": (FULL, FULL),
    "bf16": (BF16, BF16),
    "fp16": (HALF, HALF),
    "autocast-bf16": (BF16, FULL),
    "fp32-x-fp16-bias": (FULL, HALF),
}
BACKENDS = available_backends("bias_gelu")


def composed(x, bias):
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def check(backend, tokens, columns, dtypes, bias=True, scale=1.5):
    x = (scale * torch.randn(tokens, columns)).to(dtypes[0]).to(DEVICE)
    inputs = {"x": x, "bias": torch.randn(columns).to(dtypes[1]).to(DEVICE) if bias else None}
    grad_out = torch.randn(tokens, columns, device=DEVICE).to(x.dtype)
    compare("bias_gelu", backend, ops.bias_gelu, composed, reference.bias_gelu_fwd, inputs, grad_out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtypes, bias):
    check(backend, 17, 96, DTYPES[dtypes], bias)


@pytest.mark.parametrize(("tokens", "columns"), [(0, 64), (1, 64), (17, 1), (129, 7), (66, 128), (7, 300), (3, 3072)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, tokens, columns):
    check(backend, tokens, columns, DTYPES["fp32"])


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "autocast-bf16"])
@pytest.mark.parametrize(("tokens", "columns"), [(3, 1), (65, 7), (33, 300), (40, 3072), (5, 4096), (2, 9000)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_shapes(backend, tokens, columns, dtypes):
    check(backend, tokens, columns, DTYPES[dtypes])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tails_and_special_values(backend):
    """Far out GELU is exactly 0 or u, its derivative 0 or 1; infinities do not become NaN where the limit exists."""
    u = torch.tensor([[-200.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 200.0, math.inf]], device=DEVICE, requires_grad=True)
    with dispatch.use_backend(bias_gelu=backend):
        out = ops.bias_gelu(u)
        (grad,) = torch.autograd.grad(out[:, :-1].sum(), u)
    limits = torch.tensor([[0, 0, -5e-31, 0, 5e-31, 20, 200, math.inf]])  # on aarch64 torch's own is NaN at infinity
    torch.testing.assert_close(out.cpu(), limits, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[0, :-1].cpu(), torch.tensor([0, 0, 0.5, 0.5, 0.5, 1, 1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_erf_and_not_its_tanh_approximation(backend):
    u = torch.linspace(-4, 4, 4001, device=DEVICE)[None]
    with dispatch.use_backend(bias_gelu=backend):
        out = ops.bias_gelu(u).double()
    exact = F.gelu(u.double())
    tanh = F.gelu(u.double(), approximate="tanh")
    assert (out - exact).abs().max() < 1e-6
    assert (tanh - exact).abs().max() > 1e-4  # what the bound above tells apart


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    inputs = {"x": torch.randn(70, 96, device=DEVICE), "bias": torch.randn(96, device=DEVICE)}
    grad_out = torch.randn(70, 96, device=DEVICE)
    first, second = (of_backend("bias_gelu", backend, ops.bias_gelu, inputs, grad_out) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend):
    x, bias = torch.randn(64, 9, device=DEVICE), torch.randn(128, device=DEVICE)
    with dispatch.use_backend(bias_gelu=backend):
        assert torch.equal(ops.bias_gelu(x.T, bias[::2]), ops.bias_gelu(x.T.contiguous(), bias[::2].contiguous()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, bias):
    x = torch.randn(5, 32, device=DEVICE, requires_grad=True)
    bias = torch.randn(32, device=DEVICE, requires_grad=True) if bias else None
    with dispatch.use_backend(bias_gelu=backend):
        torch.library.opcheck(torch.ops.bert_fast.bias_gelu_fwd, (x, bias))
        detached = [None if t is None else t.detach() for t in (bias,)]
        torch.library.opcheck(
            torch.ops.bert_fast.bias_gelu_bwd, (torch.randn(5, 32, device=DEVICE), x.detach(), *detached)
        )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_names_what_it_lacks():
    with (
        dispatch.use_backend(bias_gelu="triton"),
        pytest.raises(TypeError, match=r"x has dtype torch.float64.*reference"),
    ):
        ops.bias_gelu(torch.randn(2, 32, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_16_bit_inputs(backend, dtype):
    """Over every finite 16-bit input the error of value and slope is PyTorch's, in the largest and in the mean square;
    beyond the inputs' tails the limits are exact, and NaN stays NaN."""
    u = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    u = u[torch.isfinite(u)][None]
    ours = of_backend("bias_gelu", backend, ops.bias_gelu, {"x": u.to(DEVICE)}, torch.ones_like(u, device=DEVICE))
    with dispatch.use_backend(bias_gelu=backend):
        ends = ops.bias_gelu(torch.tensor([[-math.inf, -60.0, 60.0, math.inf, math.nan]], dtype=dtype, device=DEVICE))
    theirs, truth = (differentiate(F.gelu, {"input": x}, torch.ones_like(u)) for x in (u, u.double()))
    inside = u.abs() < 100
    results = (found.values() for found in (ours, theirs, truth))
    for our, their, true, limit in zip(*results, (u.clamp(min=0), u > 0), strict=True):
        our = our.cpu().double()
        assert torch.equal(our[~inside], limit[~inside].double())
        our, their = (our - true)[inside], (their.double() - true)[inside]
        assert our.abs().max() <= 1.01 * their.abs().max()
        assert our.norm() <= 1.005 * their.norm()
    assert ends[0, 1:4].tolist() == [0, 60, math.inf]
    assert ends[0, 4].isnan()
