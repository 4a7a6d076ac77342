"""A candidate tried, on a CPU: the real check with the operators that are there, and operators that are made wrong."""

import types

import pytest
import torch

from bert_fast import choice, dispatch, ops
from bert_fast.tuning import trials
from bert_fast.tuning.candidates import Sizes

SIZES = Sizes(32, 64, 2, 50, 20, (20, 3, 11), 9, "float32")


def ask(subject: str, challenger: dict, **sizes) -> dict:
    trials._trial.cache_clear()
    about = {"subject": subject, "sizes": Sizes(**SIZES.as_dict() | sizes).as_dict(), "device": "cpu"}
    return trials.answer(about | {"incumbent": {}, "challenger": challenger, "sound": False})


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(trials, "REPEAT", 2)


def test_another_chunk_of_the_loss_is_right_and_timed():
    found = ask("mlm_loss", {"mlm_loss.chunk": {"cpu": 4}})
    assert found["replaced"] == {"mlm_loss.chunk": ops.MLM_CHUNK}
    assert [[len(times) for times in order] for order in found["times"]] == [[2, 2], [2, 2]]
    assert min(min(times) for order in found["times"] for times in order) > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("subject", trials.SUBJECTS)
def test_the_default_of_every_subject_is_right(subject, dtype, backend):
    """In 16 bits, too, where gradients in float32 are made of products that were rounded to 16."""
    if dispatch.why_unavailable(backend):
        pytest.skip("not built here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERT_FAST_BACKEND", backend)
        assert "times" in ask(subject, {}, dtype=dtype)


@pytest.mark.parametrize("broken", ["d qkv", "out", "NaN", "bits"])
def test_a_wrong_result_is_seen(monkeypatch, broken):
    """One element of many, on one of the batches; or one that differs from one time to the next."""
    attention, calls = ops.attention, []

    def made(qkv, *rest, **keys):
        out = attention(qkv, *rest, **keys)
        tried = choice.of("made", {"tried": 0})["tried"]
        if qkv.dtype == torch.float64 or not tried:
            return out
        calls.append(broken)
        if broken == "d qkv":
            mask = torch.zeros_like(qkv)
            mask[5, 1, 1, 3] = 0.5
            return out + (qkv * mask).sum() - (qkv * mask).sum().detach()
        change = torch.zeros_like(out)
        change[7, 3] = {"out": 0.01, "NaN": float("nan"), "bits": 1e-6 * len(calls)}[broken]
        return out + change

    monkeypatch.setattr(ops, "attention", made)
    found = ask("attention", {"made": {"tried": 1}})
    expected = {"d qkv": "d qkv is off", "out": "out is off", "NaN": "out is off|other bits", "bits": "other bits"}
    assert any(word in found["wrong"] for word in expected[broken].split("|"))
    assert "times" in ask("attention", {"made": {"tried": 0}})


def test_a_default_that_is_wrong_is_told_from_a_candidate_that_is(monkeypatch):
    gelu = ops.bias_gelu
    monkeypatch.setattr(ops, "bias_gelu", lambda x, bias: gelu(x, bias) * (1.0 if x.dtype == torch.float64 else 1.01))
    found = ask("bias_gelu", {})
    assert list(found) == ["default wrong"]
    assert "out of the default is off by" in found["default wrong"]


def test_a_candidate_that_raises_says_why(monkeypatch):
    assert "chunk is 0" in ask("mlm_loss", {"mlm_loss.chunk": {"cpu": 0}})["failed"]


def test_a_table_whose_kernel_has_not_served_is_no_candidate():
    found = ask("attention", {"attention.one_pass": {"90": 1}})
    assert "not used, though asked for: attention.one_pass" in found["failed"]


@pytest.mark.parametrize("same", [True, False])
def test_a_library_whose_backward_has_another_mask_is_seen(monkeypatch, same):
    """The masks are its own; that its backward has the forward's shows in out and in the values' gradient."""
    calls = iter(range(10**6))

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, p):
            ctx.seed, ctx.p = next(calls), p
            ctx.save_for_backward(qkv)
            return masked(qkv, p, ctx.seed)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                qkv = ctx.saved_tensors[0].detach().requires_grad_()
                out = masked(qkv, ctx.p, ctx.seed + (not same) * 10**7)
            return *torch.autograd.grad(out, qkv, grad), None

    def masked(qkv, p, seed):
        q, k, v = qkv.permute(1, 2, 0, 3)
        probabilities = torch.softmax(q @ k.mT, -1)
        keep = torch.rand(probabilities.shape, generator=torch.Generator().manual_seed(seed)) >= p
        return (probabilities * keep / (1 - p) @ v).transpose(0, 1).flatten(1)

    def attention(qkv, *rest, p, bias, **keys):
        if not p:
            return true_attention(qkv, *rest, p=p, bias=bias, **keys)
        return Made.apply(qkv, p)

    true_attention = ops.attention
    monkeypatch.setattr(ops, "attention", attention)
    trial = trials.Trial("attention", Sizes(**SIZES.as_dict() | {"attention": "library"}), "cpu")
    if same:
        trial.require_one_mask({})
    else:
        with pytest.raises(trials.Wrong, match="the backward's mask is not the forward's"):
            trial.require_one_mask({})


def test_unsound_machine_code_is_refused(monkeypatch):
    """What the disassembler lists is judged by the compile report's rules; without one nothing is asked."""
    product = "HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR16].tnspB, R56, gsb0"
    code = ["WARPGROUP.ARRIVE", product, "MOV R24, R9", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"]
    lines = (f"        /*{16 * n:04x}*/    {line} ;      /* 0x00e00000141879f0 */" for n, line in enumerate(code))
    listing = "\n".join(lines)
    compiled = types.SimpleNamespace(
        asm={"cubin": b""}, metadata=types.SimpleNamespace(target=types.SimpleNamespace(arch=90))
    )
    monkeypatch.setattr(trials, "disassembled", {b"": listing}.get)
    with pytest.raises(trials.Wrong, match=r"machine code: .*R24"):
        trials.require_sound(compiled)
    for cubin in (b"no machine code", None):
        compiled.asm = {"cubin": cubin}
        trials.require_sound(compiled)


def test_what_is_no_machine_code_has_no_listing():
    assert trials.disassembled(None) is None
    assert trials.disassembled(b"no machine code") is None
