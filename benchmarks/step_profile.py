"""Where a step's time goes: PyTorch's profiler over whole steps of ours, by what the time was spent on.

    python benchmarks/step_profile.py --seq 512 --batch 1 [--lengths wikipedia] [--mode encode] [--steps 5]

"floor" is the part's executed FLOPs at the matrix-product rate, or its bytes at the copy rate, both measured in the
same run; what has no entry there is overhead. A profiled step is a little slower than an unobserved one, whose median
is printed beside it.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import measure
import operators
import tables
import torch
import variants
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from workload import MODELS, Workload, model_config

from bert_fast.flops import step_flops

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
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
        measure.synchronize(device)
    seconds: dict[str, float] = {}
    for event in found.events():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        seconds[part_of(event)] = seconds.get(part_of(event), 0.0) + own / 1e6 / steps
    return seconds


def floors(config, batch, train: bool, nsp: bool, rate: float, copy: float, element: int) -> dict[str, float]:
    """Seconds of every part at the machine's limits; matrix products are all of the executed FLOPs but attention's."""
    directions = ("forward", "backward") if train else ("forward",)
    layers, tokens = config.num_hidden_layers, sum(batch.lengths)
    read = batch.predicted + (len(batch.lengths) if nsp else 0) if train else None
    executed = step_flops(config, batch.lengths, batch.predicted if train else 0, train=train, read=read)
    counted = layers * 4 * config.hidden_size * sum(s * s for s in batch.lengths) * (3 if train else 1)
    seconds = {"matrix products": (executed - counted) / rate}
    times = {"embedding_layernorm": 1, "attention": layers, "residual_layernorm": 2 * layers, "bias_gelu": layers}
    if train and read is not None:  # the last layer works on fewer rows after its attention
        times["residual_layernorm"] += -2 + 2 * read / tokens
        times["bias_gelu"] += -1 + read / tokens
    for operator, often in times.items():
        work = operators.WORK[operator](config, batch.lengths, element, element)
        each = sum(work[d].flops / rate + work[d].bytes / copy for d in directions)
        seconds[operator] = often * each
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
    device, train, dtype = options.device, options.mode == "train", DTYPES[options.dtype]
    config = model_config(options.model, dropout=options.dropout)
    batch = Workload().batch(options.batch, options.seq, options.lengths, device)
    variant = variants.build("bert_fast", config, device, train=train, nsp=True, dtype=dtype)
    step = variants.make_step(variant, batch, device, dtype, train=train, optimizer="none")
    step()
    rate, copy = measure.matmul_rate(device, dtype), measure.copy_rate(device)
    unobserved = statistics.median(measure.seconds(step, device) for _ in range(options.steps))
    seconds = seconds_by_part(step, options.steps, device)
    floor = floors(config, batch, train, True, rate, copy, torch.finfo(dtype).bits // 8)

    whole = sum(seconds.values())
    title = f"BERT-{options.model}, {options.mode}, {options.batch} x {options.seq}, {options.lengths} lengths, "
    table = Table(title=title + f"{options.dtype}, dropout {options.dropout}", title_justify="left")
    for column in ("part", "ms", "of the step", "floor ms", "floor of time"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, took in sorted(seconds.items(), key=lambda item: -item[1]):
        low = floor.get(part)
        reached = ("", "") if low is None else (f"{low * 1e3:.1f}", f"{low / took:.0%}")
        table.add_row(part, f"{took * 1e3:.1f}", f"{took / whole:.1%}", *reached)
    table.add_row("all", f"{whole * 1e3:.1f}", "", f"{sum(floor.values()) * 1e3:.1f}",
                  f"{sum(floor.values()) / whole:.0%}", end_section=True)  # fmt: skip
    tables.console.print(table)
    print(f"unobserved step {unobserved * 1e3:.1f} ms; matrix product {rate / 1e9:.0f} GFLOP/s, copy "
          f"{copy / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
