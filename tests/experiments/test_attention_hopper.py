"""Attention in Gluon, forward and backward: on a GPU of compute capability 9.0 as it is, elsewhere emulated.

The emulation (tests/support/gluon_emulation.py) finds races. That it does is tested by taking barriers, fences and
waits away.
"""

import importlib
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.operators import BF16, HALF, differentiate
from tests.support.packed_attention import SITE, assert_gradient_near_truth, packed, plain
from tests.support.parity import DEVICE, assert_near_truth

pytest.importorskip("triton")

from benchmarks import operators
from benchmarks.workload import MODELS
from bert_fast import choice, dispatch, dropout_mask, reference
from bert_fast.kernels import attention as portable
from tests.support import gluon_emulation as emulation

EXPERIMENTS = "bert_fast.kernels.experiments"
ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
if DEVICE == "cuda" and not ON_HOPPER:
    pytest.skip("the kernel is for compute capability 9.0", allow_module_level=True)


@pytest.fixture(scope="module")
def hopper():
    if ON_HOPPER:
        from bert_fast.kernels.experiments import attention_hopper

        return attention_hopper
    return emulation.load_module("attention_hopper")


def operands(lengths, heads, dtype, p, tail=0, scale=1.0):
    """(grad_out, qkv, out, lse) and the other arguments; out and lse are the float64 reference's, rounded."""
    qkv, cu_seqlens, row_key, rng_key, longest = packed(lengths, heads, 64, dtype, tail, scale)
    arguments = (cu_seqlens, longest, row_key, rng_key, 0.125, p, SITE)
    out, lse = reference.attention_fwd(qkv.double(), *arguments)
    grad_out = torch.randn(qkv.shape[0], heads * 64, device=DEVICE).to(dtype)
    return (grad_out, qkv, out.to(dtype), lse.float()), arguments


def compare(hopper, lengths, heads, dtype, p, tail=0):
    tensors, arguments = operands(lengths, heads, dtype, p, tail)
    grad_out, qkv, *_ = tensors
    cu_seqlens, _, row_key, rng_key, *_ = arguments
    ours, grad_bias = hopper.attention_bwd(*tensors, *arguments, torch.float32)
    doubles = {"qkv": qkv.double()}
    truth = differentiate(lambda qkv: reference.attention_fwd(qkv, *arguments)[0], doubles, grad_out.double())
    same_dtype = differentiate(lambda qkv: plain(qkv, cu_seqlens, row_key, rng_key, p), {"qkv": qkv}, grad_out)
    compare_forward(hopper, qkv, arguments, same_dtype["out"], truth["out"])
    assert_gradient_near_truth("qkv", lengths, ours, same_dtype["d qkv"], truth["d qkv"])
    assert (ours[sum(lengths) :] == 0).all(), "rows past cu_seqlens[-1] are not all zero"
    sums = ours.sum(0, dtype=torch.float32)
    sums[1] = 0.0
    assert torch.equal(grad_bias, sums)
    return ours, tensors, arguments


def compare_forward(hopper, qkv, arguments, same_dtype, truth):
    """As in test_attention.py."""
    out, lse = hopper.attention_fwd(qkv, *arguments)
    _, true_lse = reference.attention_fwd(qkv.double(), *arguments)
    assert_near_truth("out", out, same_dtype, truth)
    assert_near_truth("lse", lse, true_lse.float(), true_lse, floor=16.0)
    used = int(arguments[0][-1])
    assert (out[used:] == 0).all()
    assert (lse[:, used:] == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "lengths",
    [[1], [2, 3, 1], [17], [63, 64, 65], [0, 9, 0, 0, 70, 0], [0, 0], [], [127, 128], [129, 5]],
    ids=str,
)
def test_lengths(hopper, lengths, p):
    compare(hopper, lengths, 1, BF16, p, tail=3)


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_heads_and_a_tail_longer_than_every_sequence(hopper, dtype):
    compare(hopper, [40, 100], 3, dtype, 0.1, tail=700)


@pytest.mark.parametrize(("lengths", "dtype", "p"), [([300], BF16, 0.1), ([511], HALF, 0.1), ([512], BF16, 0.0)])
def test_long(hopper, lengths, dtype, p):
    compare(hopper, lengths, 1, dtype, p)


