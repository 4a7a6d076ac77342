"""The parts of a BERT on packed rows: subclasses of transformers' modules, each with a forward of our own.

They add no parameters and no constructor: an instance is transformers' own module whose class was swapped
(bert_fast/model/swap.py). Activations are rows (T, H); ``layout`` (bert_fast/packing.py) says what a row is.
An operator reads the parameters of several modules at once only while fusable.py finds all of those plain; another is
called instead. A part that is called without a layout, as transformers' modules call each other, is transformers' own,
on a dense batch.
"""

import contextlib
import functools
import inspect

import torch
from torch import nn
from transformers.models.bert import modeling_bert as hf

from bert_fast import dropout_mask, ops, packing
from bert_fast.linear import autocasts, linear, linear_with_residual
from bert_fast.model import idcheck
from bert_fast.model.fusable import (
    dropout_p,
    hooked_globally,
    is_gelu,
    plain,
    plain_layernorm,
    plain_table,
    runs,
    unwatched,
)
from bert_fast.packing import Layout

Tensor = torch.Tensor


def site(kind: str, layer: int = 0) -> int:
    """The number that tells a dropout from the others of a forward pass."""
    return {"embeddings": 0, "attention": 1, "attention_output": 2, "output": 3}[kind] + 3 * layer


def dropout_keys(layout: Layout | None, p: float, where: int) -> dict:
    """What an operator needs to drop with probability ``p`` at a site, in its arguments' names; nothing for 0."""
    return {"p": p, "row_key": layout.row_key, "rng_key": layout.rng_key, "site": where} if p else {}


def residual_layernorm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, norm: nn.Module, dropout: nn.Module | None,
    layout: Layout | None, where: int,
) -> Tensor:  # fmt: skip
    """LayerNorm(dropout(x + bias) + residual), fused while ``norm`` and ``dropout`` are plain modules."""
    p = 0.0 if dropout is None else dropout_p(dropout)
    if dropout is not None and not plain(dropout, nn.Dropout):
        x, bias = dropout(x if bias is None else x + bias), None
    if plain_layernorm(norm):
        keys = dropout_keys(layout, p, where)
        return ops.residual_layernorm(x, residual, norm.weight, norm.bias, bias=bias, eps=norm.eps, **keys)
    x = drop(x if bias is None else x + bias, layout, p, where)
    return norm(x if residual is None else x + residual)


def drop(x: Tensor, layout: Layout | None, p: float, where: int) -> Tensor:
    """The hidden dropout of the operators, alone."""
    if not p:
        return x
    keep = dropout_mask.hidden_keep_mask(layout.rng_key, layout.row_key, x.shape[1], p, where)
    return torch.where(keep, x * dropout_mask.dropout_scale(p), 0.0)


