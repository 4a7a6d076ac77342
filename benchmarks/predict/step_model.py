"""What a training step should cost: FLOPs and bytes of every operator, and the time they take at stated ceilings.

    python -m benchmarks.predict.step_model [--device H100] [--weights bfloat16|float32] [--of large 512 full]

A prediction, not a measurement. Each operator is charged what its code moves and computes (its kernel's docstring),
one launch after the other: products at the matrix-product rate, attention at the best published rates, everything else
at the rate of a device-to-device copy, or of instructions, exponentials, shared memory or the L2 cache where one of
those takes longer. ``--results`` takes the ceilings from a file that ``benchmarks/gpu.py`` wrote.

What the prediction leaves out, and by what a measurement will differ: products of other shapes than 8192^3 are slower
than the rate they are charged at, kernels reach less than the copy rate, and clocks fall under load. Vectors of T or H
elements and what stays in the L2 cache (sums of a few MB that programs leave for another kernel) are not charged.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.tables import Table
from benchmarks.workload import lengths_of, masked_positions, model_config
from bert_fast import ops
from bert_fast.data import capacities
from bert_fast.flops import step_flops

CASES = [(model, seq, kind) for model in ("base", "large") for seq in (128, 512) for kind in ("full", "wikipedia")]
WEIGHTS = ("bfloat16", "float32")  # float32: products and hidden states in bfloat16, as `pretrain` has it
TILE = 64  # queries and keys of an attention tile (kernels/attention.py, 16-bit dtypes at head size 64)
# Instructions of one lane an element, counted in what the kernels compile to (docs/log/performance.md). Of attention's
# inner loops on sm_90: what dropout adds to a computed score (Philox, the comparison), forward and in dq and dkv.
DROPOUT_FORWARD, DROPOUT_DQ, DROPOUT_DKV = 5.3, 5.1, 6.6
# In kernels/experiments/attention_hopper.py: of its forward, and of its backward, where they are drawn once.
DROPOUT_ASYNCHRONOUS, DROPOUT_ONE_PASS = 4.2, 7.1
GELU_FORWARD, GELU_BACKWARD = 21, 25
# KiB that go to and from shared memory for a tile of 64 x 64 scores at head size 64 in 16 bits, each operand of a
# product once. Forward: Q and K for S, V for O, K and V copied in. dq: Q, K, dO and V for S and dP, K for dQ, K and V
# copied in. dkv: the same two products; P and dS written, and read as left operands beside dO and Q; Q and dO copied
# in. Those of attention_hopper.py: the forward with half of the copies, the backward by its docstring. On sm_80, where
# each warp reads the right operand for itself, it is more; on sm_100, where operands may lie in tensor memory, less.
SHARED_FORWARD, SHARED_DQ, SHARED_DKV, SHARED_ASYNCHRONOUS, SHARED_ONE_PASS = 40, 56, 96, 32, 112
# KiB that come out of the L2 cache: two blocks of 64 rows a tile, in each kernel; a block of 128 halves them.
L2_KERNEL = 16
EMBEDDING_BACKWARD = 52 + 3 * 12  # d z; a sum of its rows for each table


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device: FLOP/s, bytes/s read and written, instructions/s of one lane, seconds.

    The defaults are for one H100 SXM. By others, measured on one: a bfloat16 product of 8192^3, a device-to-device
    copy; published: attention for head size 64 and 512 tokens without dropout (forward: Triton, backward:
    FlashAttention-3). From its data sheet: 132 multiprocessors of 128 lanes at 1.755 GHz; from the CUDA C++
    Programming Guide: 16 exponentials and 128 bytes of shared memory a clock and multiprocessor. No rate of its L2
    cache is published: infinite. The time from one kernel of a graph to the next, and what the host takes to launch one
    from Python (a PyTorch operator and a Triton kernel alike), are assumptions, of every device.
    """

    matmul: float = 798e12
    copy: float = 3.0e12
    attention_forward: float = 340e12
    attention_backward: float = 272e12
    instructions: float = 132 * 128 * 1.755e9
    exponentials: float = 132 * 16 * 1.755e9
    shared: float = 132 * 128 * 1.755e9
    l2: float = math.inf
    between_kernels: float = 1e-6
    launch: float = 10e-6