def test_the_forward_of_a_sequence_longer_than_the_backward_takes(hopper):
    (_, qkv, *_), arguments = operands([700, 30], 1, BF16, 0.1, tail=5)
    cu_seqlens, _, row_key, rng_key, *_ = arguments
    truth, _ = reference.attention_fwd(qkv.double(), *arguments)
    compare_forward(hopper, qkv, arguments, plain(qkv, cu_seqlens, row_key, rng_key, 0.1), truth)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
def test_a_batch(hopper, dtype, p):
    compare(hopper, [512, 84, 301, 257, 3, 192, 0, 448], 2, dtype, p, tail=100)


def test_no_token(hopper):
    tensors, arguments = operands([], 2, BF16, 0.0)
    grad, grad_bias = hopper.attention_bwd(*tensors, *arguments, BF16)
    assert grad.shape == (0, 3, 2, 64)
    assert torch.equal(grad_bias, torch.zeros(3, 2, 64, dtype=BF16, device=DEVICE))
    out, lse = hopper.attention_fwd(tensors[1], *arguments)
    assert (out.shape, lse.shape) == ((0, 128), (2, 0))


@pytest.mark.parametrize("lengths", [[70, 100], [200]], ids=["four warps", "eight warps"])
def test_gradient_of_the_two_kernels(hopper, lengths):
    ours, tensors, arguments = compare(hopper, lengths, 2, BF16, 0.1)
    two, _ = portable.attention_bwd(*tensors, *arguments)
    difference = (ours.double() - two.double()).norm() / two.double().norm()
    assert float(difference) < torch.finfo(BF16).eps


def test_output_of_the_portable_forward(hopper):
    """The same bits of each sum of one block of keys; of several, blocks of another size: rounding."""
    (_, qkv, *_), arguments = operands([70, 300], 2, BF16, 0.1, tail=3)
    found, expected = (module.attention_fwd(qkv, *arguments) for module in (hopper, portable))
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert float(difference) < torch.finfo(BF16).eps / 2


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [100, 300])
def test_the_mask_of_the_forward_bit_for_bit(hopper, length, p):
    """V is the identity for 64 keys at a time, so the output shows which of their scores are kept."""
    found = torch.zeros(2, length, length, dtype=torch.bool, device=DEVICE)
    (_, qkv, *_), arguments = operands([20, length], 2, HALF, p, scale=0.05)
    row_key, rng_key = arguments[2:4]
    for first in range(0, length, 64):
        keys = min(64, length - first)
        qkv[:, 2] = 0.0
        qkv[20 + first : 20 + first + keys, 2, :, :keys] = torch.eye(keys, device=DEVICE, dtype=HALF)[:, None]
        out, _ = hopper.attention_fwd(qkv, *arguments)
        found[:, :, first : first + keys] = out[20:].view(length, 2, 64)[:, :, :keys].permute(1, 0, 2) != 0
    keep = dropout_mask.attention_keep_mask(rng_key, row_key[20:], 2, length, p, SITE)
    assert torch.equal(found, keep)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [100, 150], ids=["four warps", "eight warps"])
def test_the_mask_bit_for_bit(hopper, length, p):
    """dO is the identity for 64 queries at a time, so dV shows which of their scores are kept."""
    found = torch.zeros(2, length, length, dtype=torch.bool, device=DEVICE)
    tensors, arguments = operands([20, length], 2, HALF, p, scale=0.05)
    row_key, rng_key = arguments[2:4]
    for first in range(0, length, 64):
        rows = min(64, length - first)
        grad_out = torch.zeros_like(tensors[0]).view(-1, 2, 64)
        grad_out[20 + first : 20 + first + rows, :, :rows] = torch.eye(rows, device=DEVICE, dtype=HALF)[:, None]
        grad, _ = hopper.attention_bwd(grad_out.view(-1, 128), *tensors[1:], *arguments)
        found[:, first : first + rows] = grad[20:, 2, :, :rows].permute(1, 2, 0) != 0
    keep = dropout_mask.attention_keep_mask(rng_key, row_key[20:], 2, length, p, SITE)
    assert torch.equal(found, keep)


def test_same_bits_twice(hopper):
    tensors, arguments = operands([33, 150], 2, BF16, 0.1, tail=5)
    backward = [hopper.attention_bwd(*tensors, *arguments, BF16) for _ in range(2)]
    forward = [hopper.attention_fwd(tensors[1], *arguments) for _ in range(2)]
    for pair in (backward, forward):
        for first, second in zip(*pair, strict=True):
            assert torch.equal(first, second)


