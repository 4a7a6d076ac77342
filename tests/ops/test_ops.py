"""The seam: which backend runs, what is checked, what the messages say, and the peers."""

import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast import dispatch, dropout_mask, ops, reference
from bert_fast.peers import apex, flash_attn
from tests.support.parity import DEVICE, available_backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    """No override, no environment variable, no warning given yet."""
    monkeypatch.delenv("BERT_FAST_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_override", {})
    monkeypatch.setattr(dispatch, "_functions", {})


def unavailable(monkeypatch, *names):
    real = dispatch.why_unavailable
    monkeypatch.setattr(dispatch, "why_unavailable", lambda b: f"{b} was taken away" if b in names else real(b))


def available(monkeypatch, *names):
    real = dispatch.why_unavailable
    monkeypatch.setattr(dispatch, "why_unavailable", lambda b: None if b in names else real(b))


# --------------------------------------------------------------------------------------------------------------
# The chooser


def test_every_backend_has_the_signatures_of_the_reference():
    for operator in dispatch.TABLE:
        specification = importlib.import_module(dispatch.TABLE[operator]["reference"])
        for backend in available_backends(operator):
            module = importlib.import_module(dispatch.TABLE[operator][backend])
            for direction in ("norm", "rates", "adamw", "lamb") if operator == "optimizer" else ("fwd", "bwd"):
                ours = inspect.signature(getattr(module, f"{operator}_{direction}"))
                specified = inspect.signature(getattr(specification, f"{operator}_{direction}"))
                assert list(ours.parameters) == list(specified.parameters), (operator, backend, direction)


@pytest.mark.parametrize(("device", "expected"), [("cuda", "triton"), ("cpu", "cpu"), ("mps", "reference")])
def test_the_device_decides(monkeypatch, device, expected):
    available(monkeypatch, "triton", "cpu")
    assert dispatch.choose("bias_gelu", device) == expected


def test_override_of_all_and_of_one(monkeypatch):
    available(monkeypatch, "triton", "cpu")
    dispatch.set_backend("reference", bias_gelu="triton")
    assert dispatch.choose("bias_gelu", "cpu") == "triton"
    assert dispatch.choose("attention", "cuda") == "reference"
    dispatch.set_backend(None, bias_gelu=None)
    assert dispatch.choose("bias_gelu", "cpu") == "cpu"
    assert dispatch.choose("attention", "cuda") == "triton"


def test_a_peer_for_all_serves_the_operators_that_it_has(monkeypatch):
    available(monkeypatch, "triton", "flash_attn")
    dispatch.set_backend("flash_attn")
    assert dispatch.choose("attention", "cuda") == "flash_attn"
    assert dispatch.choose("bias_gelu", "cuda") == "triton"


def test_use_backend_gives_back_what_was_there(monkeypatch):
    available(monkeypatch, "triton")
    dispatch.set_backend("reference")
    with dispatch.use_backend(bias_gelu="triton"):
        assert dispatch.choose("bias_gelu", "cpu") == "triton"
    assert dispatch.choose("bias_gelu", "cpu") == "reference"
    with pytest.raises(KeyError), dispatch.use_backend("triton"):
        raise KeyError
    assert dispatch.choose("bias_gelu", "cpu") == "reference"


