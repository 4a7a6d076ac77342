"""The optimisers alone on BERT's parameters, ours beside PyTorch's, interleaved; gradients clipped to norm 1.

    python benchmarks/optimizers.py [--model base] [--seconds 60]

"GB/s" is what an update has to move (float32; see BYTES) over its time, beside the copy bandwidth of the same run.
"""

import argparse
import statistics
import sys
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import measure
import torch
import variants
from workload import MODELS, model_config

import bert_fast
from bert_fast import optim

# Bytes an element: the norm reads g; AdamW reads w, g, m, v and writes w, m, v; LAMB reads those, writes m and v, then
# reads w, m, v and writes w. PyTorch's clipping reads g for the norm, then reads and writes it.
BYTES = {"norm": 4, "torch norm and clipping": 12, "AdamW": 32, "torch AdamW, fused": 40, "LAMB": 44}
OURS = {"torch AdamW, fused": "AdamW", "torch AdamW, foreach": "AdamW", "LAMB in PyTorch": "LAMB"}


def updates(model: torch.nn.Module) -> dict:
    """A function for each contender that does one whole update of ``model``."""
    groups = optim.parameter_groups(model)
    parameters = [p for group in groups for p in group["params"]]

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def clipped(optimizer: torch.optim.Optimizer):
        def update() -> None:
            clip()
            optimizer.step()

        return update

    fresh = lambda: [dict(group) for group in groups]  # noqa: E731
    return {
        "norm": lambda: optim.grad_norm(parameters),
        "torch norm and clipping": clip,
        "AdamW": optim.AdamW(fresh(), lr=1e-6, max_grad_norm=1.0).step,
        "torch AdamW, fused": clipped(torch.optim.AdamW(fresh(), lr=1e-6, fused=True)),
        "torch AdamW, foreach": clipped(torch.optim.AdamW(fresh(), lr=1e-6, foreach=True)),
        "LAMB": optim.Lamb(fresh(), lr=1e-6, max_grad_norm=1.0).step,
        "LAMB in PyTorch": clipped(variants.ForeachLamb(fresh())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring, after one round of warming up")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(options.device):
        model = bert_fast.BertForPreTraining(model_config(options.model, dropout=0.0))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    elements, contenders = sum(p.numel() for p in model.parameters()), updates(model)
    copy = measure.copy_rate(options.device)
    measure.interleave(contenders, 1, options.device, lambda _: None)
    once = sum(t[0] for t in measure.interleave(contenders, 1, options.device, lambda _: None).values())
    times = measure.interleave(contenders, max(3, int(options.seconds / once)), options.device, lambda _: None)
    copy = statistics.median([copy, measure.copy_rate(options.device)])
    print(
        f"{elements} parameters, {torch.get_num_threads()} threads, {len(times['norm'])} rounds, {copy / 1e9:.1f} GB/s"
    )
    print(f"{'':24} {'ms':>8} {'GB/s':>6} {'of copy':>8} {'over ours':>10}")
    for name, taken in times.items():
        middle = statistics.median(taken)
        rate = BYTES[name] * elements / middle if name in BYTES else None
        shown = f"{rate / 1e9:6.1f} {rate / copy:8.0%}" if rate else " " * 15
        ratio = f"{measure.paired_ratio(taken, times[OURS[name]]):10.2f}" if name in OURS else ""
        print(f"{name:24} {1e3 * middle:8.1f} {shown} {ratio}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
