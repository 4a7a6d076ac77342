"""BERT with its heads: same names, arguments, outputs and checkpoint keys as transformers' classes."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as hf
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from bert_fast import ops, packing
from bert_fast.linear import autocasts
from bert_fast.model.base import BertModel, BertPreTrainedModel, Rows, nothing_packed
from bert_fast.model.fusable import plain, row_wise, untouched
from bert_fast.model.idcheck import misplaced, naming
from bert_fast.model.inputs import ModelKwargs
from bert_fast.model.layers import BertPredictionHeadTransform
from bert_fast.model.losses import as_tensor, check_labels, cross_entropy, elementwise, with_zero_gradients
from bert_fast.model.outputs import BertForPreTrainingOutputWithoutLogits, MaskedLMOutputWithoutLogits
from bert_fast.reference import divisor

Tensor = torch.Tensor
Model = Any  # one with a head: to a type checker each attribute of an nn.Module is a Tensor or a Module


def _returns_dict(model: Model, kwargs: ModelKwargs) -> bool:
    asked = kwargs.get("return_dict")
    return model.config.return_dict if asked is None else asked


def _labelled(labels: Tensor | None, source: Tensor | None) -> Tensor | None:
    """Bool (B, S): where ``labels`` (B, S) are not -100. Without a ``source`` the encoder has to say that it lacks."""
    if labels is None:
        return None
    shape = labels.shape if source is None else source.shape[:2]
    check_labels("labels", labels, shape)
    return labels.reshape(shape) != -100


def _nowhere(source: Tensor | None) -> Tensor:
    """The places whose outputs a head reads that only looks at the pooled ones: none."""
    return torch.empty(0, dtype=torch.int64, device=None if source is None else source.device)


def _masked_positions(
    labels: Tensor | None, /, *, masked_positions: Tensor | None = None, masked_labels: Tensor | None = None, **_
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Where the MLM head has something to predict, and what: places (M,) in the flattened batch, and targets (M,).

    They are ``masked_positions`` and ``masked_labels``, rows of packed input filled up with label -100, or found in
    ``labels``.
    """
    if (masked_positions is None) != (masked_labels is None):
        raise ValueError("masked_positions and masked_labels go together: one of them is missing")
    if masked_positions is not None:
        check_labels("masked_labels", masked_labels, masked_positions.shape)
        return masked_positions, masked_labels
    if labels is None:
        return None, None
    targets = labels.reshape(-1).long()
    if packing.unreadable(labels):
        return torch.arange(targets.shape[0], device=labels.device), targets
    # The one synchronisation that labels cost: how many positions are masked decides the shapes below.
    places = (targets != -100).nonzero()[:, 0]
    return places, targets.index_select(0, places)


def _encode(
    model: Model, rows: Rows, kwargs: ModelKwargs, input_ids: Tensor | None, attention_mask: Tensor | None,
    token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None, **more,
):  # fmt: skip
    """The outputs of ``model.bert``, and ``rows`` filled. An encoder with code of one's own, be it a hook, is called as
    transformers calls it, and nothing is packed."""
    inputs = {
        "attention_mask": attention_mask, "token_type_ids": token_type_ids, "position_ids": position_ids,
        "inputs_embeds": inputs_embeds, **more, **kwargs, "return_dict": True,
    }  # fmt: skip
    if untouched(model.bert, BertModel):
        return model.bert(input_ids, rows=rows, **inputs)
    with nothing_packed():
        outputs = model.bert(input_ids, **inputs)
    states = outputs[0]
    if inputs.get("cu_seq_lens_q") is not None:
        layout = packing.packed_layout(inputs["cu_seq_lens_q"].int(), inputs["max_length_q"], states.shape[1])
    else:
        layout = None if attention_mask is not None else packing.flattened_layout(position_ids, states.shape[0])
        layout = layout or packing.full_layout(states.shape[0], states.shape[1], states.device)
        layout.mask = attention_mask != 0 if attention_mask is not None and attention_mask.dim() == 2 else None
    rows.fill(layout, states, outputs[1] if len(outputs) > 1 else None)
    return outputs


def _pooled(model: Model, kwargs: ModelKwargs, input_ids: Tensor | None, *inputs: Tensor | None):
    """The outputs of ``model.bert`` and the pooled ones (B, H), which are all that its head reads."""
    *_, inputs_embeds = inputs
    rows = Rows(places=_nowhere(input_ids if input_ids is not None else inputs_embeds))
    outputs = _encode(model, rows, kwargs, input_ids, *inputs)
    return outputs, rows.pooled


