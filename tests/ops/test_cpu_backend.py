"""The C++ operators' library: each instruction set this CPU has, threads, dropout's bits, dtypes, alignment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bert_fast import devices, dropout_mask, reference
from bert_fast.kernels import cpu
from tests.support.parity import assert_near_truth

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no C++ operators: {cpu.why_unavailable()}")

HERE = Path(__file__).parent
SUPPORTED = cpu.supported_instruction_sets() if cpu.why_unavailable() is None else []
LENGTHS = [130, 0, 1, 67, 5]


def operators():
    from bert_fast.kernels.cpu import attention, bias_gelu, residual_layernorm

    return attention, bias_gelu, residual_layernorm


def attention_case(dtype=torch.float32, heads=3, size=24, p=0.1, tail=2):
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
    tokens = sum(LENGTHS) + tail
    qkv = torch.randn(tokens, 3, heads, size).to(dtype)
    grad_out = torch.randn(tokens, heads * size).to(dtype)
    keys = dropout_mask.row_keys(cu_seqlens, tokens), torch.randint(-(2**63), 2**63 - 1, (1,))
    return qkv, grad_out, (cu_seqlens, max(LENGTHS), *keys, size**-0.5, p, 5)


def run_everything(dtype):
    """Every result of both directions of the operators that are all C++, on fresh inputs, with the inputs."""
    attention, bias_gelu, residual_layernorm = operators()
    qkv, grad_out, arguments = attention_case(dtype)
    out, lse = attention.attention_fwd(qkv, *arguments)
    grads_qkv = attention.attention_bwd(grad_out, qkv, out, lse, *arguments, torch.float32)
    x, bias, grad = torch.randn(333, 77).to(dtype), torch.randn(77).to(dtype), torch.randn(333, 77).to(dtype)
    gelu = bias_gelu.bias_gelu_fwd(x, bias)
    residual, weight = torch.randn(333, 77).to(dtype), torch.randn(77).to(dtype)
    keys = torch.randint(0, 2**40, (333,)), arguments[3]
    *normed, mean, rstd = residual_layernorm.residual_layernorm_fwd(
        x, bias, residual, weight, bias, *keys, 1e-5, 0.1, 2
    )
    saved = (normed[1], mean, rstd)
    grads = residual_layernorm.residual_layernorm_bwd(grad, *saved, weight, *keys, 0.1, 2, dtype, True)
    inputs = (qkv, grad_out, arguments, x, bias, grad, residual, weight, keys)
    return inputs, (out, lse, *grads_qkv, gelu, *bias_gelu.bias_gelu_bwd(grad, x, bias), *normed, *grads)


def reference_results(inputs, convert):
    qkv, grad_out, arguments, x, bias, grad, residual, weight, keys = inputs
    qkv, grad_out, x, bias, grad, residual, weight = map(convert, (qkv, grad_out, x, bias, grad, residual, weight))
    out, lse = reference.attention_fwd(qkv, *arguments)
    grads_qkv = reference.attention_bwd(grad_out, qkv, out, lse, *arguments, lse.dtype)
    gelu = (reference.bias_gelu_fwd(x, bias), *reference.bias_gelu_bwd(grad, x, bias))
    *normed, mean, rstd = reference.residual_layernorm_fwd(x, bias, residual, weight, bias, *keys, 1e-5, 0.1, 2)
    saved = (normed[1], mean, rstd)
    grads = reference.residual_layernorm_bwd(grad, *saved, weight, *keys, 0.1, 2, x.dtype, True)
    return out, lse, *grads_qkv, *gelu, *normed, *grads


def check_operators(expected_set: str) -> None:
    """Run in a process of its own, with BERT_FAST_CPU_ISA set: values, and the same bits at 1, 2 and 7 threads."""
    assert cpu.instruction_set() == expected_set
    names = ("out", "lse", "grad_qkv", "grad_bias of attention", "gelu", "grad_x", "grad_bias", "normed", "z",
             "grad_x of residual_layernorm",
             "grad_residual", "grad_bias of residual_layernorm", "grad_weight", "grad_ln_bias")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            inputs, outputs = run_everything(dtype)
            results.append(outputs)
        same, truth = (reference_results(inputs, f) for f in (lambda t: t, lambda t: t.double()))
        assert len(results[0]) == len(names)
        for i, name in enumerate(names):
            assert_near_truth(f"{name} ({dtype})", results[0][i], same[i], truth[i], factor=2.0, floor=4.0)
            assert all(torch.equal(results[0][i], r[i]) for r in results), f"{name}: bits depend on the threads"
    rows = torch.randint(0, 2**62, (5,))
    check_masks(rows)
    check_mlm_loss_rows()


def check_mlm_loss_rows() -> None:
    """The pass over logits: loss and gradients against autograd in float64, the same bits at 1, 2 and 7 threads."""
    rows = cpu.function("mlm_loss_rows", "pppfppllii")
    logits, bias, labels = torch.randn(37, 301) * 5, torch.randn(301), torch.randint(0, 301, (37,))
    labels[5] = -1
    results = []
    for threads in (1, 2, 7):
        gradient, losses, grad_bias = logits.clone(), torch.empty(37), torch.zeros(301)
        rows(gradient, bias, labels, 0.25, losses, grad_bias, 37, 301, 1, threads)
        results.append((losses, gradient, grad_bias))
    leaves = [t.double().requires_grad_() for t in (logits, bias)]
    truth = torch.nn.functional.cross_entropy(leaves[0] + leaves[1], labels, ignore_index=-1, reduction="none")
    expected = (truth.detach(), *torch.autograd.grad(0.25 * truth.sum(), leaves))
    for i in range(3):
        torch.testing.assert_close(results[0][i].double(), expected[i], rtol=2e-6, atol=2e-6)
        assert all(torch.equal(results[0][i], r[i]) for r in results), "bits depend on the threads"


def check_masks(row_key) -> None:
    """Hidden and attention masks of an odd and an even number of 64-element blocks, bit for bit."""
    draw = cpu.function("dropout_mask", "pppllllli")
    key = torch.randint(-(2**63), 2**63 - 1, (1,))
    for blocks in (1, 2, 5):
        for p in (0.0, 0.1, 0.5, 1.0):
            for head in (-1, 0, 11):
                words = torch.empty(row_key.numel(), blocks, dtype=torch.int64)
                threshold = dropout_mask.dropout_threshold(p)
                draw(row_key, key, words, row_key.numel(), blocks, 21, head, threshold, 1)
                bits = (words[..., None] >> torch.arange(64) & 1).bool().flatten(1)
                if head < 0:
                    expected = dropout_mask.hidden_keep_mask(key, row_key, 64 * blocks, p, 21)
                else:
                    expected = dropout_mask.attention_keep_mask(key, row_key, head + 1, 64 * blocks, p, 21)[head]
                assert torch.equal(bits, expected), f"blocks {blocks}, p {p}, head {head}"


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", SUPPORTED)
def test_instruction_set(name):
    """Every instruction set that this CPU has computes what the reference does, at any number of threads."""
    code = f"import test_cpu_backend as t; t.check_operators({name!r})"
    result = in_process(code, BERT_FAST_CPU_ISA=name)
    assert result.returncode == 0, result.stderr


def test_instruction_set_that_is_not_there():
    code = "from bert_fast.kernels import cpu; print(cpu.why_unavailable())"
    assert "avx1024" in in_process(code, BERT_FAST_CPU_ISA="avx1024").stdout
    missing = [name for name in cpu.INSTRUCTION_SETS if name not in SUPPORTED]
    if missing:
        said = in_process(code, BERT_FAST_CPU_ISA=missing[0]).stdout
        assert f"asks for {missing[0]}" in said
        assert SUPPORTED[-1] in said


@pytest.mark.parametrize(
    ("words", "pairs", "library"),
    [
        ("GenuineIntel avx512f avx512_bf16", True, True),  # Cooper Lake
        ("GenuineIntel avx512f avx512_bf16 avx512_fp16", False, False),  # Sapphire Rapids, AMX kept from it
        ("GenuineIntel avx512f avx512_bf16 avx512_fp16 amx_bf16", False, True),
        ("AuthenticAMD avx512f avx512_bf16 avx512_fp16", True, True),
        ("AuthenticAMD avx2", False, False),
        ("Features : asimd bf16", False, True),
        ("", False, False),
    ],
)
def test_bfloat16_where_it_is_multiplied_faster(monkeypatch, words, pairs, library):
    monkeypatch.setattr(devices, "words", lambda: frozenset(words.split()))
    assert devices.bfloat16_pairs_pay() is pairs
    assert devices.multiplies(torch.bfloat16) is library
    monkeypatch.delenv("BERT_FAST_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "supported_instruction_sets", lambda: list(cpu.INSTRUCTION_SETS))
    assert cpu.instruction_set.__wrapped__() == ("avx512_bf16" if pairs else "avx512")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_and_torch_threads():
    """No second OpenMP runtime is mapped, and exactly torch.get_num_threads() threads work."""
    code = """if True:
        import os, re, torch
        import test_cpu_backend as t
        torch.set_num_threads(1)
        before = len(os.listdir("/proc/self/task"))
        t.run_everything(torch.float32)
        one = len(os.listdir("/proc/self/task"))
        torch.set_num_threads(3)
        t.operators()[0].attention_fwd(*(lambda qkv, _, a: (qkv, *a))(*t.attention_case()))
        three = len(os.listdir("/proc/self/task"))
        maps = open("/proc/self/maps").read()
        print(one - before, three - one, len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)[-.\\w]*", maps))))
    """
    result = in_process(code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "2", "1"], "new threads at 1, at 3, OpenMP runtimes: " + result.stdout


@pytest.mark.parametrize("length", [1, 49, 300])
def test_more_threads_than_heads_give_the_same_bits(length):
    """One sequence and one head: the forward's queries are shared out."""
    attention, _, _ = operators()
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    qkv, keys = torch.randn(length, 3, 1, 40), (dropout_mask.row_keys(cu_seqlens, length), torch.tensor([77]))
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5, 16):
        torch.set_num_threads(threads)
        results.append(attention.attention_fwd(qkv, cu_seqlens, length, *keys, 0.2, 0.1, 3))
    torch.set_num_threads(before)
    for out, lse in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_library_needs_nothing_but_c():
    """No symbol of torch, Python, OpenMP or the C++ runtime: that is why one build serves every version."""
    text = cpu.LIBRARY.read_bytes()
    assert not re.search(rb"\b(GOMP_|__kmpc_|_ZNSt|_ZSt|PyObject_|_ZN2at|_ZN3c10)", text)


