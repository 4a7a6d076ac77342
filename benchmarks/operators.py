"""Every operator alone, forward and backward apart, beside PyTorch's own composition of the same function.

Operands have BERT's sizes and the dtypes of a training step: what a matrix product gave is in ``dtype``; parameters,
the embedding's output and the residual stream are in ``parameters``, float32 under autocast, ``dtype`` where the
weights themselves have 16 bits. Dropout is 0.1. Three things to know when reading the times:

- Both sides take the bias apart, as the operators do. In PyTorch's own BERT the linear before adds it.
- mlm_loss makes its gradients in the forward, PyTorch in the backward: compare the two directions' sum.
- Caches are emptied before each call, so that a share of the memory's rate means memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from workload import model_config

from bert_fast import dispatch, ops
from bert_fast.random import row_keys

Tensor = torch.Tensor

DIRECTIONS = ("forward", "backward")
DROPOUT = 0.1
EPS = 1e-12
CLS, SEP, MASK = 101, 102, 103  # rows of the word table that every batch uses often
MASKED_SHARE = 0.15
REPEATS = {"cpu": 1, "cuda": 10}  # calls a round
CACHE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # more than any last-level cache
GPU_CYCLES = 2e9  # a second, at the highest clock of any GPU so far or above it
MOST_WAITING = 0.03  # seconds; a first call compiles, and takes longer


# --------------------------------------------------------------------------------------------------------------
# What an operator has to do: FLOPs where matrix products are the limit, else bytes, each input read once and each
# output written once. Vectors of T or H elements are left out (under 1 %). lengths: tokens of each sequence; e: bytes
# of an element of ``dtype``; r: of a parameter's and of the residual stream's.


@dataclass(frozen=True)
class Work:
    """FLOPs or bytes of one call; the other is 0, since it is not the limit."""

    flops: int = 0
    bytes: int = 0


def embedding_layernorm_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    """A word row each token, position and segment rows once; backward the same again and all gradients written."""
    tokens, h = sum(lengths), config.hidden_size
    small = r * h * (max(lengths) + config.type_vocab_size)
    tables = r * h * (config.vocab_size + config.max_position_embeddings + config.type_vocab_size)
    return {
        "forward": Work(bytes=tokens * h * (r + r) + small),  # word row; out
        "backward": Work(bytes=tokens * h * (r + r) + small + tables),  # d out, word row; the tables' gradients
    }


def attention_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    """Two products forward and five backward (scores once again), 2 S^2 D FLOPs each, per sequence and head.

    Products that a kernel computes twice are not counted twice.
    """
    product = 2 * config.hidden_size * sum(s * s for s in lengths)
    return {"forward": Work(flops=2 * product), "backward": Work(flops=5 * product)}


def residual_layernorm_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    elements = sum(lengths) * config.hidden_size
    return {
        "forward": Work(bytes=elements * (e + r + r + r)),  # x, residual; out, z
        "backward": Work(bytes=elements * (r + r + e + r)),  # d out, z; d x, d residual
    }


def bias_gelu_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    elements = sum(lengths) * config.intermediate_size
    return {"forward": Work(bytes=elements * 2 * e), "backward": Work(bytes=elements * 3 * e)}  # x; out. d out, x; d x


def mlm_loss_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    """Forward all three products (logits, d hidden, d word); backward the gradients read, scaled and written."""
    masked, h, vocabulary = masked_positions(lengths), config.hidden_size, config.vocab_size
    return {
        "forward": Work(flops=6 * masked * h * vocabulary),
        "backward": Work(bytes=2 * (masked * h * e + vocabulary * (h + 1) * r)),
    }


WORK = {
    "embedding_layernorm": embedding_layernorm_work,
    "attention": attention_work,
    "residual_layernorm": residual_layernorm_work,
    "bias_gelu": bias_gelu_work,
    "mlm_loss": mlm_loss_work,
}
OPERATORS = tuple(WORK)  # the model's; not the optimisers


def masked_positions(lengths: Sequence[int]) -> int:
    return max(1, round(MASKED_SHARE * sum(lengths)))


# --------------------------------------------------------------------------------------------------------------
# Operands, and both sides of a comparison


@dataclass(frozen=True)
class Case:
    """One operator at one size. ``ours`` and ``torch`` run its forward on the same operands and give out.

    ``inputs`` are the operands that get a gradient (``torch_inputs`` PyTorch's, where it needs them padded);
    ``backend`` is what really runs ours.
    """

    operator: str
    backend: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: Callable[[], Tensor]
    torch: Callable[[], Tensor]
    work: dict[str, Work]
    torch_inputs: tuple[Tensor, ...] | None = None

    def calls(self, direction: str) -> dict[str, Callable[[], object]]:
        """{"bert_fast": ..., "pytorch": ...}: functions that run ``direction`` alone, any number of times."""
        forwards = {"bert_fast": self.ours, "pytorch": self.torch}
        if direction == "forward":
            return forwards
        return {name: self.backward(name, forward()) for name, forward in forwards.items()}

    def backward(self, name: str, out: Tensor) -> Callable[[], object]:
        """A function that runs the backward of ``out``, which the side ``name`` gave, any number of times."""
        inputs = self.inputs if name == "bert_fast" or self.torch_inputs is None else self.torch_inputs
        generator = torch.Generator(out.device).manual_seed(1)
        grad_out = torch.ones_like(out)
        if out.dim():
            grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def running_backend(operator: str, device: str) -> str:
    """The backend that runs ``operator``; the reference where a backend has left the operator to it."""
    serving = {dispatch.implementation(operator, direction, device).__module__ for direction in ("fwd", "bwd")}
    return "reference" if serving == {"bert_fast.reference"} else dispatch.choose(operator, device)


def build_case(
    operator: str,
    device: str,
    dtype: torch.dtype,
    *,
    model: str = "base",
    seq: int = 512,
    batch: int = 2,
    lengths: Sequence[int] | None = None,
    dropout: float = DROPOUT,
    parameters: torch.dtype = torch.float32,
) -> Case:
    """The case of ``operator`` (a name of OPERATORS) for ``batch`` full sequences of ``seq`` tokens, or for
    sequences of ``lengths`` tokens, each at most ``seq``; PyTorch's attention has them padded to ``seq``.

    Raises ValueError for an unknown operator and for a ``seq`` beyond the model's positions.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; the operators are {', '.join(OPERATORS)}")
    config = model_config(model, dropout=dropout)
    if not 3 <= seq <= config.max_position_embeddings:
        raise ValueError(f"seq is {seq}; sequences here have 3 to {config.max_position_embeddings} tokens")
    lengths = [seq] * batch if lengths is None else list(lengths)
    if not lengths or not 3 <= min(lengths) <= max(lengths) <= seq:
        raise ValueError(f"lengths are {lengths}; each has to be 3 to seq = {seq}")
    operands = _Operands(device, dtype, parameters, lengths, seq, dropout)
    shape, inputs, ours, composition, *padded = _BUILDERS[operator](operands, config)
    work = WORK[operator](config, lengths, dtype.itemsize, parameters.itemsize)
    return Case(operator, running_backend(operator, device), shape, inputs, ours, composition, work, *padded)


class _Operands:
    """Random operands of one batch: the same in every run."""

    def __init__(self, device: str, dtype, parameters, lengths: list[int], seq: int, dropout: float):
        self.device, self.dtype, self.parameters, self.dropout = device, dtype, parameters, dropout
        self.lengths, self.batch, self.seq = lengths, len(lengths), seq
        self.tokens = sum(lengths)
        self.generator = torch.Generator(device).manual_seed(0)
        self.cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.keys = {
            "p": dropout,
            "row_key": row_keys(self.cu_seqlens, self.tokens),
            "rng_key": torch.randint(2**62, (1,), generator=self.generator, device=device),
        }

    def activation(self, *shape: int) -> Tensor:
        """What a matrix product gave, in ``dtype``."""
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.to(self.dtype).requires_grad_()

    def parameter(self, *shape: int, scale: float = 0.02, mean: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.mul_(scale).add_(mean).to(self.parameters).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def _embedding_layernorm(o: _Operands, config):
    h, device = config.hidden_size, o.device
    word = o.parameter(config.vocab_size, h)
    position = o.parameter(config.max_position_embeddings, h)
    segment = o.parameter(config.type_vocab_size, h)
    weight, bias = o.parameter(h, mean=1.0), o.parameter(h)
    ids = o.integers(config.vocab_size, o.tokens)
    hidden = torch.rand(ids.shape, generator=o.generator, device=device) < 0.8 * MASKED_SHARE
    ids = torch.where(hidden, MASK, ids)
    starts, ends = o.cu_seqlens[:-1].long(), o.cu_seqlens[1:].long()
    ids[starts], ids[ends - 1] = CLS, SEP
    length = ends - starts
    positions = torch.arange(o.tokens, device=device) - starts.repeat_interleave(length, output_size=o.tokens)
    segments = (positions >= (length // 2).repeat_interleave(length, output_size=o.tokens)).long()

    def ours() -> Tensor:
        return ops.embedding_layernorm(
            ids, positions, segments, word, position, segment, weight, bias, eps=EPS, padding_idx=0, **o.keys
        )

    def composition() -> Tensor:
        z = F.embedding(ids, word, padding_idx=0) + F.embedding(segments, segment) + F.embedding(positions, position)
        return F.dropout(F.layer_norm(z, (h,), weight, bias, EPS), o.dropout)

    return f"{o.tokens} x {h}", (word, position, segment, weight, bias), ours, composition


def _attention(o: _Operands, config):
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    qkv = o.activation(o.tokens, 3, heads, size)

    def ours() -> Tensor:
        return ops.attention(qkv, o.cu_seqlens, o.seq, **o.keys)

    full = o.tokens == o.batch * o.seq
    padded, mask = qkv, None
    if not full:  # as a model that pads has it: padding is in its batch from the start
        padded = o.activation(o.batch * o.seq, 3, heads, size)
        mask = (torch.arange(o.seq, device=o.device) < torch.tensor(o.lengths, device=o.device)[:, None])[:, None, None]

    def composition() -> Tensor:
        q, k, v = padded.view(o.batch, o.seq, 3, heads, size).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=o.dropout)
        return out.transpose(1, 2).reshape(o.batch * o.seq, heads * size)

    shape = f"{o.batch} x {o.seq}" if full else f"{o.tokens} tokens of {o.batch} x {o.seq}"
    return f"{shape}, {heads} heads of {size}", (qkv,), ours, composition, (padded,)


def _residual_layernorm(o: _Operands, config):
    h = config.hidden_size
    x, residual = o.activation(o.tokens, h), o.parameter(o.tokens, h, scale=1.0)
    bias, weight, ln_bias = o.parameter(h), o.parameter(h, mean=1.0), o.parameter(h)

    def ours() -> Tensor:
        return ops.residual_layernorm(x, residual, weight, ln_bias, bias=bias, eps=EPS, **o.keys)

    def composition() -> Tensor:
        z = F.dropout(x + bias.to(o.dtype), o.dropout) + residual
        return F.layer_norm(z, (h,), weight, ln_bias, EPS)

    return f"{o.tokens} x {h}", (x, residual, bias, weight, ln_bias), ours, composition


def _bias_gelu(o: _Operands, config):
    x, bias = o.activation(o.tokens, config.intermediate_size), o.parameter(config.intermediate_size)

    def ours() -> Tensor:
        return ops.bias_gelu(x, bias)

    def composition() -> Tensor:
        return F.gelu(x + bias.to(o.dtype))

    return f"{o.tokens} x {config.intermediate_size}", (x, bias), ours, composition


def _mlm_loss(o: _Operands, config):
    masked, vocabulary = masked_positions(o.lengths), config.vocab_size
    hidden = o.activation(masked, config.hidden_size)
    word, bias = o.parameter(vocabulary, config.hidden_size), o.parameter(vocabulary)
    labels = o.integers(vocabulary, masked)

    def ours() -> Tensor:
        return ops.mlm_loss(hidden, word, bias, labels)

    def composition() -> Tensor:
        logits = F.linear(hidden, word.to(o.dtype), bias.to(o.dtype))
        return F.cross_entropy(logits.float(), labels)

    return f"{masked} x {config.hidden_size} x {vocabulary}", (hidden, word, bias), ours, composition


_BUILDERS = {
    "embedding_layernorm": _embedding_layernorm,
    "attention": _attention,
    "residual_layernorm": _residual_layernorm,
    "bias_gelu": _bias_gelu,
    "mlm_loss": _mlm_loss,
}


# --------------------------------------------------------------------------------------------------------------
# Time


class Stopwatch:
    """Milliseconds of one call with empty caches: CUDA's events on a GPU, the host's clock on a CPU.

    A GPU is kept busy before the call for as long as the host took to launch the last one: what an optimiser needs on
    the host for hundreds of parameters is no time of its kernels.
    """

    def __init__(self, device: str):
        self.device = device
        self._launching = 0.0  # seconds of the host, of the last call
        self._scratch = torch.empty(CACHE_BYTES[device], dtype=torch.uint8, device=device)

    def empty_caches(self) -> None:
        self._scratch.zero_()

    def __call__(self, call: Callable[[], object]) -> float:
        self.empty_caches()
        if self.device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(GPU_CYCLES * min(1.5 * self._launching, MOST_WAITING)))
            start.record()
            begun = time.perf_counter()
            call()
            self._launching = time.perf_counter() - begun
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        begun = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begun
        del result  # kept until here: giving its memory back is not the operator's time
        return 1e3 * elapsed


def measure_operators(
    device: str,
    dtype: torch.dtype,
    model: str = "base",
    seq: int = 512,
    batch: int = 2,
    rounds: int = 7,
    *,
    limits: dict[str, float],
    progress: Callable[[str], None] | None = None,
) -> list[dict]:
    """Time every operator of bert_fast.ops and PyTorch's composition, a call of each in turn; medians over rounds.

    ``device`` is "cpu" or "cuda", ``dtype`` a floating dtype, ``model`` tiny, base or large; ``limits`` are the
    machine's measured "matmul_tflops" (TFLOP/s in ``dtype``) and "copy_gbs" (GB/s read and written).
    ``progress`` is called with a phrase for each step.

    Returns a row for each operator and direction: "operator", "direction", "backend", "shape", "ms", "torch_ms",
    "tflops" or "gbs" (by what limits it: see ``WORK``) and "share_of_limit", that rate over the machine's: above 1
    where an operator multiplies in a dtype that is faster than ``dtype`` on this machine.
    Raises ValueError for ``rounds`` below 1 and for sizes that the model does not have.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    stopwatch, rows = Stopwatch(device), []
    for operator in OPERATORS:
        case = build_case(operator, device, dtype, model=model, seq=seq, batch=batch)
        for direction in DIRECTIONS:
            if progress is not None:
                progress(f"{operator} {direction}")
            calls = case.calls(direction)
            times = {name: [] for name in calls}
            for call in calls.values():  # the first call compiles, the second finds its memory in the allocator
                stopwatch(call)
                stopwatch(call)
            for _ in range(rounds * REPEATS[device]):
                for name, call in calls.items():
                    times[name].append(stopwatch(call))
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows.append(_row(case, direction, medians, limits))
    return rows


def _row(case: Case, direction: str, medians: dict[str, float], limits: dict[str, float]) -> dict:
    ms, work = medians["bert_fast"], case.work[direction]
    if work.flops:
        rate = {"tflops": work.flops / ms / 1e9}
        share = rate["tflops"] / limits["matmul_tflops"]
    else:
        rate = {"gbs": work.bytes / ms / 1e6}
        share = rate["gbs"] / limits["copy_gbs"]
    return {
        "operator": case.operator,
        "direction": direction,
        "backend": case.backend,
        "shape": case.shape,
        "ms": ms,
        "torch_ms": medians["pytorch"],
        **rate,
        "share_of_limit": share,
    }


def print_operators(rows: list[dict]) -> None:
    """The rows of :func:`measure_operators` as a table, with the sum of both directions for each operator."""
    table = Table(
        title="Operators alone, against PyTorch's composition of the same function",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # eighty columns hold it
    )
    table.add_column("operator, size, backend", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("ms", "PyTorch", "ours is", "rate", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for operator in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == operator]
        for label, row in zip((operator, own[0]["shape"]), own, strict=True):
            compared = _compared(row["ms"], row["torch_ms"])
            table.add_row(label, row["direction"], *compared, _rate(row), f"{row['share_of_limit']:.0%}")
        ms, torch_ms = (math.fsum(row[key] for row in own) for key in ("ms", "torch_ms"))
        table.add_row(own[0]["backend"], "both", *_compared(ms, torch_ms), "", "", end_section=True)
    console = Console()
    console.print(table)
    console.print(
        "share: of the measured matrix-product rate (FLOP/s) or copy rate (GB/s). mlm_loss makes its gradients in the "
        "forward, PyTorch in the backward: compare both. Biases are added apart on both sides.\n"
    )


def _compared(ms: float, torch_ms: float) -> tuple[str, str, str]:
    return _digits(ms), _digits(torch_ms), f"{torch_ms / ms:.2f}x"


def _digits(value: float) -> str:
    """Three digits, and all those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _rate(row: dict) -> str:
    if "gbs" in row:
        return f"{_digits(row['gbs'])} GB/s"
    tflops = row["tflops"]
    return f"{_digits(tflops)} TFLOP/s" if tflops >= 1 else f"{_digits(1e3 * tflops)} GFLOP/s"