def _extras(outputs) -> dict:
    """What an encoder's ``outputs`` hold for the model's; an encoder of one's own may return a tuple."""
    return {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}


def _everywhere(source: Tensor | None) -> Tensor | None:
    """Bool (B, S): what a head with code of one's own may read."""
    return None if source is None else torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)


def _by_tokens(rows: Rows, packed: bool, *modules: nn.Module) -> Tensor:
    """The dense outputs of ``modules``, one after the other, which are run on rows where ``packed``."""
    x = rows.hidden if packed else rows.dense()
    for module in modules:
        x = module(x)
    return packing.unpack(rows.layout, x) if packed else x


def _predicts_rows(cls: Model, kind: type) -> bool:
    """The MLM head of ``cls`` can be run on the rows that are wanted alone: no code of one's own sees its input."""
    if not (untouched(cls, kind) and untouched(cls.predictions, hf.BertLMPredictionHead)):
        return False
    transform = cls.predictions.transform
    parts = (*transform._modules.values(), cls.predictions.decoder)
    return plain(transform, BertPredictionHeadTransform) and all(map(row_wise, parts))


class _MaskedLanguageModelling:
    """The MLM head of ``model`` in one forward: what it predicts, on which ``rows``, its logits and its loss.

    ``by_rows``: the head, in a ``model.cls`` of class ``kind``, is run on rows, else ``model.cls`` itself is called.
    ``whole``: logits of every place are made, else a loss at the masked positions alone.
    """

    def __init__(
        self, model: Model, kind: type, source: Tensor | None, labels: Tensor | None, return_logits, kwargs: ModelKwargs
    ):
        self.model, self.count, packed = model, kwargs.get("num_items_in_batch"), kwargs.get("masked_labels")
        self.named = ("labels", labels) if packed is None else ("masked_labels", packed)  # as the caller gave them
        read = _labelled(labels, source)
        self.places, self.targets = _masked_positions(labels, **kwargs)
        self.by_rows = _predicts_rows(model.cls, kind)
        self.whole = not self.by_rows or _wants_logits(model, self.places is not None, return_logits, kwargs)
        self.rows = Rows(read=read if self.by_rows else _everywhere(source), places=None if self.whole else self.places)

    def __call__(self, logits: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(loss, dense logits) of the filled ``rows``; ``logits`` are those that ``model.cls`` gave where it was
        called."""
        layout, hidden = self.rows.layout, self.rows.hidden
        head = self.model.cls.predictions if self.by_rows else None
        loss = None
        if not self.whole:
            loss = self._loss_of(head.transform(hidden), head.decoder)
        else:
            scores = head.decoder(head.transform(hidden)) if self.by_rows else logits.flatten(0, 1)
            logits = packing.unpack(layout, scores) if self.by_rows else logits
            if self.places is not None:
                loss = self._cross_entropy(scores.index_select(0, packing.rows_of(layout, self.places)))
        if loss is not None and autocasts(hidden.device) and loss.dtype != torch.float64:
            loss = loss.float()
        return loss, logits

    def _loss_of(self, transformed: Tensor, decoder: nn.Module) -> Tensor:
        """The loss at masked positions, whose logits no one reads; one operator while ``decoder`` is plain."""
        if not plain(decoder, nn.Linear) or decoder.bias is None:
            return self._cross_entropy(decoder(transformed))
        normalizer, (name, given) = as_tensor(self.count, transformed), self.named
        with naming(lambda: ops.out_of_range(name, given, decoder.weight.shape[0], -100)):
            loss = ops.mlm_loss(transformed, decoder.weight, decoder.bias, self.targets, normalizer=normalizer)
        # as transformers' loss, in the dtype of the logits
        return loss if autocasts(transformed.device) else loss.to(transformed.dtype)

    def _cross_entropy(self, scores: Tensor) -> Tensor:
        name, given = self.named
        return cross_entropy(scores, self.targets, self.count, name=name, given=given)


def _tied_table() -> contextlib.AbstractContextManager:
    """Around the encoder and the MLM loss: the tied table's two gradients meet in one. A traced forward has both."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return contextlib.nullcontext() if traced else ops.one_table_gradient()


def _output_type(logits: Tensor | None, without: type, whole: type) -> type:
    """That of a training step without logits, which says so; torch.compile knows transformers' own alone."""
    return without if logits is None and not torch.compiler.is_compiling() else whole


def _wants_logits(model: Model, has_labels: bool, return_logits, kwargs: ModelKwargs) -> bool:
    if return_logits is None:
        return_logits = getattr(model.config, "return_logits", False)
    return not (model.training and has_labels) or bool(return_logits) or not _returns_dict(model, kwargs)


class BertForPreTraining(BertPreTrainedModel, hf.BertForPreTraining):
    """BERT with the MLM and the NSP head.

    In training with labels the MLM head runs on masked positions alone and ``prediction_logits`` is None, unless
    ``return_logits=True`` (argument or configuration field) or ``return_dict=False``. Under code of one's own, be it a
    hook, the head runs on the whole batch.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | hf.BertForPreTrainingOutput:
        """As transformers': the loss is the mean over labels (B, S) (-100: none) plus the mean over
        next_sentence_label (B,) (0: B follows A); of one alone, where only one is given.

        Packed batches (see BertModel) may give ``masked_positions`` (M,) int64 and ``masked_labels`` (M,) int64 in
        place of labels, -100 in an unused tail; next_sentence_label has -100 in one, too. ``num_items_in_batch``
        (masked positions of an accumulated batch) and ``num_sequences_in_batch`` (its NSP labels) replace the
        batch's own numbers; without the latter the NSP loss is weighted by the batch's share of masked positions.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        mlm = _MaskedLanguageModelling(self, hf.BertPreTrainingHeads, source, labels, return_logits, kwargs)
        with _tied_table():
            outputs = _encode(
                self, mlm.rows, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
            )
            logits, nsp_logits = (None, None) if mlm.by_rows else self.cls(mlm.rows.dense(), mlm.rows.pooled)
            loss, logits = mlm(logits)
        if mlm.by_rows:
            nsp_logits = self.cls.seq_relationship(mlm.rows.pooled)
        if next_sentence_label is not None:
            count = kwargs.get("num_sequences_in_batch")
            nsp = cross_entropy(nsp_logits.view(-1, 2), next_sentence_label, count, name="next_sentence_label")
            if count is None and mlm.count is not None and mlm.targets is not None:
                nsp = (nsp * ((mlm.targets != -100).sum() / divisor(as_tensor(mlm.count, nsp)))).to(nsp.dtype)
            loss = nsp if loss is None else loss + nsp
        elif loss is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            unused = (getattr(self.cls, "seq_relationship", None), getattr(self.bert, "pooler", None))
            loss = with_zero_gradients(
                loss, [p for module in unused if module is not None for p in module.parameters()]
            )
        kind = _output_type(logits, BertForPreTrainingOutputWithoutLogits, hf.BertForPreTrainingOutput)
        output = kind(
            loss=loss, prediction_logits=logits, seq_relationship_logits=nsp_logits, **_extras(outputs)
        )  # fmt: skip
        return output if _returns_dict(self, kwargs) else output.to_tuple()


class BertForMaskedLM(BertPreTrainedModel, hf.BertForMaskedLM):
    """BERT with the MLM head; ``logits`` in training as ``prediction_logits`` of BertForPreTraining."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | MaskedLMOutput:
        """As transformers'; masked_positions, masked_labels and num_items_in_batch as in BertForPreTraining."""
        source = input_ids if input_ids is not None else inputs_embeds
        mlm = _MaskedLanguageModelling(self, hf.BertOnlyMLMHead, source, labels, return_logits, kwargs)
        with _tied_table():
            outputs = _encode(
                self, mlm.rows, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask,
            )  # fmt: skip
            loss, logits = mlm(None if mlm.by_rows else self.cls(mlm.rows.dense()))
        kind = _output_type(logits, MaskedLMOutputWithoutLogits, MaskedLMOutput)
        output = kind(loss=loss, logits=logits, **_extras(outputs))
        return output if _returns_dict(self, kwargs) else output.to_tuple()


class BertForNextSentencePrediction(BertPreTrainedModel, hf.BertForNextSentencePrediction):
    """BERT with the NSP head."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | NextSentencePredictorOutput:
        """As transformers'."""
        outputs, pooled = _pooled(self, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = self.cls(pooled)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.view(-1, 2), labels, kwargs.get("num_items_in_batch"))
        return NextSentencePredictorOutput(loss=loss, logits=logits, **_extras(outputs))


class BertForSequenceClassification(BertPreTrainedModel, hf.BertForSequenceClassification):
    """BERT with a classifier or a regression on the pooled output."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | SequenceClassifierOutput:
        """As transformers'."""
        outputs, pooled = _pooled(self, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self._loss(logits, labels, kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(loss=loss, logits=logits, **_extras(outputs))

    def _loss(self, logits: Tensor, labels: Tensor, count) -> Tensor:
        if self.config.problem_type is None:  # transformers, too, keeps what the first labels tell
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        if self.config.problem_type == "regression":
            if self.num_labels == 1:
                return elementwise(F.mse_loss, logits.squeeze(), labels.squeeze(), count)
            return elementwise(F.mse_loss, logits, labels, count)
        if self.config.problem_type == "single_label_classification":
            return cross_entropy(logits.view(-1, self.num_labels), labels, count)
        return elementwise(F.binary_cross_entropy_with_logits, logits, labels, count)


class BertForMultipleChoice(BertPreTrainedModel, hf.BertForMultipleChoice):
    """BERT that scores each of several choices."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | MultipleChoiceModelOutput:
        """As transformers': inputs (B, choices, S), or embeds (B, choices, S, H); labels (B,)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        source = input_ids if input_ids is not None else inputs_embeds
        choices = source.shape[1]
        given = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
        mask = attention_mask
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
            None if t is None else t.flatten(0, 1)
            for t in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        with naming(lambda: misplaced(self.config, mask, **given)):
            outputs, scores = self.score(
                input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
            )
        logits = scores.view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **_extras(outputs))

    def score(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Any, Tensor]:
        """(the encoder's outputs, the scores (N, 1) of N choices), each a sequence as BertModel takes them, packed or
        not: examples may have different numbers of choices."""
        outputs, pooled = _pooled(self, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return outputs, self.classifier(self.dropout(pooled))


class BertForTokenClassification(BertPreTrainedModel, hf.BertForTokenClassification):
    """BERT with a classifier on every token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | TokenClassifierOutput:
        """As transformers'; the classifier runs on attended tokens alone."""
        source = input_ids if input_ids is not None else inputs_embeds
        read = _labelled(labels, source)
        packed = untouched(self.dropout, nn.Dropout) and row_wise(self.classifier)
        rows = Rows(read=read if packed else _everywhere(source))
        outputs = _encode(self, rows, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = _by_tokens(rows, packed, self.dropout, self.classifier)
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = cross_entropy(logits.reshape(-1, self.num_labels), labels, count)
        return TokenClassifierOutput(loss=loss, logits=logits, **_extras(outputs))


def _place_loss(name: str, scores: Tensor, positions: Tensor, layout: packing.Layout) -> Tensor:
    """Cross-entropy of one of the ``scores`` (B, S) of each sequence against its ``positions`` (B,) or (B, 1); those
    past its end are ignored."""
    length: int | Tensor = scores.shape[1]
    if layout.packed:
        scores, length = packing.by_sequence(layout, scores[0], torch.finfo(scores.dtype).min), layout.cu_seqlens.diff()
    check_labels(name, positions, scores.shape[:1])
    positions, outside = positions.reshape(-1), scores.shape[1]
    positions = positions.clamp(min=0).where(positions < length, outside)
    return cross_entropy(scores, positions, None, outside, name=name)


class BertForQuestionAnswering(BertPreTrainedModel, hf.BertForQuestionAnswering):
    """BERT that scores each token as the start and the end of the answer."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[ModelKwargs],
    ) -> tuple[Tensor, ...] | QuestionAnsweringModelOutput:
        """As transformers', but that the scores of padding are the lowest number, so that none of a token is below.

        The loss reads what padding scores before, as transformers' does: such batches are not packed. Of packed input
        it is that of each sequence alone, with start_positions and end_positions (B,) in their sequences.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        has_loss = start_positions is not None and end_positions is not None
        packed = row_wise(self.qa_outputs)
        rows = Rows(read=_everywhere(source) if has_loss or not packed else None)
        outputs = _encode(self, rows, kwargs, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        logits = _by_tokens(rows, packed, self.qa_outputs)
        start, end = (scores.squeeze(-1).contiguous() for scores in logits.split(1, dim=-1))
        loss = None
        if has_loss:
            of_starts = _place_loss("start_positions", start, start_positions, rows.layout)
            loss = (of_starts + _place_loss("end_positions", end, end_positions, rows.layout)) / 2
        real = packing.attended(rows.layout)
        if real is not None:
            start, end = (t.masked_fill(~real, torch.finfo(t.dtype).min) for t in (start, end))
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **_extras(outputs))
