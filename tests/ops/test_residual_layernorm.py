"""residual_layernorm: LayerNorm(dropout(x + bias) + residual), each backend against float64."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bert_fast import dispatch, dropout_mask, ops, reference
from tests.support.operators import BF16, FULL, HALF, assert_same_bits, compare, of_backend
from tests.support.parity import DEVICE, available_backends

EPS = 1e-12
SITE = 5
DTYPES = {  # x, residual, parameters
    "fp32": (FULL, FULL, FULL),
    "bf16": (BF16, BF16, BF16),
    "fp16": (HALF, HALF, HALF),
    "autocast-bf16": (BF16, FULL, FULL),
    "bf16-activations": (BF16, BF16, FULL),
    "fp32-x-fp16-residual": (FULL, HALF, BF16),
}
BACKENDS = available_backends("residual_layernorm")


def make_inputs(tokens, columns, dtypes, *, bias=True, residual=True, mean=0.0):
    x_dtype, residual_dtype, dtype = dtypes
    inputs = {
        "x": torch.randn(tokens, columns).to(x_dtype),
        "bias": torch.randn(columns).to(dtype) if bias else None,
        "residual": (torch.randn(tokens, columns) + mean).to(residual_dtype) if residual else None,
        "weight": torch.randn(columns).to(dtype),
        "ln_bias": torch.randn(columns).to(dtype),
    }
    return {name: None if t is None else t.to(DEVICE) for name, t in inputs.items()}


def make_keys(tokens):
    lengths = torch.tensor([0, tokens // 3, tokens // 3, tokens], dtype=torch.int32, device=DEVICE)
    return dropout_mask.row_keys(lengths, tokens), torch.tensor([0x1234_5678_9ABC_DEF0], device=DEVICE)


def operator(keys, p, eps=EPS):
    """The operator as a function of its inputs."""
    return functools.partial(ops.residual_layernorm, eps=eps, p=p, row_key=keys[0], rng_key=keys[1], site=SITE)


def check(backend, inputs, p):
    shape, residual = inputs["x"].shape, inputs["residual"]
    row_key, rng_key = keys = make_keys(shape[0])
    grad_out = torch.randn(shape, device=DEVICE).to((inputs["x"] if residual is None else residual).dtype)

    def exact(**doubles):
        return reference.residual_layernorm_fwd(**doubles, row_key=row_key, rng_key=rng_key, eps=EPS, p=p, site=SITE)[0]

    def composed(x, bias, residual, weight, ln_bias):
        z = x if bias is None else x + bias.to(x.dtype)
        if p:
            keep = dropout_mask.hidden_keep_mask(rng_key, row_key, shape[1], p, SITE)
            z = z * keep * dropout_mask.dropout_scale(p)
        if residual is not None:
            z = z.to(residual.dtype) + residual
        return F.layer_norm(z, shape[1:], weight.to(z.dtype), ln_bias.to(z.dtype), EPS)

    compare("residual_layernorm", backend, operator(keys, p), composed, exact, inputs, grad_out)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, dtypes, p):
    check(backend, make_inputs(17, 96, DTYPES[dtypes]), p)


@pytest.mark.parametrize(("tokens", "columns"), [(0, 32), (1, 32), (17, 1), (129, 7), (128, 32), (9, 300), (5, 1024)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, tokens, columns):
    check(backend, make_inputs(tokens, columns, DTYPES["fp32"]), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "autocast-bf16"])
@pytest.mark.parametrize(("tokens", "columns"), [(65, 24), (33, 300), (20, 768), (70, 1024), (3, 4096), (2, 8192)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_shapes(backend, tokens, columns, dtypes):
    """Not one column in 16 bits: there the variance is 0, and the rounding of the saved z is all the backward sees."""
    check(backend, make_inputs(tokens, columns, DTYPES[dtypes]), 0.1)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("bias", "residual"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias_or_residual(backend, bias, residual, p):
    check(backend, make_inputs(19, 64, DTYPES["bf16"], bias=bias, residual=residual), p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_costs_no_digits(backend):
    """E[x^2] - E[x]^2 in fp32 would leave nothing of a variance of 1 beside a mean of 1e4."""
    check(backend, make_inputs(16, 256, DTYPES["fp32"], mean=1e4), 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend):
    """Variance 0: xhat is 0, so the output is ln_bias, and nothing is NaN or infinite."""
    inputs = make_inputs(6, 64, DTYPES["fp32"], bias=False)
    inputs["x"], inputs["residual"] = torch.zeros_like(inputs["x"]), torch.full_like(inputs["residual"], 3.0)
    function, grad_out = operator((None, None), 0.0, eps=1e-5), torch.randn(6, 64, device=DEVICE)
    result = of_backend("residual_layernorm", backend, function, inputs, grad_out)
    torch.testing.assert_close(result["out"], inputs["ln_bias"].expand(6, 64), rtol=0, atol=0)
    for name, value in result.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("columns", [32, 100, 768])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_is_the_function(backend, columns, p):
    tokens = 21
    row_key, rng_key = make_keys(tokens)
    x = torch.ones(tokens, columns, device=DEVICE)
    parameter = torch.ones(columns, device=DEVICE)
    with dispatch.use_backend(residual_layernorm=backend):
        _, z, _, _ = torch.ops.bert_fast.residual_layernorm_fwd(
            x, None, None, parameter, parameter, row_key, rng_key, 1.0, p, SITE
        )
    keep = dropout_mask.hidden_keep_mask(rng_key, row_key, columns, p, SITE)
    assert torch.equal(z, keep * torch.tensor(dropout_mask.dropout_scale(p), device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    inputs, keys = make_inputs(70, 96, DTYPES["fp32"]), make_keys(70)  # more tiles than programs
    grad_out = torch.randn(70, 96, device=DEVICE)
    first, second = (of_backend("residual_layernorm", backend, operator(keys, 0.1), inputs, grad_out) for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_x_is_the_residuals_where_nothing_differs(backend):
    inputs = make_inputs(4, 32, DTYPES["bf16"])
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    with dispatch.use_backend(residual_layernorm=backend):
        _, z, mean, rstd = torch.ops.bert_fast.residual_layernorm_fwd(
            *(inputs[name] for name in ("x", "bias", "residual", "weight", "ln_bias")), none, none, EPS, 0.0, 0
        )
        grads = {
            dtype: torch.ops.bert_fast.residual_layernorm_bwd(
                torch.randn_like(z), z, mean, rstd, inputs["weight"], none, none, 0.0, 0, dtype, False
            )
            for dtype in (BF16, FULL)
        }
    assert grads[BF16][0].shape == (0, 32)
    assert grads[FULL][0].shape == (4, 32)
    assert grads[FULL][0].dtype == FULL
    assert grads[FULL][2].shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_contiguous(backend):
    wide = torch.randn(9, 128, device=DEVICE)
    weight, ln_bias = torch.randn(128, device=DEVICE), torch.randn(128, device=DEVICE)
    residual = torch.randn(64, 9, device=DEVICE)
    with dispatch.use_backend(residual_layernorm=backend):
        strided = ops.residual_layernorm(wide[:, ::2], residual.T, weight[::2], ln_bias[::2], eps=EPS)
        packed = ops.residual_layernorm(
            wide[:, ::2].contiguous(), residual.T.contiguous(), weight[::2].contiguous(), ln_bias[::2].contiguous(),
            eps=EPS,
        )  # fmt: skip
    assert torch.equal(strided, packed)


@pytest.mark.parametrize(
    ("backend", "p"), [(b, 0.1) for b in BACKENDS] + [pytest.param(b, 0.0, marks=pytest.mark.slow) for b in BACKENDS]
)
def test_opcheck(backend, p):
    inputs = make_inputs(5, 32, DTYPES["fp32"])
    keys = make_keys(5)
    leaves = [inputs[name].requires_grad_() for name in ("x", "bias", "residual", "weight", "ln_bias")]
    with dispatch.use_backend(residual_layernorm=backend):
        torch.library.opcheck(torch.ops.bert_fast.residual_layernorm_fwd, (*leaves, *keys, EPS, p, SITE))
        z = torch.randn(5, 32, device=DEVICE)
        rows = torch.rand(5, device=DEVICE)
        torch.library.opcheck(
            torch.ops.bert_fast.residual_layernorm_bwd,
            (z.clone(), z, rows, rows.clone(), leaves[3].detach(), *keys, p, SITE, FULL, True),
        )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("columns", [768, 1024])
def test_programs_that_share_rows_run_at_once(columns, monkeypatch):
    """A multiprocessor is given no more of the backward's than fit it, by dev/occupancy.json, on any GPU."""
    from bert_fast.kernels import embedding_layernorm, residual_layernorm, rows

    stated = json.loads((Path(__file__).resolve().parents[2] / "dev" / "occupancy.json").read_text())
    monkeypatch.setattr(rows, "multiprocessors", lambda device: 1)
    config = embedding_layernorm._launch_config(columns, "bwd")
    each = {f"embedding_layernorm bwd H={columns}": (config, embedding_layernorm._ELEMENTS)}
    for dtype, kind in ((BF16, ""), (FULL, " fp32")):
        config = residual_layernorm._launch_config(columns, "bwd", dtype)
        elements = 8 * residual_layernorm._elements("bwd", dtype)
        each[f"residual_layernorm bwd H={columns}{kind}"] = (config, elements)
    for name, (config, elements) in each.items():
        given = rows.tile_programs(torch.device("cuda"), 10**6, config, elements)
        fit = [least for p in (0.0, 0.1) for least in stated[f"{name} p={p}"].values()]
        assert 1 <= given <= min(fit), name
        assert given * config["BLOCK_N"] == elements, name  # as many elements under way as were meant


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_triton_names_what_it_lacks():
    double = make_inputs(2, 32, (torch.float64,) * 3)
    wide = make_inputs(1, 8193, DTYPES["fp32"])
    with dispatch.use_backend(residual_layernorm="triton"):
        with pytest.raises(TypeError, match=r"x has dtype torch.float64.*reference"):
            ops.residual_layernorm(double["x"], None, double["weight"], double["ln_bias"], eps=EPS)
        with pytest.raises(ValueError, match=r"8193 elements; the triton backend has 1 to 8192.*reference"):
            ops.residual_layernorm(wide["x"], None, wide["weight"], wide["ln_bias"], eps=EPS)