def _nominal(
    matmul: float, copy: float, multiprocessors: int, lanes: int, clock: float, l2: float = math.inf
) -> Ceilings:
    """From a data sheet alone: dense bfloat16 FLOP/s and bytes/s as printed, which no product and no copy reaches, and
    attention as fast as its products, exponentials and shared memory let it be."""
    each = multiprocessors * clock
    return Ceilings(matmul, copy, matmul, matmul, lanes * each, 16 * each, 128 * each, l2)


DEVICES = {
    # 80 GB SXM: data sheet; 16 exponentials and 128 bytes by the Programming Guide; the L2 cache by NVIDIA's A100
    # whitepaper, 5120 bytes a clock. No attention of 512 tokens is published for it at head size 64.
    "A100": _nominal(312e12, 2.039e12, 108, 64, 1.41e9, 5120 * 1.41e9),
    "H100": Ceilings(),
    # An H100 with HBM3e, 4.8 TB/s by its data sheet; by others, on one: products of 769 to 798 TFLOP/s, copy 4.3 TB/s.
    "H200": Ceilings(copy=4.3e12),
    # Data sheet; exponentials and shared memory a clock as on Hopper, by FlashAttention-4 (Zadouri et al., 2026), and
    # 1.85 GHz: the clock at which 148 multiprocessors of 8192 FLOPs a clock have the data sheet's rate.
    "B200": _nominal(2.25e15, 8.0e12, 148, 128, 1.85e9),
}


def stated(device: str) -> Ceilings:
    """Those of the GPU that ``device`` names ("NVIDIA H200"); an H100's where it names none of DEVICES."""
    return next((ceilings for name, ceilings in DEVICES.items() if name in device), DEVICES["H100"])


BESIDE = ("instructions", "exponentials", "shared", "l2")  # what takes its time beside products and memory


@dataclass(frozen=True)
class Entry:
    """One line of a step: ``times`` calls of ``operator``, each of ``flops``, ``bytes`` and ``kernels`` launches.

    ``direction`` is forward, backward or update; ``rate`` names the ceiling of the FLOPs. ``least`` are the bytes that
    no implementation of the operator by itself can do without. ``instructions`` (of one lane), ``exponentials`` and
    bytes to and from ``shared`` memory and the ``l2`` cache take their time while memory is read and written. A call on
    some of the rows is a part of one of ``times``.
    """

    operator: str
    direction: str
    times: float
    flops: float = 0
    bytes: float = 0
    least: float | None = None
    rate: str = "matmul"
    kernels: int = 1
    instructions: float = 0
    exponentials: float = 0
    shared: float = 0
    l2: float = 0

    def seconds(self, ceilings: Ceilings) -> float:
        """Of all ``times`` calls."""
        once = self.flops / getattr(ceilings, self.rate) + self.bytes / ceilings.copy
        once = max(once, *(getattr(self, name) / getattr(ceilings, name) for name in BESIDE))
        return self.times * (once + self.kernels * ceilings.between_kernels)