def test_no_sequence_sees_another(hopper):
    """Also where the other is NaN, and rows past the end are."""
    (grad_out, qkv, out, lse), arguments = operands([9, 70, 20], 1, BF16, 0.1, tail=4)
    before, _ = hopper.attention_bwd(grad_out, qkv, out, lse, *arguments)
    out_before, lse_before = hopper.attention_fwd(qkv, *arguments)
    for x in (grad_out, qkv, out):
        x[9:79] = float("nan")
        x[99:] = float("nan")
    after, _ = hopper.attention_bwd(grad_out, qkv, out, lse, *arguments)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[79:], after[79:])
    assert after[9:79].isnan().any()
    out_after, lse_after = hopper.attention_fwd(qkv, *arguments)
    for own in (slice(0, 9), slice(79, None)):
        assert torch.equal(out_before[own], out_after[own])
        assert torch.equal(lse_before[:, own], lse_after[:, own])
    assert out_after[9:79].isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_give_no_nan(hopper, sign):
    """Scores of +-1e4: a key past the end, whose score is 0, must not be exponentiated."""
    qkv, cu_seqlens, row_key, rng_key, longest = packed([70, 3], 1, 64, BF16)
    qkv[:, 0], qkv[:, 1] = 40.0, sign * 20.0 * (1 + torch.rand(73, 1, 1, device=DEVICE))
    arguments = (cu_seqlens, longest, row_key, rng_key, 0.125, 0.1, SITE)
    out, lse = reference.attention_fwd(qkv.double(), *arguments)
    grad_out = torch.randn(73, 64, device=DEVICE).to(BF16)
    grad, _ = hopper.attention_bwd(grad_out, qkv, out.to(BF16), lse.float(), *arguments)
    assert float(lse.abs().min()) > 6e3
    assert grad.isfinite().all()
    found, found_lse = hopper.attention_fwd(qkv, *arguments)
    assert found.isfinite().all()
    assert torch.allclose(found_lse.double(), lse, rtol=1e-5)


