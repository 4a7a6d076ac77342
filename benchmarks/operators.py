"""Every operator alone, forward and backward apart, beside PyTorch's own composition and whoever else has it.

Operands have BERT's sizes and the dtypes of a training step: what a matrix product gave is in ``dtype``; parameters,
the embedding's output and the residual stream are in ``parameters``, float32 under autocast, ``dtype`` where the
weights themselves have 16 bits. Dropout is 0.1. Three things to know when reading the times:

- Both sides take the bias apart, as the operators do. In PyTorch's own BERT the linear before adds it.
- mlm_loss makes its gradients in the forward, PyTorch in the backward: compare the two directions' sum.
- Caches are emptied before each call, so that a share of the memory's rate means memory.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bert_fast
from benchmarks import clock
from benchmarks.contenders import CONTENDERS, RATE, capability, clipped, their_optimizer
from benchmarks.limits import NAMES
from benchmarks.results import reason
from benchmarks.workload import masked_positions, model_config
from bert_fast import choice, dispatch, ops, optim
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
PACKED = {"torch-flash-packed": "flash", "torch-cudnn-packed": "cudnn"}  # the same kernels without padding, as backends
HOPPER = {"forward": "bert_fast-asynchronous", "backward": "bert_fast-one-pass"}


# --------------------------------------------------------------------------------------------------------------
# The operators


@dataclass(frozen=True)
class Work:
    """What one call has to do. ``products``: whether matrix products are its limit, else it is memory."""

    flops: int
    bytes: int
    products: bool = False


class Sizes:
    """The sizes of a call over sequences of ``lengths`` tokens: e bytes of an element of ``dtype``, r of a parameter's
    and of the residual stream's; th and ti elements of the hidden states and of the feed-forward's; vh of the table."""

    def __init__(self, config, lengths: Sequence[int], e: int, r: int):
        self.config, self.lengths, self.batch, self.tokens = config, list(lengths), len(lengths), sum(lengths)
        self.h, self.inner, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.vocabulary, self.masked = config.vocab_size, masked_positions(lengths)
        self.e, self.r, self.th, self.ti, self.vh = (
            e, r, self.tokens * self.h, self.tokens * self.inner, self.vocabulary * self.h
        )  # fmt: skip


class Operands(Sizes):
    """Random operands of one batch: the same in every run."""

    def __init__(self, device: str, dtype, parameters, config, lengths: Sequence[int], seq: int, dropout: float):
        super().__init__(config, lengths, dtype.itemsize, parameters.itemsize)
        self.device, self.dtype, self.parameters, self.seq, self.dropout = device, dtype, parameters, seq, dropout
        self.generator = torch.Generator(device).manual_seed(0)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        self.keys = {
            "p": dropout,
            "row_key": row_keys(self.cu_seqlens, self.tokens),
            "rng_key": self.integers(2**62, 1),
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

    def words(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids with their [CLS], [SEP] and masks, positions and segments, (T,) each."""
        ids = self.integers(self.vocabulary, self.tokens)
        hidden = torch.rand(ids.shape, generator=self.generator, device=self.device) < 0.12
        ids = torch.where(hidden, MASK, ids)
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        ids[starts], ids[ends - 1] = CLS, SEP
        starts, halves = (x.repeat_interleave(ends - starts, output_size=self.tokens)
                          for x in (starts, (ends - starts) // 2))  # fmt: skip
        positions = torch.arange(self.tokens, device=self.device) - starts
        return ids, positions, (positions >= halves).long()

    @property
    def full(self) -> bool:
        return self.tokens == self.batch * self.seq

    @functools.cached_property
    def padded(self) -> tuple[Tensor, Tensor | None]:
        """q, k and v and the mask as a model that pads has them: padding is in its batch from the start."""
        mask = torch.arange(self.seq, device=self.device) < torch.tensor(self.lengths, device=self.device)[:, None]
        return self.activation(self.batch * self.seq, 3, self.heads, self.h // self.heads), mask[:, None, None]


@dataclass(frozen=True)
class Operator:
    """``operands(o)`` are its tensors; with them ``ours`` and ``torch``, PyTorch's own composition, run a forward.
    ``forward`` and ``backward`` say what either has to do: each input read once, each output written
    once; vectors of T or H elements are left out (under 1 %)."""

    shape: str
    operands: Callable[[Operands], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    forward: Callable[[Sizes], Work]
    backward: Callable[[Sizes], Work]


def composed_embedding(o: Operands, ids, positions, segments, word, position, segment, weight, bias) -> Tensor:
    z = F.embedding(ids, word, padding_idx=0) + F.embedding(segments, segment) + F.embedding(positions, position)
    return F.dropout(F.layer_norm(z, (o.h,), weight, bias, EPS), o.dropout)


def composed_attention(o: Operands, qkv: Tensor) -> Tensor:
    mask = None
    if not o.full:
        qkv, mask = o.padded
    q, k, v = qkv.view(o.batch, o.seq, 3, o.heads, o.h // o.heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=o.dropout)
    return out.transpose(1, 2).reshape(o.batch * o.seq, o.h)


def composed_mlm_loss(o: Operands, hidden, word, bias, labels) -> Tensor:
    logits = F.linear(hidden, word.to(o.dtype), bias.to(o.dtype))
    return F.cross_entropy(logits.float(), labels)


def attention_products(s: Sizes, products: int) -> int:
    """FLOPs of ``products`` of 2 S^2 D each, per sequence and head; what a kernel computes twice counts once."""
    return products * 2 * s.h * sum(n * n for n in s.lengths)


def small_tables(s: Sizes) -> int:
    """Bytes of the position and segment rows, each once."""
    return s.r * s.h * (max(s.lengths) + s.config.type_vocab_size)


def all_tables(s: Sizes) -> int:
    return s.r * (s.vh + s.h * (s.config.max_position_embeddings + s.config.type_vocab_size))


def weights(o: Operands, *shape: int) -> Tensor:
    """A product's weight, in ``dtype``."""
    return o.parameter(*shape).detach().to(o.dtype).requires_grad_()


OPERATORS = {
    "embedding_layernorm": Operator(
        "{tokens} x {h}",
        lambda o: (*o.words(), o.parameter(o.vocabulary, o.h), o.parameter(o.config.max_position_embeddings, o.h),
                   o.parameter(o.config.type_vocab_size, o.h), o.parameter(o.h, mean=1.0), o.parameter(o.h)),
        lambda o, *operands: ops.embedding_layernorm(*operands, eps=EPS, padding_idx=0, **o.keys),
        composed_embedding,
        lambda s: Work(12 * s.th, 2 * s.th * s.r + small_tables(s)),  # word row; out
        # d out, word row; the tables' gradients
        lambda s: Work(12 * s.th, 2 * s.th * s.r + small_tables(s) + all_tables(s)),
    ),
    "attention": Operator(
        "{batch} x {seq}, {heads} heads",
        lambda o: (o.activation(o.tokens, 3, o.heads, o.h // o.heads),),
        lambda o, qkv: ops.attention(qkv, o.cu_seqlens, o.seq, **o.keys),
        composed_attention,
        lambda s: Work(attention_products(s, 2), 4 * s.th * s.e, products=True),
        lambda s: Work(attention_products(s, 5), 8 * s.th * s.e, products=True),  # scores once again
    ),
    "residual_layernorm": Operator(
        "{tokens} x {h}",
        lambda o: (o.activation(o.tokens, o.h), o.parameter(o.tokens, o.h, scale=1.0), o.parameter(o.h),
                   o.parameter(o.h, mean=1.0), o.parameter(o.h)),
        lambda o, x, residual, bias, weight, ln_bias: ops.residual_layernorm(
            x, residual, weight, ln_bias, bias=bias, eps=EPS, **o.keys
        ),
        lambda o, x, residual, bias, weight, ln_bias: F.layer_norm(
            F.dropout(x + bias.to(o.dtype), o.dropout) + residual, (o.h,), weight, ln_bias, EPS
        ),
        lambda s: Work(12 * s.th, s.th * (s.e + 3 * s.r)),  # x, residual; out, z
        lambda s: Work(12 * s.th, s.th * (s.e + 3 * s.r)),  # d out, z; d x, d residual
    ),
    "bias_gelu": Operator(
        "{tokens} x {inner}",
        lambda o: (o.activation(o.tokens, o.inner), o.parameter(o.inner)),
        lambda o, x, bias: ops.bias_gelu(x, bias),
        lambda o, x, bias: F.gelu(x + bias.to(o.dtype)),
        lambda s: Work(40 * s.ti, 2 * s.ti * s.e),  # x; out
        lambda s: Work(40 * s.ti, 3 * s.ti * s.e),  # d out, x; d x
    ),
    "mlm_loss": Operator(
        "{masked} x {h} x {vocabulary}",
        lambda o: (o.activation(o.masked, o.h), o.parameter(o.vocabulary, o.h), o.parameter(o.vocabulary),
                   o.integers(o.vocabulary, o.masked)),
        lambda o, *operands: ops.mlm_loss(*operands),
        composed_mlm_loss,
        # all three products (logits, d hidden, d word); backward the gradients read, scaled and written
        lambda s: Work(6 * s.masked * s.vh, 2 * (s.masked * s.h * s.e + s.vh * s.r), products=True),
        lambda s: Work(s.vh, 2 * (s.masked * s.h * s.e + (s.vh + s.vocabulary) * s.r)),
    ),
    # the whole of it: what one kernel saves at its GELU is seen beside its products
    "feed_forward": Operator(
        "{tokens} x {h} x {inner}",
        lambda o: (o.activation(o.tokens, o.h), weights(o, o.inner, o.h), o.parameter(o.inner),
                   weights(o, o.h, o.inner)),
        lambda o, x, weight_in, bias, weight_out: ops.feed_forward(x, weight_in, bias, weight_out),
        lambda o, x, weight_in, bias, weight_out: F.linear(
            F.gelu(F.linear(x, weight_in, bias.to(o.dtype))), weight_out
        ),
        lambda s: Work(4 * s.tokens * s.h * s.inner, 2 * s.e * (s.th + s.h * s.inner), products=True),
        lambda s: Work(8 * s.tokens * s.h * s.inner, s.e * (3 * s.th + 4 * s.h * s.inner), products=True),
    ),
}  # fmt: skip
OF_THE_MODEL = tuple(name for name in OPERATORS if name != "feed_forward")  # what it is made of by default


def work_of(operator: str, direction: str, config, lengths: Sequence[int], e: int, r: int) -> Work:
    """What a call has to do."""
    return getattr(OPERATORS[operator], direction)(Sizes(config, lengths, e, r))


# --------------------------------------------------------------------------------------------------------------
# One operator at one size


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
    torch_inputs: tuple[Tensor, ...]

    def backward(self, out: Tensor, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        """A function that runs the backward from ``out`` to ``inputs``, any number of times."""
        generator = torch.Generator(out.device).manual_seed(1)
        grad_out = torch.ones_like(out)
        if out.dim():
            grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    def call(self, direction: str, *, ours: bool = True, forward: Callable[[], Tensor] | None = None):
        """A function that runs ``direction`` alone of one side (by ``forward`` in place of its own)."""
        forward = forward or (self.ours if ours else self.torch)
        return forward if direction == "forward" else self.backward(
            forward(), self.inputs if ours else self.torch_inputs
        )  # fmt: skip


def running_backend(operator: str, device: str) -> str:
    """The backend that runs ``operator``; the reference where a backend has left the operator to it."""
    serving = {dispatch.implementation(operator, direction, device).__module__ for direction in ("fwd", "bwd")}
    return "reference" if serving == {"bert_fast.reference"} else dispatch.choose(operator, device)


def build_case(
    operator: str, device: str, dtype: torch.dtype, *, model: str = "base", seq: int = 512, batch: int = 2,
    lengths: Sequence[int] | None = None, dropout: float = DROPOUT, parameters: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
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
    o, what = Operands(device, dtype, parameters, config, lengths, seq, dropout), OPERATORS[operator]
    operands, shape = what.operands(o), what.shape.format_map(vars(o))
    inputs = tuple(x for x in operands if x.requires_grad)
    theirs = inputs if o.full or operator != "attention" else o.padded[:1]
    if operator == "attention":
        shape = f"{o.tokens} tokens of " * (not o.full) + f"{shape} of {o.h // o.heads}"
    return Case(operator, running_backend(operator, device), shape, inputs, lambda: what.ours(o, *operands),
                lambda: what.torch(o, *operands), theirs)  # fmt: skip


def contenders_of(operator: str, direction: str, device: str, *, compiled: bool = False) -> list[str]:
    """Who has ``operator`` here: ours, PyTorch's own composition (``compiled`` too), installed peers, candidates to
    become ours; of mlm_loss the products that are in it too."""
    names = ["bert_fast", "pytorch"] + ["compile"] * compiled
    names += [
        b for b in ("flash_attn", "apex") if b in dispatch.TABLE[operator] and dispatch.why_unavailable(b) is None
    ]
    if operator == "attention" and device == "cuda":
        names += [*TORCH_ATTENTION, *PACKED, HOPPER[direction]]
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
    forward = torch.compile(case.torch, dynamic=False) if contender == "compile" else None
    choices = CONTENDERS[contender].ours.choices if contender in CONTENDERS else {}

    @contextlib.contextmanager
    def packed():
        with dispatch.use_backend(attention="torch"), choice.use({"attention.torch": {"kernel": PACKED[contender]}}):
            yield

    def means():
        if contender in TORCH_ATTENTION:
            return sdpa_kernel(TORCH_ATTENTION[contender])
        if contender in PACKED:
            return packed()
        if contender in ("flash_attn", "apex"):
            return dispatch.use_backend(**{case.operator: contender})
        return choice.use(choices)

    with means():
        theirs = contender in ("pytorch", "compile", *TORCH_ATTENTION)
        call = case.call(direction, ours=not theirs, forward=forward)

    def run():
        with means():
            return call()

    if choices:
        wanted = {name for name in choices if case.operator in name}
        wanted = {name for name in wanted if case.operator != "feed_forward" or name.split(".")[1][0] == direction[0]}
        check_candidate(case, direction, run, wanted)
    return run


def check_candidate(case: Case, direction: str, run: Callable[[], object], wanted: set[str]) -> None:
    """RuntimeError where ``run`` is not ours as built to rounding, or not by the kernels ``wanted``."""
    expected = case.call(direction)()
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


# --------------------------------------------------------------------------------------------------------------
# Times


def rate_of(work: Work, seconds: float, limits: dict, dtype: torch.dtype) -> dict:
    """FLOP/s or bytes/s by what limits the operator, and its share of the measured limit: above 1 where an operator
    multiplies in a dtype that is faster than ``dtype`` on this machine."""
    if work.products:
        rate = {"tflops": work.flops / seconds / 1e12}
        limit = limits.get("matmul_tflops", {}).get(NAMES[dtype])
    else:
        rate, limit = {"gbs": work.bytes / seconds / 1e9}, limits.get("copy_gbs")
    return rate | {"share_of_limit": next(iter(rate.values())) / limit if limit else None}


def rows_of(
    own: clock.Clock, facts: dict, calls: dict[str, Callable[[], object]], rounds: int,
    rates: Callable[[str, float], dict],
) -> list[dict]:  # fmt: skip
    """A row for each of ``calls``, ours first, each called in turn with cold caches: "ms" (median over rounds), its
    quantiles, what ``rates(contender, seconds)`` gives, and of others "ours_is", the paired ratio of their time over
    ours."""
    times, rows = clock.interleave(calls, rounds, own.call), []
    for name, seconds in times.items():
        spread = {f"{key}_ms".removeprefix("p50_"): 1e3 * value for key, value in clock.quantiles(seconds).items()}
        row = facts | {"contender": name, "backend": name} | spread | rates(name, statistics.median(seconds))
        if name != "bert_fast":
            row["ours_is"] = clock.paired_ratio(seconds, times["bert_fast"])
        rows.append(row)
    return rows


def measure(
    own: clock.Clock, operator: str, dtype: torch.dtype, *, model: str, seq: int, lengths: Sequence[int], kind: str,
    limits: dict, rounds: int, dropout: float = DROPOUT, parameters: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[dict]:  # fmt: skip
    """Rows of both directions of one operator: what :func:`rows_of` says, and "tflops" or "gbs" (by what limits it)
    with "share_of_limit". A contender that fails keeps its reason in its row."""
    case = build_case(
        operator, own.device, dtype, model=model, seq=seq, lengths=lengths, dropout=dropout, parameters=parameters
    )
    rows, config = [], model_config(model, dropout=dropout)
    for direction in DIRECTIONS:
        facts = {"model": model, "seq": seq, "lengths": kind, "dropout": dropout, "operator": operator,
                 "direction": direction, "shape": case.shape}  # fmt: skip
        calls, failed = {}, []
        for contender in contenders_of(operator, direction, own.device, compiled=compiled):
            try:
                call = call_of(case, direction, contender)
                own.calls(call, 1)  # compiles, and finds its memory in the allocator
                calls[contender] = call
            except Exception as error:
                if contender == "bert_fast":
                    raise
                failed.append(facts | {"contender": contender, "backend": contender, "failed": reason(error)})
        work = work_of(operator, direction, config, lengths, dtype.itemsize, parameters.itemsize)
        counted = {"flops": work.flops, "bytes": work.bytes}
        rows += rows_of(own, facts, calls, rounds * REPEATS[own.device],
                        lambda _, seconds, w=work, c=counted: c | rate_of(w, seconds, limits, dtype))  # fmt: skip
        rows[-len(calls)]["backend"] = case.backend
        rows += failed
    return rows


# The optimisers: their peers, and bytes an element of float32 weights that it has to move: the norm reads
# g; AdamW reads w, g, m, v and writes w, m, v; LAMB reads those, writes m and v, then reads w, m, v and writes w.
# PyTorch's clipping reads g for the norm, then reads and writes it. With weights and gradients of 16 bits, ours keeps
# float32 weights besides, PyTorch and apex do not: they move less than half.
OPTIMIZERS = {
    "norm": {"bert_fast": 4, "torch norm and clipping": 12},
    "adamw": {"bert_fast": 32, "torch AdamW, fused": 40, "torch AdamW, foreach": None},
    "lamb": {"bert_fast": 44, "LAMB in PyTorch": None, "apex FusedLAMB": None},
}
SIXTEEN_BITS = {"norm": 2, "adamw": 30, "lamb": 42}  # of ours: two of gradients twice, two of weights written besides


def update_of(model: torch.nn.Module, operator: str, contender: str) -> Callable[[], object]:
    """A function that does one whole update of ``model`` as ``contender`` does it, gradients clipped to norm 1."""
    groups = optim.parameter_groups(model)
    parameters = [p for group in groups for p in group["params"]]
    if contender == "bert_fast":
        if operator == "norm":
            return lambda: optim.grad_norm(parameters)
        return {"adamw": optim.AdamW, "lamb": optim.Lamb}[operator](groups, lr=RATE, max_grad_norm=1.0).step
    if contender == "apex FusedLAMB":
        from apex.optimizers import FusedLAMB

        return FusedLAMB(parameters, lr=RATE, max_grad_norm=1.0).step
    return clipped(parameters, their_optimizer(model, operator, fused="fused" in contender))


def measure_optimizers(
    own: clock.Clock, model: str, *, limits: dict, rounds: int, weights: torch.dtype = torch.float32
) -> list[dict]:
    """A row for each contender of each optimiser, as :func:`measure` has them; gradients have ``weights``' dtype."""
    with torch.device(own.device):
        module = bert_fast.BertForPreTraining(model_config(model, dropout=0.0)).to(weights)
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    elements, rows = sum(p.numel() for p in module.parameters()), []
    for operator, contenders in OPTIMIZERS.items():
        here = [n for n in contenders if n != "apex FusedLAMB" or dispatch.why_unavailable("apex") is None]
        calls = {name: update_of(module, operator, name) for name in here}
        for call in calls.values():
            own.calls(call, 1)

        def rates(name: str, seconds: float, contenders=contenders, operator=operator) -> dict:
            moved = contenders[name] if weights == torch.float32 else SIXTEEN_BITS[operator] * (name == "bert_fast")
            work = Work(12 * elements, (moved or 0) * elements)
            return {"flops": work.flops, "bytes": work.bytes} | rate_of(work, seconds, limits, weights) if moved else {}

        facts = {"model": model, "seq": 0, "lengths": "", "dropout": 0.0, "operator": operator, "direction": "update",
                 "shape": f"{elements} parameters of {weights.itemsize} bytes", "weights": NAMES[weights]}  # fmt: skip
        rows += rows_of(own, facts, calls, rounds, rates)
    return rows


def measure_operators(
    device: str, dtype: torch.dtype, model: str = "base", seq: int = 512, batch: int = 2, rounds: int = 7, *,
    limits: dict, progress: Callable[[str], None] = lambda text: None,
) -> list[dict]:  # fmt: skip
    """Rows of every operator at ``batch`` full sequences, and of the optimisers.

    ``device`` is "cpu" or "cuda", ``dtype`` a floating dtype; ``limits`` are limits.py's. ``progress`` is called with
    a phrase for each step. Raises ValueError for sizes that the model does not have.
    """
    own, rows = clock.Clock(device), []
    for operator in OF_THE_MODEL:
        progress(operator)
        rows += measure(
            own, operator, dtype, model=model, seq=seq, lengths=[seq] * batch, kind="full", limits=limits, rounds=rounds
        )
    progress("optimisers")
    return rows + measure_optimizers(own, model, limits=limits, rounds=rounds)