def test_a_choice_reaches_the_implementation():
    x = torch.randn(3, 8, device=DEVICE)
    calls = []
    real = reference.bias_gelu_fwd
    try:
        reference.bias_gelu_fwd = lambda *args: calls.append(args) or real(*args)
        with dispatch.use_backend("reference"):
            ops.bias_gelu(x)
    finally:
        reference.bias_gelu_fwd = real
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch.set_backend("cuda"), r"unknown backend 'cuda'; the backends are triton, cpu, reference"),
        (lambda: dispatch.set_backend(softmax="triton"), r"unknown operator 'softmax'; the operators are embedding"),
        (lambda: dispatch.set_backend(bias_gelu="apex"), r"bias_gelu has no backend 'apex'; it has triton, cpu, ref"),
        (lambda: dispatch.why_unavailable("xla"), r"unknown backend 'xla'"),
    ],
)
def test_names_that_do_not_exist(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        ("triton", "pip install 'triton"),
        ("cpu", "C.. compiler"),
        ("flash_attn", "pip install flash-attn"),
        ("apex", "github.com/NVIDIA/apex"),
    ],
)
def test_a_missing_backend_by_name_raises_and_says_how_to_get_it(monkeypatch, backend, how):
    unavailable(monkeypatch, backend)
    with pytest.raises(dispatch.BackendUnavailable, match=rf"'{backend}' cannot run here: .*taken away.*{how}"):
        dispatch.set_backend(backend)
    assert dispatch._override == {}, "a refused choice changes nothing"


