"""What the backward computes again: the same bits, eager and recorded, and less that is kept."""

import copy
import weakref

import pytest
import torch
from transformers import BertConfig

from bert_fast import BertForPreTraining, BertForSequenceClassification, dispatch, ops
from bert_fast.model.base import RECOMPUTED
from tests.support.parity import DEVICE
from tests.support.recorded_runs import Rerun
from tests.train import test_captured_step as steps

BF16 = torch.bfloat16
CONFIG = BertConfig(
    vocab_size=120, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
    max_position_embeddings=32,
)  # fmt: skip


def gradients(recompute: str, autocast: bool = False, **fields) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE).train()
    model.recompute(recompute)
    ids = torch.randint(5, 120, (3, 20), device=DEVICE)
    mask = torch.arange(20, device=DEVICE) < torch.tensor([[20], [7], [13]], device=DEVICE)
    labels = torch.where(mask & (ids % 3 == 0), ids, -100)
    torch.manual_seed(1)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        loss = model(ids, attention_mask=mask, labels=labels, next_sentence_label=ids[:, 0] % 2, **fields).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"hidden_dtype": BF16}], ids=["", "hidden_dtype"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("what", RECOMPUTED[1:])
def test_the_same_bits(what, autocast, fields):
    if fields and not autocast:
        pytest.skip("hidden states of 16 bits beside float32 weights are autocast's")
    expected, found = gradients("nothing", autocast, **fields), gradients(what, autocast, **fields)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


class OwnDropout(torch.nn.Dropout):
    """Draws from torch's generator, as transformers' and peft's modules do."""


def test_layers_whose_own_code_draws_random_numbers_draw_them_again():
    found = []
    for what in ("nothing", "layers"):
        torch.manual_seed(0)
        model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE).train()
        for layer in model.bert.encoder.layer:
            layer.output.dropout.__class__ = OwnDropout
        model.recompute(what)
        torch.manual_seed(1)
        ids = torch.randint(5, 120, (3, 20), device=DEVICE)
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("recorder", [None, *steps.recorders()])
@pytest.mark.parametrize("what", RECOMPUTED[1:])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_bits_in_steps(what, bf16, recorder):
    expected = steps.trained(steps.build(bf16=bf16))
    step = steps.build(bf16=bf16, recorder=recorder)
    step.model.recompute(what)
    found = steps.trained(steps.prepare(step))
    assert steps.same(found, expected)
    assert recorder is None or step.captured == 7


@pytest.mark.parametrize("step", [False, True])
def test_outputs_of_gelu_are_kept_by_nobody(monkeypatch, step):
    """Three layers' and the MLM head's: of the layers none is alive once the forward is done."""
    made, alive = [], {}
    bias_gelu = ops.bias_gelu

    def watched(x, bias=None):
        y = bias_gelu(x, bias)
        made.append(weakref.ref(y))
        return y

    monkeypatch.setattr(ops, "bias_gelu", watched)
    for what in ("nothing", "gelu"):
        made.clear()
        if step:
            trainer = steps.build(recorder=Rerun)
            trainer.model.recompute(what)
            backward = torch.Tensor.backward

            def counted(loss, *args, what=what, backward=backward, **kwargs):
                alive.setdefault(what, [y() is not None for y in made])
                backward(loss, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, "backward", counted)
            steps.apply(trainer, 0)
            monkeypatch.setattr(torch.Tensor, "backward", backward)
        else:
            torch.manual_seed(0)
            model = BertForSequenceClassification(copy.deepcopy(CONFIG)).to(DEVICE).train()
            model.recompute(what)
            loss = model(torch.randint(5, 120, (2, 9), device=DEVICE), labels=torch.tensor([0, 1], device=DEVICE)).loss
            alive[what] = [y() is not None for y in made]
            loss.backward()
    layers = 2 if step else 3
    assert alive["nothing"][:layers] == [True] * layers
    assert alive["gelu"][:layers] == [False] * layers


def test_it_can_be_taken_back_and_what_is_unknown_is_refused():
    model = BertForPreTraining(copy.deepcopy(CONFIG))
    for what in RECOMPUTED:
        model.recompute(what)
        assert model.bert.encoder.layer[0].gradient_checkpointing == (what == "layers")
        assert {layer.recompute_gelu for layer in model.bert.encoder.layer} == {what == "gelu"}
    model.recompute()
    assert not model.bert.encoder.layer[0].gradient_checkpointing
    with pytest.raises(ValueError, match="recompute takes one of nothing, gelu, layers, got 'all'"):
        model.recompute("all")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_models_have_one_gradient_of_the_table(monkeypatch, reentrant):
    """transformers hooks the word embeddings then, so that their rows have gradients; a table that is trained gives
    them one anyway, and so the embedding stays one operator."""
    model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    called = []
    chosen = dispatch.implementation
    monkeypatch.setattr(dispatch, "implementation", lambda *what: called.append(what[:2]) or chosen(*what))
    ids = torch.randint(5, 120, (2, 9), device=DEVICE)
    model(ids, labels=ids).loss.backward()
    assert ("embedding_layernorm", "bwd_add") in called
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, rows: seen.append(rows.requires_grad))
    model(ids, labels=ids).loss.backward()
    assert seen == [True]  # a hook of the caller's is called, behind transformers'


def test_an_adapter_has_gradients_in_checkpointed_layers_behind_a_frozen_table():
    model = BertForPreTraining(copy.deepcopy(CONFIG)).to(DEVICE).train()
    model.requires_grad_(False)
    query = model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": True})  # which needs an input with a gradient
    ids = torch.randint(5, 120, (2, 9), device=DEVICE)
    model(ids, labels=ids).loss.backward()
    assert query.grad.abs().sum() > 0
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()._forward_hooks