def linears_side_by_side(
    linears: tuple[nn.Linear, ...], x: Tensor, bias_apart: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (T, H) through plain linears of one size, all with a bias or none: their outputs (T, N) side by side; x for the
    residual, see ``linear_with_residual``; and None or, where ``bias_apart`` and it needs a gradient, the bias (N,): it
    was added detached, and the operator that reads the outputs makes its gradient."""
    biases = None if linears[0].bias is None else tuple(m.bias for m in linears)
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or ops.transformed()
    if x.device.type == "cpu" and not recorded and not autocasts(x.device) and x.dtype == torch.float32:
        # Each writes its own columns: no copy of the weights, which for a short batch costs as much as the product.
        out = x.new_empty(x.shape[0], sum(m.weight.shape[0] for m in linears))
        for m, columns in zip(linears, out.chunk(len(linears), dim=1), strict=True):
            if biases is None:
                torch.mm(x, m.weight.t(), out=columns)
            else:
                torch.addmm(m.bias, x, m.weight.t(), out=columns)
        return out, x, None
    bias = None if biases is None else torch.cat(biases)
    apart = bias_apart and bias is not None and bias.requires_grad
    out, x = linear_with_residual(x, tuple(m.weight for m in linears), bias.detach() if apart else bias)
    return out, x, bias if apart else None


def activate(dense: nn.Module, activation, x: Tensor) -> tuple[Tensor, Tensor]:
    """activation(dense(x)), GELU and the bias in one operator; and x for the residual alone, see
    ``linear_with_residual``."""
    if not is_gelu(activation):
        return activation(dense(x)), x
    if not plain(dense, nn.Linear):
        return ops.bias_gelu(dense(x)), x
    y, x = linear_with_residual(x, (dense.weight,))
    return ops.bias_gelu(y, dense.bias), x


def packed(forward):
    """The forward of a part on rows where its ``layout`` is a Layout, else that of transformers' class of this name."""
    theirs = getattr(hf, forward.__qualname__.partition(".")[0]).forward
    place = list(inspect.signature(forward).parameters).index("layout") - 1

    @functools.wraps(forward)
    def either(self, *args, **kwargs):
        on_rows = len(args) > place and isinstance(args[place], Layout)
        return (forward if on_rows else theirs)(self, *args, **kwargs)

    return either


class BertEmbeddings(hf.BertEmbeddings):
    """Word, position and segment embeddings, LayerNorm and dropout of packed tokens."""

    @packed
    def forward(
        self, ids: Tensor | None, positions: Tensor, segments: Tensor, embeds: Tensor | None, layout: Layout,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """ids, positions, segments (T,) int64, or ``embeds`` (T, H) in place of ids -> (T, H) in ``dtype``, or in that
        of the tables."""
        word, position, segment = self.word_embeddings, self.position_embeddings, self.token_type_embeddings
        norm, p, where = self.LayerNorm, dropout_p(self.dropout), site("embeddings")
        if plain_table(position) and plain_table(segment) and plain_layernorm(norm):
            if embeds is None:
                table, padding_idx = word.weight, word.padding_idx
                idcheck.check_later(ids, table.shape[0])
            else:  # the rows themselves are the table
                table, padding_idx = embeds, None
                ids = torch.arange(embeds.shape[0], device=embeds.device)
            if dtype is None:
                dtype = torch.promote_types(table.dtype, position.weight.dtype)
                dtype = torch.promote_types(dtype, segment.weight.dtype)
            x = ops.embedding_layernorm(
                ids, positions, segments, table, position.weight, segment.weight, norm.weight, norm.bias,
                eps=norm.eps, padding_idx=padding_idx, out_dtype=dtype, **dropout_keys(layout, p, where),
            )  # fmt: skip
        else:
            x = norm((word(ids) if embeds is None else embeds) + segment(segments) + position(positions))
            x = drop(x, layout, p, where)
            x = x if dtype is None else x.to(dtype)
        return x if plain(self.dropout, nn.Dropout) else self.dropout(x)


class BertSelfAttention(hf.BertSelfAttention):
    """Bidirectional self-attention of packed sequences."""

    @packed
    def forward(self, x: Tensor, layout: Layout, attentions: list | None = None) -> Tensor:
        """x (T, H) -> (T, H). Appends the weights (B, heads, S, S) to ``attentions`` where it is a list."""
        return self.with_residual(x, layout, attentions)[0]

    def with_residual(self, x: Tensor, layout: Layout, attentions: list | None = None) -> tuple[Tensor, Tensor]:
        """``forward``, and x for the residual alone, which nothing else may read; see ``linear_with_residual``."""
        linears, bias = (self.query, self.key, self.value), None
        if all(plain(m, nn.Linear) for m in linears) and len({m.bias is None for m in linears}) == 1:
            # the gradient of q's, k's and v's bias: attention's backward has its sums at hand
            qkv, x, bias = linears_side_by_side(linears, x, bias_apart=not layout.explicit)
        else:
            qkv = torch.cat([m(x) for m in linears], dim=1)
        qkv = qkv.view(x.shape[0], 3, self.num_attention_heads, self.attention_head_size)
        # transformers drops attention weights by the flag of this module, not of the Dropout
        p = float(self.dropout.p) if self.training and isinstance(self.dropout, nn.Dropout) else 0.0
        where = site("attention", self.layer_idx)
        if layout.explicit:
            out, weights = explicit_attention(qkv, layout, self.scaling, p, where)
            if attentions is not None:
                attentions.append(weights)
            return out, x
        keys = dropout_keys(layout, p, where)
        return ops.attention(qkv, layout.cu_seqlens, layout.max_seqlen, scale=self.scaling, bias=bias, **keys), x


def explicit_attention(qkv: Tensor, layout: Layout, scale: float, p: float, where: int) -> tuple[Tensor, Tensor]:
    """Attention with its weights in memory: rows (T, A*D) and weights (B, A, S, S) after dropout.

    qkv (T, 3, A, D). Same numbers and dropout masks as ``ops.attention`` where both apply; takes any bias.
    """
    _, _, heads, size = qkv.shape
    dense = packing.spread(layout, qkv)  # (B, S, 3, A, D)
    total = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    # transformers' weights are float32 under autocast where softmax is (CUDA) or where a float32 mask was added
    autocast = autocasts(qkv.device)
    shown = total if autocast and (qkv.is_cuda or layout.bias is not None) else qkv.dtype
    with torch.autocast(qkv.device.type, enabled=False) if autocast else contextlib.nullcontext():
        q, k, v = dense.to(total).permute(2, 0, 3, 1, 4)  # each (B, A, S, D)
        scores = scale * (q @ k.transpose(2, 3))
        if layout.bias is None:
            weights = torch.softmax(scores, dim=-1)
        else:  # 0, and not NaN, for a query that sees no key (a bias of -inf), as transformers' sdpa has it
            weights = torch._safe_softmax(scores + layout.bias.to(total), dim=-1)
        if p:
            row_key = packing.spread(layout, layout.row_key)  # (B, S)
            keep = dropout_mask.attention_keep_mask(layout.rng_key, row_key.flatten(), heads, layout.length, p, where)
            keep = keep.view(heads, layout.batch, layout.length, layout.length).transpose(0, 1)
            # a key's number is its position in the sample, which holes and packing part from its column
            column = (row_key & dropout_mask.MASK32).clamp(max=layout.length - 1)[:, None, None, :]
            keep = keep.gather(3, column.expand_as(keep))
            weights = torch.where(keep, weights * dropout_mask.dropout_scale(p), 0.0)
        seen = layout.mask if layout.indices is not None else layout.shown
        if seen is not None:  # other queries are no rows, or are not read: their weights are 0
            weights = weights * seen[:, None, :, None]
        weights = weights.to(shown)
        out = (weights.to(total) @ v).transpose(1, 2).reshape(layout.batch, layout.length, heads * size)
    return packing.pack(layout, out.to(qkv.dtype)), weights


class BertSelfOutput(hf.BertSelfOutput):
    """The attention's output product, dropout, residual and LayerNorm."""

    _site = "attention_output"

    @packed
    def forward(self, x: Tensor, residual: Tensor, layout: Layout, layer: int) -> Tensor:
        x, bias = (
            (linear(x, (self.dense.weight,)), self.dense.bias)
            if plain(self.dense, nn.Linear)
            else (self.dense(x), None)
        )
        return residual_layernorm(x, bias, residual, self.LayerNorm, self.dropout, layout, site(self._site, layer))


class BertOutput(hf.BertOutput):
    """The feed-forward's second product, dropout, residual and LayerNorm."""

    _site = "output"
    forward = BertSelfOutput.forward


class BertAttention(hf.BertAttention):
    """Self-attention and its output."""

    @packed
    def forward(
        self, x: Tensor, layout: Layout, attentions: list | None = None, only: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """x (T, H) -> (T, H), or the rows ``only`` (R,) of it."""
        if plain(self.self, BertSelfAttention) and unwatched(self.output, BertSelfOutput):
            context, x = self.self.with_residual(x, layout, attentions)
        else:
            context = self.self(x, layout, attentions)
        if only is not None:
            context, x, layout = context.index_select(0, only), x.index_select(0, only), packing.select(layout, only)
        return self.output(context, x, layout, self.self.layer_idx)


class BertIntermediate(hf.BertIntermediate):
    """The feed-forward's first product and activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.with_residual(x)[0] if x.dim() == 2 else super().forward(x)

    def with_residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward``, and x for the residual alone, which nothing else may read; see ``linear_with_residual``."""
        return activate(self.dense, self.intermediate_act_fn, x)


def fusable_feed_forward(inner: nn.Module, output: nn.Module) -> bool:
    """No hook sees what is between the two modules of a feed-forward, and both products and GELU are our own."""
    return (
        plain(inner, BertIntermediate)
        and plain(output, BertOutput)
        and plain(inner.dense, nn.Linear)
        and plain(output.dense, nn.Linear)
        and is_gelu(inner.intermediate_act_fn)
    )


def fused_feed_forward(
    inner: BertIntermediate, output: BertOutput, x: Tensor, layout: Layout, layer: int
) -> Tensor:  # fmt: skip
    """output(inner(x), x), its two products and GELU as one operator."""
    y = ops.feed_forward(x, inner.dense.weight, inner.dense.bias, output.dense.weight)
    where = site(output._site, layer)
    return residual_layernorm(y, output.dense.bias, x, output.LayerNorm, output.dropout, layout, where)


class BertLayer(hf.BertLayer):
    """One encoder layer on packed rows; transformers' gradient checkpointing wraps this forward.

    ``recompute_gelu``: GELU's output is computed again in the backward and not kept (``model.recompute``).
    """

    recompute_gelu = False

    @packed
    def forward(
        self, x: Tensor, layout: Layout, attentions: list | None = None, only: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """x (T, H) -> (T, H), or the rows ``only`` (R,) of it: what follows attention is computed for them alone."""
        if self.gradient_checkpointing and self.training:
            ops.require_masks_again(x, self.attention.self.dropout.p, self._gradient_checkpointing_func)
        x = self.attention(x, layout, attentions, only)
        layout = layout if only is None else packing.select(layout, only)
        layer = self.attention.self.layer_idx
        if ops.fuses_feed_forward(x) and fusable_feed_forward(self.intermediate, self.output):
            return fused_feed_forward(self.intermediate, self.output, x, layout, layer)
        if plain(self.intermediate, BertIntermediate) and unwatched(self.output, BertOutput):
            activated, x = self.intermediate.with_residual(x)
            with ops.recompute_on_backward(activated) if self.recompute_gelu else contextlib.nullcontext():
                return self.output(activated, x, layout, layer)
        return self.output(self.intermediate(x), x, layout, layer)


def shown(x: Tensor, layout: Layout, hidden_states: list | None) -> Tensor:
    """x (T, H), appended to ``hidden_states`` as (B, S, H) where that is a list; what follows reads that very tensor,
    so that gradients flow through what the caller gets."""
    if hidden_states is None:
        return x
    hidden_states.append(packing.unpack(layout, x))
    return packing.pack(layout, hidden_states[-1])


class BertEncoder(hf.BertEncoder):
    """The stack of layers."""

    @packed
    def forward(
        self,
        x: Tensor,
        layout: Layout,
        hidden_states: list | None = None,
        attentions: list | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """x (T, H) -> (T, H), or the rows ``only`` (R,) of it, which the last layer then computes alone (the idea is
        FlashAttention's last_layer_subset). ``hidden_states`` gets each layer's output, see ``shown``."""
        last = len(self.layer) - 1
        for number, layer in enumerate(self.layer):
            x = shown(layer(x, layout, attentions, only if number == last else None), layout, hidden_states)
        return x


class BertPredictionHeadTransform(hf.BertPredictionHeadTransform):
    """Product, activation and LayerNorm of the MLM head."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return super().forward(x)
        x, _ = activate(self.dense, self.transform_act_fn, x)
        return residual_layernorm(x, None, None, self.LayerNorm, None, None, 0)


def all_ours(embeddings: nn.Module, encoder: nn.Module) -> bool:
    """Every part takes rows, and no hook is on a part whose output is another kind of thing than in transformers.

    Each forward asks, so this reads dictionaries, which cost less than modules' attributes.
    """
    if hooked_globally() or not (runs(embeddings, BertEmbeddings) and plain(encoder, BertEncoder)):
        return False
    for layer in encoder.layer:
        parts = layer._modules
        attention = parts.get("attention")
        if not (
            runs(layer, BertLayer)
            and plain(attention, BertAttention)
            and plain(attention._modules.get("self"), BertSelfAttention)
            and runs(attention._modules.get("output"), BertSelfOutput)
            and runs(parts.get("intermediate"), BertIntermediate)
            and runs(parts.get("output"), BertOutput)
        ):
            return False
    return True
