"""The fused operators as PyTorch operators: schemas, shapes, derivatives, checks. Nothing here computes.

Each operator is two torch.library operators, ``bert_fast::<name>_fwd`` and ``bert_fast::<name>_bwd``, so that
autograd, fake tensors and torch.compile see through it; bert_fast/dispatch.py says which implementation runs.
The public functions below check what shapes, dtypes and devices tell; values (ids, labels, cu_seqlens) are
checked on CPU tensors when the operator runs, and never on a GPU, where that would wait for the device.
"""

import contextlib
import contextvars
import itertools
import math

import torch

from bert_fast import choice, dispatch, reference
from bert_fast.linear import product_dtype

Tensor = torch.Tensor

_library = torch.library.Library("bert_fast", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _define(operator: str, direction: str, schema: str, fake, check=None) -> None:
    name = f"{operator}_{direction}"

    def run(*args):
        device = args[0].device
        if check is not None and device.type == "cpu":
            check(*args)
        # One of the first four has the operator's dtype; not one element: a loss's gradient may have another.
        float64 = any(isinstance(x, Tensor) and x.dtype == torch.float64 and x.numel() != 1 for x in args[:4])
        implementation = dispatch.implementation(operator, direction, device.type, float64)
        # Autocast chose the inputs' dtypes; inside it would round what implementations widen, to sum it in float32.
        with torch._C._DisableAutocast():
            if device.type != "cuda" or torch.cuda.current_device() == device.index:
                return implementation(*args)
            with torch.cuda.device(device):  # kernels are launched on the current device, which is another
                return implementation(*args)

    _library.define(f"{name}{schema}", tags=_TAGS)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bert_fast::{name}", fake, lib=_library)


def _call(name: str, *args):
    """The operator ``name``; past what autograd does for it, where that is nothing."""
    operator = getattr(torch.ops.bert_fast, name).default
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


_nodes: dict[str, type[torch.autograd.Function]] = {}


def _differentiate(operator: str, setup_context, backward) -> None:
    """Gives ``<operator>_fwd`` the derivative ``backward``, of its first output; the others are for that alone.

    Twice: registered for the operator, as torch.compile and exports want it, and as a node of autograd that calls the
    operator, which costs the host a third of what a registered derivative does.
    """

    def setup(ctx, inputs, output):
        # Zeros in the place of the gradients of what the backward alone reads, among them a whole word table's, would
        # be written in every step.
        ctx.set_materialize_grads(False)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        setup_context(ctx, inputs, output)

    torch.library.register_autograd(f"bert_fast::{operator}_fwd", backward, setup_context=setup, lib=_library)

    def node_forward(ctx, *inputs):
        output = _call(f"{operator}_fwd", *inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output[0] if isinstance(output, tuple) else output

    methods = {"forward": staticmethod(node_forward), "backward": staticmethod(backward)}
    _nodes[operator] = type(operator, (torch.autograd.Function,), methods)

    def setup_bwd(ctx, inputs, output):
        pass

    def double_backward(ctx, *grads):
        raise NotImplementedError(
            f"bert_fast: {operator} has no second derivative; for gradient penalties and Hessians take derivatives by "
            "torch.func, run the model of transformers, or bert_fast.reference in place of the operator"
        )

    torch.library.register_autograd(
        f"bert_fast::{operator}_bwd", double_backward, setup_context=setup_bwd, lib=_library
    )


# Whether a transform of torch.func (grad, vmap, jvp, ...) is at work. Operators are then the reference's plain PyTorch,
# which all of them take, and which has derivatives of any order.
transformed = torch._C._are_functorch_transforms_active


def _first_output(operator: str, *inputs) -> Tensor:
    """The first output of ``<operator>_fwd``, differentiable."""
    if transformed():
        with torch._C._DisableAutocast():
            output = getattr(reference, f"{operator}_fwd")(*inputs)
        return output[0] if isinstance(output, tuple) else output
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return _nodes[operator].apply(*inputs)
    output = _call(f"{operator}_fwd", *inputs)
    return output[0] if isinstance(output, tuple) else output


def _total_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _require(condition: bool, operator: str, message: str, error=ValueError) -> None:
    if not condition:
        raise error(f"bert_fast.{operator}: {message}")


def _check_like(operator: str, device: torch.device, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Every tensor is on ``device`` and has its shape (-1: any size)."""
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"bert_fast.{operator}: {name} is on {tensor.device}, the other tensors on {device}: move it"
            )
        found = tensor.shape
        if found != shape and (
            len(found) != len(shape) or any(want not in (-1, have) for want, have in zip(shape, found, strict=True))
        ):
            expected = tuple("any" if n == -1 else n for n in shape)
            raise ValueError(f"bert_fast.{operator}: {name} has shape {tuple(found)}, expected {expected}")


_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def _check_floating(operator: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATING:
            raise TypeError(f"bert_fast.{operator}: {name} has dtype {tensor.dtype}, expected a floating-point dtype")


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dropout_keys(operator: str, p: float, row_key: Tensor | None, rng_key: Tensor | None, x: Tensor):
    """The checked keys of a mask over ``x``'s rows; empty tensors where nothing is dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"bert_fast.{operator}: the dropout probability p is {p}, expected 0 <= p <= 1")
    if p == 0.0:
        none = x.new_empty(0, dtype=torch.int64)
        return none, none
    _require(
        row_key is not None and rng_key is not None,
        operator,
        "dropout needs row_key (bert_fast.dropout_mask.row_keys) and rng_key (bert_fast.ops.draw_dropout_key)",
    )
    _check_like(operator, x.device, rng_key=(rng_key, (1,)), row_key=(row_key, (x.shape[0],)))
    for name, key in (("rng_key", rng_key), ("row_key", row_key)):
        if key.dtype != torch.int64:
            raise TypeError(f"bert_fast.{operator}: {name} has dtype {key.dtype}, expected int64")
    return row_key.contiguous(), rng_key.contiguous()


def _check_range(operator: str, name: str, values: Tensor, size: int, ignore: int | None = None) -> None:
    """Every value is in 0 .. size-1 (or ``ignore``). Reads the values: CPU tensors only."""
    if values.numel() == 0:
        return
    if int(values.min()) < 0 or int(values.max()) >= size:
        error = out_of_range(f"bert_fast.{operator}: {name}", values, size, ignore)
        if error is not None:
            raise error


def out_of_range(
    name: str, values: Tensor, size: int, ignore: int | None = None, among: Tensor | None = None
) -> IndexError | None:
    """The error that names the first of ``values`` (of any shape) outside 0 .. size-1 (and not ``ignore``), where
    ``among`` (bool, of that shape) is true; None where there is none."""
    bad = (values < 0) | (values >= size)
    if ignore is not None:
        bad &= values != ignore
    if among is not None:
        bad &= among
    if not bad.any():
        return None
    place = bad.nonzero()[0].tolist()
    allowed = f"0 .. {size - 1}" + ("" if ignore is None else f" or {ignore}")
    return IndexError(
        f"{name}[{', '.join(map(str, place))}] is {int(values[tuple(place)])}, allowed is {allowed} "
        f"({int(bad.sum())} of {values.numel()} are out of range)"
    )


# --------------------------------------------------------------------------------------------------------------
# The dropout key


def _draw_dropout_key(like: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


_library.define("draw_dropout_key(Tensor like) -> Tensor", tags=(*_TAGS, torch.Tag.nondeterministic_seeded))
_library.impl("draw_dropout_key", _draw_dropout_key, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bert_fast::draw_dropout_key", lambda like: like.new_empty((1,), dtype=torch.int64), lib=_library
)


def draw_dropout_key(like: Tensor) -> Tensor:
    """One int64 (1,) on ``like``'s device from torch's generator: the key of a forward pass's dropout masks."""
    if transformed():  # vmap's ``randomness`` says whether all samples have one
        return _draw_dropout_key(like)
    return torch.ops.bert_fast.draw_dropout_key(like)


# --------------------------------------------------------------------------------------------------------------
# embedding_layernorm


def _embedding_layernorm_fake(ids, positions, segments, word, *rest):
    rows, out_dtype = ids.shape[0], rest[-1]
    mean = word.new_empty((rows,), dtype=_total_dtype(word))
    return word.new_empty((rows, word.shape[1]), dtype=out_dtype), mean, torch.empty_like(mean)


def _embedding_layernorm_check(ids, positions, segments, word, position, segment, *_):
    _check_range("embedding_layernorm", "ids", ids, word.shape[0])
    _check_range("embedding_layernorm", "positions", positions, position.shape[0])
    _check_range("embedding_layernorm", "segments", segments, segment.shape[0])


def _embedding_layernorm_setup(ctx, inputs, output):
    *tensors, row_key, rng_key, _, ctx.p, ctx.site, ctx.padding_idx, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors[:7], mean, rstd, row_key, rng_key)


def _embedding_layernorm_backward(ctx, grad_out, *_):
    grads = _call(
        "embedding_layernorm_bwd", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site, ctx.padding_idx
    )
    return None, None, None, *grads, None, None, None, None, None, None, None


def _embedding_layernorm_bwd_fake(grad_out, ids, positions, segments, word, position, segment, weight, *_):
    tables = (word, position, segment, weight, weight)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tables)


_define(
    "embedding_layernorm",
    "fwd",
    "(Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, Tensor weight, "
    "Tensor bias, Tensor row_key, Tensor rng_key, float eps, float p, int site, int padding_idx, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _embedding_layernorm_fake,
    _embedding_layernorm_check,
)
_define(
    "embedding_layernorm",
    "bwd",
    "(Tensor grad_out, Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, "
    "Tensor weight, Tensor mean, Tensor rstd, Tensor row_key, Tensor rng_key, float p, int site, int padding_idx) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embedding_layernorm_bwd_fake,
)
_define(
    "embedding_layernorm",
    "bwd_add",  # bwd, but the gradient of word is added to the last argument
    "(Tensor grad_out, Tensor ids, Tensor positions, Tensor segments, Tensor word, Tensor position, Tensor segment, "
    "Tensor weight, Tensor mean, Tensor rstd, Tensor row_key, Tensor rng_key, float p, int site, int padding_idx, "
    "Tensor(a!) grad_word) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _embedding_layernorm_bwd_fake(*args)[1:],
)
_differentiate("embedding_layernorm", _embedding_layernorm_setup, _embedding_layernorm_backward)


class _EmbeddingLayerNormAndTable(torch.autograd.Function):
    """embedding_layernorm whose word table is an output too: the gradient of that one is what ours is added to."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _call("embedding_layernorm_fwd", *inputs)
        ctx.set_materialize_grads(False)  # a table that nobody read has no gradient
        _embedding_layernorm_setup(ctx, inputs, output)
        return output[0], inputs[3].detach()

    @staticmethod
    def backward(ctx, grad_out, grad_word):
        if grad_word is None:
            return _embedding_layernorm_backward(ctx, grad_out)
        if torch.is_grad_enabled() and grad_out is not None:  # create_graph: the operator refuses a second derivative
            grads = list(_embedding_layernorm_backward(ctx, grad_out))
            grads[3] = grads[3] + grad_word
            return tuple(grads)
        grad_word, grads = grad_word.contiguous(), (None,) * 4
        if grad_out is not None:
            grads = _call(
                "embedding_layernorm_bwd_add", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site,
                ctx.padding_idx, grad_word,
            )  # fmt: skip
        return None, None, None, grad_word, *grads, None, None, None, None, None, None, None


# Inside one_table_gradient, after an embedding: its word table, and the same table as an output of the embedding.
_embedded: contextvars.ContextVar = contextvars.ContextVar("bert_fast.ops._embedded", default=None)


@contextlib.contextmanager
def one_table_gradient():
    """Around a model's forward: the two gradients of a tied word table, projection's and embedding's, meet in one.

    Each use of a table makes a gradient (V, H), the embedding's nearly all zeros, and autograd adds the two. In here
    ``embedding_layernorm`` gives the table on, and ``mlm_loss`` of the same table reads what was given on. So autograd
    takes the projection's gradient through the embedding's backward, which adds the rows of its tokens to it in place
    and returns it: the table's whole gradient, with the same bits, and still autograd's for hooks to see. Tables that
    are not tied or need no gradient are treated as ever, and so are compiled forwards.
    """
    token = _embedded.set([])
    try:
        yield
    finally:
        _embedded.reset(token)


def _embedded_table() -> list[Tensor] | None:
    return None if torch.compiler.is_compiling() or transformed() else _embedded.get()


def embedding_layernorm(
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + segment[segments])) (T, H) in one pass.

    ids, positions, segments (T,) int64; word (V, H), position (P, H), segment (S, H), weight and bias (H,)
    floating; row_key (T,) and rng_key (1,) int64 name the mask where p > 0. ``out_dtype`` defaults to word's.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, IndexError for indices out
    of range on a CPU; on a GPU the row of an index out of range is NaN.
    """
    name, rows, device = "embedding_layernorm", ids.shape[0], word.device
    _check_like(name, device, ids=(ids, (-1,)), positions=(positions, (rows,)), segments=(segments, (rows,)))
    for what, index in (("ids", ids), ("positions", positions), ("segments", segments)):
        _require(index.dtype == torch.int64, name, f"{what} has dtype {index.dtype}, expected int64", TypeError)
    _check_like(name, device, word=(word, (-1, -1)))
    columns = word.shape[1]
    _check_like(name, device, position=(position, (-1, columns)), segment=(segment, (-1, columns)),
                weight=(weight, (columns,)), bias=(bias, (columns,)))  # fmt: skip
    _check_floating(name, word=word, position=position, segment=segment, weight=weight, bias=bias)
    row_key, rng_key = _dropout_keys(name, p, row_key, rng_key, ids)
    arguments = (
        ids.contiguous(), positions.contiguous(), segments.contiguous(), word.contiguous(), position.contiguous(),
        segment.contiguous(), weight.contiguous(), bias.contiguous(), row_key, rng_key, eps, p, site,
        -1 if padding_idx is None else padding_idx, out_dtype or word.dtype,
    )  # fmt: skip
    embedded = _embedded_table()
    if embedded is not None and word.requires_grad:
        out, given_on = _EmbeddingLayerNormAndTable.apply(*arguments)
        embedded[:] = word, given_on
        return out
    return _first_output("embedding_layernorm", *arguments)


# --------------------------------------------------------------------------------------------------------------
# attention


def _attention_fake(qkv, *_):
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty((tokens, heads * size)), qkv.new_empty((heads, tokens), dtype=_total_dtype(qkv))


def _check_cu_seqlens(qkv, cu_seqlens, max_seqlen, *_):
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] > qkv.shape[0]:
        raise ValueError(
            f"bert_fast.attention: cu_seqlens must start at 0, never fall, and end at or before the {qkv.shape[0]} "
            f"tokens of qkv; it is {ends}"
        )
    if (longest := max(lengths, default=0)) > max_seqlen:
        raise ValueError(
            f"bert_fast.attention: max_seqlen is {max_seqlen}, but sequence {lengths.index(longest)} of cu_seqlens "
            f"has {longest} tokens"
        )


def _attention_setup(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, row_key, rng_key, ctx.scale, ctx.p, ctx.site, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qkv, *output, cu_seqlens, row_key, rng_key)


def _attention_backward(ctx, grad_out, *_):
    qkv, out, lse, cu_seqlens, row_key, rng_key = ctx.saved_tensors
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[-1] else None
    grad_qkv, grad_bias = _call(
        "attention_bwd", grad_out.contiguous(), qkv, out, lse, cu_seqlens, ctx.max_seqlen, row_key, rng_key, ctx.scale,
        ctx.p, ctx.site, bias_dtype,
    )  # fmt: skip
    return grad_qkv, *(None,) * 7, None if bias_dtype is None else grad_bias


def _attention_bwd_fake(grad_out, qkv, *rest):
    *_, bias_dtype = rest
    grad_bias = qkv.new_empty(0 if bias_dtype is None else qkv.shape[1:], dtype=bias_dtype)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), grad_bias