def test_automatic_fallback_warns_once(monkeypatch):
    unavailable(monkeypatch, "cpu", "triton")
    with pytest.warns(
        RuntimeWarning, match=r"the cpu backend cannot run here \(cpu was taken away\).*To get it: build"
    ):
        assert dispatch.choose("bias_gelu", "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("attention", "cpu") == "reference"
        with pytest.raises(RuntimeWarning, match="triton"):  # another backend is another warning
            dispatch.choose("attention", "cuda")


def test_named_reference_does_not_warn(monkeypatch):
    unavailable(monkeypatch, "cpu", "triton")
    dispatch.set_backend("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("bias_gelu", "cpu") == "reference"


def test_environment_variable(monkeypatch):
    available(monkeypatch, "triton")
    monkeypatch.setenv("BERT_FAST_BACKEND", "reference")
    assert dispatch.choose("bias_gelu", "cuda") == "reference"
    dispatch.set_backend(bias_gelu="triton")
    assert dispatch.choose("bias_gelu", "cuda") == "triton", "what the program asks for goes before the environment"
    monkeypatch.setenv("BERT_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="unknown backend 'fastest'"):
        dispatch.choose("attention", "cuda")


@pytest.mark.parametrize("named", [None, "triton"])
def test_float64_on_a_gpu_is_the_reference_s_unless_triton_is_named(monkeypatch, named):
    pytest.importorskip("triton")
    available(monkeypatch, "triton")
    dispatch.set_backend(named)
    assert dispatch.choose("attention", "cuda") == "triton"
    for operator, direction in (("attention", "bwd"), ("mlm_loss", "bwd_"), ("embedding_layernorm", "bwd_add")):
        found = dispatch.implementation(operator, direction, "cuda", True)
        assert (found.__module__ == "bert_fast.reference") == (named is None), operator


def test_operators_tell_float64(monkeypatch):
    told = []

    def implementation(*asked):
        told.append(asked)
        return real(*asked)

    real = dispatch.implementation
    monkeypatch.setattr(dispatch, "implementation", implementation)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
        ops.bias_gelu(x, torch.randn(8, dtype=dtype)).sum().backward()
    labels, normalizer = torch.zeros(4, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    ops.mlm_loss(torch.randn(4, 8), torch.randn(9, 8), torch.randn(9), labels, normalizer=normalizer)
    for dtype in (torch.float32, torch.float64):  # no token at all
        ops.attention(torch.randn(0, 3, 2, 8, dtype=dtype), torch.zeros(1, dtype=torch.int32), 0)
    assert [asked[-1] for asked in told] == [False, False, True, True, False, False, True]


def test_the_cpp_operators_refuse_other_tensors(monkeypatch):
    """They would take the device's addresses for the host's, and end the process."""
    available(monkeypatch, "cpu")
    dispatch.set_backend("cpu")
    with pytest.raises(dispatch.BackendUnavailable, match="'cpu' cannot run attention on tensors of cuda: move"):
        dispatch.implementation("attention", "fwd", "cuda")


def test_environment_variable_in_a_new_process():
    code = "import bert_fast.dispatch as b; print(b.backends()['attention']['cpu'])"
    environment = os.environ | {"BERT_FAST_BACKEND": "reference"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "reference", result.stderr


@pytest.mark.parametrize("epilogue", [{}, {"fwd": {90: 1}}])
def test_backends_lists_every_operator_that_is_used(monkeypatch, epilogue):
    monkeypatch.setattr(dispatch, "FEED_FORWARD_EPILOGUE", epilogue)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = dispatch.backends()
    assert list(table) == [name for name in dispatch.TABLE if epilogue or name != "feed_forward"]
    assert all(name in dispatch.BACKENDS for row in table.values() for name in row.values())


def test_triton_names_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in dispatch.why_unavailable("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.why_unavailable("triton") == "the package triton is not installed"


# --------------------------------------------------------------------------------------------------------------
# Checks


def good(operator):
    """Arguments that ``ops.<operator>`` accepts: positional, and by name."""
    t, h = 6, 8
    keys = {"row_key": torch.arange(t, device=DEVICE), "rng_key": torch.tensor([5], device=DEVICE)}
    rows = torch.randn(t, h, device=DEVICE)
    row = torch.randn(h, device=DEVICE)
    index = torch.zeros(t, dtype=torch.int64, device=DEVICE)
    return {
        "embedding_layernorm": dict(
            ids=index, positions=index, segments=index, word=rows, position=rows, segment=rows, weight=row, bias=row,
            eps=1e-5, p=0.1, **keys,
        ),
        "attention": dict(
            qkv=torch.randn(t, 3, 2, 4, device=DEVICE), max_seqlen=4, p=0.1, **keys,
            cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE),
            bias=torch.randn(24, device=DEVICE),
        ),
        "residual_layernorm": dict(x=rows, residual=rows, weight=row, ln_bias=row, bias=row, eps=1e-5, p=0.1, **keys),
        "bias_gelu": {"x": rows, "bias": row},
        "feed_forward": {"x": rows, "weight_in": rows, "bias": torch.randn(t, device=DEVICE), "weight_out": rows.T},
        "mlm_loss": {"hidden": rows, "word": rows, "bias": torch.randn(t, device=DEVICE), "labels": index},
    }[operator]  # fmt: skip


def call(operator, **changes):
    with dispatch.use_backend("reference"):
        return getattr(ops, operator)(**(good(operator) | changes))


OPERATORS = [name for name in dispatch.TABLE if name != "optimizer"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_good_arguments_are_good(operator):
    assert call(operator).isfinite().all()


def differentiable(operator):
    """``good(operator)`` with gradients, and those of its tensors that have them."""
    inputs = {
        name: t.clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
        for name, t in good(operator).items()
    }
    return inputs, [t for t in inputs.values() if torch.is_tensor(t) and t.requires_grad]


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_registered_derivative_is_that_of_the_shorter_way(operator, monkeypatch):
    """torch.compile and exports take the one, eager forwards the other."""
    inputs, wanted = differentiable(operator)

    def ways():
        out = call(operator, **inputs)
        return type(out.grad_fn).__name__, [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    name, shorter = ways()
    assert name == f"{operator}Backward"
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    name, registered = ways()
    assert name.startswith("GeneratedBackwardFor_bert_fast_")
    assert all(map(torch.equal, shorter, registered))


@pytest.mark.parametrize(
    ("operator", "backend"),
    [(operator, backend) for operator in OPERATORS for backend in available_backends(operator)],
)
def test_autocast_rounds_nothing_inside(operator, backend):
    """What an implementation widens to float32 stays so, in the backward too, with parameters in float32."""
    of_products = {"qkv", "x", "residual", "hidden", "weight_in", "weight_out"}
    given = {
        name: t.bfloat16().detach().requires_grad_() if name in of_products else t
        for name, t in differentiable(operator)[0].items()
    }
    wanted = [t for t in given.values() if torch.is_tensor(t) and t.requires_grad]

    def made(autocast: bool) -> list[torch.Tensor]:
        with dispatch.use_backend(**{operator: backend}), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = getattr(ops, operator)(**given)
            return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    assert all(map(torch.equal, made(True), made(False)))


@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms_of_torch_func_give_the_same_derivatives(operator):
    """All of one call, and of each of several weights at once; no gradient of a row of padding."""
    changes = {"padding_idx": 0} if operator == "embedding_layernorm" else {}
    inputs, wanted = differentiable(operator)
    names = [name for name, t in inputs.items() if any(t is w for w in wanted)]

    def loss(values):
        return getattr(ops, operator)(**{**inputs, **changes, **values}).square().sum()

    expected = dict(zip(names, torch.autograd.grad(loss({}), wanted), strict=True))
    given = {name: inputs[name].detach() for name in names}
    got = torch.func.grad(loss)(given)
    several = {name: torch.stack([torch.randn_like(t), t]) for name, t in given.items()}
    each = torch.func.vmap(torch.func.grad(loss))(several)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(each[name][1], expected[name], atol=1e-5, rtol=1e-4)
    assert any(t.any() for t in got.values())
    moved = {name: torch.randn_like(t) for name, t in given.items()}
    if changes:  # of which forward mode knows nothing, as in torch.nn.functional.embedding
        moved["word"][0] = 0
    _, along = torch.func.jvp(loss, (given,), (moved,))
    torch.testing.assert_close(along, sum((got[name] * moved[name]).sum() for name in names), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_there_is_no_second_derivative_and_it_is_said(operator):
    inputs, wanted = differentiable(operator)
    out = call(operator, **inputs)
    grads = torch.autograd.grad(out, wanted, torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{operator} has no second derivative"):
        sum(g.sum() for g in grads).backward()


LONG, INT = torch.int64, torch.int32
BAD = [
    ("embedding_layernorm", {"ids": torch.zeros(6, dtype=INT)}, TypeError, "ids has dtype torch.int32, expected int64"),
    ("embedding_layernorm", {"positions": torch.zeros(5, dtype=LONG)}, ValueError, r"positions has shape \(5,\)"),
    ("embedding_layernorm", {"ids": torch.zeros(2, 3, dtype=LONG)}, ValueError, r"ids has shape \(2, 3\)"),
    ("embedding_layernorm", {"segment": torch.randn(2, 7)}, ValueError, r"\(2, 7\), expected \('any', 8\)"),
    ("embedding_layernorm", {"word": torch.zeros(6, 8, dtype=LONG)}, TypeError, "word has dtype torch.int64"),
    ("embedding_layernorm", {"row_key": None}, ValueError, "dropout needs row_key"),
    ("attention", {"qkv": torch.randn(6, 2, 2, 4)}, ValueError, r"qkv has shape \(6, 2, 2, 4\), expected \('any', 3"),
    ("attention", {"qkv": torch.randn(6, 3, 1, 257)}, ValueError, "the head size is 257, supported are 1 to 256"),
    ("attention", {"cu_seqlens": torch.tensor([0, 6])}, TypeError, "cu_seqlens has dtype torch.int64, expected int32"),
    ("attention", {"cu_seqlens": torch.empty(0, dtype=INT)}, ValueError, "cu_seqlens is empty"),
    ("attention", {"bias": torch.randn(23)}, ValueError, r"bias has shape \(23,\), expected \(24,\)"),
    ("attention", {"bias": torch.randn(2, 3, 4)}, ValueError, r"bias has shape \(2, 3, 4\), expected \(3, 2, 4\)"),
    ("attention", {"bias": torch.zeros(24, dtype=INT)}, TypeError, "bias has dtype torch.int32, expected a floating"),
    ("attention", {"bias": torch.randn(24, device="meta")}, ValueError, "bias is on meta, the other"),
    ("residual_layernorm", {"residual": torch.randn(6, 7)}, ValueError, r"shape \(6, 7\), expected \(6, 8\)"),
    ("residual_layernorm", {"weight": torch.randn(9)}, ValueError, r"weight has shape \(9,\), expected \(8,\)"),
    ("residual_layernorm", {"p": 1.5}, ValueError, "p is 1.5, expected 0 <= p <= 1"),
    ("residual_layernorm", {"rng_key": None}, ValueError, "draw_dropout_key"),
    ("residual_layernorm", {"rng_key": torch.tensor([1.0])}, TypeError, "rng_key has dtype torch.float32"),
    ("residual_layernorm", {"row_key": torch.arange(5)}, ValueError, r"row_key has shape \(5,\), expected \(6,\)"),
    ("residual_layernorm", {"bias": torch.randn(8, device="meta")}, ValueError, "bias is on meta, the other"),
    ("bias_gelu", {"x": torch.randn(2, 3, 8)}, ValueError, r"x has shape \(2, 3, 8\)"),
    ("bias_gelu", {"x": torch.ones(6, 8, dtype=LONG)}, TypeError, "x has dtype torch.int64, expected a floating-point"),
    ("feed_forward", {"weight_in": torch.randn(6, 7)}, ValueError, r"weight_in has shape \(6, 7\), expected"),
    ("feed_forward", {"weight_out": torch.randn(8, 7)}, ValueError, r"weight_out has shape \(8, 7\), expected"),
    ("feed_forward", {"bias": torch.zeros(6, dtype=LONG)}, TypeError, "bias has dtype torch.int64, expected"),
    ("mlm_loss", {"labels": torch.zeros(6, dtype=INT)}, TypeError, "labels has dtype torch.int32, expected int64"),
    ("mlm_loss", {"chunk": 0}, ValueError, "chunk is 0, expected at least 1"),
    ("mlm_loss", {"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \(2,\), expected 1 element"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "changes", "error", "message"), BAD)
def test_bad_arguments(operator, changes, error, message):
    changes = {
        name: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
        for name, v in changes.items()
    }
    with pytest.raises(error, match=rf"bert_fast\.{operator}: .*{message}"):
        call(operator, **changes)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on CPU tensors")
@pytest.mark.parametrize(
    ("operator", "changes", "error", "message"),
    [
        ("attention", {"cu_seqlens": torch.tensor([1, 6], dtype=INT)}, ValueError, r"must start at 0.*it is \[1, 6\]"),
        ("attention", {"cu_seqlens": torch.tensor([0, 4, 2], dtype=INT)}, ValueError, "never fall"),
        ("attention", {"cu_seqlens": torch.tensor([0, 7], dtype=INT)}, ValueError, "before the 6 tokens"),
        ("attention", {"max_seqlen": 3}, ValueError, "max_seqlen is 3, but sequence 1 of cu_seqlens has 4 tokens"),
        ("mlm_loss", {"labels": torch.full((6,), 6)}, IndexError, r"labels\[0\] is 6, allowed is 0 .. 5 or -100"),
        ("mlm_loss", {"labels": torch.full((6,), -1)}, IndexError, r"labels\[0\] is -1.*6 of 6 are out of range"),
        ("embedding_layernorm", {"ids": torch.full((6,), 99)}, IndexError, r"ids\[0\] is 99, allowed is 0 .. 5"),
    ],
)
def test_bad_values(operator, changes, error, message):
    with pytest.raises(error, match=message):
        call(operator, **changes)


@pytest.mark.parametrize(
    "operator", ["embedding_layernorm", "attention", "residual_layernorm", "bias_gelu", "feed_forward"]
)
def test_double_backward_raises_clearly(operator):
    arguments = good(operator)
    x = arguments[{"embedding_layernorm": "word", "attention": "qkv"}.get(operator, "x")].requires_grad_()
    with dispatch.use_backend("reference"):
        out = getattr(ops, operator)(**arguments)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{operator} has no second derivative"):
            grad.sum().backward()


class Filled(TorchDispatchMode):
    """Which tensors are made full of zeros, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full"):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("operator", "name"), [("mlm_loss", "word"), ("residual_layernorm", "x"), ("attention", "qkv")]
)
def test_outputs_kept_for_the_backward_get_no_zero_gradients(operator, name):
    arguments = good(operator)
    x = arguments[name].detach().clone().requires_grad_()
    with dispatch.use_backend("reference"):
        out = getattr(ops, operator)(**(arguments | {name: x}))
        grad = torch.ones_like(out)
        with Filled() as filled:
            out.backward(grad)
    assert x.grad is not None
    assert filled.shapes == []


@pytest.mark.parametrize("operator", ["residual_layernorm", "bias_gelu", "embedding_layernorm"])
def test_compiles_without_a_graph_break(operator):
    arguments = good(operator)
    compiled = torch.compile(lambda **kw: getattr(ops, operator)(**kw) * 2, fullgraph=True, backend="aot_eager")
    with dispatch.use_backend("reference"):
        torch.testing.assert_close(compiled(**arguments), getattr(ops, operator)(**arguments) * 2, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------
# Peers: not installed here, so stand-ins that compute the same show that they are called as they want to be


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attn_is_not_installed():
    assert flash_attn.why_unavailable() == "the package flash-attn is not installed"
    with pytest.raises(dispatch.BackendUnavailable, match="flash-attn"):
        dispatch.set_backend(attention="flash_attn")


def test_flash_attn_says_why(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.3")
    assert "2.6.3 is installed" in flash_attn.why_unavailable()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3.post1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in flash_attn.why_unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flash_attn.why_unavailable() is None


def test_apex_says_why(monkeypatch, tmp_path):
    def install(*folders, extension=False):
        for folder in folders:
            (tmp_path / folder).mkdir()
        specs = {"apex": types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])}
        specs["fused_layer_norm_cuda"] = object() if extension else None
        monkeypatch.setattr(importlib.util, "find_spec", specs.get)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert apex.why_unavailable() == "the package apex is not installed"
    install()
    assert "unrelated project, not NVIDIA's" in apex.why_unavailable()
    install("normalization")
    assert "without its CUDA extensions" in apex.why_unavailable()
    install(extension=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in apex.why_unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert apex.why_unavailable() is None


@pytest.mark.parametrize(
    ("qkv", "p", "error", "message"),
    [
        (torch.zeros(4, 3, 1, 8, dtype=torch.float16), 0.1, NotImplementedError, "asked for dropout 0.1.*own mask"),
        (torch.zeros(4, 3, 1, 8), 0.0, TypeError, "float32; the flash_attn backend has float16 and bfloat16"),
        (torch.zeros(4, 3, 1, 12, dtype=torch.float16), 0.0, ValueError, "head size is 12.*multiples of 8"),
    ],
)
def test_flash_attn_refuses_what_it_cannot_do(qkv, p, error, message):
    none = torch.empty(0, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(error, match=message):
        flash_attn.attention_fwd(qkv, cu_seqlens, 4, none, none, 1.0, p, 0)
    with pytest.raises(error, match=message):
        flash_attn.attention_bwd(
            qkv[:, 0].flatten(1), qkv, qkv[:, 0], qkv[:, 0, 0], cu_seqlens, 4, none, none, 1.0, p, 0, None
        )


class StandInFlashAttention(types.ModuleType):
    """The two functions of flash_attn.flash_attn_interface (2.7) with their arguments' names and order."""

    def __init__(self):
        super().__init__("flash_attn.flash_attn_interface")
        self.calls = []

    def _flash_attn_varlen_forward(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        self.calls.append("forward")
        assert cu_seqlens_q is cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (5, 5, 0.0, False)
        assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
        qkv, none = torch.stack([q, k, v], dim=1), torch.empty(0, dtype=torch.int64)
        out, lse = reference.attention_fwd(qkv, cu_seqlens_q, max_seqlen_q, none, none, softmax_scale, 0.0, 0)
        out, lse = out.view(q.shape), lse.clone()
        out[int(cu_seqlens_q[-1]) :], lse[:, int(cu_seqlens_q[-1]) :] = float("nan"), float("nan")  # not written
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        self, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        self.calls.append("backward")
        assert deterministic
        assert dout.shape == out.shape == q.shape
        qkv, none = torch.stack([q, k, v], dim=1), torch.empty(0, dtype=torch.int64)
        grads, _ = reference.attention_bwd(
            dout.flatten(1), qkv, out.flatten(1), softmax_lse, cu_seqlens_q, max_seqlen_q, none, none, softmax_scale,
            0.0, 0,
        )  # fmt: skip
        end = int(cu_seqlens_q[-1])
        for grad, value in zip((dq, dk, dv), grads.unbind(1), strict=True):
            grad[:end] = value[:end]
        return torch.empty(0)


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch):
    stand_in = StandInFlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in)
    available(monkeypatch, "flash_attn")
    qkv = torch.randn(9, 3, 2, 8).to(torch.bfloat16).to(DEVICE)
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32, device=DEVICE)  # and a tail of two tokens
    grad_out = torch.randn(9, 16, device=DEVICE).to(torch.bfloat16)
    results = {}
    for backend in ("flash_attn", "reference"):
        leaf, bias = qkv.clone().requires_grad_(), torch.randn(48, device=DEVICE, requires_grad=True)
        with dispatch.use_backend(attention=backend):
            out = ops.attention(leaf, cu_seqlens, 5, bias=bias)
            results[backend] = [out.detach(), *torch.autograd.grad(out, (leaf, bias), grad_out)]
    assert stand_in.calls == ["forward", "backward"]
    *exact, (ours, expected) = zip(*results.values(), strict=True)
    for a, b in exact:
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-2)  # it sums what is rounded already
    assert not ours.view(3, 16)[1].any()


class StandInApex(types.ModuleType):
    """The two functions of fused_layer_norm_cuda, with their arguments in order."""

    def __init__(self):
        super().__init__("fused_layer_norm_cuda")
        self.calls = []

    def forward_affine(self, x, normalized_shape, weight, bias, eps):
        self.calls.append("forward")
        assert tuple(normalized_shape) == x.shape[1:]
        assert x.dtype == weight.dtype == bias.dtype
        none = torch.empty(0, dtype=torch.int64)
        out, _, mean, rstd = reference.residual_layernorm_fwd(x, None, None, weight, bias, none, none, eps, 0.0, 0)
        return out, mean, rstd

    def backward_affine(self, grad_out, mean, rstd, x, normalized_shape, weight, bias, eps, memory_efficient):
        self.calls.append("backward")
        assert not memory_efficient
        none = torch.empty(0, dtype=torch.int64)
        _, grad_x, _, grad_weight, grad_bias = reference.residual_layernorm_bwd(
            grad_out, x, mean, rstd, weight, none, none, 0.0, 0, x.dtype, False
        )
        return grad_x, grad_weight, grad_bias


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_apex_is_called_as_it_wants_to_be(monkeypatch, bias, p):
    stand_in = StandInApex()
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", stand_in)
    available(monkeypatch, "apex")
    inputs = [torch.randn(5, 16), torch.randn(5, 16), torch.randn(16), torch.randn(16), torch.randn(16)]
    inputs = [t.to(DEVICE) for t in inputs]
    keys = dropout_mask.row_keys(torch.tensor([0, 5], device=DEVICE), 5), torch.tensor([3], device=DEVICE)
    grad_out = torch.randn(5, 16, device=DEVICE)
    results = {}
    for backend in ("apex", "reference"):
        x, residual, weight, ln_bias, x_bias = leaves = [t.clone().requires_grad_() for t in inputs]
        with dispatch.use_backend(residual_layernorm=backend):
            out = ops.residual_layernorm(
                x, residual, weight, ln_bias, bias=x_bias if bias else None, eps=1e-5, p=p, row_key=keys[0],
                rng_key=keys[1],
            )  # fmt: skip
            grads = torch.autograd.grad(out, leaves if bias else leaves[:4], grad_out)
        results[backend] = [out.detach(), *grads]
    assert stand_in.calls == ["forward", "backward"]
    for ours, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, expected)
