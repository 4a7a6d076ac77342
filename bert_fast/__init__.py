"""bert_fast: pre-train BERT fast, as a drop-in for transformers' BERT."""

__version__ = "0.1.0"

_MODEL = (
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
)
_DISPATCH = ("backends", "set_backend", "use_backend")


def __getattr__(name: str):
    """The model classes, imported when first asked for: transformers takes seconds to import."""
    if name in _MODEL:
        from . import model

        return getattr(model, name)
    if name in _DISPATCH:
        from . import dispatch

        return getattr(dispatch, name)
    if name == "BertConfig":
        from transformers import BertConfig

        return BertConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_MODEL, *_DISPATCH, "BertConfig"]
