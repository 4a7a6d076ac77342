"""Tiny models with heads of random weights, as transformers saves them, and what transformers says by them."""

import torch
import transformers

import bert_fast
from bert_fast.data import load_tokenizer, save_tokenizer


def save_head(model, folder, name="BertForSequenceClassification", **config):
    """A model of transformers' class ``name`` in ``folder``, its encoder that of the folder ``model``."""
    settings = transformers.BertConfig.from_pretrained(model, **config)
    torch.manual_seed(3)
    network = getattr(transformers, name)(settings)
    network.bert.load_state_dict(
        transformers.BertModel.from_pretrained(model, add_pooling_layer=network.bert.pooler is not None).state_dict()
    )
    network.save_pretrained(folder)
    save_tokenizer(load_tokenizer(model), folder, max_length=settings.max_position_embeddings)
    return folder


def outputs_of(folder, texts, pairs=None, name="BertForSequenceClassification"):
    """(inputs, output) of transformers' own model for each text by itself; float64."""
    assert not issubclass(getattr(transformers, name), bert_fast.BertPreTrainedModel)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = getattr(transformers, name).from_pretrained(folder).double().eval()
    for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
        inputs = tokenizer(text, pair, truncation=True, return_tensors="pt")
        with torch.no_grad():
            yield inputs, network(**inputs)


def logits_of(folder, texts, pairs=None):
    """The logits of a BertForSequenceClassification, (texts, labels) float64."""
    return torch.cat([output.logits for _, output in outputs_of(folder, texts, pairs)])
