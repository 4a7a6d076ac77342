"""bert_fast: pre-train BERT fast, as a drop-in for transformers' BERT."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertPreTrainedModel",
    "accelerate",
    "backends",
    "register",
    "set_backend",
    "unregister",
    "use_backend",
]

if TYPE_CHECKING:  # what editors and type checkers read
    from transformers import BertConfig

    from bert_fast.dispatch import backends, set_backend, use_backend
    from bert_fast.model import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        BertPreTrainedModel,
        accelerate,
        register,
        unregister,
    )


_DISPATCH = "bert_fast.dispatch"
_ELSEWHERE = {"BertConfig": "transformers", "backends": _DISPATCH, "set_backend": _DISPATCH, "use_backend": _DISPATCH}


if not TYPE_CHECKING:  # to a type checker a module with a __getattr__ has every name, misspelt ones too

    def __getattr__(name: str):
        """What ``__all__`` names, imported when first asked for: transformers takes seconds to import."""
        if name in __all__:
            return getattr(import_module(_ELSEWHERE.get(name, "bert_fast.model")), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
