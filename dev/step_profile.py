"""Where a step's time goes: PyTorch's profiler over whole steps of ours, by what the time was spent on or by kernel.

    python dev/step_profile.py --seq 512 --batch 1 [--lengths wikipedia] [--mode encode] [--steps 5]

"floor" is the part's executed FLOPs at the matrix-product rate, or its bytes at the copy rate, both measured in the
same run; what has no entry there is overhead. A profiled step is a little slower than an unobserved one, whose median
is printed beside it.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works on a checkout that is not installed

from benchmarks import limits, operators
from benchmarks.clock import Clock, synchronize
from benchmarks.contenders import Setting, build
from benchmarks.options import DTYPES
from benchmarks.steps import executed_flops
from benchmarks.tables import Table
from benchmarks.workload import MODELS, Batch, Workload, model_config

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::addmv", "aten::linear", "aten::matmul")


def part_of(event) -> str:
    """The line of the table that a profiler event's own time belongs to: that of the operator it was called by."""
    if event.name in PRODUCTS:
        return "matrix products"
    caller = event
    while caller is not None and not caller.name.startswith("bert_fast::"):
        caller = caller.cpu_parent
    if caller is not None:
        return re.sub(r"_(fwd|bwd)(_|_add)?$", "", caller.name.removeprefix("bert_fast::"))
    return "PyTorch's other operators" if event.name.startswith("aten::") else "autograd and Python"


def seconds_by_part(step, steps: int, device: str) -> dict[str, float]:
    """Seconds a step of every part: own time of the operators (on a GPU: of their kernels)."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(steps):
            step()
        synchronize(device)
    seconds: dict[str, float] = {}
    for event in found.events():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[part_of(event)] = seconds.get(part_of(event), 0.0) + own / 1e6 / steps
    return seconds


def floors(config, batch: Batch, setting: Setting, rate: float, copy: float) -> dict[str, float]:
    """Seconds of every part at the machine's limits; matrix products are all of the executed FLOPs but attention's."""
    train, element = setting.train, setting.dtype.itemsize
    directions = ("forward", "backward") if train else ("forward",)
    layers, tokens = config.num_hidden_layers, sum(batch.lengths)
    read = batch.predicted + (len(batch.lengths) if setting.nsp else 0) if train else None
    executed = executed_flops(config, batch, "bert_fast", "packed", setting)
    counted = layers * 4 * config.hidden_size * sum(s * s for s in batch.lengths) * (3 if train else 1)
    seconds = {"matrix products": (executed - counted) / rate}
    times = {"embedding_layernorm": 1, "attention": layers, "residual_layernorm": 2 * layers, "bias_gelu": layers}
    if train and read is not None:  # the last layer works on fewer rows after its attention
        times["residual_layernorm"] += -2 + 2 * read / tokens
        times["bias_gelu"] += -1 + read / tokens
    for operator, often in times.items():
        work = [operators.work_of(operator, d, config, batch.lengths, element, element) for d in directions]
        seconds[operator] = often * sum(w.flops / rate if w.products else w.bytes / copy for w in work)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", choices=("full", "wikipedia", "corpus"), default="full")
    parser.add_argument("--mode", choices=("train", "encode"), default="train")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    setting = Setting(options.device, DTYPES[options.dtype], options.mode == "train")
    config = model_config(options.model, dropout=options.dropout)
    batch = Workload().batch(options.batch, options.seq, options.lengths, options.device)
    step, clock = build("bert_fast", config, setting).step(batch), Clock(options.device)
    step()
    rate, copy = limits.matmul_rate(clock, setting.dtype), limits.copy_rate(clock)
    unobserved = statistics.median(clock.step(step) for _ in range(options.steps))
    seconds = seconds_by_part(step, options.steps, options.device)
    floor = floors(config, batch, setting, rate, copy)

    whole = sum(seconds.values())
    rows = []
    for part, took in sorted(seconds.items(), key=lambda item: -item[1]):
        low = floor.get(part)
        reached = ("", "") if low is None else (f"{low * 1e3:.1f}", f"{low / took:.0%}")
        rows.append([part, f"{took * 1e3:.1f}", f"{took / whole:.1%}", *reached])
    lowest = sum(floor.values())
    rows.append(["all", f"{whole * 1e3:.1f}", "", f"{lowest * 1e3:.1f}", f"{lowest / whole:.0%}"])
    title = f"BERT-{options.model}, {options.mode}, {options.batch} x {options.seq}, {options.lengths} lengths, "
    title += f"{options.dtype}, dropout {options.dropout}"
    Table(["part", "ms", "of the step", "floor ms", "floor of time"], rows, title).show()
    print(f"unobserved step {unobserved * 1e3:.1f} ms; matrix product {rate / 1e9:.0f} GFLOP/s, copy "
          f"{copy / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