def test_float64_is_the_reference():
    attention, bias_gelu, _ = operators()
    qkv, grad_out, arguments = attention_case(torch.float64)
    out, lse = attention.attention_fwd(qkv, *arguments)
    expected, expected_lse = reference.attention_fwd(qkv, *arguments)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    everything = (grad_out, qkv, out, lse, *arguments, torch.float64)
    for ours, theirs in zip(attention.attention_bwd(*everything), reference.attention_bwd(*everything), strict=True):
        assert torch.equal(ours, theirs)
    x, bias = torch.randn(4, 5).double(), torch.randn(5).double()
    assert torch.equal(bias_gelu.bias_gelu_fwd(x, bias), reference.bias_gelu_fwd(x, bias))
    for ours, theirs in zip(
        bias_gelu.bias_gelu_bwd(x, x, bias), reference.bias_gelu_bwd(x, x, bias), strict=True
    ):  # fmt: skip
        assert torch.equal(ours, theirs)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that starts one element into its memory."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unaligned_data_give_the_same_bits(dtype):
    attention, bias_gelu, _ = operators()
    qkv, grad_out, arguments = attention_case(dtype)
    out, lse = attention.attention_fwd(qkv, *arguments)
    again, lse_again = attention.attention_fwd(shifted(qkv), *arguments)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    grads = attention.attention_bwd(grad_out, qkv, out, lse, *arguments, dtype)
    moved = (shifted(t) for t in (grad_out, qkv, out, lse))
    for grad, of_moved in zip(grads, attention.attention_bwd(*moved, *arguments, dtype), strict=True):
        assert torch.equal(grad, of_moved)
    x, bias = torch.randn(70, 33).to(dtype), torch.randn(33)
    assert torch.equal(bias_gelu.bias_gelu_fwd(x, bias), bias_gelu.bias_gelu_fwd(shifted(x), shifted(bias)))


