"""The drop-in model: transformers' BERT classes on the operators of bert_fast.ops."""

from transformers.models.bert import modeling_bert as _hf

from bert_fast.model import swap as _swap
from bert_fast.model.auto import register, unregister
from bert_fast.model.base import BertModel, BertPreTrainedModel
from bert_fast.model.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bert_fast.model.swap import accelerate

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
_swap.MODELS.update({getattr(_hf, model.__name__): model for model in _MODELS})

__all__ = ["BertPreTrainedModel", "accelerate", "register", "unregister", *(model.__name__ for model in _MODELS)]
