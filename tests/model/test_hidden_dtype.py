"""Hidden states in 16 bits beside float32 weights: what `pretrain` trains with, held to a model all of 16 bits."""

import copy

import pytest
import torch
import transformers
from transformers import BertConfig

from bert_fast import BertForPreTraining, BertModel, use_backend
from tests.support.parity import DEVICE, assert_near_truth, available_backends

BF16 = torch.bfloat16
OPERATORS = ("embedding_layernorm", "attention", "residual_layernorm", "bias_gelu", "mlm_loss")
BACKENDS = [b for b in available_backends("attention") if all(b in available_backends(o) for o in OPERATORS)]


def models(**fields):
    """(ours in float32, transformers' in bfloat16, and in float64), of the same weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=150, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=112,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        **fields,
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config)
    for p in theirs.parameters():
        p.data = p.data.to(BF16).float()  # what all three have alike
    ours = BertForPreTraining(config)
    ours.load_state_dict(theirs.state_dict())
    return [model.to(DEVICE) for model in (ours, copy.deepcopy(theirs).to(BF16), theirs.double())]


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 150, (3, 37), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, ids, -100)
    mask = torch.arange(37) < torch.tensor([[37], [11], [30]])
    made = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100),
            "next_sentence_label": torch.tensor([0, 1, 1])}  # fmt: skip
    return {name: value.to(DEVICE) for name, value in made.items()}


def gradients(model, **options) -> dict[str, torch.Tensor]:
    loss = model(**batch(), **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_near_to_the_truth_as_a_model_of_16_bits(backend):
    ours, theirs, truth = models()
    with use_backend(**dict.fromkeys(OPERATORS, backend)), torch.autocast(DEVICE, BF16):
        found = gradients(ours.train(), hidden_dtype=BF16)
    same, exact = gradients(theirs.train()), gradients(truth.train())
    assert found.keys() == exact.keys()
    errors = {"ours": 0.0, "theirs": 0.0}
    for name, expected in exact.items():
        assert found[name].dtype == torch.float32
        if "key.bias" not in name:  # exactly 0: both have rounding alone
            # of one parameter the largest of a few errors is held against another such: chance counts
            assert_near_truth(name, found[name].to(BF16), same[name].to(BF16), expected, factor=3.0)
        errors["ours"] += float((found[name].double() - expected).square().sum())
        errors["theirs"] += float((same[name].double() - expected).square().sum())
    assert 0 < errors["ours"] <= errors["theirs"]


def test_every_hidden_state_has_it():
    ours, _, truth = models()
    asked = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    with torch.autocast(DEVICE, BF16):
        found = ours.bert(**asked, output_hidden_states=True, hidden_dtype=BF16)
        default = ours.bert(**asked, output_hidden_states=True)
    assert {x.dtype for x in found.hidden_states} == {found.last_hidden_state.dtype} == {BF16}
    assert {x.dtype for x in default.hidden_states} == {torch.float32}
    exact = truth.bert(**asked).last_hidden_state
    real = asked["attention_mask"].bool()
    error = (found.last_hidden_state.double() - exact)[real].abs().max()
    assert 0 < error < 0.02 * exact.abs().max()


def test_half_as_much_is_kept():
    """Of a layer: what goes into its products and what LayerNorm's backward reads, no longer twice as wide."""
    ours, *_ = models()
    rows = int(batch()["attention_mask"].sum())

    def wide(**options) -> int:
        kept = {}

        def pack(tensor):
            if tensor.dtype == torch.float32 and tensor.shape == (rows, 48):
                kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes again
            return tensor

        with torch.autocast(DEVICE, BF16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours.train()(**batch(), **options)
        return len(kept)

    assert wide(hidden_dtype=BF16) == 0
    assert wide() == 2 * 2  # the sums before both LayerNorms of two whole layers


def test_the_default_is_the_parameters_dtype_to_the_bit():
    ours, *_ = models()
    first = gradients(ours.eval())
    ours.zero_grad()
    for name, grad in gradients(ours, hidden_dtype=torch.float32).items():
        assert torch.equal(grad, first[name]), name


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
def test_a_dtype_without_its_products_is_refused(dtype):
    ours, *_ = models()
    with pytest.raises(ValueError, match=r"call the model under torch\.autocast"):
        ours(**batch(), hidden_dtype=dtype)
    assert isinstance(ours.bert, BertModel)
