"""The fused operators as PyTorch operators, a file each: schema, shapes, derivative, checks and the public function."""

from bert_fast.ops.attention import attention, require_masks_again
from bert_fast.ops.bias_gelu import bias_gelu, recompute_on_backward
from bert_fast.ops.checks import out_of_range
from bert_fast.ops.dropout_key import draw_dropout_key
from bert_fast.ops.embedding_layernorm import embedding_layernorm
from bert_fast.ops.feed_forward import feed_forward, fuses_feed_forward
from bert_fast.ops.mlm_loss import MLM_CHUNK, mlm_loss
from bert_fast.ops.register import transformed
from bert_fast.ops.residual_layernorm import residual_layernorm
from bert_fast.ops.table_gradient import one_table_gradient

__all__ = [
    "MLM_CHUNK",
    "attention",
    "bias_gelu",
    "draw_dropout_key",
    "embedding_layernorm",
    "feed_forward",
    "fuses_feed_forward",
    "mlm_loss",
    "one_table_gradient",
    "out_of_range",
    "recompute_on_backward",
    "require_masks_again",
    "residual_layernorm",
    "transformed",
]
