"""BERT with its heads: same names, arguments, outputs and checkpoint keys as transformers' classes."""

import contextlib

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
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from bert_fast import ops, packing
from bert_fast.linear import autocasts
from bert_fast.model.base import BertModel, BertPreTrainedModel, Rows, nothing_packed
from bert_fast.model.idcheck import misplaced, naming
from bert_fast.model.layers import BertPredictionHeadTransform, plain, row_wise, untouched
from bert_fast.model.losses import as_tensor, check_labels, cross_entropy, elementwise, with_zero_gradients
from bert_fast.model.outputs import BertForPreTrainingOutputWithoutLogits, MaskedLMOutputWithoutLogits
from bert_fast.reference import divisor

Tensor = torch.Tensor


def _returns_dict(model: nn.Module, kwargs: dict) -> bool:
    asked = kwargs.get("return_dict")
    return model.config.return_dict if asked is None else asked


def _labelled(labels: Tensor | None, source: Tensor) -> Tensor | None:
    """Bool (B, S): where ``labels`` (B, S) are not -100."""
    if labels is None:
        return None
    check_labels("labels", labels, source.shape[:2])
    return labels.reshape(source.shape[:2]) != -100


def _nowhere(source: Tensor) -> Tensor:
    """The places whose outputs a head reads that only looks at the pooled ones: none."""
    return torch.empty(0, dtype=torch.int64, device=None if source is None else source.device)


def _masked_positions(labels: Tensor | None, kwargs: dict) -> tuple[Tensor | None, Tensor | None]:
    """Where the MLM head has something to predict, and what: places (M,) in the flattened batch, and targets (M,).

    They are ``masked_positions`` and ``masked_labels``, rows of packed input filled up with label -100, or found in
    ``labels``.
    """
    places, targets = kwargs.get("masked_positions"), kwargs.get("masked_labels")
    if (places is None) != (targets is None):
        raise ValueError("masked_positions and masked_labels go together: one of them is missing")
    if places is not None:
        check_labels("masked_labels", targets, places.shape)
    if places is None and labels is not None:
        targets = labels.reshape(-1).long()
        if packing.unreadable(labels):
            return torch.arange(targets.shape[0], device=labels.device), targets
        # The one synchronisation that labels cost: how many positions are masked decides the shapes below.
        places = (targets != -100).nonzero()[:, 0]
        targets = targets.index_select(0, places)
    return places, targets


def _encode(model: nn.Module, rows: Rows, input_ids: Tensor | None, kwargs: dict, **inputs):
    """The outputs of ``model.bert``, and ``rows`` filled. An encoder with code of one's own, be it a hook, is called as
    transformers calls it, and nothing is packed."""
    kwargs = {**kwargs, "return_dict": True}
    if untouched(model.bert, BertModel):
        return model.bert(input_ids, **inputs, rows=rows, **kwargs)
    with nothing_packed():
        outputs = model.bert(input_ids, **inputs, **kwargs)
    states, mask = outputs[0], inputs["attention_mask"]
    if kwargs.get("cu_seq_lens_q") is not None:
        layout = packing.packed_layout(kwargs["cu_seq_lens_q"].int(), kwargs["max_length_q"], states.shape[1])
    else:
        layout = None if mask is not None else packing.flattened_layout(inputs["position_ids"], states.shape[0])
        layout = layout or packing.full_layout(*states.shape[:2], states.device)
        layout.mask = mask != 0 if mask is not None and mask.dim() == 2 else None
    rows.fill(layout, states, outputs[1] if len(outputs) > 1 else None)
    return outputs


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


def _predicts_rows(cls: nn.Module, kind: type) -> bool:
    """The MLM head of ``cls`` can be run on the rows that are wanted alone: no code of one's own sees its input."""
    if not (untouched(cls, kind) and untouched(cls.predictions, hf.BertLMPredictionHead)):
        return False
    transform = cls.predictions.transform
    parts = (*transform._modules.values(), cls.predictions.decoder)
    return plain(transform, BertPredictionHeadTransform) and all(map(row_wise, parts))


