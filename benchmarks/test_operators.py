"""Every operator under pytest-benchmark, ours beside PyTorch: `pytest benchmarks --benchmark-only`.

On a GPU where there is one, else on the CPU, with the cases of operators.py. Times are the host's, so on a GPU they
include the launch; `python benchmarks/run.py --kernels` has the device's own, and the rates. For a narrow table add
`--benchmark-columns=min,median,rounds`.
"""

import functools
import os
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    if "triton" in sys.modules:  # tests/conftest.py came first in this process, and its tests need the interpreter
        pytest.skip("Triton's interpreter is on: run `pytest benchmarks` by itself", allow_module_level=True)
    del os.environ["TRITON_INTERPRET"]  # the interpreter is for tests; it must not be timed

import torch

from benchmarks.clock import Clock, synchronize
from benchmarks.operators import DIRECTIONS, OF_THE_MODEL, Case, build_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZE = {"model": "base", "seq": 512, "batch": 32} if DEVICE == "cuda" else {"model": "base", "seq": 128, "batch": 4}
ROUNDS = 50 if DEVICE == "cuda" else 5


@functools.lru_cache(maxsize=1)
def case_of(operator: str) -> Case:
    return build_case(operator, DEVICE, DTYPE, **SIZE)


@functools.cache
def clock() -> Clock:
    return Clock(DEVICE)


@pytest.mark.parametrize("implementation", ["bert_fast", "pytorch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operator", OF_THE_MODEL)
def test_speed(benchmark, operator, direction, implementation):
    case = case_of(operator)
    call = case.call(direction, ours=implementation == "bert_fast")
    benchmark.group = f"{operator} {direction}, {case.shape}, {str(DTYPE).removeprefix('torch.')}, {DEVICE}"
    benchmark.extra_info["backend"] = case.backend if implementation == "bert_fast" else "torch"

    def run():
        result = call()
        synchronize(DEVICE)
        return result

    def empty_caches():
        clock().empty_caches()
        synchronize(DEVICE)

    benchmark.pedantic(run, setup=empty_caches, rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("operator", OF_THE_MODEL)
def test_both_sides_compute_the_same(operator):
    """Without dropout ours and PyTorch's composition agree: output and every gradient."""
    case = build_case(operator, DEVICE, torch.float32, model="tiny", seq=24, batch=3, dropout=0.0)
    torch.testing.assert_close(case.ours(), case.torch(), rtol=1e-4, atol=1e-4)
    gradients = [case.call("backward", ours=ours)() for ours in (True, False)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
