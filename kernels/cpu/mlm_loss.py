"""mlm_loss on a CPU: products by the library, one C++ pass over the logits between them (kernels/cpu/mlm_loss.cpp)."""

import torch

from ... import reference
from . import function

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
    count = valid.sum().clamp(min=1).float() if normalizer is None else normalizer.reshape(()).float()
    scale, targets = float(1.0 / count), labels.where(valid, -1)
    table, table_bias = word.to(hidden.dtype), bias.float()
    positions, vocabulary = hidden.shape[0], word.shape[0]
    losses = torch.empty(positions)
    grad_hidden = torch.empty_like(hidden) if with_grads else hidden.new_empty(0)
    grad_word = word.new_empty(0)
    grad_bias = torch.zeros(vocabulary if with_grads else 0)
    for start in range(0, positions, chunk):
        rows = slice(start, min(start + chunk, positions))
        logits = (hidden[rows] @ table.T).float()
        _rows(
            logits, table_bias, targets[rows].contiguous(), scale, losses[rows], grad_bias,
            *logits.shape, int(with_grads), torch.get_num_threads(),
        )  # fmt: skip
        if with_grads:
            grad_logits = logits.to(hidden.dtype)
            grad_hidden[rows] = reference.long_product(grad_logits, table)
            if hidden.dtype == torch.float32 and start > 0:
                grad_word.addmm_(grad_logits.T, hidden[rows])
            else:
                product = (grad_logits.T @ hidden[rows]).float()
                grad_word = product if start == 0 else grad_word.add_(product)
    if with_grads and positions == 0:
        grad_word = torch.zeros(word.shape)
    # torch splits a long sum over its threads, so the bits would depend on them; NumPy's pairwise sum does not.
    total = torch.tensor(float(losses.numpy().sum(dtype="float64")), dtype=torch.float32)
    return total / count, grad_hidden, grad_word.to(word.dtype), grad_bias.to(bias.dtype)


mlm_loss_bwd = reference.mlm_loss_bwd
mlm_loss_bwd_ = reference.mlm_loss_bwd_
