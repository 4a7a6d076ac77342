"""How often a step under autocast converts each weight: counted by the profiler, which sees inside the operators."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bert_fast
from bert_fast import BertConfig, BertForPreTraining
from bert_fast.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=f"no C++ operators: {cpu.why_unavailable()}")

LAYERS, H, F, V = 2, 64, 160, 500
# the weights of a layer, by shape: q, k and v are one product; H x H is the head's transform and the pooler, too
SHAPES = {(3 * H, H): LAYERS, (H, H): LAYERS + 2, (F, H): LAYERS, (H, F): LAYERS, (V, H): 1}


def model_and_batch():
    config = BertConfig(num_hidden_layers=LAYERS, hidden_size=H, num_attention_heads=2, intermediate_size=F,
                        vocab_size=V, max_position_embeddings=32)  # fmt: skip
    ids = torch.randint(5, V, (2, 24))
    labels = torch.full_like(ids, -100)
    labels[:, 3:20:4] = ids[:, 3:20:4]
    batch = {"input_ids": ids, "labels": labels, "next_sentence_label": torch.tensor([0, 1])}
    return BertForPreTraining(config), batch


def calls(step, operator: str) -> list[list]:
    """The shapes of the inputs of each call of ``operator`` in ``step``."""
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    return [event.input_shapes for event in profiler.events() if event.name == operator]


def conversions(step) -> dict[tuple, int]:
    """How often ``step`` converts a tensor of each of SHAPES to another dtype."""
    found = Counter(tuple(shapes[0]) for shapes in calls(step, "aten::copy_"))
    return {shape: found[shape] for shape in SHAPES}


def train_step(model, batch):
    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()

    return step


def test_a_training_step_converts_each_weight_once_and_each_gradient_once():
    """The table is read as it is by the embedding; the MLM loss converts it, and its own gradient back."""
    model, batch = model_and_batch()
    with bert_fast.use_backend("cpu"):
        assert conversions(train_step(model.train(), batch)) == {shape: 2 * n for shape, n in SHAPES.items()}


def test_gradient_checkpointing_converts_the_layers_weights_once_more():
    """autocast forgets its copies where it ends, so the layers that the backward computes again convert again."""
    model, batch = model_and_batch()
    model.gradient_checkpointing_enable()
    again = {(3 * H, H): LAYERS, (H, H): LAYERS, (F, H): LAYERS, (H, F): LAYERS, (V, H): 0}
    with bert_fast.use_backend("cpu"):
        assert conversions(train_step(model.train(), batch)) == {s: 2 * n + again[s] for s, n in SHAPES.items()}


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.inference_mode])
def test_encoding_converts_each_weight_once_under_autocast_and_never_in_bfloat16(gradients):
    model, batch = model_and_batch()
    encoder = model.bert.eval()

    def encode():
        with gradients(), torch.autocast("cpu", torch.bfloat16, enabled=encoder.dtype == torch.float32):
            encoder(batch["input_ids"])

    with bert_fast.use_backend("cpu"):
        assert conversions(encode) == {**SHAPES, (H, H): LAYERS + 1, (V, H): 0}  # without the MLM head
        encoder.bfloat16()
        assert conversions(encode) == dict.fromkeys(SHAPES, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_encoding_in_float32_copies_no_weight_and_gives_the_same_numbers(bias):
    model, batch = model_and_batch()
    encoder = model.bert.eval()
    if not bias:
        for layer in encoder.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                linear.bias = None
    outputs = []

    def encode():
        with torch.no_grad():
            outputs.append(encoder(batch["input_ids"]).last_hidden_state)

    def recorded():
        outputs.append(encoder(batch["input_ids"]).last_hidden_state)

    assert len(calls(recorded, "aten::cat")) == (1 + bias) * LAYERS
    assert calls(encode, "aten::cat") == []
    recorded = outputs[0]
    assert recorded.requires_grad
    torch.testing.assert_close(outputs[-1], recorded, rtol=0, atol=1e-6)
    assert encoder(batch["input_ids"][:, :0].reshape(0, 24)).last_hidden_state.shape == (0, 24, H)
