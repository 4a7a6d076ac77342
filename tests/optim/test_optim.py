"""The optimisers: every backend against float64, PyTorch's AdamW, LAMB as its paper has it; what is never changed."""

import copy
import importlib
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_fast import dispatch, optim
from tests.support.parity import DEVICE, assert_near_truth, available_backends

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = available_backends("optimizer")
SHAPES = [(1,), (7,), (1023,), (2048,), (2049, 3), (64, 5), (0,)]
KINDS = {
    "adamw": lambda params, **options: optim.AdamW(params, lr=1e-2, **options),
    "adamw-uncorrected": lambda params, **options: optim.AdamW(params, lr=1e-2, bias_correction=False, **options),
    "lamb": lambda params, **options: optim.Lamb(params, lr=1e-2, **options),
    "lamb-nvidia": lambda params, **options: optim.Lamb(params, lr=1e-2, variant="nvidia", **options),
}


def parameters(dtype=torch.float32, shapes=SHAPES, seed=1):
    torch.manual_seed(seed)
    made = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes])
    with torch.no_grad():
        for p in made:
            p.data = p.data.to(dtype)
    return made


def gradients(params, step, scale=1.0):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, device=DEVICE)).to(p.dtype)


def build(kind, params, weight_decay=0.01, **options):
    return KINDS[kind](optim.parameter_groups(params, weight_decay), **options)


def train(backend, kind, params, steps=3, scale=1.0, **options):
    optimizer = build(kind, params, **options)
    with dispatch.use_backend(optimizer=backend):
        for step in range(steps):
            gradients(params, step, scale)
            optimizer.step()
    return optimizer


def bits(params, optimizer):
    found = [p.detach().clone() for p in params]
    for p in params:
        found += [value.clone() for value in optimizer.state[p].values()]
    return [*found, optimizer.skipped.clone()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [0.5, 3.0, math.inf, math.nan])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.98, 0.99999), None])
@pytest.mark.parametrize("there", [False, True], ids=["numbers", "on-device"])
def test_rates_and_the_clipping_factor(backend, norm, betas, there):
    counted = [0.0, 1.0, 9.0, 1000.0, 1e6] + [float(i) for i in range(600)]
    steps = torch.tensor(counted, device=DEVICE)
    skipped = torch.tensor(7, device=DEVICE)
    lr, decay = (torch.tensor(x, dtype=torch.float64, device=DEVICE) if there else x for x in (1.7e-4, 0.01))
    groups = [(1, lr, decay), (16, 2e-3, decay), (588, lr, 0.0)]
    with dispatch.use_backend(optimizer=backend):
        rates = dispatch.implementation("optimizer", "rates", DEVICE)
        found, clip = rates(steps, torch.tensor(norm, device=DEVICE), skipped, groups, betas, 1.0)
    finite = math.isfinite(norm)
    assert steps.tolist() == [t + finite for t in counted]
    assert int(skipped) == 7 + (not finite)
    expected = []
    for number, t in enumerate(counted):
        t = max(1.0, t + finite)
        corrections = [1 - beta**t if beta else 1.0 for beta in betas or (0.0, 0.0)]
        own = [2e-3 if 1 <= number < 17 else 1.7e-4, 0.01 if number < 17 else 0.0]
        expected.append([*own, 1 / corrections[0], corrections[1] ** -0.5])
    torch.testing.assert_close(found.double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
    assert math.isnan(float(clip)) if not finite else float(clip) == pytest.approx(min(1.0, 1 / norm), rel=1e-5)
    unclipped = rates(steps, torch.tensor(norm, device=DEVICE), None, groups, betas, None)[1]
    assert float(unclipped) == 1.0 or not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 2.0, "weight_decay": 0.1}], ids=["plain", "clipped"])
