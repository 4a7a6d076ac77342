"""Products with weights, whose gradients may be summed in place where no hook sees them.

Autograd makes a weight's gradient in memory of its own and then adds it to ``.grad``: of every weight, in every
micro-batch after the first, two reads and a write that a product could do itself; under autocast it is besides
rounded to 16 bits and converted back. Inside :func:`gradients_in_place` the product that makes the gradient writes or
adds to ``.grad``, with sums in float32, and autograd is given none.

So it is with the gradient of what a product multiplies, where a residual passes beside it: two gradients, which
autograd adds in a pass of its own. The product of :func:`linear_with_residual` adds its own to the residual's.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from bert_fast.products import multiply

Tensor = torch.Tensor

# The weights of each gradients_in_place, by identity, with where their first gradients go. No context variable:
# checkpointed layers run again inside the backward, which on a GPU is a thread of autograd's.
_in_place: dict[int, Mapping[Tensor, Tensor]] = {}


@contextlib.contextmanager
def gradients_in_place(weights: Iterable[Tensor], first: Mapping[Tensor, Tensor] | None = None) -> Iterator[None]:
    """Around a forward and its ``backward()``: the gradients of ``weights`` that :func:`linear` multiplies with.

    The first gradient is written where ``first`` has memory for a weight, which becomes its ``.grad`` (to several
    weights of one product only where they lie one after the other), else to new memory; later ones are added to it.
    Weights with hooks, and all that is used otherwise than by ``linear``, have gradients by autograd, which it adds.
    For a step that owns its gradients: ``torch.autograd.grad`` finds none, nor do hooks on the nodes of the graph.
    """
    held = [w for w in weights if w.requires_grad]  # while they live their identities are theirs
    before = {id(w): _in_place[id(w)] for w in held if id(w) in _in_place}
    _in_place.update((id(w), first or {}) for w in held)
    try:
        yield
    finally:
        for w in held:
            _in_place.pop(id(w), None)
        _in_place.update(before)


def linear(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (T, H) times the transposes of ``weights`` (N_i, H) side by side, plus ``bias``: (T, sum of N_i).

    Equals ``F.linear(x, torch.cat(weights), bias)``, under autocast too.
    """
    if _owned(weights):
        return _Linear.apply(x.to(product_dtype(x)), bias, False, *weights)
    return F.linear(x, weights[0] if len(weights) == 1 else torch.cat(list(weights)), bias)


def linear_with_residual(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(``linear(x, weights, bias)``, x): x again, for its use beside the product, a residual's.

    Inside :func:`gradients_in_place` the gradient of that use is memory that the product's backward adds to and hands
    on: nothing else may keep it, as a hook could. The caller knows that there is none between here and there.
    """
    if _owned(weights) and x.dtype == product_dtype(x):
        return _Linear.apply(x, bias, True, *weights)
    return linear(x, weights, bias), x


def _owned(weights: Sequence[Tensor]) -> bool:
    tracing = torch.compiler.is_compiling()
    return not tracing and torch.is_grad_enabled() and all(id(w) in _in_place for w in weights)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for ``device``; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies ``x`` now."""
    rounded = autocasts(x.device) and x.dtype != torch.float64  # which autocast leaves as it is
    return torch.get_autocast_dtype(x.device.type) if rounded else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, with_residual, *weights):
        rows, dtype = [w.shape[0] for w in weights], weights[0].dtype
        if autocasts(x.device) and dtype != torch.float64:
            dtype = x.dtype
        if len(weights) == 1:
            weight = weights[0].to(dtype)
        else:  # put together and rounded in one pass
            weight = torch.empty((sum(rows), weights[0].shape[1]), dtype=dtype, device=x.device)
            torch._foreach_copy_(weight.split(rows), weights)
        ctx.save_for_backward(x, weight)
        ctx.weights, ctx.rows = weights, rows
        ctx.first = [_in_place[id(w)].get(w) for w in weights]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)  # zeros in the place of a gradient that there is not
        out = F.linear(x, weight, None if bias is None else bias.to(dtype))
        return (out, x) if with_residual else out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_residual=None):
        if grad_out is None:
            return grad_residual, *(None,) * (2 + len(ctx.weights))
        x, weight = ctx.saved_tensors
        grad_x = _product_added(grad_residual, grad_out, weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_out.sum(dim=0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, *_weight_gradients(ctx.weights, ctx.rows, ctx.first, grad_out, x)


def _product_added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, added to ``total`` in place where there is one."""
    if total is None:
        return a @ b
    if total.is_contiguous() and total.dtype == a.dtype:
        return total.addmm_(a, b)
    return total + a @ b


def _weight_gradients(weights, rows, first, grad_out: Tensor, x: Tensor) -> list[Tensor | None]:
    """grad_out^T @ x, put or added where ``.grad`` of the weights is; what is left for autograd to add."""
    held = [w.grad for w in weights]
    hooked = any(w._backward_hooks or w._post_accumulate_grad_hooks for w in weights)
    if not hooked and (together := _one_matrix(held)) is not None:
        multiply(grad_out.t(), x, together, add=True)
        return [None] * len(weights)
    fresh = hooked or any(grad is not None for grad in held)
    together = None if fresh else _one_matrix(first)
    if together is None:
        together = torch.empty((sum(rows), x.shape[1]), dtype=weights[0].dtype, device=x.device)
        first = together.split(rows)
    multiply(grad_out.t(), x, together)
    left = list(first)
    for i, w in enumerate(weights):
        if not fresh and w.grad is None:  # else it is here twice
            w.grad, left[i] = left[i], None
    return left


def _one_matrix(maybe: Sequence[Tensor | None]) -> Tensor | None:
    """The matrix of the rows of ``maybe``, which lie in memory one after the other; None where they do not."""
    parts = [part for part in maybe if part is not None and part.is_contiguous()]
    if len(parts) < len(maybe):
        return None
    start = parts[0]
    storage, offset = start.untyped_storage()._cdata, start.storage_offset()
    for part in parts:
        if (part.untyped_storage()._cdata, part.storage_offset(), part.dtype) != (storage, offset, start.dtype):
            return None
        offset += part.numel()
    return start.as_strided((sum(part.shape[0] for part in parts), start.shape[1]), start.stride())
