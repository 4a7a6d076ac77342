"""What a device can do: which products it has in hardware, and how fast they are."""

import time

import torch

from bert_fast import processor


def has_matrix_unit(device: torch.device, dtype: torch.dtype) -> bool:
    """Does ``device`` multiply matrices of ``dtype`` in hardware, and no slower than those of float32?"""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= (8 if dtype == torch.bfloat16 else 7)
    return processor.multiplies(dtype)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the library's matrix product on ``device``: the best of several, on random data."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
