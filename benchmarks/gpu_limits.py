"""Phase 1: what the device can do. Environment, matrix-product rates, copy bandwidth, what a launch costs."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from gpu_results import Results, raise_if_device_lost, reason
from operators import Stopwatch
from step_model import TOKENS
from workload import model_config

from bert_fast.env import environment


def median_ms(call: Callable[[], object], stopwatch: Stopwatch, repeat: int) -> float:
    """Milliseconds of a call on a cold cache: the median of ``repeat`` calls, after two that do not count."""
    stopwatch(call)
    stopwatch(call)
    return statistics.median(stopwatch(call) for _ in range(repeat))


@contextlib.contextmanager
def multiplied_by(library: str) -> Iterator[None]:
    """Matrices are multiplied by ``library`` ("cublas", "cublaslt") where PyTorch has the choice, inside the block."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def product_rate(
    device: str, dtype: torch.dtype, m: int, n: int, k: int, stopwatch: Stopwatch, repeat: int, turned: str = "b"
) -> float:
    """FLOP/s of the library's (m, k) x (k, n) on random data; ``turned`` names the factors that lie transposed in
    memory: a linear's weight in its forward ("b"), none for d input (""), the output's gradient for d weight ("a")."""

    def factor(name: str, rows: int, columns: int) -> torch.Tensor:
        if name in turned:
            return torch.randn(columns, rows, device=device).to(dtype).T
        return torch.randn(rows, columns, device=device).to(dtype)

    a, b = factor("a", m, k), factor("b", k, n)
    return 2 * m * n * k / median_ms(lambda: a @ b, stopwatch, repeat) * 1e3


def copy_rate(device: str, smoke: bool, stopwatch: Stopwatch, repeat: int) -> float:
    """Bytes/s, read and written, of a copy of 4 GiB."""
    source = torch.randn((1 << 12) if smoke else (1 << 30), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), stopwatch, repeat) * 1e3


def float8_rate(device: str, size: int, stopwatch: Stopwatch, repeat: int) -> float:
    """FLOP/s of an 8-bit product (e4m3) with a bfloat16 result, one scale a matrix."""
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def call():
        return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / median_ms(call, stopwatch, repeat) * 1e3


def launch_seconds(device: str, launches: int) -> float:
    """What the host takes for one small PyTorch operator, the device never behind."""
    x = torch.zeros(1, device=device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(launches):
        x.add_(1)
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / launches


def graph_kernel_seconds(device: str, kernels: int, repeat: int) -> float:
    """What one small kernel after another takes in a replayed graph."""
    x = torch.zeros(1, device=device)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    times = []
    for _ in range(repeat + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) / kernels / 1e3


def run(results: Results, options) -> None:
    """Fills "environment", "limits" and "products" (the rates at the shapes of a step's own products)."""
    device, smoke = options.device, options.smoke
    results.put("environment", environment())
    size, repeat = (64, 2) if smoke else (8192, 20)
    stopwatch = Stopwatch(device)
    limits: dict = {"matmul_tflops": {}}
    results.put("limits", limits)

    def measure(name: str, call: Callable[[], float], unit: float, into: dict = limits) -> None:
        try:
            into[name] = call() / unit
            print(f"   {name}: {into[name]:.4g}", flush=True)
        except Exception as error:
            # fp8 is missing on older parts, and no one limit is worth losing the others for
            limits.setdefault("failed", {})[name] = reason(error)
            raise_if_device_lost()
        results.save()

    rates = limits["matmul_tflops"]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        n = size if dtype == torch.bfloat16 else size // 2
        measure(name, lambda d=dtype, n=n: product_rate(device, d, n, n, n, stopwatch, repeat), 1e12, rates)
    if device == "cuda":
        measure("float8", lambda: float8_rate(device, size, stopwatch, repeat), 1e12, rates)
    measure("copy_gbs", lambda: copy_rate(device, smoke, stopwatch, repeat), 1e9)
    if device == "cuda":
        measure("launch_us", lambda: launch_seconds(device, 1000), 1e-6)
        measure("graph_kernel_us", lambda: graph_kernel_seconds(device, 1000, 20), 1e-6)

    tokens = 64 if smoke else TOKENS
    for model in ("micro",) if smoke else ("large", "base"):
        config = model_config(model, dropout=0.1)
        h, inner = config.hidden_size, config.intermediate_size
        for name, n, k in (("qkv", 3 * h, h), ("attention output", h, h), ("in", inner, h), ("out", h, inner)):
            for what, turned, shape in (
                ("forward", "b", (tokens, n, k)), ("d input", "", (tokens, k, n)), ("d weight", "a", (n, k, tokens)),
            ):  # fmt: skip
                facts = {"model": model, "shape": f"{model} {name}, {what}: {' x '.join(map(str, shape))}"}

                def case(shape=shape, turned=turned) -> dict:
                    arguments = device, torch.bfloat16, *shape, stopwatch, max(2, repeat // 2), turned
                    rate = product_rate(*arguments)
                    row = {"tflops": rate / 1e12, "ms": 2e3 * shape[0] * shape[1] * shape[2] / rate}
                    if device == "cuda":  # a plain product is cuBLAS's unless a program says otherwise
                        with multiplied_by("cublaslt"):
                            row["cublaslt_tflops"] = product_rate(*arguments) / 1e12
                    return row

                results.case(1, facts["shape"], "products", facts, case)
