"""Small models of every class beside transformers' own, inputs of every kind for them, and what is the same."""

import torch
import transformers
from transformers import BertConfig

import bert_fast
from tests.support import class_names
from tests.support.parity import DEVICE

HEADS = class_names.CLASSES
B, S, V = 4, 9, 61
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def config(**changes) -> BertConfig:
    fields = {
        "vocab_size": V,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    return BertConfig(**{**fields, **changes})


def pair(name: str, **changes):
    """The reference and ours with the same random weights, biases and LayerNorms included."""
    reference = getattr(transformers, name)(config(**changes))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = getattr(bert_fast, name)(config(**changes))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference.to(DEVICE), ours.to(DEVICE)


MASKS = {
    "none": None,
    "ones": [S] * B,
    "right": [S, 5, 1, 7],
    "left": [S, 5, 1, 7],
    "holes": [S, 6, 3, 8],
    "empty_row": [S, 0, 3, 8],
}


def mask_of(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = (torch.arange(S)[None] < torch.tensor(MASKS[kind])[:, None]).long()
    if kind == "left":
        mask = mask.flip(1)
    if kind == "holes":
        mask[:, 2] = 0
    return mask.to(DEVICE)


def inputs_of(name: str, mask: torch.Tensor | None = None) -> dict:
    batch = {
        "input_ids": torch.randint(0, V, (B, S), device=DEVICE),
        "token_type_ids": torch.randint(0, 2, (B, S), device=DEVICE),
    }
    if mask is not None:
        batch["attention_mask"] = mask
    tokens = torch.randint(0, V, (B, S), device=DEVICE)
    attended = torch.ones_like(tokens) if mask is None or mask.dim() != 2 else mask
    tokens = tokens.masked_fill((torch.rand(B, S, device=DEVICE) < 0.5) | (attended == 0), -100)
    classes = torch.randint(0, 2, (B,), device=DEVICE)
    if name == "BertForPreTraining":
        batch |= {"labels": tokens, "next_sentence_label": classes}
    if name == "BertForMaskedLM":
        batch["labels"] = tokens
    if name in ("BertForNextSentencePrediction", "BertForSequenceClassification"):
        batch["labels"] = classes
    if name == "BertForTokenClassification":
        batch["labels"] = tokens.clamp(max=2)
    if name == "BertForQuestionAnswering":
        batch |= {"start_positions": classes, "end_positions": classes + 3}
    if name == "BertForMultipleChoice":
        batch = {k: v.view(2, 2, S) for k, v in batch.items()} | {"labels": classes[:2]}
    return batch


def qa(name: str) -> dict:
    return {"num_labels": 2} if name == "BertForQuestionAnswering" else {}


def assert_same_outputs(ours, reference, mask=None) -> None:
    assert list(ours.keys()) == list(reference.keys())
    for key in reference:
        if torch.is_tensor(reference[key]):
            assert ours[key].dtype == reference[key].dtype, key
            expected = reference[key]
            if mask is not None and mask.dim() == 2 and expected.shape[:2] == mask.shape:
                attended = mask.bool() if expected.dim() == 2 else mask.bool()[..., None]
                dense = torch.where(attended, ours[key], 0.0)
                expected = torch.where(attended, expected, 0.0)
                torch.testing.assert_close(dense, expected, **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")
                assert ours[key].isfinite().all()
                continue
            torch.testing.assert_close(ours[key], expected, **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")


def assert_same_gradients(ours, reference) -> None:
    theirs = dict(reference.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # A gradient is a sum over tokens, rounded where it is largest: an element near 0 has the error of its terms.
        tolerance = {**TOLERANCE, "atol": TOLERANCE["atol"] * max(1.0, float(expected.abs().max()))}
        torch.testing.assert_close(parameter.grad, expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared > 30


def loss_of(output) -> torch.Tensor:
    if "loss" in output:
        return output.loss
    return output.last_hidden_state[:, 0].square().sum() + output.pooler_output.sum()


def packed_of(batch: dict, lengths: list[int]) -> dict:
    """The first ``lengths[i]`` tokens of each row, end to end, with the arguments of transformers' collator."""
    keep = torch.arange(S, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    out = {k: v[keep][None] for k, v in batch.items() if v.shape == keep.shape}
    return out | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}