_define(
    "attention",
    "fwd",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor row_key, Tensor rng_key, float scale, float p, "
    "int site, Tensor? bias) -> (Tensor, Tensor)",
    _attention_fake,
    _check_cu_seqlens,
)
_define(
    "attention",
    "bwd",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, Tensor row_key, "
    "Tensor rng_key, float scale, float p, int site, ScalarType? bias_dtype) -> (Tensor, Tensor)",
    _attention_bwd_fake,
)
_differentiate("attention", _attention_setup, _attention_backward)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention of packed sequences: per sequence and head dropout(softmax(scale q k^T)) v.

    qkv (T, 3, A, D) floating, D <= 256; cu_seqlens (B+1,) int32: sequence i is tokens cu_seqlens[i] ..
    cu_seqlens[i+1]-1; max_seqlen bounds their lengths; scale defaults to D**-0.5. Returns (T, A*D), zero past
    cu_seqlens[-1]. No token sees another sequence. row_key (T,) and rng_key (1,) int64 name the mask where p > 0.
    ``bias`` (3, A, D) or (3*A*D,), floating, is one that qkv has in it already, from a product that was given it
    detached: it changes nothing here, and the backward gives its gradient, qkv's summed over all tokens in float32
    (float64), without a pass of its own. Of k it is exactly 0, as no softmax sees what is added to every key.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit and, on a CPU, for cu_seqlens
    that do not add up.
    """
    name = "attention"
    _check_like(name, qkv.device, qkv=(qkv, (-1, 3, -1, -1)), cu_seqlens=(cu_seqlens, (-1,)))
    _check_floating(name, qkv=qkv, bias=bias)
    _require(
        cu_seqlens.dtype == torch.int32, name, f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32", TypeError
    )
    _require(cu_seqlens.shape[0] >= 1, name, "cu_seqlens is empty; without any sequence it is [0]")
    _require(1 <= qkv.shape[3] <= 256, name, f"the head size is {qkv.shape[3]}, supported are 1 to 256")
    if bias is not None and bias.dim() == 1:
        _check_like(name, qkv.device, bias=(bias, (math.prod(qkv.shape[1:]),)))
        bias = bias.reshape(qkv.shape[1:])
    _check_like(name, qkv.device, bias=(bias, tuple(qkv.shape[1:])))
    row_key, rng_key = _dropout_keys(name, p, row_key, rng_key, qkv)
    if bias is not None and transformed():
        qkv = qkv + (bias - bias.detach())  # nothing, with the bias's gradient
    return _first_output(
        name, qkv.contiguous(), cu_seqlens.contiguous(), max_seqlen, row_key, rng_key,
        qkv.shape[3] ** -0.5 if scale is None else scale, p, site, _contiguous(bias),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# residual_layernorm


def _residual_layernorm_fake(x, bias, residual, *_):
    out = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    mean = x.new_empty((x.shape[0],), dtype=_total_dtype(x))
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


def _residual_layernorm_bwd_fake(grad_out, z, mean, rstd, weight, row_key, rng_key, p, site, x_dtype, has_bias):
    same = p == 0.0 and x_dtype == z.dtype
    grad_x = z.new_empty((0 if same else z.shape[0], z.shape[1]), dtype=z.dtype if same else x_dtype)
    grad_bias = weight.new_empty(weight.shape if has_bias else (0,))
    return grad_x, torch.empty_like(z), grad_bias, torch.empty_like(weight), torch.empty_like(weight)


def _residual_layernorm_setup(ctx, inputs, output):
    x, bias, residual, weight, _, row_key, rng_key, _, ctx.p, ctx.site = inputs
    ctx.x_dtype, ctx.has_bias, ctx.has_residual = x.dtype, bias is not None, residual is not None
    ctx.save_for_backward(*output[1:], weight, row_key, rng_key)


def _residual_layernorm_backward(ctx, grad_out, *_):
    grad_x, grad_residual, grad_bias, grad_weight, grad_ln_bias = _call(
        "residual_layernorm_bwd", grad_out.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site, ctx.x_dtype, ctx.has_bias
    )
    if ctx.p == 0.0 and ctx.x_dtype == grad_residual.dtype:
        grad_x = grad_residual
    return (
        grad_x,
        grad_bias if ctx.has_bias else None,
        grad_residual if ctx.has_residual else None,
        grad_weight,
        grad_ln_bias,
        *(None,) * 5,
    )


_define(
    "residual_layernorm",
    "fwd",
    "(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor ln_bias, Tensor row_key, Tensor rng_key, "
    "float eps, float p, int site) -> (Tensor, Tensor, Tensor, Tensor)",
    _residual_layernorm_fake,
)
_define(
    "residual_layernorm",
    "bwd",
    "(Tensor grad_out, Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor row_key, Tensor rng_key, float p, "
    "int site, ScalarType x_dtype, bool has_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _residual_layernorm_bwd_fake,
)
_differentiate("residual_layernorm", _residual_layernorm_setup, _residual_layernorm_backward)


def residual_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float,
    p: float = 0.0,
    row_key: Tensor | None = None,
    rng_key: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x + bias) + residual) (T, H), in the residual's dtype (x's, where there is none).

    x and residual (T, H), bias, weight and ln_bias (H,), floating; row_key (T,) and rng_key (1,) int64 name
    the mask where p > 0. Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    name = "residual_layernorm"
    _check_like(name, x.device, x=(x, (-1, -1)))
    columns = x.shape[1]
    _check_like(name, x.device, residual=(residual, tuple(x.shape)), bias=(bias, (columns,)),
                weight=(weight, (columns,)), ln_bias=(ln_bias, (columns,)))  # fmt: skip
    _check_floating(name, x=x, residual=residual, bias=bias, weight=weight, ln_bias=ln_bias)
    row_key, rng_key = _dropout_keys(name, p, row_key, rng_key, x)
    return _first_output(
        name, x.contiguous(), _contiguous(bias), _contiguous(residual), weight.contiguous(), ln_bias.contiguous(),
        row_key, rng_key, eps, p, site,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# bias_gelu


def _bias_gelu_bwd_fake(grad_out, x, bias):
    return torch.empty_like(x), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _bias_gelu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bias_gelu_backward(ctx, grad_out):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _call("bias_gelu_bwd", grad_out.contiguous(), x, bias)
    return grad_x, None if bias is None else grad_bias


_define("bias_gelu", "fwd", "(Tensor x, Tensor? bias) -> Tensor", lambda x, bias: torch.empty_like(x))
_define("bias_gelu", "bwd", "(Tensor grad_out, Tensor x, Tensor? bias) -> (Tensor, Tensor)", _bias_gelu_bwd_fake)
_differentiate("bias_gelu", _bias_gelu_setup, _bias_gelu_backward)


def bias_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x + bias) with the exact normal distribution function; x (T, F), bias (F,) -> (T, F) in x's dtype.

    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    _check_like("bias_gelu", x.device, x=(x, (-1, -1)))
    _check_like("bias_gelu", x.device, bias=(bias, (x.shape[1],)))
    _check_floating("bias_gelu", x=x, bias=bias)
    return _first_output("bias_gelu", x.contiguous(), _contiguous(bias))


def recompute_on_backward(y: Tensor) -> contextlib.AbstractContextManager:
    """Around the use of ``y``, what ``bias_gelu`` gave: a backward that needs it computes it again, to the same bits.

    It is made from what bias_gelu's own backward keeps, so nothing is kept for it. Where ``y`` has no such origin (no
    gradient, a forward that is compiled) it is kept as ever.
    """
    node = y.grad_fn
    if not isinstance(node, _nodes["bias_gelu"]._backward_cls):
        return contextlib.nullcontext()
    place, shape, dtype = y.data_ptr(), y.shape, y.dtype

    def pack(kept: Tensor):
        return node if (kept.data_ptr(), kept.shape, kept.dtype) == (place, shape, dtype) else kept

    def unpack(kept) -> Tensor:
        return _call("bias_gelu_fwd", *kept.saved_tensors) if kept is node else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# --------------------------------------------------------------------------------------------------------------
# feed_forward


def _feed_forward_fake(x, weight_in, bias, weight_out, in_epilogue):
    z = x.new_empty((x.shape[0], weight_in.shape[0]))
    return x.new_empty((x.shape[0], weight_out.shape[0])), z, torch.empty_like(z)


def _feed_forward_bwd_fake(grad_out, x, weight_in, bias, weight_out, z, activated, wanted, in_epilogue):
    grad_x, grad_in, grad_out_weight = (
        torch.empty_like(t) if w else z.new_empty(0) for t, w in zip((x, weight_in, weight_out), wanted, strict=True)
    )
    return grad_x, grad_in, z.new_empty(0) if bias is None else torch.empty_like(bias), grad_out_weight


def _feed_forward_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _feed_forward_backward(ctx, grad_out, *_):
    for_x, for_weight_in, _, for_weight_out, _ = ctx.needs_input_grad
    grad_x, grad_weight_in, grad_bias, grad_weight_out = _call(
        "feed_forward_bwd",
        grad_out.contiguous(),
        *ctx.saved_tensors,
        [for_x, for_weight_in, for_weight_out],
        dispatch.in_epilogue("bwd", grad_out),
    )
    return (
        grad_x if for_x else None,
        grad_weight_in if for_weight_in else None,
        None if ctx.saved_tensors[2] is None else grad_bias,
        grad_weight_out if for_weight_out else None,
        None,
    )


_define(
    "feed_forward",
    "fwd",
    "(Tensor x, Tensor weight_in, Tensor? bias, Tensor weight_out, bool in_epilogue) -> (Tensor, Tensor, Tensor)",
    _feed_forward_fake,
)
_define(
    "feed_forward",
    "bwd",
    "(Tensor grad_out, Tensor x, Tensor weight_in, Tensor? bias, Tensor weight_out, Tensor z, Tensor activated, "
    "bool[] wanted, bool in_epilogue) -> (Tensor, Tensor, Tensor, Tensor)",
    _feed_forward_bwd_fake,
)
_differentiate("feed_forward", _feed_forward_setup, _feed_forward_backward)


def fuses_feed_forward(x: Tensor) -> bool:
    """Whether a model has to compute the feed-forward of ``x`` by ``feed_forward``: where FEED_FORWARD_EPILOGUE in
    bert_fast/dispatch.py names this GPU, in 16 bits, in forwards that are not compiled."""
    if not (dispatch.FEED_FORWARD_EPILOGUE or choice.active()) or torch.compiler.is_compiling():
        return False
    sixteen_bits = product_dtype(x) in (torch.float16, torch.bfloat16)
    return sixteen_bits and any(dispatch.in_epilogue(direction, x) for direction in ("fwd", "bwd"))


def feed_forward(x: Tensor, weight_in: Tensor, bias: Tensor | None, weight_out: Tensor) -> Tensor:
    """GELU(x weight_in^T + bias) weight_out^T (T, H), the bias of the second product left to what follows.

    x (T, H), weight_in (F, H), bias (F,), weight_out (H, F) floating. Products are in x's dtype, under autocast in
    autocast's, as a linear layer's are, and so is the result.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit.
    """
    name = "feed_forward"
    _check_like(name, x.device, x=(x, (-1, -1)), weight_in=(weight_in, (-1, x.shape[-1])))
    columns = weight_in.shape[0]
    _check_like(name, x.device, bias=(bias, (columns,)), weight_out=(weight_out, (-1, columns)))
    _check_floating(name, x=x, weight_in=weight_in, bias=bias, weight_out=weight_out)
    dtype = product_dtype(x)
    return _first_output(
        name, x.to(dtype).contiguous(), weight_in.to(dtype).contiguous(), _contiguous(bias),
        weight_out.to(dtype).contiguous(), dispatch.in_epilogue("fwd", x),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# mlm_loss


def _mlm_loss_fake(hidden, word, bias, labels, normalizer, ignore_index, chunk, with_grads):
    loss = hidden.new_empty((), dtype=_total_dtype(hidden))
    if not with_grads:
        return loss, hidden.new_empty(0), word.new_empty(0), bias.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(word), torch.empty_like(bias)


def _mlm_loss_check(hidden, word, bias, labels, normalizer, ignore_index, *_):
    _check_range("mlm_loss", "labels", labels, word.shape[0], ignore_index)


def _mlm_loss_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


# Both are torch's own, without a public name; where a version lacks one the factor is multiplied in as ever.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _is_last_backward(grad_loss: Tensor) -> bool:
    """Nobody needs the saved gradients again: the graph is freed, no second derivative is recorded, nobody traces."""
    return (
        type(grad_loss) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and _dispatch_modes() == 0
        and not _keeps_graph()
    )


def _mlm_loss_backward(ctx, grad_loss, *_):
    if _is_last_backward(grad_loss):  # a copy of the table's gradient (V, H) less, and a pass where the factor is one
        grads = tuple(g.detach() for g in ctx.saved_tensors)
        _call("mlm_loss_bwd_", grad_loss, *grads)
    else:
        grads = _call("mlm_loss_bwd", grad_loss, *ctx.saved_tensors)
    return *grads, None, None, None, None, None


_define(
    "mlm_loss",
    "fwd",
    "(Tensor hidden, Tensor word, Tensor bias, Tensor labels, Tensor? normalizer, int ignore_index, int chunk, "
    "bool with_grads) -> (Tensor, Tensor, Tensor, Tensor)",
    _mlm_loss_fake,
    _mlm_loss_check,
)
_define(
    "mlm_loss",
    "bwd",
    "(Tensor grad_loss, Tensor grad_hidden, Tensor grad_word, Tensor grad_bias) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, *grads: tuple(torch.empty_like(g) for g in grads),
)
_define(
    "mlm_loss",
    "bwd_",  # bwd in place
    "(Tensor grad_loss, Tensor(a!) grad_hidden, Tensor(b!) grad_word, Tensor(c!) grad_bias) -> ()",
    lambda *_: None,
)
_differentiate("mlm_loss", _mlm_loss_setup, _mlm_loss_backward)


# Positions whose logits exist at a time. On a GPU d hidden, of (chunk, H) with a sum over the vocabulary, needs as many
# rows to have a tile for every multiprocessor, and d word is read and written once a chunk; elsewhere memory counts.
MLM_CHUNK = {"cuda": 4096}


def mlm_loss(
    hidden: Tensor,
    word: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    normalizer: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Softmax cross-entropy of hidden @ word^T + bias at masked positions: a scalar, in float32 (or float64).

    hidden (M, H), word (V, H), bias (V,) floating; labels (M,) int64, 0 .. V-1 or ``ignore_index``. The sum
    over labelled positions is divided by ``normalizer`` (1 element; default: their number; loss 0 and zero
    gradients where it is 0). Logits exist for at most ``chunk`` positions at a time (default: 4096 on a GPU,
    1024 elsewhere). The gradients are made in the forward pass: three matrix products, where recomputing in the
    backward takes five. Products are in hidden's dtype, gradients in their inputs' dtypes, summed in float32.
    Raises ValueError or TypeError for shapes, devices and dtypes that do not fit, IndexError for labels out of
    range on a CPU; on a GPU such a label makes the loss NaN.
    """
    name = "mlm_loss"
    _check_like(name, hidden.device, hidden=(hidden, (-1, -1)))
    _check_like(name, hidden.device, word=(word, (-1, hidden.shape[1])), labels=(labels, (hidden.shape[0],)))
    _check_like(name, hidden.device, bias=(bias, (word.shape[0],)))
    _check_floating(name, hidden=hidden, word=word, bias=bias, normalizer=normalizer)
    _require(labels.dtype == torch.int64, name, f"labels has dtype {labels.dtype}, expected int64", TypeError)
    if chunk is None:
        chunk = choice.of("mlm_loss.chunk", MLM_CHUNK).get(hidden.device.type, 1024)
    _require(chunk >= 1, name, f"chunk is {chunk}, expected at least 1")
    if normalizer is not None:
        _require(normalizer.numel() == 1, name, f"normalizer has shape {tuple(normalizer.shape)}, expected 1 element")
    embedded = _embedded_table()
    if embedded and embedded[0] is word:
        word = embedded[1]
    with_grads = (
        torch.is_grad_enabled()
        and not transformed()
        and (hidden.requires_grad or word.requires_grad or bias.requires_grad)
    )
    return _first_output(
        name, hidden.contiguous(), word.contiguous(), bias.contiguous(), labels.contiguous(), normalizer, ignore_index,
        chunk, with_grads,
    )  # fmt: skip
