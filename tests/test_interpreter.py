"""bfloat16 in kernels equals PyTorch's: on a GPU by hardware, without one through bert_fast/interpreter.py, whose other
correction is tested here too.

Run as a script, this file prints which of its checks fail in Triton's own interpreter, uncorrected.
"""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    offset = index[:, None] * N + index[None, :]
    product = tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset))
    tl.store(out_ptr + offset, product)


@triton.jit
def _convert_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset).to(out_ptr.dtype.element_ty))


@triton.jit
def _store_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset) * 1.0)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    a, b = tl.load(a_ptr + offset), tl.load(b_ptr + offset)
    tl.store(out_ptr + offset, tl.where(a < b, a * b, a + b))


def _awkward_values(dtype: torch.dtype) -> torch.Tensor:
    """4096 values: all magnitudes, ties between two bfloat16 values both ways, zeros, subnormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4096, generator=generator) * torch.exp2(torch.randint(-120, 120, (4096,), generator=generator))
    ties = torch.randint(0x0080, 0x7F00, (512,), generator=generator, dtype=torch.int32) << 16 | 0x8000
    x[:512] = ties.view(torch.float32)
    special = [0.0, -0.0, 1e-40, -1e-45, float("inf"), -float("inf"), float("nan"), 3.4028235e38, -3.3895e38]
    x[512 : 512 + len(special)] = torch.tensor(special)
    return x.to(dtype).to(DEVICE)


def check_dot() -> None:
    a, b = (torch.randn(32, 32, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty(32, 32, device=DEVICE)
    _dot_kernel[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def _check_conversion(kernel, source: torch.dtype, target: torch.dtype) -> None:
    x = _awkward_values(source)
    out = torch.empty_like(x, dtype=target)
    kernel[(1,)](x, out, N=x.numel())
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


def check_cast() -> None:
    _check_conversion(_convert_kernel, torch.float32, torch.bfloat16)


def check_store() -> None:
    _check_conversion(_store_kernel, torch.float32, torch.bfloat16)


def check_arithmetic() -> None:
    a, b = (torch.randn(256, device=DEVICE).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, out, N=256)
    torch.testing.assert_close(out, torch.where(a < b, a * b, a + b), rtol=0, atol=0)


CHECKS = {"dot": check_dot, "cast": check_cast, "store": check_store, "arithmetic": check_arithmetic}


@pytest.mark.parametrize("name", CHECKS)
def test_bfloat16_equals_pytorch(name):
    CHECKS[name]()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_conversions_equal_pytorch(source, target):
    _check_conversion(_convert_kernel, source, target)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels do not pass through the correction")
def test_correction_is_idempotent():
    from triton.runtime import interpreter

    from bert_fast.interpreter import correct

    correct()
    before = type(interpreter.interpreter_builder)
    correct()
    assert type(interpreter.interpreter_builder) is before
    check_dot()


@triton.jit
def _loop_kernel(bound_ptr, out_ptr):
    total = 0
    for number in range(tl.load(bound_ptr), tl.load(bound_ptr + 1)):
        total += number
    tl.store(out_ptr, total)


def test_bounds_that_are_loaded():
    """With every NumPy: an array of one element is no integer to those of 2026."""
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    _loop_kernel[(1,)](torch.tensor([3, 9], device=DEVICE), out)
    assert int(out) == 3 + 4 + 5 + 6 + 7 + 8


def test_correction_is_still_needed():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right = set(CHECKS) - set(done.stdout.split())
    assert not right, (
        f"triton {triton.__version__} interprets bfloat16 right by itself in: {', '.join(sorted(right))}. Delete that "
        "part of bert_fast/interpreter.py (all of it, its callers and this file where nothing is left)"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, check in CHECKS.items():
        try:
            check()
        except AssertionError:
            print(name)