def _masked_language_modelling(
    model: nn.Module, rows: Rows, labels: Tensor | None, places: Tensor | None, targets: Tensor | None,
    want_logits: bool, kwargs: dict, logits: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, dense logits) of the MLM head ``model.cls.predictions``, run on masked positions alone unless
    ``want_logits``: then ``rows`` holds every output, and else those at ``places``. Where ``model.cls`` itself was
    called, of its dense ``logits``."""
    layout, hidden = rows.layout, rows.hidden
    head = model.cls.predictions if logits is None else None
    count, packed = kwargs.get("num_items_in_batch"), kwargs.get("masked_labels")
    named = {"name": "labels", "given": labels} if packed is None else {"name": "masked_labels", "given": packed}

    loss = None
    if logits is not None:
        if places is not None:
            loss = cross_entropy(logits.flatten(0, 1).index_select(0, places), targets, count, **named)
    elif want_logits:
        scores = head.decoder(head.transform(hidden))
        logits = packing.unpack(layout, scores)
        if places is not None:
            loss = cross_entropy(scores.index_select(0, packing.rows_of(layout, places)), targets, count, **named)
    elif places is not None:
        transformed = head.transform(hidden)
        if plain(head.decoder, nn.Linear) and head.decoder.bias is not None:
            normalizer = as_tensor(count, transformed)
            with naming(lambda: ops.out_of_range(*named.values(), head.decoder.weight.shape[0], -100)):
                loss = ops.mlm_loss(transformed, head.decoder.weight, head.decoder.bias, targets, normalizer=normalizer)
            if not autocasts(hidden.device):
                loss = loss.to(transformed.dtype)  # as transformers' loss, in the dtype of the logits
        else:
            loss = cross_entropy(head.decoder(transformed), targets, count, **named)
    if loss is not None and autocasts(hidden.device) and loss.dtype != torch.float64:
        loss = loss.float()
    return loss, logits


def _tied_table() -> contextlib.AbstractContextManager:
    """Around the encoder and the MLM loss: the tied table's two gradients meet in one. A traced forward has both."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return contextlib.nullcontext() if traced else ops.one_table_gradient()


def _output_type(logits: Tensor | None, without: type, whole: type) -> type:
    """That of a training step without logits, which says so; torch.compile knows transformers' own alone."""
    return without if logits is None and not torch.compiler.is_compiling() else whole


