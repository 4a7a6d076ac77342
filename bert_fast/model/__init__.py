"""The drop-in model: transformers' BERT classes on the operators of bert_fast.ops."""

from transformers.models.bert import modeling_bert as _hf

from . import exchange as _exchange
from .base import BertModel, BertPreTrainedModel
from .exchange import accelerate
from .heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

_MODELS = (
    BertModel,
    BertForPreTraining,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForMultipleChoice,
)
_exchange.MODELS.update({getattr(_hf, model.__name__): model for model in _MODELS})

__all__ = ["BertPreTrainedModel", "accelerate", *(model.__name__ for model in _MODELS)]