def tiled(lengths: Sequence[int], block_m: int = TILE, block_n: int = TILE) -> tuple[int, int]:
    """(useful, computed) scores of one head: S^2 of each sequence, and those of the tiles that cover them."""
    useful = sum(s * s for s in lengths)
    computed = sum(-(-s // block_m) * block_m * -(-s // block_n) * block_n for s in lengths)
    return useful, computed


def parameters(config) -> int:
    """Elements of BertForPreTraining's parameters, the tied table once."""
    h, inner = config.hidden_size, config.intermediate_size
    layer = 4 * (h * h + h) + 2 * h * inner + inner + h + 4 * h
    tables = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * h + 2 * h
    heads = 2 * (h * h + h) + 2 * h + config.vocab_size + 2 * h + 2
    return config.num_hidden_layers * layer + tables + heads


def step(
    config, lengths: Sequence[int], weights: str = "bfloat16", optimizer: str = "lamb", joined: bool = True
) -> list[Entry]:
    """Every line of a packed training step of BertForPreTraining over sequences of ``lengths`` tokens.

    ``weights``: the dtype of parameters and their gradients; products and hidden states are bfloat16 in any case.
    ``joined``: the tied table's two gradients meet in one buffer, as in every forward that is not compiled. A
    micro-batch that is the first of its update, and its last: for what others cost besides see :func:`accumulation`.
    """
    lines = [*encoder(config, lengths, weights), *heads(config, lengths, weights, joined)]
    return [*lines, *update(config, weights, optimizer)]


def encoder(config, lengths: Sequence[int], weights: str) -> list[Entry]:
    """The layers. The last one makes keys, values and attention for every token, and what follows only where its
    output is read: at the masked positions and each [CLS]."""
    e, w = 2, 2 if weights == "bfloat16" else 4
    layers, h, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    tokens, read = sum(lengths), rows_read(lengths)
    often = layers - 1 + read / tokens  # after attention, in layers of all tokens
    th, ti, rh = tokens * h, tokens * inner, (read if read < tokens else 0) * h
    lines = []
    for name, size, times in (
        ("qkv", 3 * h * h, layers), ("attention output", h * h, often), ("feed-forward in", h * inner, often),
        ("feed-forward out", h * inner, often),
    ):  # fmt: skip
        lines.append(Entry(f"product {name}", "forward", times, flops=2 * tokens * size))
        lines.append(Entry(f"product {name}", "backward", times, flops=4 * tokens * size, kernels=2))
    lines += [
        # q, k and v are three parameters: put together anew in each step, and rounded in the same pass
        Entry("weights q, k, v in one", "forward", layers, bytes=3 * h * h * (w + e), least=0,
              kernels=2 if w == e else 3),
        *attention(config, lengths),
        Entry("residual_layernorm", "forward", 2 * often, bytes=4 * th * e),
        # without dropout the product's gradient is the residual's
        Entry("residual_layernorm", "backward", 2 * often,
              bytes=th * e * (4 if config.hidden_dropout_prob else 3), kernels=2),
        # a layer's input and its first LayerNorm's output are read by a product and as a residual: the product's
        # gradient is added to the other one in place
        Entry("residual's gradient, read by the product", "backward", layers + often, bytes=th * e, kernels=0),
        Entry("bias_gelu", "forward", often, bytes=2 * ti * e, instructions=GELU_FORWARD * ti),
        Entry("bias_gelu", "backward", often, bytes=3 * ti * e, instructions=GELU_BACKWARD * ti, kernels=2),
    ]  # fmt: skip
    if rh:
        lines += [
            Entry("rows that are read", "forward", 1, bytes=4 * rh * e, kernels=4),
            # two times zeros of all rows, and sums into some; the head's and the pooler's part put together
            Entry("rows that are read", "backward", 1, bytes=(2 * th + 8 * rh) * e,
                  least=4 * rh * e, kernels=5),
        ]  # fmt: skip
    if w != e:
        weight = layers * (h * h + 2 * h * inner)
        lines.append(Entry("rounding of weights", "forward", 1, bytes=weight * (w + e), least=0, kernels=3 * layers))
    return lines


def predicted_rows(lengths: Sequence[int]) -> int:
    """Masked positions that a packed batch has room for; the MLM head computes them all."""
    return capacities(sum(lengths), max(lengths), len(lengths)).masked


def rows_read(lengths: Sequence[int]) -> int:
    """Rows of the last layer that a head reads: masked positions and [CLS]; all, where those would be no fewer."""
    return min(predicted_rows(lengths) + len(lengths), sum(lengths))


def attention(config, lengths: Sequence[int]) -> list[Entry]:
    """Both directions, and the random bits of dropout as if nothing hid them: the published rates are without."""
    layers, h = config.num_hidden_layers, config.hidden_size
    _, scores = tiled(lengths)
    every = scores * config.num_attention_heads
    kib = every / TILE**2 * 1024
    lines = [
        Entry("attention", "forward", layers, flops=4 * scores * h, rate="attention_forward",
              exponentials=every * (1 + 1 / TILE), shared=SHARED_FORWARD * kib, l2=L2_KERNEL * kib),
        # seven products where five would do: dq and dkv each make scores and dP; the third kernel sums what the two
        # leave for the bias of q and v
        Entry("attention", "backward", layers, flops=14 * scores * h, rate="attention_backward", kernels=3,
              exponentials=2 * every, shared=(SHARED_DQ + SHARED_DKV) * kib, l2=2 * L2_KERNEL * kib),
    ]  # fmt: skip
    if config.attention_probs_dropout_prob:
        lines += [
            Entry(f"attention{BITS}", direction, layers, instructions=count * every, kernels=0)
            for direction, count in (("forward", DROPOUT_FORWARD), ("backward", DROPOUT_DQ + DROPOUT_DKV))
        ]
    return lines


BITS = ": bits of dropout"


def heads(config, lengths: Sequence[int], weights: str, joined: bool) -> list[Entry]:
    """The embedding, the MLM and the NSP head with their losses, and the table that embedding and MLM head share."""
    e, w = 2, 2 if weights == "bfloat16" else 4
    h, vocabulary = config.hidden_size, config.vocab_size
    tokens, masked = sum(lengths), predicted_rows(lengths)
    th, mh, mv, vh = tokens * h, masked * h, masked * vocabulary, vocabulary * h
    chunks = -(-masked // ops.MLM_CHUNK["cuda"])
    words = -math.expm1(-tokens / vocabulary) * vh * w  # rows of those that occur: benchmarks draw tokens uniformly
    # joined: those rows of the gradient are read and written; else all rows are written, many of them zeros
    tables = (config.max_position_embeddings + config.type_vocab_size) * h * w + (2 * words if joined else vh * w)
    dense = h * h * (w + e) if w != e else 0  # a weight rounded (of the pooler its gradient too)
    lines = [
        # word row and out; backward: d out, word row, d z in float32 written once and read for each table; the tables
        Entry("embedding_layernorm", "forward", 1, bytes=th * (w + e)),
        Entry("embedding_layernorm", "backward", 1, bytes=th * (w + e + 4 * 4) + tables,
              least=th * e + words + tables, instructions=EMBEDDING_BACKWARD * th, kernels=44),
        # the product's output through GELU and LayerNorm
        Entry("MLM transform", "forward", 1, flops=2 * mh * h, bytes=5 * mh * e + dense, kernels=3),
        Entry("MLM transform", "backward", 1, flops=4 * mh * h, bytes=6 * mh * e, kernels=6),
        # a copy of the table; logits read and overwritten; sums of the bias; d word in float32, written by the first
        # chunk, read and written by the others, and rounded; d hidden in float32, rounded
        Entry("mlm_loss", "forward", 1, flops=6 * mh * vocabulary,
              bytes=vh * (w + e) + mv * (2 * e + 2) + 4 * vh * (2 * chunks - 1) + (vh * (4 + w) if w != 4 else 0)
              + mh * (4 + e), least=4 * vh, kernels=5 * chunks + 12),
        # one launch that changes nothing where the loss's own gradient is one
        Entry("mlm_loss", "backward", 1),
        Entry("pooler and next sentence", "forward", 1, flops=2 * len(lengths) * h * (h + 2), bytes=dense, kernels=6),
        Entry("pooler and next sentence", "backward", 1, flops=4 * len(lengths) * h * (h + 2), bytes=dense, kernels=12),
        # the batch into the graph's buffers, keys of rows, checks of ids; the start of the backward
        Entry("small operators", "forward", 1, kernels=35),
        Entry("small operators", "backward", 1, kernels=5),
    ]  # fmt: skip
    if not joined:
        lines.append(Entry("sum of the tied table's gradients", "backward", 1, bytes=3 * vh * w, least=0))
    return lines


def update(config, weights: str, optimizer: str) -> list[Entry]:
    """The optimiser over every parameter: the gradients' norm, then one pass (AdamW) or two (LAMB).

    Float32 moments and weights; with 16-bit weights those are written by the last pass. One launch a pass
    has all parameters, those that decay and the others.
    """
    n, g = parameters(config), 2 if weights == "bfloat16" else 4
    copy = 2 if weights == "bfloat16" else 0
    lines = [
        Entry("gradient norm", "update", 1, bytes=n * g, kernels=4),
        # before them whether the losses are finite
        Entry("rates, clipping, skipping", "update", 1, kernels=1 + 4),
    ]
    if optimizer == "adamw":
        return [*lines, Entry("adamw", "update", 1, bytes=n * (g + 24 + copy))]
    # moments and the norms of weight and update; then the update again from the moments, and the weights written;
    # between them a ratio for each parameter
    return [
        *lines,
        Entry("lamb", "update", 1, bytes=n * ((g + 20) + (16 + copy)), least=n * (g + 24 + copy), kernels=3),
    ]


def accumulation(config, weights: str) -> list[Entry]:
    """What a micro-batch after an update's first one costs besides: its gradients are added to those before.

    In place by the products where bert_fast/linear.py makes them, else by autograd.
    """
    h, layers, g = config.hidden_size, config.num_hidden_layers, 2 if weights == "bfloat16" else 4
    products = layers * (4 * h * h + 2 * h * config.intermediate_size) + h * h
    others = parameters(config) - products
    return [
        Entry("weight gradients added in place", "backward", 1, bytes=2 * products * g, kernels=0),
        Entry("gradients added by autograd", "backward", 1, bytes=3 * others * g, least=2 * others * g,
              kernels=10 * layers + 13),
    ]  # fmt: skip


# What a contender's kernels change of the lines of a step as built


def five_products(x: Entry) -> Entry:
    if (x.operator, x.direction) == ("attention", "backward"):
        return replace(x, flops=x.flops * 5 / 7, kernels=x.kernels - 1, exponentials=x.exponentials / 2, l2=x.l2 / 4,
                       shared=x.shared * SHARED_ONE_PASS / (SHARED_DQ + SHARED_DKV))  # fmt: skip
    if (x.operator, x.direction) == (f"attention{BITS}", "backward"):
        return replace(x, instructions=x.instructions * DROPOUT_ONE_PASS / (DROPOUT_DQ + DROPOUT_DKV))
    return x


def asynchronous_forward(x: Entry) -> Entry:
    """The rate that is charged for the products already supposes that they overlap with the rest."""
    if (x.operator, x.direction) == ("attention", "forward"):
        return replace(x, shared=x.shared * SHARED_ASYNCHRONOUS / SHARED_FORWARD, l2=x.l2 / 2)
    if (x.operator, x.direction) == (f"attention{BITS}", "forward"):
        return replace(x, instructions=x.instructions * DROPOUT_ASYNCHRONOUS / DROPOUT_FORWARD)
    return x


def gelu_in_products(x: Entry) -> Entry:
    """The product writes its sum beside its GELU, and the product of the backward reads the sum."""
    if x.operator != "bias_gelu":
        return x
    return replace(x, bytes=x.bytes / {"forward": 2, "backward": 3}[x.direction], instructions=0, kernels=0)


CHANGES: dict[str, tuple[Callable[[Entry], Entry], ...]] = {
    "bert_fast-one-pass": (five_products,),
    "bert_fast-asynchronous": (asynchronous_forward,),
    "bert_fast-epilogue": (gelu_in_products,),
    "bert_fast-candidates": (five_products, asynchronous_forward, gelu_in_products),
}


@dataclass(frozen=True)
class Prediction:
    """A step at the ceilings. ``mfu`` counts the full formula (bert_fast/flops.py) over the matrix-product rate,
    ``executed`` what is computed of it: the last layer only where it is read."""

    seconds: float
    sequences_per_s: float
    tokens_per_s: float
    mfu: float
    executed: float
    launches: float
    shares: dict[str, float]  # of the step, by kind of work


KINDS = {"products": ("product", "MLM transform", "mlm_loss", "pooler"), "attention": ("attention",),
         "optimiser": ("gradient norm", "rates", "lamb", "adamw")}  # fmt: skip


def kind_of(entry: Entry) -> str:
    return next((kind for kind, starts in KINDS.items() if entry.operator.startswith(starts)), "rest")


def predict(config, lengths: Sequence[int], lines: Sequence[Entry], ceilings: Ceilings) -> Prediction:
    """The step ``lines`` over sequences of ``lengths`` tokens."""
    seconds = sum(line.seconds(ceilings) for line in lines)
    masked = masked_positions(lengths)
    full, executed = (
        step_flops(config, lengths, masked, train=True, read=read) / seconds / ceilings.matmul
        for read in (None, min(masked + len(lengths), sum(lengths)))
    )
    shares = dict.fromkeys((*KINDS, "rest"), 0.0)
    for line in lines:
        shares[kind_of(line)] += line.seconds(ceilings) / seconds
    launches = sum(line.times * line.kernels for line in lines)
    return Prediction(seconds, len(lengths) / seconds, sum(lengths) / seconds, full, executed, launches, shares)


def operator_seconds(
    config, lengths: Sequence[int], operator: str, direction: str, ceilings: Ceilings, weights: str = "bfloat16"
) -> float:
    """One call of an operator (a name of benchmarks/operators.py) forward or backward, at the ceilings.

    As it is measured alone: the graph is kept for the next call, so mlm_loss scales its gradients into new tensors.
    """
    if operator == "feed_forward":  # whole: its products, GELU between them
        products, h = {"forward": 2, "backward": 4}[direction], config.hidden_size
        seconds = products * 2 * sum(lengths) * h * config.intermediate_size / ceilings.matmul
        gelu = operator_seconds(config, lengths, "bias_gelu", direction, ceilings, weights)
        return seconds + products * ceilings.between_kernels + gelu
    found = [
        x for x in step(config, lengths, weights, joined=False)
        if x.operator.removesuffix(BITS) == operator and x.direction == direction
    ]  # fmt: skip
    if not found:
        raise ValueError(f"the step has no line {operator!r} {direction!r}")
    seconds = sum(replace(line, times=1).seconds(ceilings) for line in found)
    if (operator, direction) == ("mlm_loss", "backward"):
        masked, h = masked_positions(lengths), config.hidden_size  # the operator alone has no room to spare
        seconds += 2 * h * (2 * masked + (2 if weights == "bfloat16" else 4) * config.vocab_size) / ceilings.copy
    return seconds


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
    """The ceilings that a file of benchmarks/gpu.py measured; attention's and what is missing are its device's stated
    ones."""
    limits = results.get("limits", {})
    found = {
        "matmul": limits.get("matmul_tflops", {}).get("bfloat16", 0) * 1e12,
        "copy": limits.get("copy_gbs", 0) * 1e9,
        "between_kernels": limits.get("graph_kernel_us", 0) * 1e-6,
    }
    return replace(stated(results.get("device", "")), **{name: value for name, value in found.items() if value})


def summary(ceilings: Ceilings, weights: str = "bfloat16", optimizer: str = "lamb") -> str:
    """A line for each of CASES."""
    rows = []
    for model, seq, kind in CASES:
        config, lengths = model_config(model, dropout=0.1), lengths_of(kind, seq)
        p = predict(config, lengths, step(config, lengths, weights, optimizer), ceilings)
        parts = [p.mfu, p.executed, *(p.shares[key] for key in ("products", "attention", "rest", "optimiser"))]
        rows.append([f"{model} {seq}, {kind}", f"{len(lengths)}", f"{1e3 * p.seconds:.1f}", f"{p.sequences_per_s:.0f}",
                     f"{p.tokens_per_s / 1e3:.0f}k", *(f"{100 * part:.0f} %" for part in parts)])  # fmt: skip
    header = ["BERT", "sequences", "step ms", "sequences/s", "tokens/s", "MFU", "executed", "products", "attention",
              "rest", "optimiser"]  # fmt: skip
    return Table(header, rows).markdown()


# What is aimed at with BERT-large at 512 tokens: half of the product's rate on full sequences; at Wikipedia's lengths
# the most real tokens a second and GPU in the logs of MLPerf Training's submitters (in FP8, on 4 or 8 GPUs).
MFU_AIM = 0.5
RECORD = {"H100": 272e3, "H200": 258e3, "B200": 368e3}


def aims(weights: str = "bfloat16", optimizer: str = "lamb") -> Table:
    """What each aim allows a step on each device, and what the products leave of it for everything else."""
    rows, config = [], model_config("large", dropout=0.1)
    for name, ceilings in DEVICES.items():
        for aim, kind in (("half of the product's rate, full", "full"), ("MLPerf's best, wikipedia", "wikipedia")):
            if kind == "wikipedia" and name not in RECORD:
                continue
            lengths = lengths_of(kind, 512)
            p = predict(config, lengths, step(config, lengths, weights, optimizer), ceilings)
            allowed = p.seconds * p.mfu / MFU_AIM if kind == "full" else sum(lengths) / RECORD[name]
            products = p.shares["products"] * p.seconds
            left, others = allowed - products, p.seconds - products
            needs = "met at the ceilings" if others <= left else f"the others in {left / others:.2f} of it"
            rows.append([f"{name}: {aim}", *(f"{1e3 * x:.1f}" for x in (allowed, p.seconds, products, left, others)),
                         needs if left > 0 else "products in 8 bits"])  # fmt: skip
    header = ["GPU: aim", "allows, ms", "predicted, ms", "products", "leaves the others", "the others", "needs"]
    return Table(header, rows)


def attention_lines() -> Table:
    """Of BERT-large's attention at 512 tokens, what each resource of each device takes alone: the longest is the least
    that these kernels can take, "charged" what the step has."""
    config, lengths, rows = model_config("large", dropout=0.1), lengths_of("full", 512), []
    for name, ceilings in DEVICES.items():
        for x in attention(config, lengths)[:2]:
            alone = [x.flops / ceilings.matmul, *(getattr(x, key) / getattr(ceilings, key) for key in BESIDE[1:])]
            charged = x.seconds(ceilings) - x.times * x.kernels * ceilings.between_kernels
            cells = [f"{1e3 * x.times * seconds:.1f}" for seconds in alone] + [f"{1e3 * charged:.1f}"]
            rows.append([f"{name}, {x.direction}", *("not published" if cell == "0.0" else cell for cell in cells)])
    return Table(["GPU", "products, ms", "exponentials", "shared memory", "L2 cache", "charged"], rows)


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
        rows.append([f"{x.operator}, {x.direction}", f"{x.times:.4g}", f"{x.times * x.flops / 1e12:.2f}",
                     f"{x.times * x.bytes / 1e9:.2f}", extra, f"{ms:.2f}", f"{100 * share:.1f} %"])  # fmt: skip
    header = ["operator", "calls", "TFLOP", "GB", "avoidable", "ms", "of the step"]
    return Table(header, rows).markdown()


def memory(weights: str = "bfloat16") -> str:
    """Bytes per token and layer, base and large, and why each is kept."""
    base, large = (activations(model_config(model, dropout=0.1), weights) for model in ("base", "large"))
    rows = [[what, str(b), str(size), why] for (what, b, _), (_, size, why) in zip(base, large, strict=True)]
    rows.append(["all", str(sum(x[1] for x in base)), str(sum(x[1] for x in large)), ""])
    return Table(["kept", "base", "large", "for"], rows).markdown()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16")
    parser.add_argument("--optimizer", choices=("lamb", "adamw"), default="lamb")
    parser.add_argument("--of", nargs=3, metavar=("MODEL", "SEQ", "LENGTHS"), default=("large", "512", "full"))
    parser.add_argument("--device", choices=DEVICES, default="H100", help="whose ceilings (default H100)")
    parser.add_argument("--results", type=Path, help="a file of benchmarks/gpu.py: its ceilings in place of the stated")
    options = parser.parse_args(arguments)
    model, seq, kind = options.of
    if (model, int(seq) if seq.isdigit() else 0, kind) not in CASES:
        parser.error(f"--of {' '.join(options.of)}: known are {'; '.join(f'{m} {s} {k}' for m, s, k in CASES)}")
    ceilings = DEVICES[options.device]
    if options.results:
        ceilings = ceilings_of(json.loads(options.results.read_text(encoding="utf-8")))
    print(f"A prediction, at {ceilings}\n")
    print(summary(ceilings, options.weights, options.optimizer))
    print(f"\n{model} {seq}, {kind}, {options.weights} weights\n")
    print(detail(model, int(seq), kind, ceilings, options.weights, options.optimizer))
    print("\nbesides, in each micro-batch after an update's first\n")
    for x in accumulation(model_config(model, dropout=0.1), options.weights):
        print(f"{x.operator}: {x.bytes / 1e9:.2f} GB, {1e3 * x.seconds(ceilings):.2f} ms")
    print("\nbytes per token and layer, kept for the backward\n")
    print(memory(options.weights))
    print(f"\nwhat the aims need\n\n{aims(options.weights, options.optimizer).markdown()}")
    print(f"\nattention of large at 512, each resource alone\n\n{attention_lines().markdown()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
