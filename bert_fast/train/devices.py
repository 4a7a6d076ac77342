"""What the device can do: bfloat16 in hardware, its peak, and the FLOPs that training needs of it."""

import time
from pathlib import Path

import numpy as np
import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 matrices in hardware, rather than by converting them?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


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


def training_flops(config, lengths: np.ndarray, predicted: int) -> int:
    """FLOPs of one training step on sequences of ``lengths`` (n,) tokens with ``predicted`` masked positions in all.

    Matrix products alone, multiply and add apart, three times the forward 24 L h^2 s + 4 L h s^2 (feed-forward of
    4 h) a sequence, P (2 h^2 + 2 h V) for the MLM head at masked positions, 2 h^2 + 4 h for pooler and NSP; real
    tokens, attention within each sequence. ``config`` is a BertConfig.
    """
    h, layers = config.hidden_size, config.num_hidden_layers
    lengths = np.asarray(lengths, dtype=np.int64)
    dense = 2 * (4 * h * h + 2 * h * config.intermediate_size)
    encoder = layers * (dense * int(lengths.sum()) + 4 * h * int((lengths**2).sum()))
    heads = predicted * (2 * h * h + 2 * h * config.vocab_size) + len(lengths) * (2 * h * h + 4 * h)
    return 3 * (encoder + heads)
