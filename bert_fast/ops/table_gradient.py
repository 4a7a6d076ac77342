"""One gradient for a tied word table: what embedding_layernorm tells mlm_loss."""

import contextlib
import contextvars

import torch

from bert_fast.ops.register import transformed

# Inside one_table_gradient, after an embedding: its word table, and the same table as an output of the embedding.
_embedded: contextvars.ContextVar = contextvars.ContextVar("bert_fast.ops.table_gradient", default=None)


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


def embedded_table() -> list[torch.Tensor] | None:
    """The list that ``one_table_gradient`` keeps, empty before an embedding; None outside it."""
    return None if torch.compiler.is_compiling() or transformed() else _embedded.get()
