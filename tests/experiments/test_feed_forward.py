"""feed_forward: bias and GELU in the epilogues of their products, against float64 and beside two operators."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bert_fast
from bert_fast import dispatch, ops, reference
from bert_fast.model import layers
from tests.support.operators import BF16, FULL, HALF, assert_same_bits, compare, differentiate
from tests.support.parity import DEVICE, assert_near_truth, available_backends

pytest.importorskip("triton")
if DEVICE == "cuda" and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
    pytest.skip("the kernels are for compute capability 9.0 and 10.0", allow_module_level=True)
if "triton" not in available_backends("feed_forward"):
    pytest.skip("needs Triton", allow_module_level=True)

from bert_fast.kernels import bias_gelu
from bert_fast.kernels.experiments import feed_forward

EVERYWHERE = {"fwd": {90: 1, 100: 1}, "bwd": {90: 1, 100: 1}}


def operands(tokens, hidden, columns, dtype, bias=FULL):
    """x, weight_in, bias (in ``bias``, or None), weight_out and grad_out."""

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape)).to(dtype).to(DEVICE)

    x, grad_out = draw(tokens, hidden), draw(tokens, hidden)
    weight_in, weight_out = draw(columns, hidden, scale=hidden**-0.5), draw(hidden, columns, scale=columns**-0.5)
    return x, weight_in, None if bias is None else torch.randn(columns).to(bias).to(DEVICE), weight_out, grad_out


@pytest.fixture
def in_epilogue(monkeypatch):
    """The operator computes in the epilogues here, on any device; gives what was called of the kernels."""
    called = []

    def spied(name):
        function = getattr(feed_forward, name)
        monkeypatch.setattr(feed_forward, name, lambda *a: called.append(name) or function(*a))

    spied("product_gelu")
    spied("product_gelu_bwd")
    monkeypatch.setattr(dispatch, "in_epilogue", lambda direction, x: True)
    with dispatch.use_backend(feed_forward="triton"):
        yield called


def plain(x, weight_in, bias, weight_out):
    z = F.linear(x, weight_in)
    return F.linear(F.gelu(z if bias is None else z + bias.to(x.dtype)), weight_out)


def named(x, weight_in, bias, weight_out, grad_out):
    """The inputs by name, and grad_out."""
    return {"x": x, "weight_in": weight_in, "bias": bias, "weight_out": weight_out}, grad_out


def check(tokens, hidden, columns, dtype, bias=FULL):
    inputs = named(*operands(tokens, hidden, columns, dtype, bias))
    compare("feed_forward", "triton", ops.feed_forward, plain, plain, *inputs)


SHAPES = [(1, 64, 128), (7, 40, 136), (129, 72, 264), (1000, 64, 128)]


@pytest.mark.parametrize(("tokens", "hidden", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, HALF, FULL], ids=str)
def test_shapes(in_epilogue, tokens, hidden, columns, dtype):
    check(tokens, hidden, columns, dtype)
    assert in_epilogue == ["product_gelu", "product_gelu_bwd"]


@pytest.mark.parametrize("bias", [None, BF16], ids=str)
def test_biases(in_epilogue, bias):
    check(130, 80, 144, BF16, bias)
    assert in_epilogue == ["product_gelu", "product_gelu_bwd"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FULL], ids=str)
def test_a_layer_of_bert(in_epilogue, dtype):
    check(300, 768, 3072, dtype)


@pytest.mark.parametrize("dtype", [BF16, HALF, FULL], ids=str)
def test_rounds_where_a_product_and_bias_gelu_do(dtype):
    """GELU and its derivative are of z as it is stored; the gradient of the activation alone is not rounded before."""
    x, weight_in, bias, weight_out, grad_out = operands(150, 72, 200, dtype)
    z, activated = feed_forward.product_gelu(x, weight_in, bias)
    assert torch.equal(activated, bias_gelu.bias_gelu_fwd(z, bias))
    truth = x.double() @ weight_in.double().T
    assert_near_truth("z", z, F.linear(x, weight_in), truth)

    grad_z, grad_bias = feed_forward.product_gelu_bwd(grad_out, weight_out, z, bias)
    exact = reference.bias_gelu_bwd(grad_out.double() @ weight_out.double(), z.double(), bias.double())
    separate = bias_gelu.bias_gelu_bwd(grad_out @ weight_out, z, bias)
    assert_near_truth("d z", grad_z, separate[0], exact[0], factor=1.0)
    assert_near_truth("d bias", grad_bias, separate[1], exact[1])


@pytest.mark.parametrize(("tokens", "dtype"), [(1200, BF16), (200, FULL)])
def test_same_bits_whoever_computes_a_tile(monkeypatch, tokens, dtype):
    """By some programs, by one, by as many as there are tiles: the order of the sums is that of the rows."""
    x, weight_in, bias, weight_out, grad_out = operands(tokens, 40, 200, dtype)

    def results():
        z, activated = feed_forward.product_gelu(x, weight_in, bias)
        return z, activated, *feed_forward.product_gelu_bwd(grad_out, weight_out, z, bias)

    found = [results()]
    for programs in (1, 10**6):
        monkeypatch.setattr(feed_forward, "_programs", lambda device, tiles, each, most=programs: min(tiles, most))
        found.append(results())
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_same_bits_twice(in_epilogue):
    inputs = named(*operands(130, 40, 200, BF16))
    first, second = (differentiate(ops.feed_forward, *inputs) for _ in range(2))
    assert_same_bits(first, second)


def test_nothing_but_its_own_rows(in_epilogue):
    """A row that is NaN leaves the others as they were: rows past the end of a tile's are no one's."""
    x, weight_in, bias, weight_out, _ = operands(130, 64, 128, BF16)
    before = ops.feed_forward(x, weight_in, bias, weight_out)
    x[129] = float("nan")
    after = ops.feed_forward(x, weight_in, bias, weight_out)
    assert torch.equal(before[:129], after[:129])
    assert after[129].isnan().all()


def test_far_out(in_epilogue):
    """Where GELU is 0 or u and its derivative 0 or 1."""
    x = torch.tensor([[300.0], [-300.0]], device=DEVICE).expand(2, 8).contiguous().requires_grad_()
    one = torch.eye(8, device=DEVICE)
    out = ops.feed_forward(x, one, None, one)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.tolist() == [[300.0] * 8, [0.0] * 8]
    assert grad.tolist() == [[1.0] * 8, [0.0] * 8]


@pytest.mark.parametrize(
    ("tokens", "hidden", "columns", "dtype"),
    [(5, 12, 16, BF16), (5, 16, 12, BF16), (5, 6, 8, FULL), (0, 16, 16, BF16), (5, 16, 16, torch.float64)],
)
def test_what_the_kernels_have_not_is_two_operators(in_epilogue, tokens, hidden, columns, dtype):
    *inputs, grad_out = operands(tokens, hidden, columns, dtype)
    if dtype == torch.float64:
        with pytest.raises(TypeError, match=r"bias_gelu: x has dtype torch.float64.*reference"):
            ops.feed_forward(*inputs)
    else:
        check(tokens, hidden, columns, dtype)
    assert in_epilogue == []
    x, weight_in, bias, weight_out = inputs
    with pytest.raises(ValueError, match="feed_forward: the kernels have contiguous matrices"):
        feed_forward.product_gelu(x, weight_in, bias)
    with pytest.raises(ValueError, match="feed_forward: the kernels have contiguous matrices"):
        feed_forward.product_gelu_bwd(grad_out, weight_out, x @ weight_in.T, bias)


def test_addresses_and_strides_that_a_descriptor_has_not():
    aligned = torch.zeros(8, 8, dtype=BF16)
    assert feed_forward.takes(8, aligned, aligned)
    assert not feed_forward.takes(8, aligned, torch.zeros(65, dtype=BF16)[1:].view(8, 8))
    assert not feed_forward.takes(8, aligned.T, aligned)
    assert not feed_forward.takes(8, aligned, aligned.half())
    assert not feed_forward.takes(4, aligned, aligned)


@pytest.mark.parametrize("backend", available_backends("feed_forward"))
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(backend, bias):
    x, weight_in, b, weight_out, grad_out = operands(5, 8, 16, FULL, FULL if bias else None)
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight_in, b, weight_out)]
    with dispatch.use_backend(feed_forward=backend):
        torch.library.opcheck(torch.ops.bert_fast.feed_forward_fwd, (*leaves, True))
        fixed = [None if t is None else t.detach() for t in leaves]
        _, z, activated = torch.ops.bert_fast.feed_forward_fwd(*fixed, True)
        for wanted in ([True, True, True], [False, True, False]):
            torch.library.opcheck(
                torch.ops.bert_fast.feed_forward_bwd, (grad_out, *fixed, z, activated, wanted, True)
            )  # fmt: skip


def test_a_weight_that_is_fixed_has_no_gradient(in_epilogue):
    x, weight_in, bias, weight_out, grad_out = operands(5, 16, 16, BF16)
    out = ops.feed_forward(x, weight_in.requires_grad_(), bias.requires_grad_(), weight_out)
    out.backward(grad_out)
    expected = differentiate(ops.feed_forward, *named(x, weight_in, bias, weight_out, grad_out))
    assert torch.equal(weight_in.grad, expected["d weight_in"])
    assert torch.equal(bias.grad, expected["d bias"])
    assert x.grad is None
    assert weight_out.grad is None


# --------------------------------------------------------------------------------------------------------------
# Where it is used


def test_nowhere_until_a_constant_says_so(monkeypatch):
    assert dispatch.FEED_FORWARD_EPILOGUE == {}
    gpu = SimpleNamespace(device=torch.device("cuda"), shape=(4096, 8), dtype=BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not ops.fuses_feed_forward(gpu)
    monkeypatch.setattr(dispatch, "FEED_FORWARD_EPILOGUE", {"bwd": {90: 4096}})
    assert ops.fuses_feed_forward(gpu)
    assert [dispatch.in_epilogue(direction, gpu) for direction in ("fwd", "bwd")] == [False, True]
    for other in ({"shape": (4095, 8)}, {"dtype": FULL}, {"device": torch.device("cpu")}):
        assert not ops.fuses_feed_forward(SimpleNamespace(**(vars(gpu) | other)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not ops.fuses_feed_forward(gpu)


def small_model(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = bert_fast.BertConfig(vocab_size=60, max_position_embeddings=32, **(sizes | changes))
    return bert_fast.BertForPreTraining(config).to(DEVICE)


def step(model, dtype, autocast):
    """The loss and every gradient of one batch, from the same masks of dropout each time."""
    torch.manual_seed(5)
    model.zero_grad()
    ids = torch.randint(60, (3, 20), device=DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        loss = model(ids, labels=ids, next_sentence_label=torch.zeros(3, dtype=torch.int64, device=DEVICE)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_computes_the_same_either_way(in_epilogue, monkeypatch, autocast):
    model = small_model()
    model = model if autocast else model.to(BF16)
    loss, grads = step(model, BF16, autocast)
    assert in_epilogue == []
    monkeypatch.setattr(dispatch, "FEED_FORWARD_EPILOGUE", EVERYWHERE)
    fused_loss, fused_grads = step(model, BF16, autocast)
    assert in_epilogue == ["product_gelu"] * 2 + ["product_gelu_bwd"] * 2

    exact = copy.deepcopy(model).double()
    monkeypatch.setattr(dispatch, "FEED_FORWARD_EPILOGUE", {})
    with dispatch.use_backend("reference"):
        true_loss, truth = step(exact, BF16, False)
    assert abs(fused_loss - true_loss) <= 1.5 * abs(loss - true_loss) + 0.01 * true_loss
    for name, grad in fused_grads.items():
        norm, scale = torch.linalg.vector_norm, torch.linalg.vector_norm(truth[name])
        assert grad.dtype == grads[name].dtype
        error, separate = norm(grad.double() - truth[name]), norm(grads[name].double() - truth[name])
        assert float(error) <= 1.5 * float(separate) + 0.004 * float(scale), name


@pytest.mark.parametrize("who", ["hook on the intermediate", "hook on a dense", "another activation", "float32"])
def test_who_looks_on_or_differs_keeps_two_operators(in_epilogue, monkeypatch, who):
    monkeypatch.setattr(dispatch, "FEED_FORWARD_EPILOGUE", EVERYWHERE)
    model = small_model(hidden_act="gelu_new" if who == "another activation" else "gelu")
    seen = []
    for layer in model.bert.encoder.layer:
        watched = {"hook on the intermediate": layer.intermediate, "hook on a dense": layer.output.dense}.get(who)
        if watched is not None:
            watched.register_forward_hook(lambda *_: seen.append(1))
    step(model.to(FULL if who == "float32" else BF16), BF16, False)
    assert in_epilogue == []
    assert len(seen) == (2 if who.startswith("hook") else 0)


def test_a_fused_feed_forward_is_made_of_our_own_modules():
    layer = small_model().bert.encoder.layer[0]
    assert layers.fusable_feed_forward(layer.intermediate, layer.output)
    layer.output.dense.register_forward_pre_hook(lambda *_: None)
    assert not layers.fusable_feed_forward(layer.intermediate, layer.output)
