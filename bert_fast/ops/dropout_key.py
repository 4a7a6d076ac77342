"""The key of a forward pass's dropout masks."""

import torch

from bert_fast.ops.register import TAGS, library, transformed


def _draw_dropout_key(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


library.define("draw_dropout_key(Tensor like) -> Tensor", tags=(*TAGS, torch.Tag.nondeterministic_seeded))
library.impl("draw_dropout_key", _draw_dropout_key, "CompositeExplicitAutograd")
torch.library.register_fake(
    "bert_fast::draw_dropout_key", lambda like: like.new_empty((1,), dtype=torch.int64), lib=library
)


def draw_dropout_key(like: torch.Tensor) -> torch.Tensor:
    """One int64 (1,) on ``like``'s device from torch's generator: the key of a forward pass's dropout masks."""
    if transformed():  # vmap's ``randomness`` says whether all samples have one
        return _draw_dropout_key(like)
    return torch.ops.bert_fast.draw_dropout_key(like)
