"""Outputs of a training step in which the MLM head ran at the masked positions alone: its logits are None, and code
that reads them gets a message, once, that says how to get them."""

import sys

import torch
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)
# These read every field of an output, whatever it is.
_READERS = {"transformers", "accelerate", "torch", "dataclasses", "copy"}


def _message(name: str) -> str:
    return (
        f"bert_fast: outputs.{name} is None, since in training with labels the MLM head runs at the masked positions "
        "alone. Pass return_logits=True to the model, or set model.config.return_logits = True, to have them computed"
    )


def _announced(name: str) -> property:
    def read(self):
        value = self.__dict__.get(name)
        if value is None and not torch.compiler.is_compiling():
            reader = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if reader not in _READERS:  # no Python warning, which may be an error: to ask for None is no fault
                logger.warning_once(_message(name))
        return value

    return property(read, lambda self, value: self.__dict__.__setitem__(name, value))


class _WithoutLogits:
    """Keys, length, tuple and None as every output has them. The key or the number of what is not there raises, and
    what follows keeps transformers' number."""

    def __getitem__(self, key):
        name = self.absent
        if self.__dict__.get(name) is not None:
            return super().__getitem__(key)
        if isinstance(key, str):
            if key == name:
                raise KeyError(_message(name))
            return super().__getitem__(key)
        loss, *others = self.to_tuple()
        found = (loss, self, *others)[key]  # self stands where transformers has the logits
        if found is self or (isinstance(found, tuple) and any(value is self for value in found)):
            raise IndexError(_message(name))
        return found


class MaskedLMOutputWithoutLogits(_WithoutLogits, MaskedLMOutput):
    absent = "logits"
    logits = _announced(absent)


class BertForPreTrainingOutputWithoutLogits(_WithoutLogits, BertForPreTrainingOutput):
    absent = "prediction_logits"
    prediction_logits = _announced(absent)
