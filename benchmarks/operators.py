"""Every operator alone, forward and backward apart, beside PyTorch's own composition and whoever else has it.

Operands have BERT's sizes and the dtypes of a training step: what a matrix product gave is in ``dtype``; parameters,
the embedding's output and the residual stream are in ``parameters``, float32 under autocast, ``dtype`` where the
weights themselves have 16 bits. Dropout is 0.1. Three things to know when reading the times:

- Both sides take the bias apart, as the operators do. In PyTorch's own BERT the linear before adds it.
- mlm_loss makes its gradients in the forward, PyTorch in the backward: compare the two directions' sum.
- Caches are emptied before each call, so that a share of the memory's rate means memory.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import clock
from benchmarks.contenders import CONTENDERS, capability
from benchmarks.results import reason
from benchmarks.workload import masked_positions, model_config
from bert_fast import choice, dispatch, ops
from bert_fast.dropout_mask import row_keys

Tensor = torch.Tensor

DIRECTIONS = ("forward", "backward")
DROPOUT = 0.1
EPS = 1e-12
CLS, SEP, MASK = 101, 102, 103  # rows of the word table that every batch uses often
REPEATS = {"cpu": 1, "cuda": 3}  # calls a round
NOTE = (
    "share: of the measured matrix-product rate or copy rate. mlm_loss makes its gradients in the forward, PyTorch in "
    "the backward: compare both. Biases are added apart on both sides."
)
PRODUCTS = "three products"  # the contender of mlm_loss that has nothing else to do
# contenders of attention: PyTorch's kernels, and ours that are candidates, by direction
TORCH_ATTENTION = {"torch-flash": SDPBackend.FLASH_ATTENTION, "torch-cudnn": SDPBackend.CUDNN_ATTENTION}
HOPPER = {"forward": "bert_fast-asynchronous", "backward": "bert_fast-one-pass"}
# FLOPs an element of the operators whose limit is memory, roughly: where they lie in a roofline picture
FLOPS_OF_AN_ELEMENT = {"embedding_layernorm": 12, "residual_layernorm": 12, "bias_gelu": 40, "mlm_loss": 1}


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


def feed_forward_work(config, lengths: Sequence[int], e: int, r: int) -> dict[str, Work]:
    """Two products forward, four backward."""
    product = 2 * sum(lengths) * config.hidden_size * config.intermediate_size
    return {"forward": Work(flops=2 * product), "backward": Work(flops=4 * product)}


WORK = {
    "embedding_layernorm": embedding_layernorm_work,
    "attention": attention_work,
    "residual_layernorm": residual_layernorm_work,
    "bias_gelu": bias_gelu_work,
    "mlm_loss": mlm_loss_work,
    "feed_forward": feed_forward_work,
}
OPERATORS = tuple(name for name in WORK if name != "feed_forward")  # those that the model is made of; see CASES


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
    if operator not in WORK:
        raise ValueError(f"unknown operator {operator!r}; the operators are {', '.join(WORK)}")
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
    hidden = torch.rand(ids.shape, generator=o.generator, device=device) < 0.12
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


def _feed_forward(o: _Operands, config):
    """The whole of it: what one kernel saves at its GELU is seen beside its products."""
    h, inner = config.hidden_size, config.intermediate_size
    x, bias = o.activation(o.tokens, h), o.parameter(inner)
    weight_in, weight_out = o.parameter(inner, h), o.parameter(h, inner)
    if o.dtype != o.parameters:
        weight_in, weight_out = (w.detach().to(o.dtype).requires_grad_() for w in (weight_in, weight_out))

    def ours() -> Tensor:
        return ops.feed_forward(x, weight_in, bias, weight_out)

    def composition() -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight_in, bias.to(o.dtype))), weight_out)

    return f"{o.tokens} x {h} x {inner}", (x, weight_in, bias, weight_out), ours, composition


_BUILDERS = {
    "embedding_layernorm": _embedding_layernorm,
    "attention": _attention,
    "residual_layernorm": _residual_layernorm,
    "bias_gelu": _bias_gelu,
    "mlm_loss": _mlm_loss,
    "feed_forward": _feed_forward,
}


# --------------------------------------------------------------------------------------------------------------
# Contenders, and their times


def contenders_of(operator: str, direction: str, device: str, *, compiled: bool = False) -> list[str]:
    """Who has ``operator`` here: ours, PyTorch's own composition (``compiled`` too), installed peers, candidates to
    become ours; of mlm_loss the products that are in it too."""
    names = ["bert_fast", "pytorch"] + ["compile"] * compiled
    names += [
        b for b in ("flash_attn", "apex") if b in dispatch.TABLE[operator] and dispatch.why_unavailable(b) is None
    ]
    if operator == "attention" and device == "cuda":
        names += [*TORCH_ATTENTION, HOPPER[direction]]
    if operator == "feed_forward":
        names.append("bert_fast-epilogue")
    if (operator, direction) == ("mlm_loss", "forward"):
        names.append(PRODUCTS)
    here = capability(device)
    return [n for n in names if not (n in CONTENDERS and (c := CONTENDERS[n].ours.capabilities) and here not in c)]


def products_of_mlm_loss(case: Case) -> Callable[[], object]:
    """The three products of mlm_loss, for all positions at once and the vocabulary padded as it pads it."""
    hidden, word, _ = (x.detach() for x in case.inputs)
    word = F.pad(word.to(hidden.dtype), (0, 0, 0, -word.shape[0] % 128))
    logits = hidden @ word.T
    return lambda: (hidden @ word.T, logits @ word, logits.T @ hidden)


def call_of(case: Case, direction: str, contender: str) -> Callable[[], object]:
    """A function that runs one direction of one contender.

    RuntimeError for a candidate that does not give, to rounding, what ours as built gives, or has not served.
    """
    if contender == PRODUCTS:
        return products_of_mlm_loss(case)
    ours = contender not in ("pytorch", "compile", *TORCH_ATTENTION)
    forward = case.ours if ours else case.torch
    if contender == "compile":
        forward = torch.compile(case.torch, dynamic=False)

    def means():
        if contender in TORCH_ATTENTION:
            return sdpa_kernel(TORCH_ATTENTION[contender])
        if contender in ("flash_attn", "apex"):
            return dispatch.use_backend(**{case.operator: contender})
        return choice.use(CONTENDERS[contender].ours.choices if contender in CONTENDERS else {})

    with means():
        call = forward if direction == "forward" else case.backward("bert_fast" if ours else "pytorch", forward())

    def run():
        with means():
            return call()

    if contender in CONTENDERS and CONTENDERS[contender].ours.choices:
        wanted = {name for name in CONTENDERS[contender].ours.choices if case.operator in name}
        wanted = {name for name in wanted if case.operator != "feed_forward" or name.split(".")[1][0] == direction[0]}
        check_candidate(case, direction, run, wanted)
    return run


def check_candidate(case: Case, direction: str, run: Callable[[], object], wanted: set[str]) -> None:
    """RuntimeError where ``run`` is not ours as built to rounding, or not by the kernels ``wanted``."""
    expected = case.ours() if direction == "forward" else case.backward("bert_fast", case.ours())()
    with choice.use({}) as served:
        if not same(run(), expected):
            raise RuntimeError(f"{case.operator}'s {direction} does not give what the kernels as built give")
    if silent := wanted - set(served):
        raise RuntimeError(f"not used, though asked for: {', '.join(sorted(silent))}")


def same(found, expected) -> bool:
    """Whether two results (a tensor or several) agree to the rounding of their dtype."""
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True)
    return all(
        float((a.detach().double() - b.detach().double()).norm())
        <= max(4 * torch.finfo(b.dtype).eps, 1e-5) * float(b.detach().double().norm()) + 1e-12
        for a, b in pairs
    )


def rate_of(work: Work, seconds: float, limits: dict, dtype: torch.dtype) -> dict:
    """FLOP/s or bytes/s by what limits the operator, and its share of the measured limit: above 1 where an operator
    multiplies in a dtype that is faster than ``dtype`` on this machine."""
    if work.flops:
        rate = {"tflops": work.flops / seconds / 1e12}
        limit = limits.get("matmul_tflops", {}).get(str(dtype).removeprefix("torch."))
    else:
        rate, limit = {"gbs": work.bytes / seconds / 1e9}, limits.get("copy_gbs")
    return rate | {"share_of_limit": next(iter(rate.values())) / limit if limit else None}


def measure(
    own: clock.Clock, operator: str, dtype: torch.dtype, *, model: str, seq: int, lengths: Sequence[int], kind: str,
    limits: dict, rounds: int, dropout: float = DROPOUT, parameters: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[dict]:  # fmt: skip
    """Rows of both directions of one operator: every contender's call in turn with cold caches, medians over rounds.

    "ms", its quantiles, "tflops" or "gbs" (by what limits it: see ``WORK``), "share_of_limit" and of others "ours_is",
    the paired ratio of their time over ours. A contender that fails keeps its reason in its row.
    """
    case = build_case(
        operator, own.device, dtype, model=model, seq=seq, lengths=lengths, dropout=dropout, parameters=parameters
    )
    rows, config = [], model_config(model, dropout=dropout)
    for direction in DIRECTIONS:
        calls, failed = {}, {}
        for contender in contenders_of(operator, direction, own.device, compiled=compiled):
            try:
                calls[contender] = call_of(case, direction, contender)
                own.calls(calls[contender], 1)  # compiles, and finds its memory in the allocator
            except Exception as error:
                if contender == "bert_fast":
                    raise
                failed[contender] = reason(error)
                calls.pop(contender, None)
        times = clock.interleave(calls, rounds * REPEATS[own.device], own.call)
        work, elements = case.work[direction], sum(lengths) * config.hidden_size
        elements = sum(lengths) * config.intermediate_size if operator == "bias_gelu" else elements
        counted = {
            "flops": work.flops or FLOPS_OF_AN_ELEMENT.get(operator, 1) * elements,
            "bytes": work.bytes or (4 if direction == "forward" else 8) * elements * dtype.itemsize,
        }
        facts = {"model": model, "seq": seq, "lengths": kind, "dropout": dropout, "operator": operator,
                 "direction": direction, "shape": case.shape}  # fmt: skip
        for name in (*times, *failed):
            row = facts | {"contender": name, "backend": case.backend if name == "bert_fast" else name}
            if name in failed:
                rows.append(row | {"failed": failed[name]})
                continue
            row |= counted | timed(times[name]) | rate_of(work, statistics.median(times[name]), limits, dtype)
            if name != "bert_fast":
                row["ours_is"] = clock.paired_ratio(times[name], times["bert_fast"])
            rows.append(row)
    return rows


def timed(seconds: list[float]) -> dict:
    spread = clock.quantiles(seconds)
    return {"ms": 1e3 * spread["p50"], "p20_ms": 1e3 * spread["p20"], "p80_ms": 1e3 * spread["p80"]}


def measure_operators(
    device: str, dtype: torch.dtype, model: str = "base", seq: int = 512, batch: int = 2, rounds: int = 7, *,
    limits: dict, progress: Callable[[str], None] = lambda text: None,
) -> list[dict]:  # fmt: skip
    """Rows of every operator at ``batch`` full sequences, and of the optimisers.

    ``device`` is "cpu" or "cuda", ``dtype`` a floating dtype; ``limits`` are limits.py's. ``progress`` is called with
    a phrase for each step. Raises ValueError for ``rounds`` below 1 and for sizes that the model does not have.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    from benchmarks import optimizers

    own, rows = clock.Clock(device), []
    for operator in OPERATORS:
        progress(operator)
        rows += measure(
            own, operator, dtype, model=model, seq=seq, lengths=[seq] * batch, kind="full", limits=limits, rounds=rounds
        )
    progress("optimisers")
    return rows + optimizers.measure(own, model, limits=limits, rounds=rounds)