def test_against_float64(backend, kind, options):
    ours, plain, truth = parameters(), parameters(), parameters(torch.float64)
    with torch.no_grad():  # the same weights and gradients, in float64
        for p, q in zip(ours, truth, strict=True):
            q.copy_(p)
    states = [train(backend, kind, ours, **options), train("reference", kind, plain, **options)]
    states.append(build(kind, truth, **options))
    for step in range(3):
        gradients(plain, step)
        for p, q in zip(plain, truth, strict=True):
            q.grad = p.grad.double()
        states[2].step()

    def together(state, params, key):  # a parameter of one element may cancel to nothing: its error is seen beside all
        return torch.cat([(p.detach() if key is None else state.state[p][key]).flatten() for p in params])

    for key in (None, "exp_avg", "exp_avg_sq"):
        found = [together(*pair, key) for pair in zip(states, (ours, plain, truth), strict=True)]
        assert_near_truth(key or "weights", *found)
    assert all(int(states[0].state[p]["step"]) == 3 for p in ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_is_pytorchs(backend, clip):
    ours, theirs = parameters(), parameters()
    train(backend, "adamw", ours, steps=5, max_grad_norm=clip)
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in optim.parameter_groups(theirs)]
    reference = torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)
    for step in range(5):
        gradients(theirs, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb_is_algorithm_2(backend):
    """The paper's algorithm, written out for one matrix that decays and one vector that does not."""
    shapes = [(300, 7), (300,)]
    params = parameters(shapes=shapes)
    weights = [p.detach().double() for p in params]
    train(backend, "lamb", params, steps=4, weight_decay=0.05)
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    replay = parameters(shapes=shapes)
    for t in range(1, 5):
        gradients(replay, t - 1)
        for i, (w, (m, v), decay) in enumerate(zip(weights, moments, (0.05, 0.0), strict=True)):
            g = replay[i].grad.double()
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g**2
            moments[i] = (m, v)
            r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
            ratio = float(w.norm() / (r + decay * w).norm()) if decay else 1.0
            weights[i] = w - 1e-2 * ratio * (r + decay * w)
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb_ratio_is_one_where_a_norm_is_zero(backend):
    for w, g in ((0.0, 1.0), (1.0, 0.0)):
        p = torch.nn.Parameter(torch.full((3, 5), w, device=DEVICE))
        p.grad = torch.full_like(p, g)
        optimizer = optim.Lamb([p], lr=0.1, weight_decay=0.0, variant="nvidia")
        with dispatch.use_backend(optimizer=backend):
            optimizer.step()
        expected = w - (0.1 if g else 0.0)
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_sixteen_bits_have_masters(backend, dtype, kind):
    """20 small steps: their sum arrives in the weights though each is below the weights' resolution."""
    params = parameters(dtype, shapes=[(40, 30), (33,)])
    start = [p.detach().float() for p in params]
    optimizer = KINDS[kind](optim.parameter_groups(params))
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    exact = parameters(dtype, shapes=[(40, 30), (33,)])
    for p in exact:
        p.data = p.data.float()
    reference = KINDS[kind](optim.parameter_groups(exact))
    for group in reference.param_groups:
        group["lr"] = 1e-4
    with dispatch.use_backend(optimizer=backend):
        for _ in range(20):
            for p, q in zip(params, exact, strict=True):
                p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
            optimizer.step()
            reference.step()
    for p, q, before in zip(params, exact, start, strict=True):
        torch.testing.assert_close(optimizer.state[p]["master"], q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p.detach(), optimizer.state[p]["master"].to(dtype))
        assert float((before - optimizer.state[p]["master"]).abs().min()) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["adamw", "lamb", "lamb-nvidia"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_changes_nothing(backend, kind, bad):
    params = parameters()
    optimizer = train(backend, kind, params)
    before = bits(params, optimizer)
    gradients(params, 9)
    params[4].grad[-1, -1] = bad  # 1e30: its square is not a float32
    with dispatch.use_backend(optimizer=backend):
        optimizer.step()
    if bad == 1e30 and optimizer.grad_norm.isfinite():
        pytest.skip("this backend's norm of 1e30 is finite: summed in float64")
    after = bits(params, optimizer)
    assert int(after[-1]) == int(before[-1]) + 1
    for a, b in zip(before[:-1], after[:-1], strict=True):
        assert torch.equal(a, b)
    gradients(params, 10)
    with dispatch.use_backend(optimizer=backend):
        optimizer.step()
    assert int(optimizer.skipped) == 1
    assert int(optimizer.state[params[0]]["step"]) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_may_be_skipped(backend):
    params = parameters()
    optimizer = KINDS["lamb"](optim.parameter_groups(params))
    gradients(params, 0)
    params[0].grad.fill_(math.nan)
    with dispatch.use_backend(optimizer=backend):
        optimizer.step()
    fresh = parameters()
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))
    assert int(optimizer.state[params[0]]["step"]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend):
    params = parameters()
    gradients(params, 0)
    params[1].grad = None
    params[3].grad = params[3].grad.bfloat16().float()
    with dispatch.use_backend(optimizer=backend):
        ours = optim.grad_norm(params)
    true = sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5
    assert float(ours) == pytest.approx(true, rel=1e-6)
    assert ours.dtype == torch.float32
    assert float(optim.grad_norm([params[1]])) == 0.0


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or DEVICE == "cuda"])
def test_norm_of_many_numbers(backend):
    """float64's to roundings of float32, of a gradient as large as the table of BERT's words. PyTorch's own norm, which
    sums float32's squares in float32, is a thousandth short there on a CPU: it is no measure of ours."""
    table = torch.nn.Parameter(torch.empty(30522, 768, device=DEVICE))
    table.grad = torch.randn_like(table) * torch.randn(30522, 1, device=DEVICE).exp()
    with dispatch.use_backend(optimizer=backend):
        ours = float(optim.grad_norm([table]))
    true = float(table.grad.double().square().sum().sqrt())
    assert ours == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_norm_decides(backend):
    a, b = parameters(), parameters()
    first, second = (KINDS["adamw"](optim.parameter_groups(p), max_grad_norm=1.0) for p in (a, b))
    with dispatch.use_backend(optimizer=backend):
        gradients(a, 0)
        first.step(grad_norm=torch.tensor(100.0, device=DEVICE))
        gradients(b, 0, scale=1.0)
        for p in b:
            p.grad *= 1.0 / (100.0 + 1e-6)
        second.step(grad_norm=torch.tensor(0.5, device=DEVICE))
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        before = [p.detach().clone() for p in a]
        first.step(grad_norm=torch.tensor(math.inf, device=DEVICE))
    assert all(torch.equal(p, q) for p, q in zip(before, a, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_comes_back_bit_for_bit(backend, kind):
    whole = parameters(torch.bfloat16)
    optimizer = train(backend, kind, whole, steps=2)
    resumed = parameters(torch.bfloat16, seed=7)
    with torch.no_grad():
        for p, q in zip(resumed, whole, strict=True):
            p.copy_(q)
    other = KINDS[kind](optim.parameter_groups(resumed))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with dispatch.use_backend(optimizer=backend):
        for step in (2, 3):
            gradients(whole, step)
            gradients(resumed, step)
            optimizer.step()
            other.step()
    for a, b in zip(bits(whole, optimizer), bits(resumed, other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_lie_in_a_bucket(backend, kind, dtype, monkeypatch):
    """As DistributedDataParallel lays them: one behind another, so at any address. The bits are the same, and weights
    and moments are still accessed by 16 bytes."""
    plain, bucketed = parameters(dtype), parameters(dtype)
    expected = bits(plain, train(backend, kind, plain))
    bucket, seen = torch.empty(1 + sum(p.numel() for p in bucketed), dtype=dtype, device=DEVICE), []
    if backend == "triton":
        kernels = importlib.import_module("bert_fast.kernels.optimizer")

        class Work(kernels._Work):
            def __init__(self, lists):
                super().__init__(lists)
                seen.append((len(lists), self.arguments["ALIGNED"]))

        monkeypatch.setattr(kernels, "_Work", Work)
    optimizer = build(kind, bucketed)
    with dispatch.use_backend(optimizer=backend):
        for step in range(3):
            gradients(bucketed, step)
            places = bucket[1:].split([p.numel() for p in bucketed])
            for p, place in zip(bucketed, places, strict=True):
                p.grad = place.view(p.shape).copy_(p.grad)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(expected, bits(bucketed, optimizer), strict=True))
    for kinds, aligned in seen:
        assert aligned == ((False,) if kinds == 1 else (True, True, False, True, True))


@pytest.mark.skipif(DEVICE == "cuda", reason="threads of a CPU")
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_same_bits_at_any_number_of_threads(kind):
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ operators are not built")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = parameters(shapes=[(300, 500), (70000,)])
            found.append(bits(params, train("cpu", kind, params)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradient_wait(backend):
    params = parameters(shapes=[(5, 5), (6, 6)])
    optimizer = KINDS["adamw"](list(params))
    with dispatch.use_backend(optimizer=backend):
        gradients(params, 0)
        params[1].grad = None
        optimizer.step()
        kept = params[1].detach().clone()
        assert torch.equal(kept, parameters(shapes=[(5, 5), (6, 6)])[1])
        gradients(params, 1)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_learning_rate_as_a_tensor_and_a_closure(backend):
    a, b = parameters(), parameters()
    first, second = KINDS["lamb"](list(a)), KINDS["lamb"](list(b))
    first.param_groups[0]["lr"] = torch.tensor(3e-3, device=DEVICE)
    second.param_groups[0]["lr"] = 3e-3
    with dispatch.use_backend(optimizer=backend):
        assert first.step(lambda: gradients(a, 0) or 5.0) == 5.0
        gradients(b, 0)
        assert second.step() is None
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_groups_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    model[0].bias.requires_grad_(False)
    decayed, plain = optim.parameter_groups(model, weight_decay=0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in plain["params"]} == {id(model[1].weight), id(model[1].bias)}
    assert len(optim.parameter_groups(torch.nn.LayerNorm(3))) == 1


def test_a_group_may_come_later():
    params = parameters(shapes=[(4, 4), (3, 3)])
    optimizer = KINDS["adamw"]([params[0]])
    gradients(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [params[1]], "lr": 0.5})
    gradients(params, 1)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb_without_eps_at_sizes_that_fill_no_vector(backend):
    """What a backend reads past the end of a parameter is 0 / 0 there, and must not reach the norms."""
    shapes = [(3, 7), (2049, 3)]
    ours, plain = parameters(shapes=shapes), parameters(shapes=shapes)
    train(backend, "lamb", ours, steps=1, eps=0.0)
    train("reference", "lamb", plain, steps=1, eps=0.0)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def split(params, options, kind="lamb", **shared) -> list[torch.optim.Optimizer]:
    """One optimiser of all groups, parameter i in group i modulo their number; then one for each group alone."""
    groups = [{"params": list(params)[i :: len(options)], **given} for i, given in enumerate(options)]
    twins = [{**group, "params": [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in groups]
    return [KINDS[kind](groups, **shared), *(KINDS[kind]([twin], **shared) for twin in twins)]


def step_together(together, alone, step, norm=3.0, without=None):
    """A step of all, with the same gradients and the same norm; group i of ``together`` is that of ``alone[i]``."""
    gradients([p for group in together.param_groups for p in group["params"]], step)
    if without is not None:
        without.grad = None
    given = torch.tensor(norm, device=DEVICE)
    together.step(grad_norm=given)
    for group, other in zip(together.param_groups, alone, strict=True):
        for p, q in zip(group["params"], other.param_groups[0]["params"], strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        other.step(grad_norm=given)


def assert_same_bits(together, alone):
    for group, other in zip(together.param_groups, alone, strict=True):
        for p, q in zip(group["params"], other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
            assert together.state[p].keys() == other.state[q].keys()
            for key, value in together.state[p].items():
                assert value.dtype == other.state[q][key].dtype
                assert torch.equal(value, other.state[q][key])


def rate(value):
    """A learning rate or weight decay on the device, as a recorded step has it."""
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


TOGETHER = {
    "decay": lambda: [{"weight_decay": 0.1}, {"weight_decay": 0.0}],
    "betas": lambda: [{"betas": (0.9, 0.999)}, {"betas": (0.8, 0.99)}, {"betas": (0.9, 0.999), "weight_decay": 0.0}],
    "eps": lambda: [{"eps": 1e-6}, {"eps": 1e-3}],
    "lr on the device": lambda: [{"lr": rate(3e-3)}, {"lr": 1e-2, "weight_decay": 0.0}],
    "all on the device": lambda: [{"lr": rate(3e-3), "weight_decay": rate(0.1)}, {"lr": rate(0.1)}],
    "many": lambda: [{"lr": 1e-3 * (1 + i), "weight_decay": 0.01 * (i % 3)} for i in range(40)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "dtype"), [("adamw", torch.float32), ("lamb", torch.bfloat16)])
@pytest.mark.parametrize("groups", TOGETHER)
def test_groups_have_the_bits_of_each_alone(backend, kind, groups, dtype):
    options = TOGETHER[groups]()
    shapes = SHAPES + [(3 + i, 5) for i in range(len(options) - len(SHAPES))]
    together, *alone = split(parameters(dtype, shapes=shapes), options, kind, max_grad_norm=1.0)
    with dispatch.use_backend(optimizer=backend):
        for step, norm in enumerate((3.0, math.nan, 0.5)):
            step_together(together, alone, step, norm)
            assert int(together.skipped) == int(alone[0].skipped) == (step > 0)
            assert_same_bits(together, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_counts_of_groups_that_go_together(backend):
    """Each parameter's own, whatever goes together: without a gradient, with other betas, loaded, copied, added."""
    params = parameters(shapes=[(4, 4), (5,), (3, 3), (6,)])
    together, *alone = split(params, [{"weight_decay": 0.1}, {"weight_decay": 0.0}])
    with dispatch.use_backend(optimizer=backend):
        step_together(together, alone, 0)
        counts = {together.state[p]["step"]._base for p in params}
        assert [base.tolist() for base in counts] == [[1.0] * 4]
        for step in (1, 2):
            step_together(together, alone, step, without=params[step])
            assert_same_bits(together, alone)
        for step, betas in ((3, [0.7, 0.9]), (4, (0.9, 0.999))):
            for optimizer in (together, alone[1]):
                optimizer.param_groups[-1]["betas"] = betas
            step_together(together, alone, step)
            assert_same_bits(together, alone)
        for optimizer in (together, *alone):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step_together(together, alone, 5)
        together, alone = pickle.loads(pickle.dumps(together)), copy.deepcopy(alone)
        step_together(together, alone, 6)
        (late,), (twin,) = parameters(shapes=[(2, 9)]), parameters(shapes=[(2, 9)])
        together.add_param_group({"params": [late]})
        alone.append(KINDS["lamb"]([twin]))
        step_together(together, alone, 7)
        assert_same_bits(together, alone)
    groups = [group["params"] for group in together.param_groups]
    assert [[int(together.state[p]["step"]) for p in params] for params in groups] == [[8, 7], [7, 8], [1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_beside_others(backend):
    """The reference takes a group with float64 in it; the others are the backend's."""
    params = parameters(shapes=[(4, 5), (6,), (7, 3), (3, 3)])
    for p in (params[0], params[3]):  # a group of it, and one in which it is a part
        p.data = p.data.double()
    together, *alone = split(params, [{}, {"weight_decay": 0.0}, {"lr": 1e-3}])
    with dispatch.use_backend(optimizer=backend):
        for step in range(2):
            step_together(together, alone, step)
    assert_same_bits(together, alone)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's launches")
@pytest.mark.parametrize("given", [False, True], ids=["own norm", "given norm"])
def test_launches(given, monkeypatch):
    """One a pass for all groups of the same betas and eps, and of each dtype that parameters have."""
    from bert_fast.kernels import optimizer as kernels

    launches = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launches.append(self.name.removeprefix("_optimizer_").removesuffix("_kernel"))
            return self.kernel[grid]

    for name in [name for name in vars(kernels) if name.startswith("_optimizer_") and name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Counted(name))

    def launched(optimizer) -> list[str]:
        launches.clear()
        optimizer.step(grad_norm=torch.tensor(1.0, device=DEVICE) if given else None)
        norms = launches.count("norm")
        assert norms == (0 if given else len({p.dtype for g in optimizer.param_groups for p in g["params"]}))
        return launches[norms:]

    adamw, lamb = ["adamw"], ["lamb_moments", "lamb_ratio", "lamb_apply"]
    params = parameters()
    gradients(params, 0)
    with dispatch.use_backend(optimizer="triton"):
        for kind, passes in (("adamw", adamw), ("lamb", lamb)):
            optimizer = build(kind, params)
            assert len(optimizer.param_groups) == 2
            assert launched(optimizer) == ["rates", *passes]
            optimizer.param_groups[1]["lr"] = rate(1e-3)
            assert launched(optimizer) == ["rates", *passes]
            optimizer.param_groups[1]["betas"] = (0.8, 0.9)
            assert launched(optimizer) == 2 * ["rates", *passes]
            optimizer.add_param_group({"params": [params[0].detach().clone().requires_grad_()], "betas": (0.8, 0.9)})
            optimizer.param_groups[2]["params"][0].grad = params[0].grad
            assert launched(optimizer) == 2 * ["rates", *passes]
            many = parameters(shapes=[(3,)] * 40)
            gradients(many, 0)
            optimizer = KINDS[kind]([{"params": [p]} for p in many])
            assert launched(optimizer) == ["rates", "rates", *passes]
        params[2].data = params[2].data.bfloat16()
        gradients(params, 1)
        assert launched(build("lamb", params)) == ["rates", *lamb, *lamb]


def test_a_group_may_be_empty():
    optimizer = KINDS["lamb"]([{"params": []}])
    optimizer.step()
    assert int(optimizer.skipped) == 0


BAD = [
    ({"lr": -1.0}, "lr is -1.0"),
    ({"betas": (0.9, 1.0)}, "betas are"),
    ({"eps": -1e-8}, "eps is"),
    ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("kind", [optim.AdamW, optim.Lamb])
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([torch.nn.Parameter(torch.ones(2))], **options)


def test_unknown_variant():
    with pytest.raises(ValueError, match="variant is 'nv'"):
        optim.Lamb([torch.nn.Parameter(torch.ones(2))], variant="nv")


def test_what_cannot_be_updated_is_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True).to(DEVICE)
    embedding(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        KINDS["adamw"](embedding.parameters()).step()
    turned = torch.nn.Parameter(torch.randn(3, 4, device=DEVICE).T)
    turned.grad = torch.ones_like(turned)
    before = turned.detach().clone()
    with pytest.raises(ValueError, match="not contiguous"):
        KINDS["adamw"]([turned]).step()
    assert torch.equal(turned, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_step_changes_nothing(backend):
    """Whatever is wrong is found before the first parameter is touched."""
    good = torch.nn.Parameter(torch.randn(3, 3, device=DEVICE))
    turned = torch.nn.Parameter(torch.randn(3, 4, device=DEVICE).T)
    optimizer = KINDS["lamb"]([{"params": [good]}, {"params": [turned]}])
    before = good.detach().clone()
    for p in (good, turned):
        p.grad = torch.ones_like(p)
    with dispatch.use_backend(optimizer=backend), pytest.raises(ValueError, match="not contiguous"):
        optimizer.step(grad_norm=torch.tensor(math.inf, device=DEVICE))
    assert torch.equal(good, before)
    assert int(optimizer.skipped) == 0
    optimizer = KINDS["adamw"]([good])
    optimizer.step()
    before = good.detach().clone()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(2, 2)
    optimizer.load_state_dict(saved)
    with dispatch.use_backend(optimizer=backend), pytest.raises(ValueError, match=r"exp_avg of shape \(2, 2\)"):
        optimizer.step()
    assert torch.equal(good, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loaded_weights_reach_the_masters(backend):
    """Weights written by others are trained on; where they are the master's rounding it keeps its low bits."""
    params = parameters(torch.bfloat16, shapes=[(40, 30)])
    optimizer = train(backend, "adamw", params)
    state, p = optimizer.state[params[0]], params[0]
    before = state["master"].clone()
    with torch.no_grad():
        p.copy_(p.clone())
        p[3] = 5.0
    gradients(params, 4, scale=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with dispatch.use_backend(optimizer=backend):
        optimizer.step()
    before[3] = 5.0
    assert torch.equal(state["master"], before)
    assert torch.equal(p, before.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_may_be_converted_between_steps(backend):
    params = parameters(shapes=[(40, 30), (7,)])
    optimizer = train(backend, "adamw", params)
    exact = [p.detach().clone() for p in params]
    for dtype in (torch.bfloat16, torch.float32):
        params.to(dtype)
        gradients(params, 5)
        with dispatch.use_backend(optimizer=backend):
            optimizer.step()
        for p, before in zip(params, exact, strict=True):
            state = optimizer.state[p]
            assert ("master" in state) == (dtype == torch.bfloat16)
            assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
            torch.testing.assert_close(p.float(), before, rtol=1e-2, atol=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_updated_weights_are_refused(backend):
    p = torch.nn.Parameter(torch.randn(4, device=DEVICE))
    p.grad = torch.ones_like(p)
    loss = (p * p * p).sum()
    with dispatch.use_backend(optimizer=backend):
        optim.AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_goes_on_alone():
    params = parameters(torch.bfloat16, shapes=[(4, 4), (5,)])
    optimizer = KINDS["lamb-nvidia"](list(params), max_grad_norm=0.5)
    gradients(params, 0)
    optimizer.step()
    twin, kept = copy.deepcopy(optimizer), bits(params, optimizer)
    copies = twin.param_groups[0]["params"]
    gradients(copies, 1)
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, bits(params, optimizer), strict=True))
    gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(params, optimizer), bits(copies, twin), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_every_instruction_set(kind):
    """The C++ optimisers as this CPU's plainer instruction sets run them."""
    cpu = pytest.importorskip("bert_fast.kernels.cpu")
    if "cpu" not in BACKENDS:
        pytest.skip("the C++ operators are not built")
    code = (
        "from tests.optim import test_optim as t\n"
        f"t.test_against_float64('cpu', {kind!r}, {{'max_grad_norm': 2.0}})\n"
        f"t.test_sixteen_bits_have_masters('cpu', t.torch.bfloat16, {kind!r})\n"
        f"t.test_sixteen_bits_have_masters('cpu', t.torch.float16, {kind!r})\n"
    )
    for name in set(cpu.supported_instruction_sets()) - {cpu.instruction_set()}:
        environment = {**os.environ, "BERT_FAST_CPU_ISA": name}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{name}: {done.stderr}"
