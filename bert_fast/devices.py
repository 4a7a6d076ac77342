"""What a device can do: which products it has in hardware, and how fast they are."""

import functools
import time
from pathlib import Path

import torch


@functools.cache
def words() -> frozenset[str]:
    """The words of /proc/cpuinfo, names of features among them; none where there is no such file."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return frozenset()


def bfloat16_pairs_pay() -> bool:
    """Does vdpbf16ps, which multiplies pairs of bfloat16, do more in a second than float32's multiply-add?

    Not on Intel's processors from Sapphire Rapids on (those that have avx512_fp16): they multiply bfloat16 in AMX. On
    Emerald Rapids a core issues 1.3 vdpbf16ps of 512 bits in a nanosecond and 5.3 multiply-adds: 83 and 171 GFLOP/s.
    """
    return "avx512_bf16" in words() and not {"GenuineIntel", "avx512_fp16"} <= words()


def multiplies(dtype: torch.dtype) -> bool:
    """Does PyTorch multiply matrices of this 16-bit ``dtype`` in hardware, and no slower than those of float32?"""
    if dtype == torch.bfloat16:
        return bool({"amx_bf16", "bf16"} & words()) or bfloat16_pairs_pay()  # "bf16" is Arm's word
    return bool({"amx_fp16", "avx512_fp16"} & words())


def has_matrix_unit(device: torch.device, dtype: torch.dtype) -> bool:
    """Does ``device`` multiply matrices of ``dtype`` in hardware, and no slower than those of float32?"""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= (8 if dtype == torch.bfloat16 else 7)
    return multiplies(dtype)


def in_bfloat16(precision: str, device: torch.device | str) -> bool:
    """Whether ``precision`` ("fp32", "bf16" or "auto": where the device multiplies it in hardware) is bfloat16."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'fp32' or 'bf16', got {precision!r}")
    return precision == "bf16" or (precision == "auto" and has_matrix_unit(torch.device(device), torch.bfloat16))


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


def reset_peak_memory(kind: str) -> None:
    """Has :func:`peak_memory` of ``kind`` begin anew, at what is held; OSError where the system cannot."""
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # the high-water mark of the resident set
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(kind: str) -> int:
    """The most bytes since :func:`reset_peak_memory`: of this process ("cpu"), or of PyTorch's allocator on the current
    GPU ("cuda"). OSError where the system does not say."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
