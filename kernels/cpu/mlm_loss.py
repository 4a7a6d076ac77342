"""mlm_loss on a CPU: products by the library, one C++ pass over the logits between them (kernels/cpu/mlm_loss.cpp)."""

import torch

from bert_fast import reference
from bert_fast.kernels.cpu import function
from bert_fast.products import long_product, multiply

Tensor = torch.Tensor

_rows = function("mlm_loss_rows", "pppfppllii")


def mlm_loss_fwd(
    hidden: Tensor,
    word: Tensor,
    bias: Tensor,
    labels: Tensor,
    normalizer: Tensor | None,
    ignore_index: int,
    chunk: int,
    with_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss () float32 and the gradients of hidden, word and bias (empty without ``with_grads``).

    Products are in hidden's dtype. The table's gradient is summed in float32 where there is more than one chunk.
    """
    if torch.float64 in (hidden.dtype, word.dtype, bias.dtype):
        return reference.mlm_loss_fwd(hidden, word, bias, labels, normalizer, ignore_index, chunk, with_grads)
    valid = labels != ignore_index
    count = reference.divisor(valid.sum() if normalizer is None else normalizer.reshape(())).float()
    scale, targets = float(1.0 / count), labels.where(valid, -1)
    positions, vocabulary = hidden.shape[0], word.shape[0]
    once = positions <= chunk  # then nothing is summed
    grad_word = torch.empty(word.shape if with_grads else 0, dtype=word.dtype if once else torch.float32)
    if with_grads and once and hidden.itemsize < word.itemsize:
        # The rounded table lies where its gradient will, which is written when the table has been read: memory of its
        # own would be new in every step, and its page faults cost more than rounding does.
        table = grad_word.view(-1).view(hidden.dtype)[: word.numel()].view(word.shape).copy_(word)
    else:
        table = word.to(hidden.dtype)
    table_bias = bias.float()
    losses = torch.empty(positions)
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_bias = torch.zeros(vocabulary if with_grads else 0)
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        product = hidden[rows] @ table.T
        logits = product.float()
        _rows(
            logits, table_bias, targets[rows].contiguous(), scale, losses[rows], grad_bias,
            *logits.shape, int(with_grads), torch.get_num_threads(),
        )  # fmt: skip
        if with_grads:
            grad_logits = product.copy_(logits)
            del logits
            grad_hidden[rows] = long_product(grad_logits, table)
            multiply(grad_logits.T, hidden[rows], grad_word, add=start > 0)
    if with_grads and positions == 0:
        grad_word.zero_()
    # torch splits a long sum over its threads, so the bits would depend on them; NumPy's pairwise sum does not.
    total = torch.tensor(float(losses.numpy().sum(dtype="float64")), dtype=torch.float32)
    return total / count, grad_hidden, grad_word.to(word.dtype), grad_bias.to(bias.dtype)


mlm_loss_bwd = reference.mlm_loss_bwd
mlm_loss_bwd_ = reference.mlm_loss_bwd_
