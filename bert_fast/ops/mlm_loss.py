"""mlm_loss: the tied projection and the cross-entropy of the masked positions."""

import torch

from bert_fast import choice
from bert_fast.ops.checks import check_floating, check_like, check_range, require
from bert_fast.ops.register import call, define, differentiate, first_output, total_dtype, transformed
from bert_fast.ops.table_gradient import embedded_table

Tensor = torch.Tensor


def _fake(hidden, word, bias, labels, normalizer, ignore_index, chunk, with_grads):
    loss = hidden.new_empty((), dtype=total_dtype(hidden))
    if not with_grads:
        return loss, hidden.new_empty(0), word.new_empty(0), bias.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(word), torch.empty_like(bias)


def _check(hidden, word, bias, labels, normalizer, ignore_index, *_):
    check_range("mlm_loss", "labels", labels, word.shape[0], ignore_index)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


# Both are torch's own, without a public name; where a version lacks one the factor is multiplied in as ever.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _is_last_backward(grad_loss: Tensor) -> bool:
    """The saved gradients serve once: the graph is freed, no second derivative is recorded, nothing traces."""
    return (
        type(grad_loss) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and _dispatch_modes() == 0
        and not _keeps_graph()
    )


def _backward(ctx, grad_loss, *_):
    if _is_last_backward(grad_loss):  # a copy of the table's gradient (V, H) less, and a pass where the factor is one
        grads = tuple(g.detach() for g in ctx.saved_tensors)
        call("mlm_loss_bwd_", grad_loss, *grads)
    else:
        grads = call("mlm_loss_bwd", grad_loss, *ctx.saved_tensors)
    return *grads, None, None, None, None, None


define(
    "mlm_loss",
    "fwd",
    "(Tensor hidden, Tensor word, Tensor bias, Tensor labels, Tensor? normalizer, int ignore_index, int chunk, "
    "bool with_grads) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _check,
)
define(
    "mlm_loss",
    "bwd",
    "(Tensor grad_loss, Tensor grad_hidden, Tensor grad_word, Tensor grad_bias) -> (Tensor, Tensor, Tensor)",
    lambda grad_loss, *grads: tuple(torch.empty_like(g) for g in grads),
)
define(
    "mlm_loss",
    "bwd_",  # bwd in place
    "(Tensor grad_loss, Tensor(a!) grad_hidden, Tensor(b!) grad_word, Tensor(c!) grad_bias) -> ()",
    lambda *_: None,
)
differentiate("mlm_loss", _setup, _backward)


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
    check_like(name, hidden.device, hidden=(hidden, (-1, -1)))
    check_like(name, hidden.device, word=(word, (-1, hidden.shape[1])), labels=(labels, (hidden.shape[0],)))
    check_like(name, hidden.device, bias=(bias, (word.shape[0],)))
    check_floating(name, hidden=hidden, word=word, bias=bias, normalizer=normalizer)
    require(labels.dtype == torch.int64, name, f"labels has dtype {labels.dtype}, expected int64", TypeError)
    if chunk is None:
        chunk = choice.of("mlm_loss.chunk", MLM_CHUNK).get(hidden.device.type, 1024)
    require(chunk >= 1, name, f"chunk is {chunk}, expected at least 1")
    if normalizer is not None:
        require(normalizer.numel() == 1, name, f"normalizer has shape {tuple(normalizer.shape)}, expected 1 element")
    embedded = embedded_table()
    if embedded and embedded[0] is word:
        word = embedded[1]
    with_grads = (
        torch.is_grad_enabled()
        and not transformed()
        and (hidden.requires_grad or word.requires_grad or bias.requires_grad)
    )
    return first_output(
        name, hidden.contiguous(), word.contiguous(), bias.contiguous(), labels.contiguous(), normalizer, ignore_index,
        chunk, with_grads,
    )  # fmt: skip