def _wants_logits(model: nn.Module, has_labels: bool, return_logits, kwargs: dict) -> bool:
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | hf.BertForPreTrainingOutput:
        """As transformers': the loss is the mean over labels (B, S) (-100: none) plus the mean over
        next_sentence_label (B,) (0: B follows A); of one alone, where only one is given.

        Packed batches (see BertModel) may give ``masked_positions`` (M,) int64 and ``masked_labels`` (M,) int64 in
        place of labels, -100 in an unused tail; next_sentence_label has -100 in one, too. ``num_items_in_batch``
        (masked positions of an accumulated batch) and ``num_sequences_in_batch`` (its NSP labels) replace the
        batch's own numbers; without the latter the NSP loss is weighted by the batch's share of masked positions.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        read = _labelled(labels, source)
        places, targets = _masked_positions(labels, kwargs)
        by_rows = _predicts_rows(self.cls, hf.BertPreTrainingHeads)
        want_logits = not by_rows or _wants_logits(self, places is not None, return_logits, kwargs)
        rows = Rows(
            read=read if by_rows else _everywhere(source),
            places=None if want_logits else _nowhere(source) if places is None else places,
        )
        with _tied_table():
            outputs = _encode(
                self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds,
            )  # fmt: skip
            logits, nsp_logits = (None, None) if by_rows else self.cls(rows.dense(), rows.pooled)
            loss, logits = _masked_language_modelling(self, rows, labels, places, targets, want_logits, kwargs, logits)
        if by_rows:
            nsp_logits = self.cls.seq_relationship(rows.pooled)
        if next_sentence_label is not None:
            count = kwargs.get("num_sequences_in_batch")
            nsp = cross_entropy(nsp_logits.view(-1, 2), next_sentence_label, count, name="next_sentence_label")
            items = kwargs.get("num_items_in_batch")
            if count is None and items is not None and targets is not None:
                nsp = (nsp * ((targets != -100).sum() / divisor(as_tensor(items, nsp)))).to(nsp.dtype)
            loss = nsp if loss is None else loss + nsp
        elif loss is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            unused = (getattr(self.cls, "seq_relationship", None), getattr(self.bert, "pooler", None))
            loss = with_zero_gradients(
                loss, [p for module in unused if module is not None for p in module.parameters()]
            )
        kind = _output_type(logits, BertForPreTrainingOutputWithoutLogits, hf.BertForPreTrainingOutput)
        output = kind(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=nsp_logits,
            **_extras(outputs),
        )
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | MaskedLMOutput:
        """As transformers'; masked_positions, masked_labels and num_items_in_batch as in BertForPreTraining."""
        source = input_ids if input_ids is not None else inputs_embeds
        read = _labelled(labels, source)
        places, targets = _masked_positions(labels, kwargs)
        by_rows = _predicts_rows(self.cls, hf.BertOnlyMLMHead)
        want_logits = not by_rows or _wants_logits(self, places is not None, return_logits, kwargs)
        rows = Rows(read=read if by_rows else _everywhere(source), places=None if want_logits else places)
        with _tied_table():
            outputs = _encode(
                self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )  # fmt: skip
            logits = None if by_rows else self.cls(rows.dense())
            loss, logits = _masked_language_modelling(self, rows, labels, places, targets, want_logits, kwargs, logits)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | NextSentencePredictorOutput:
        """As transformers'."""
        source = input_ids if input_ids is not None else inputs_embeds
        rows = Rows(places=_nowhere(source))
        outputs = _encode(
            self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        logits = self.cls(rows.pooled)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | SequenceClassifierOutput:
        """As transformers'."""
        source = input_ids if input_ids is not None else inputs_embeds
        rows = Rows(places=_nowhere(source))
        outputs = _encode(
            self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        logits = self.classifier(self.dropout(rows.pooled))
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
        **kwargs: Unpack[TransformersKwargs],
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
        rows = Rows(places=_nowhere(source))
        with naming(lambda: misplaced(self.config, mask, **given)):
            outputs = _encode(
                self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds,
            )  # fmt: skip
        logits = self.classifier(self.dropout(rows.pooled)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(loss=loss, logits=logits, **_extras(outputs))


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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | TokenClassifierOutput:
        """As transformers'; the classifier runs on attended tokens alone."""
        source = input_ids if input_ids is not None else inputs_embeds
        read = _labelled(labels, source)
        packed = untouched(self.dropout, nn.Dropout) and row_wise(self.classifier)
        rows = Rows(read=read if packed else _everywhere(source))
        outputs = _encode(
            self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        logits = _by_tokens(rows, packed, self.dropout, self.classifier)
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = cross_entropy(logits.reshape(-1, self.num_labels), labels, count)
        return TokenClassifierOutput(loss=loss, logits=logits, **_extras(outputs))


def _place_loss(name: str, scores: Tensor, positions: Tensor, layout: packing.Layout) -> Tensor:
    """Cross-entropy of one of the ``scores`` (B, S) of each sequence against its ``positions`` (B,) or (B, 1); those
    past its end are ignored."""
    length = scores.shape[1]
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, ...] | QuestionAnsweringModelOutput:
        """As transformers', but that the scores of padding are the lowest number, so that none of a token is below.

        The loss reads what padding scores before, as transformers' does: such batches are not packed. Of packed input
        it is that of each sequence alone, with start_positions and end_positions (B,) in their sequences.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        has_loss = start_positions is not None and end_positions is not None
        packed = row_wise(self.qa_outputs)
        rows = Rows(read=_everywhere(source) if has_loss or not packed else None)
        outputs = _encode(
            self, rows, input_ids, kwargs, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        logits = _by_tokens(rows, packed, self.qa_outputs)
        start, end = (scores.squeeze(-1).contiguous() for scores in logits.split(1, dim=-1))
        loss = None
        if has_loss:
            of_starts = _place_loss("start_positions", start, start_positions, rows.layout)
            loss = (of_starts + _place_loss("end_positions", end, end_positions, rows.layout)) / 2
        real = packing.attended(rows.layout)
        if real is not None:
            start, end = (t.masked_fill(~real, torch.finfo(t.dtype).min) for t in (start, end))
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            **_extras(outputs),
        )