def test_what_it_has_not_is_refused(hopper):
    tensors, arguments = operands([4], 1, BF16, 0.0)
    long = (arguments[0], 513, *arguments[2:])
    floats = [x.float() for x in tensors]
    unaligned = torch.empty(tensors[0].numel() + 1, dtype=BF16, device=DEVICE)[1:].view(tensors[0].shape)
    for wrong, others in (
        ((unaligned, *tensors[1:]), arguments), (floats, arguments), (tensors, long),
        (tensors, (*arguments[:4], 0.0, *arguments[5:])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="one-pass backward"):
            hopper.attention_bwd(*wrong, *others)
    qkv = tensors[1]
    unaligned = torch.empty(qkv.numel() + 1, dtype=BF16, device=DEVICE)[1:].view(qkv.shape)
    for wrong, others in (
        (unaligned, arguments), (qkv.float(), arguments), (qkv[..., :32].contiguous(), arguments),
        (qkv, (*arguments[:4], -0.5, *arguments[5:])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="asynchronous forward"):
            hopper.attention_fwd(wrong, *others)


@pytest.fixture
def as_on_hopper(hopper, monkeypatch):
    """attention.py takes this device for one of compute capability 9.0; gives what it calls of attention_hopper.py."""
    names = ("takes_forward", "takes_backward", "attention_fwd", "attention_bwd")
    spy = SimpleNamespace(**{name: getattr(hopper, name) for name in names})
    monkeypatch.setattr(portable.rows, "capability", lambda device: 90)
    monkeypatch.setitem(sys.modules, f"{EXPERIMENTS}.attention_hopper", spy)
    monkeypatch.setattr(importlib.import_module(EXPERIMENTS), "attention_hopper", spy, raising=False)
    monkeypatch.setattr(portable, "_without_gluon", set())
    return spy


def test_where_it_is_the_default(as_on_hopper, monkeypatch):
    """Nowhere, until ONE_PASS_BACKWARD names a compute capability; what it does not take stays with the two kernels."""
    assert portable.ONE_PASS_BACKWARD == {}
    tensors, arguments = operands([40], 1, BF16, 0.1)
    called, backward = [], as_on_hopper.attention_bwd
    as_on_hopper.attention_bwd = lambda *all_of_them: called.append(all_of_them[5]) or backward(*all_of_them)
    two, _ = portable.attention_bwd(*tensors, *arguments)
    monkeypatch.setattr(portable, "ONE_PASS_BACKWARD", {90: 64})
    assert torch.equal(portable.attention_bwd(*tensors, *arguments)[0], two)  # 40 tokens are fewer than 64
    monkeypatch.setattr(portable, "ONE_PASS_BACKWARD", {90: 40})
    portable.attention_bwd(*[x.float() for x in tensors], *arguments)
    assert called == []
    _, grad_bias = portable.attention_bwd(*tensors, *arguments, torch.float32)
    assert called == [40]
    assert grad_bias.dtype == torch.float32


def test_where_the_forward_is_the_default(as_on_hopper, monkeypatch):
    """Likewise."""
    assert portable.ASYNCHRONOUS_FORWARD == {}
    (_, qkv, *_), arguments = operands([200], 1, BF16, 0.1)
    called, forward = [], as_on_hopper.attention_fwd
    as_on_hopper.attention_fwd = lambda *all_of_them: called.append(all_of_them[2]) or forward(*all_of_them)
    expected, _ = portable.attention_fwd(qkv, *arguments)
    monkeypatch.setattr(portable, "ASYNCHRONOUS_FORWARD", {90: 256})
    assert torch.equal(portable.attention_fwd(qkv, *arguments)[0], expected)
    monkeypatch.setattr(portable, "ASYNCHRONOUS_FORWARD", {90: 200})
    portable.attention_fwd(qkv.float(), *arguments)
    assert called == []
    out, _ = portable.attention_fwd(qkv, *arguments, torch.zeros(3, 1, 64, dtype=BF16, device=DEVICE))
    assert called == [200]
    assert torch.equal(out, forward(qkv, *arguments)[0])


def fails(error):
    def call(*given):
        raise error

    return call


@pytest.fixture(params=["untested", "import", "name", "compiler"])
def without_gluon(request, as_on_hopper, monkeypatch):
    """Gluon kernels are asked for, and cannot be had, in one of the ways in which that happens; gives the reason."""
    monkeypatch.setattr(portable, "ASYNCHRONOUS_FORWARD", {90: 0})
    monkeypatch.setattr(portable, "ONE_PASS_BACKWARD", {90: 0})
    if request.param == "untested":
        monkeypatch.setattr(portable.compilers, "triton_version", lambda: "3.10.0")
        return "not 3.10.0"
    if request.param == "import":
        monkeypatch.delattr(sys.modules[EXPERIMENTS], "attention_hopper")
        monkeypatch.setitem(sys.modules, f"{EXPERIMENTS}.attention_hopper", None)
        return "attention_hopper"
    error = AttributeError("no warpgroup_mma") if request.param == "name" else RuntimeError("PassManager::run failed")
    as_on_hopper.attention_fwd = as_on_hopper.attention_bwd = fails(error)
    return str(error)


def test_where_it_cannot_be_had_the_portable_kernels_serve_with_one_note(without_gluon):
    tensors, arguments = operands([70, 3], 1, BF16, 0.1)
    calls = {
        "forward": lambda: portable.attention_fwd(tensors[1], *arguments)[0],
        "backward": lambda: portable.attention_bwd(*tensors, *arguments)[0],
    }
    for direction, call in calls.items():
        with choice.use({}) as served, pytest.warns(RuntimeWarning, match=f"Gluon {direction} cannot run") as notes:
            found = [call(), call()]
        assert [without_gluon in str(note.message) for note in notes] == [True]
        assert not served  # so that nobody times the portable kernel under the other's name
        with choice.use({"attention.asynchronous": {90: 10**9}, "attention.one_pass": {90: 10**9}}):
            assert all(torch.equal(x, call()) for x in found)


def test_errors_of_the_device_are_not_taken_for_errors_of_the_compiler(as_on_hopper, monkeypatch):
    monkeypatch.setattr(portable, "ASYNCHRONOUS_FORWARD", {90: 0})
    (_, qkv, *_), arguments = operands([70], 1, BF16, 0.1)
    for error in (torch.OutOfMemoryError("full"), torch.AcceleratorError("illegal address")):
        as_on_hopper.attention_fwd = fails(error)
        with pytest.raises(type(error)):
            portable.attention_fwd(qkv, *arguments)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_benchmark_times_it_where_it_is_right(as_on_hopper, monkeypatch, direction):
    """A candidate is switched by its choice, serves, and is refused where it gives something else."""
    candidate = operators.HOPPER[direction]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for other in ("forward", "backward"):
        assert (candidate in operators.contenders_of("attention", other, "cuda")) == (other == direction)
    monkeypatch.setitem(MODELS, "one head", MODELS["micro"] | {"num_attention_heads": 1})
    with dispatch.use_backend(attention="triton"):
        case = operators.build_case("attention", DEVICE, BF16, model="one head", seq=40, batch=1)
        run = operators.call_of(case, direction, candidate)
        expected = case.call(direction)()
        assert operators.same(run(), expected)
        name = {"forward": "attention_fwd", "backward": "attention_bwd"}[direction]
        own = getattr(as_on_hopper, name)
        setattr(as_on_hopper, name, lambda *given: [1.5 * found for found in own(*given)])
        with pytest.raises(RuntimeError, match="does not give"):
            operators.call_of(case, direction, candidate)
        takes = {"forward": "takes_forward", "backward": "takes_backward"}[direction]
        setattr(as_on_hopper, takes, lambda *given: False)
        with pytest.raises(RuntimeError, match="not used, though asked for"):
            operators.call_of(case, direction, candidate)


# --------------------------------------------------------------------------------------------------------------
# The emulation finds what it is there for

GUARDS = r"^ +(?:_barrier\(\)|hopper\.fence_async_shared\(\)|async_copy\.wait_group\(\d\)).*$"


def guards() -> list[str]:
    """The kernels' lines that are a barrier, a fence or a wait for copies, in order."""
    source = (emulation.ROOT / "kernels/experiments/attention_hopper.py").read_text(encoding="utf-8")
    return re.findall(GUARDS, source, re.MULTILINE)


def run_edited(edit):
    """Both directions, of blocks of keys that are the first, in between, and not whole."""
    module = emulation.load_module("attention_hopper", edit)
    tensors, arguments = operands([500], 1, BF16, 0.1)
    return module.attention_fwd(tensors[1], *arguments)[0], module.attention_bwd(*tensors, *arguments)[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation is for CPU tensors")
@pytest.mark.parametrize("number", range(len(guards())))
def test_without_a_barrier_a_fence_or_a_wait_there_is_a_race(number):
    def without(source):
        count = itertools.count()
        return re.sub(
            GUARDS, lambda found: "" if next(count) == number else found.group(), source, flags=re.MULTILINE
        )  # fmt: skip

    with pytest.raises(emulation.Race):
        run_edited(without)


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation is for CPU tensors")
@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("warpgroup_mma_wait(1, (scores,))\n    p, peak", "warpgroup_mma_wait(2, (scores,))\n    p, peak"),
        ("warpgroup_mma_wait(0, (sums, left))", "warpgroup_mma_wait(1, (sums, left))"),
        ("_copy_block(k_s.index(stage ^ 1), k_ptr", "_copy_block(k_s.index(stage), k_ptr"),
        ("_copy_block(v_s.index(stage), v_ptr", "_copy_block(v_s.index(stage ^ 1), v_ptr"),
        ("warpgroup_mma_wait(1, (scores,))\n            lse", "warpgroup_mma_wait(2, (scores,))\n            lse"),
        ("warpgroup_mma_wait(1, (grad_p,))", "warpgroup_mma_wait(2, (grad_p,))"),
        ("warpgroup_mma_wait(0, (dv, dk, dq, of_dv, of_dk))", "warpgroup_mma_wait(1, (dv, dk, dq, of_dv, of_dk))"),
        ("q_s.index(stage ^ 1), q_ptr", "q_s.index(stage), q_ptr"),
        ("            grad_scores_s.store(grad_scores)\n", ""),
    ],
)
def test_other_mistakes_are_races(what, instead):
    def changed(source):
        assert source.count(what) == 1
        return source.replace(what, instead)

    with pytest.raises(emulation.Race):
        run_edited(changed)


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation is for CPU tensors")
@pytest.mark.parametrize(("what", "instead"), [
    ("mask=mask)\n\n\n@gluon.jit\ndef _load", ")\n\n\n@gluon.jit\ndef _load"),  # copies past the last row
    ('"BLOCKS": blocks', '"BLOCKS": blocks // 2'),  # sums of dQ for half of the queries
])  # fmt: skip
def test_a_wrong_access_is_found(what, instead):
    def changed(source):
        assert source.count(what) == 1
        return source.replace(what, instead)

    tensors, arguments = operands([300], 1, BF16, 0.1)
    module = emulation.load_module("attention_hopper", changed)
    try:
        found, _ = module.attention_bwd(*tensors, *arguments)
    except IndexError:
        return
    assert found.isnan().any()
