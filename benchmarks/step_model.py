"""What a training step should cost: FLOPs and bytes of every operator, and the time they take at stated ceilings.

    python benchmarks/step_model.py [--weights bfloat16|float32] [--of large 512 full] [--results FILE]

A prediction, not a measurement. Each operator is charged what its code moves and computes (its kernel's docstring),
one launch after the other: products at the matrix-product rate, attention at the best published rates, everything else
at the rate of a device-to-device copy. ``--results`` takes the ceilings from a file that ``benchmarks/gpu.py`` wrote.

What the prediction leaves out, and by what a measurement will differ: products of other shapes than 8192^3 are slower
than the rate they are charged at, kernels reach less than the copy rate, and clocks fall under load.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Works on a checkout that nobody installed; the siblings are scripts, not a package.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from operators import masked_positions
from workload import model_config, wikipedia_quantiles

from bert_fast.flops import step_flops

CASES = [(model, seq, kind) for model in ("base", "large") for seq in (128, 512) for kind in ("full", "wikipedia")]
TOKENS = 32768  # real tokens of a step
WEIGHTS = ("bfloat16", "float32")  # float32: weights and residual stream in float32 under bfloat16 autocast
MLM_CHUNK = 1024  # positions whose logits exist at a time (bert_fast.ops.mlm_loss)
TILE = 64  # queries and keys of an attention tile (kernels/attention.py, 16-bit dtypes at head size 64)


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device. FLOP/s, bytes/s read and written, seconds from one kernel of a graph to the next.

    The defaults are for one H100 and come from elsewhere: a bfloat16 product of 8192^3 and a device-to-device copy as
    measured by others on such a device, attention as published for head size 64 and 512 tokens without dropout
    (forward: Triton, backward: FlashAttention-3). The time between kernels is an assumption.
    """

    matmul: float = 798e12
    copy: float = 3.0e12
    attention_forward: float = 340e12
    attention_backward: float = 272e12
    between_kernels: float = 1e-6


@dataclass(frozen=True)
class Entry:
    """One line of a step: ``times`` calls of ``operator``, each of ``flops``, ``bytes`` and ``kernels`` launches.

    ``direction`` is forward, backward or update; ``rate`` names the ceiling of the FLOPs. ``least`` are the bytes that
    no implementation of the operator by itself can do without.
    """

    operator: str
    direction: str
    times: int
    flops: float = 0
    bytes: float = 0
    least: float | None = None
    rate: str = "matmul"
    kernels: int = 1

    def seconds(self, ceilings: Ceilings) -> float:
        """Of all ``times`` calls."""
        once = self.flops / getattr(ceilings, self.rate) + self.bytes / ceilings.copy
        return self.times * (once + self.kernels * ceilings.between_kernels)