def test_stored_formats_round_as_torch_does():
    """Every bfloat16 and float16 through GELU, specials and subnormals included; of large values it is the identity."""
    _, bias_gelu, _ = operators()
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        zero = torch.zeros(1, dtype=torch.float32)
        large = every[every > 8][:, None].contiguous()
        assert torch.equal(bias_gelu.bias_gelu_fwd(large, zero), large)
        finite = every[every.isfinite()][:, None].contiguous()
        ours = bias_gelu.bias_gelu_fwd(finite, zero).float()
        exact = finite.double()  # torch's own gelu cancels in the negative tail, even in float64
        truth = (0.5 * exact * torch.erfc(-exact * 0.5**0.5)).to(dtype).float()
        info = torch.finfo(dtype)
        unit = truth.abs() * info.eps + info.smallest_normal * info.eps + 2.0**-120  # Phi below 2^-126 is 0
        assert ((ours - truth).abs() <= unit).all(), "further than one unit in the last place from the truth"
        assert bias_gelu.bias_gelu_fwd(every[every.isnan()][:, None].contiguous(), zero).isnan().all()


@pytest.mark.parametrize("positions", [7, 70_000])
def test_mlm_loss_and_embedding_have_the_same_bits_at_any_number_of_threads(positions):
    from bert_fast.kernels.cpu import embedding_layernorm, mlm_loss

    before = torch.get_num_threads()
    hidden, word, bias = torch.randn(positions, 4), torch.randn(11, 4), torch.randn(11)
    ids = torch.randint(0, 11, (positions,))
    none = torch.empty(0, dtype=torch.int64)
    tables = (word, torch.randn(5, 4), torch.randn(2, 4), torch.randn(4))
    indices = (ids, ids % 5, ids % 2)
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            losses = [
                mlm_loss.mlm_loss_fwd(hidden * (1 + k), word, bias, ids, None, -100, 1 << 20, False)[0]
                for k in range(8)
            ]
            out, mean, rstd = embedding_layernorm.embedding_layernorm_fwd(
                *indices, *tables, torch.randn(4, generator=torch.Generator().manual_seed(1)), none, none,
                1e-5, 0.0, 0, -1, torch.float32,
            )  # fmt: skip
            grads = embedding_layernorm.embedding_layernorm_bwd(
                hidden, *indices, *tables, mean, rstd, none, none, 0.0, 0, -1
            )
            results.append((*losses, out, *grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("normalizer", [float("inf"), 1e30])
def test_mlm_loss_with_a_huge_normalizer_has_finite_gradients(normalizer):
    from bert_fast.kernels.cpu import mlm_loss

    inputs = (torch.randn(5, 4), torch.randn(11, 4), torch.randn(11), torch.randint(0, 11, (5,)))
    arguments = (*inputs, torch.tensor(normalizer), -100, 3, True)
    for ours, expected in zip(mlm_loss.mlm_loss_fwd(*arguments), reference.mlm_loss_fwd(*arguments), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
