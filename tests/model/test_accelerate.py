"""bert_fast.accelerate: a loaded transformers BERT on this engine, with the same Parameter objects."""

import functools

import accelerate
import pytest
import torch
import transformers
from torch import nn

import bert_fast
from tests.support.heads import HEADS, assert_same_outputs, config, inputs_of, mask_of, qa
from tests.support.parity import DEVICE


@pytest.mark.parametrize("name", HEADS)
def test_same_parameters_and_outputs(name):
    model = getattr(transformers, name)(config(**qa(name))).to(DEVICE).eval()
    batch = inputs_of(name, mask_of("right"))
    expected = model(**batch)
    before = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    fast = bert_fast.accelerate(model)
    assert fast is model
    assert type(fast) is getattr(bert_fast, name)
    assert {n: id(p) for n, p in fast.named_parameters(remove_duplicate=False)} == before
    assert_same_outputs(fast(**batch), expected, mask_of("right") if name != "BertForMultipleChoice" else None)
    assert bert_fast.accelerate(fast) is fast


class Pipeline(nn.Module):
    """Mean pooling over a BERT, as sentence embedding pipelines have it."""

    def __init__(self, bert):
        super().__init__()
        self.encoder = bert

    def forward(self, **batch):
        hidden, mask = self.encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_inside_a_larger_module():
    model = Pipeline(transformers.BertModel(config())).to(DEVICE).eval()
    batch = inputs_of("BertModel", mask_of("left"))
    expected = model(**batch)
    assert bert_fast.accelerate(model) is model
    assert type(model.encoder) is bert_fast.BertModel
    torch.testing.assert_close(model(**batch), expected, atol=1e-5, rtol=1e-5)


def test_what_transformers_recorded_with_is_taken_off():
    """Its hooks stay where states were asked for once, and would look at every forward of this engine's."""
    model = transformers.BertForPreTraining(config()).to(DEVICE).eval()
    batch = inputs_of("BertForPreTraining", mask_of("ones"))
    expected = model(**batch, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.modules())
    bert_fast.accelerate(model)
    assert not any(m._forward_hooks for m in model.modules())
    got = model(**batch, output_hidden_states=True)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def offloaded(model):
    accelerate.cpu_offload(model, execution_device=torch.device(DEVICE))
    return model


def patched(name):
    def patch(model):
        module = model.get_submodule(name)
        module.forward = functools.partial(module.forward)
        return model

    return patch


@pytest.mark.parametrize(
    "patch",
    [
        offloaded,
        patched(""),
        patched("bert"),
        patched("bert.embeddings"),
        patched("bert.encoder.layer.1.attention.self"),
    ],
)
def test_a_forward_on_an_instance_is_refused_and_works_when_it_is_put_on_after(patch):
    model = patch(transformers.BertForPreTraining(config()).to(DEVICE).eval())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=r"bert_fast\.accelerate: the forward of"):
        bert_fast.accelerate(model)
    assert [type(m) for m in model.modules()] == kinds
    model = transformers.BertForPreTraining(config()).to(DEVICE).eval()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    with torch.no_grad():
        expected = model(**batch)
        assert_same_outputs(patch(bert_fast.accelerate(model))(**batch), expected, mask_of("right"))


@pytest.mark.parametrize("part", ["BertModel", "BertSelfAttention", "BertPredictionHeadTransform"])
def test_a_forward_that_was_put_on_a_class_is_refused(part, monkeypatch):
    kind = getattr(transformers.models.bert.modeling_bert, part)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: before(self, *args, **kwargs))
    model = transformers.BertForPreTraining(config())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=rf"bert_fast\.accelerate: the forward of .*{part}"):
        bert_fast.accelerate(model)
    assert [type(m) for m in model.modules()] == kinds


def test_forwards_on_instances_of_torchs_own_modules_are_called():
    model = transformers.BertForPreTraining(config()).to(DEVICE).eval()
    for name in ("bert.encoder.layer.0.output.dense", "bert.pooler.dense", "cls.predictions.decoder"):
        module = model.get_submodule(name)
        module.forward = lambda x, before=module.forward: 2 * before(x)
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    expected = model(**batch)
    assert_same_outputs(bert_fast.accelerate(model)(**batch), expected, mask_of("right"))


class WithItsOwnForward(transformers.BertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_what_cannot_be_accelerated_is_said_and_left_alone():
    for error, model in (
        (ValueError, nn.Linear(2, 2)),
        (ValueError, transformers.BertModel(config(is_decoder=True))),
        (ValueError, transformers.BertLMHeadModel(config(is_decoder=True))),
        (TypeError, Pipeline(WithItsOwnForward(config()))),
    ):
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(error, match="bert_fast"):
            bert_fast.accelerate(model)
        assert [type(m) for m in model.modules()] == kinds


def test_training_goes_on():
    model = transformers.BertForPreTraining(config()).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = inputs_of("BertForPreTraining")
    bert_fast.accelerate(model).train()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