def tiled(lengths: Sequence[int], block_m: int = TILE, block_n: int = TILE) -> tuple[int, int]:
    """(useful, computed) scores of one head: S^2 of each sequence, and those of the tiles that cover them."""
    useful = sum(s * s for s in lengths)
    computed = sum(-(-s // block_m) * block_m * -(-s // block_n) * block_n for s in lengths)
    return useful, computed


def lengths_of(kind: str, seq: int, tokens: int = TOKENS) -> list[int]:
    """Sequences of about ``tokens`` tokens in all: of ``seq`` tokens each, or of Wikipedia's lengths."""
    if kind == "full":
        return [seq] * max(1, tokens // seq)
    mean = sum(wikipedia_quantiles(64, seq)) / 64
    return wikipedia_quantiles(max(2, round(tokens / mean)), seq)


def parameters(config) -> int:
    """Elements of BertForPreTraining's parameters, the tied table once."""
    h, inner = config.hidden_size, config.intermediate_size
    layer = 4 * (h * h + h) + 2 * h * inner + inner + h + 4 * h
    tables = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * h + 2 * h
    heads = 2 * (h * h + h) + 2 * h + config.vocab_size + 2 * h + 2
    return config.num_hidden_layers * layer + tables + heads


def step(config, lengths: Sequence[int], weights: str = "bfloat16", optimizer: str = "lamb") -> list[Entry]:
    """Every line of a packed training step of BertForPreTraining over sequences of ``lengths`` tokens.

    ``weights``: the dtype of parameters and residual stream; products are bfloat16 in any case.
    """
    e, r = 2, 2 if weights == "bfloat16" else 4
    layers, h, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    tokens, masked, vocabulary = sum(lengths), masked_positions(lengths), config.vocab_size
    th, ti, vh = tokens * h, tokens * inner, vocabulary * h
    _, scores = tiled(lengths)
    tables = r * h * (vocabulary + config.max_position_embeddings + config.type_vocab_size)
    lines = [
        # word row and out; backward: word row, d out, d z written in float32 and read by three sorted sums, tables
        Entry("embedding_layernorm", "forward", 1, bytes=2 * th * r),
        Entry(
            "embedding_layernorm", "backward", 1, bytes=th * (2 * r + 16) + tables, least=2 * th * r + tables, kernels=9
        ),
    ]
    products = {
        "qkv": 3 * h * h,
        "attention output": h * h,
        "feed-forward in": h * inner,
        "feed-forward out": h * inner,
    }
    for name, size in products.items():
        lines.append(Entry(f"product {name}", "forward", layers, flops=2 * tokens * size))
        lines.append(Entry(f"product {name}", "backward", layers, flops=4 * tokens * size, kernels=2))
    lines += [
        # q, k and v are three parameters: put together anew in each step (under autocast then rounded)
        Entry(
            "weights q, k, v in one", "forward", layers, bytes=3 * h * h * (2 * r + (0 if r == e else r + e)), least=0
        ),
        Entry("bias of q, k, v", "backward", layers, bytes=3 * th * e),
        Entry("attention", "forward", layers, flops=4 * scores * h, rate="attention_forward"),
        # seven products where five would do: dq and dkv each make scores and dP
        Entry("attention", "backward", layers, flops=14 * scores * h, rate="attention_backward", kernels=2),
        Entry("residual_layernorm", "forward", 2 * layers, bytes=th * (e + 3 * r)),
        Entry("residual_layernorm", "backward", 2 * layers, bytes=th * (3 * r + e), kernels=2),
        Entry("bias_gelu", "forward", layers, bytes=2 * ti * e),
        Entry("bias_gelu", "backward", layers, bytes=3 * ti * e, kernels=2),
    ]
    if r != e:
        weight = layers * (h * h + 2 * h * inner)
        lines += [
            Entry("rounding of activations", "forward", 2 * layers, bytes=th * (r + e), least=0),
            Entry("rounding of gradients", "backward", 2 * layers, bytes=th * (r + e), least=0),
            Entry("rounding of weights", "forward", 1, bytes=weight * (r + e), least=0, kernels=3 * layers),
            Entry("rounding of weight gradients", "backward", 1, bytes=(weight + 3 * layers * h * h) * (r + e), least=0,
                  kernels=4 * layers),
        ]  # fmt: skip
    mh, mv, chunks = masked * h, masked * vocabulary, -(-masked // MLM_CHUNK)
    lines += [
        # rows gathered for the head and the pooler; backward: two (T, H) of zeros, filled, and two sums
        Entry("gather of masked rows", "forward", 2, bytes=mh * r),
        Entry("gather of masked rows", "backward", 2, bytes=th * r + th * 3 * r + mh * r, least=mh * 2 * r, kernels=3),
        Entry("MLM transform", "forward", 1, flops=2 * mh * h, bytes=mh * (2 * e + 2 * r), kernels=4),
        Entry("MLM transform", "backward", 1, flops=4 * mh * h, bytes=mh * (5 * e + 2 * r), kernels=6),
        # logits made, read twice and overwritten; sums of the bias; d word in float32, read and written per chunk
        Entry("mlm_loss", "forward", 1, flops=6 * mh * vocabulary,
              bytes=mv * (3 * e + 2) + vh * (r + e) + 4 * vh * (2 * chunks - 1) + vh * (4 + r), least=4 * vh,
              kernels=4 * chunks + 8),
        Entry("mlm_loss", "backward", 1, bytes=2 * (mh * e + vh * r), least=0),
        Entry("sum of the tied table's gradients", "backward", 1, bytes=3 * vh * r, least=0),
        Entry("pooler and next sentence", "forward", 1, flops=2 * len(lengths) * h * (h + 2), kernels=6),
        Entry("pooler and next sentence", "backward", 1, flops=4 * len(lengths) * h * (h + 2), kernels=12),
    ]  # fmt: skip
    return [*lines, *update(config, weights, optimizer)]


def update(config, weights: str, optimizer: str) -> list[Entry]:
    """The optimiser over every parameter: the gradients' norm, then one pass (AdamW) or two (LAMB).

    Float32 moments and weights; with 16-bit weights those are written by the last pass.
    """
    n, g = parameters(config), 2 if weights == "bfloat16" else 4
    copy = 2 if weights == "bfloat16" else 0
    lines = [Entry("gradient norm", "update", 1, bytes=n * g, kernels=2)]
    if optimizer == "adamw":
        return [*lines, Entry("adamw", "update", 1, bytes=n * (g + 24 + copy))]
    # moments and the norms of weight and update; then the update again from the moments, and the weights written
    return [
        *lines,
        Entry("lamb", "update", 1, bytes=n * ((g + 20) + (16 + copy)), least=n * (g + 24 + copy), kernels=3),
    ]


@dataclass(frozen=True)
class Prediction:
    """A step at the ceilings. ``mfu`` counts the full formula (bert_fast/flops.py) over the matrix-product rate."""

    seconds: float
    sequences_per_s: float
    tokens_per_s: float
    mfu: float
    shares: dict[str, float]  # of the step, by kind of work


KINDS = {"products": ("product", "MLM transform", "mlm_loss", "pooler"), "attention": ("attention",),
         "optimiser": ("gradient norm", "lamb", "adamw")}  # fmt: skip


def kind_of(entry: Entry) -> str:
    return next((kind for kind, starts in KINDS.items() if entry.operator.startswith(starts)), "rest")


def predict(config, lengths: Sequence[int], lines: Sequence[Entry], ceilings: Ceilings) -> Prediction:
    """The step ``lines`` over sequences of ``lengths`` tokens."""
    seconds = sum(line.seconds(ceilings) for line in lines)
    flops = step_flops(config, lengths, masked_positions(lengths), train=True)
    shares = dict.fromkeys((*KINDS, "rest"), 0.0)
    for line in lines:
        shares[kind_of(line)] += line.seconds(ceilings) / seconds
    return Prediction(
        seconds, len(lengths) / seconds, sum(lengths) / seconds, flops / seconds / ceilings.matmul, shares
    )


def operator_seconds(
    config, lengths: Sequence[int], operator: str, direction: str, ceilings: Ceilings, weights: str = "bfloat16"
) -> float:
    """One call of an operator (a name of benchmarks/operators.py) forward or backward, at the ceilings."""
    found = [x for x in step(config, lengths, weights) if (x.operator, x.direction) == (operator, direction)]
    if not found:
        raise ValueError(f"the step has no line {operator!r} {direction!r}")
    return sum(replace(line, times=1).seconds(ceilings) for line in found)


def activations(config, weights: str = "bfloat16") -> list[tuple[str, int, str]]:
    """(what, bytes per token and layer, why it is kept) from the forward to the backward."""
    e, r = 2, 2 if weights == "bfloat16" else 4
    h, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    return [
        ("input of the layer, as the products read it", e * h, "d W of the qkv product"),
        ("q, k, v", 3 * e * h, "attention's backward makes scores and d P from them"),
        ("attention's output", e * h, "d W of the output product; rowsum(d O * O)"),
        ("log-sum-exp of the scores", 4 * heads, "probabilities in the backward without a second softmax"),
        ("sum before the first LayerNorm", r * h, "its normalised rows"),
        ("first LayerNorm's output", e * h, "d W of the feed-forward's first product"),
        ("feed-forward's first product", e * inner, "derivative of GELU, which is computed again"),
        ("GELU's output", e * inner, "d W of the feed-forward's second product"),
        ("sum before the second LayerNorm", r * h, "its normalised rows"),
        ("mean and 1/deviation of both", 16, "LayerNorm's backward"),
    ]


def ceilings_of(results: dict) -> Ceilings:
    """The ceilings that a file of benchmarks/gpu.py measured; attention's and what is missing stay as they are."""
    limits = results.get("limits", {})
    found = {
        "matmul": limits.get("matmul_tflops", {}).get("bfloat16", 0) * 1e12,
        "copy": limits.get("copy_gbs", 0) * 1e9,
        "between_kernels": limits.get("graph_kernel_us", 0) * 1e-6,
    }
    return replace(Ceilings(), **{name: value for name, value in found.items() if value})


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(ceilings: Ceilings, weights: str = "bfloat16", optimizer: str = "lamb") -> str:
    """A line for each of CASES."""
    rows = []
    for model, seq, kind in CASES:
        config, lengths = model_config(model, dropout=0.1), lengths_of(kind, seq)
        p = predict(config, lengths, step(config, lengths, weights, optimizer), ceilings)
        shares = [f"{100 * p.shares[key]:.0f} %" for key in ("products", "attention", "rest", "optimiser")]
        rows.append([f"{model} {seq}, {kind}", f"{len(lengths)}", f"{1e3 * p.seconds:.1f}", f"{p.sequences_per_s:.0f}",
                     f"{p.tokens_per_s / 1e3:.0f}k", f"{100 * p.mfu:.0f} %", *shares])  # fmt: skip
    header = ["BERT", "sequences", "step ms", "sequences/s", "tokens/s", "MFU", "products", "attention", "rest",
              "optimiser"]  # fmt: skip
    return markdown_table(header, rows)


def detail(
    model: str, seq: int, kind: str, ceilings: Ceilings, weights: str = "bfloat16", optimizer: str = "lamb"
) -> str:
    """A line for each entry of one case."""
    config, lengths = model_config(model, dropout=0.1), lengths_of(kind, seq)
    lines = step(config, lengths, weights, optimizer)
    total = sum(line.seconds(ceilings) for line in lines)
    rows = []
    for x in lines:
        extra = "" if x.least is None or not x.bytes else f"{100 * (1 - x.least / x.bytes):.0f} %"
        ms, share = 1e3 * x.seconds(ceilings), x.seconds(ceilings) / total
        rows.append([f"{x.operator}, {x.direction}", str(x.times), f"{x.times * x.flops / 1e12:.2f}",
                     f"{x.times * x.bytes / 1e9:.2f}", extra, f"{ms:.2f}", f"{100 * share:.1f} %"])  # fmt: skip
    header = ["operator", "calls", "TFLOP", "GB", "avoidable", "ms", "of the step"]
    return markdown_table(header, rows)


def memory(weights: str = "bfloat16") -> str:
    """Bytes per token and layer, base and large, and why each is kept."""
    base, large = (activations(model_config(model, dropout=0.1), weights) for model in ("base", "large"))
    rows = [[what, str(b), str(size), why] for (what, b, _), (_, size, why) in zip(base, large, strict=True)]
    rows.append(["all", str(sum(x[1] for x in base)), str(sum(x[1] for x in large)), ""])
    return markdown_table(["kept", "base", "large", "for"], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16")
    parser.add_argument("--optimizer", choices=("lamb", "adamw"), default="lamb")
    parser.add_argument("--of", nargs=3, metavar=("MODEL", "SEQ", "LENGTHS"), default=("large", "512", "full"))
    parser.add_argument("--results", type=Path, help="a file of benchmarks/gpu.py: its ceilings in place of the stated")
    options = parser.parse_args(arguments)
    model, seq, kind = options.of
    if (model, int(seq) if seq.isdigit() else 0, kind) not in CASES:
        parser.error(f"--of {' '.join(options.of)}: known are {'; '.join(f'{m} {s} {k}' for m, s, k in CASES)}")
    ceilings = Ceilings()
    if options.results:
        ceilings = ceilings_of(json.loads(options.results.read_text(encoding="utf-8")))
    print(f"A prediction, at {ceilings}\n")
    print(summary(ceilings, options.weights, options.optimizer))
    print(f"\n{model} {seq}, {kind}, {options.weights} weights\n")
    print(detail(model, int(seq), kind, ceilings, options.weights, options.optimizer))
    print("\nbytes per token and layer, kept for the backward\n")
    print(memory(options.weights))
    return 0


if __name__ == "__main__":
    sys.exit(main())
