"""What the machine can do, measured in the same run: matrix products, a large copy, what a launch costs."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.clock import Clock
from bert_fast.devices import has_matrix_unit

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
REPEAT = {"cpu": 5, "cuda": 20}


def product_seconds(
    clock: Clock, dtype: torch.dtype, m: int, n: int, k: int, *, turned: str = "", repeat: int | None = None
) -> float:
    """Seconds of the library's (m, k) x (k, n) on random data.

    ``turned`` names the factors that lie transposed in memory: a linear's weight in its forward ("b"), none for d input
    (""), the output's gradient for d weight ("a"). The median with cold caches on a GPU; the best of several on a CPU,
    which others may be using, with warm ones.
    """
    device = clock.device

    def factor(name: str, rows: int, columns: int) -> torch.Tensor:
        if name in turned:
            return torch.randn(columns, rows, device=device).to(dtype).T
        return torch.randn(rows, columns, device=device).to(dtype)

    a, b = factor("a", m, k), factor("b", k, n)
    repeat = repeat or REPEAT[device]
    if device == "cuda":
        return statistics.median(clock.calls(lambda: a @ b, repeat))
    a @ b
    return min(clock.step(lambda: a @ b) for _ in range(repeat))


def matmul_rate(clock: Clock, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of the library's matrix product at the model's sizes."""
    if clock.device == "cuda":
        m = n = k = size or (8192 if dtype != torch.float32 else 4096)
    elif has_matrix_unit(torch.device("cpu"), dtype):
        m = n = k = size or 2048
    else:
        m, n, k = 512, 1024, 2048
    return 2 * m * n * k / product_seconds(clock, dtype, m, n, k)


def float8_rate(clock: Clock, size: int = 8192) -> float:
    """FLOP/s of an 8-bit product (e4m3) with a bfloat16 result, one scale a matrix."""
    a, b = (torch.randn(size, size, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)

    def call():
        return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / statistics.median(clock.calls(call, REPEAT[clock.device]))


def copy_rate(clock: Clock, elements: int | None = None) -> float:
    """Bytes/s, read and written, of a large copy."""
    source = torch.empty(elements or (1 << 30 if clock.device == "cuda" else 1 << 26), device=clock.device).normal_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = [clock.step(lambda: target.copy_(source)) for _ in range(REPEAT[clock.device])]
    return 2 * source.nbytes / (statistics.median(times) if clock.device == "cuda" else min(times))


def launch_seconds(launches: int = 1000) -> float:
    """What the host takes for one small PyTorch operator on a GPU, the device never behind."""
    x = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / launches


def graph_kernel_seconds(kernels: int = 1000) -> float:
    """What one small kernel after another takes in a replayed CUDA graph."""
    x = torch.zeros(1, device="cuda")
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    clock = Clock("cuda")
    return statistics.median(clock.step(graph.replay) for _ in range(20)) / kernels


def measure(clock: Clock, dtypes: set[torch.dtype], *, small: bool = False) -> dict:
    """{"matmul_tflops": {dtype: ...}, "copy_gbs"} of ``dtypes``; on a GPU "launch_us" and "graph_kernel_us" too.

    What cannot be measured is in "failed" with its reason: no one limit is worth losing the others for. ``small`` is
    for trials.
    """
    limits: dict = {"matmul_tflops": {}}

    def note(into: dict, name: str, call: Callable[[], float], unit: float) -> None:
        try:
            into[name] = call() / unit
        except Exception as error:
            limits.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"

    size = 64 if small else None
    for dtype in sorted(dtypes, key=str):
        note(limits["matmul_tflops"], NAMES[dtype], lambda d=dtype: matmul_rate(clock, d, size), 1e12)
    note(limits, "copy_gbs", lambda: copy_rate(clock, 1 << 12 if small else None), 1e9)
    if clock.device == "cuda":
        if torch.bfloat16 in dtypes:
            note(limits["matmul_tflops"], "float8", lambda: float8_rate(clock), 1e12)
        note(limits, "launch_us", launch_seconds, 1e-6)
        note(limits, "graph_kernel_us", graph_kernel_seconds, 1e-6)
    return limits


@contextlib.contextmanager
def multiplied_by(library: str) -> Iterator[None]:
    """Matrices are multiplied by ``library`` ("cublas", "cublaslt") where PyTorch has the choice, inside the block."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def products_of_a_step(clock: Clock, config, tokens: int, *, repeat: int | None = None) -> list[dict]:
    """The rate of each matrix product of a training step over ``tokens`` tokens, in bfloat16, on a GPU by cuBLAS and
    by cuBLASLt."""
    h, inner, rows = config.hidden_size, config.intermediate_size, []
    for name, n, k in (("qkv", 3 * h, h), ("attention output", h, h), ("in", inner, h), ("out", h, inner)):
        for what, turned, shape in (
            ("forward", "b", (tokens, n, k)), ("d input", "", (tokens, k, n)), ("d weight", "a", (n, k, tokens)),
        ):  # fmt: skip
            flops = 2 * shape[0] * shape[1] * shape[2]
            seconds = product_seconds(clock, torch.bfloat16, *shape, turned=turned, repeat=repeat)
            row = {"shape": f"{name}, {what}: {' x '.join(map(str, shape))}", "ms": 1e3 * seconds,
                   "tflops": flops / seconds / 1e12}  # fmt: skip
            if clock.device == "cuda":
                with multiplied_by("cublaslt"):
                    other = product_seconds(clock, torch.bfloat16, *shape, turned=turned, repeat=repeat)
                row["cublaslt_tflops"] = flops / other / 1e12
            rows.append(row)
    return rows
