"""Matrix products that the library behind torch does not have, or has less exactly, on a CPU."""

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


def long_product(x: Tensor, y: Tensor) -> Tensor:
    """x (M, K) @ y (K, N) for a long K, as exact for few rows as for many.

    For fewer than 12 rows the library behind torch on a CPU adds all K terms one after the other (errors five to
    ten times as large at K = 30522); with 16 rows it adds them in blocks.
    """
    rows = x.shape[0]
    if x.device.type != "cpu" or rows >= 16:
        return x @ y
    return (torch.cat([x, x.new_zeros(16 - rows, x.shape[1])]) @ y)[:rows]
