"""Matrix products that the library behind torch does not have, or has less exactly."""

import contextlib
from collections.abc import Iterator

import torch

Tensor = torch.Tensor

# Rows of a product that is converted after it was made: of a vocabulary's, the whole would be memory that leaves the
# cache before it is read again and, new in every step, is paid for in page faults.
BLOCK = 8192


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b: one product, in which ``out`` is rounded once, wherever the library has it."""
    beta = 1 if add else 0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:  # as on a CPU, which has no product of 16-bit matrices with a float32 result
        for rows, part in zip(a.split(BLOCK), out.split(BLOCK), strict=True):
            (part.add_ if add else part.copy_)(rows @ b)


_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextlib.contextmanager
def sums_in_float32() -> Iterator[None]:
    """Within, products of 16-bit matrices on a GPU are rounded once.

    cuBLAS may split a product with a long K, as a weight's gradient is, and by PyTorch's default round each part to 16
    bits before it adds them up. The setting is the process's, so it holds for autograd's thread too.
    Source: PyTorch's "Numerical accuracy", "Reduced Precision Reduction for FP16 and BF16 GEMMs".
    """
    settings = torch.backends.cuda.matmul
    allowed = [name for name in _REDUCTIONS if getattr(settings, name)]
    for name in allowed:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name in allowed:
            setattr(settings, name, True)


def long_product(x: Tensor, y: Tensor) -> Tensor:
    """x (M, K) @ y (K, N) for a long K, as exact for few rows as for many.

    For fewer than 12 rows the library behind torch on a CPU adds all K terms one after the other (errors five to
    ten times as large at K = 30522); with 16 rows it adds them in blocks.
    """
    rows = x.shape[0]
    if x.device.type != "cpu" or rows >= 16:
        return x @ y
    return (torch.cat([x, x.new_zeros(16 - rows, x.shape[1])]) @ y)[:rows]
