"""Held-out loss and accuracy of a pre-training model, exact over any number of batches of any size."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.data import Corpus
from bert_fast.data.pairs import require_known
from bert_fast.model.base import Rows

# Rows of logits held at a time: 256 of a vocabulary of 30522 are 31 MB in float32.
ROWS_AT_ONCE = 256
INPUTS = (
    "input_ids", "token_type_ids", "position_ids", "cu_seq_lens_q", "max_length_q", "cls_positions", "sample_ids",
)  # fmt: skip
# What is summed over batches, in this order.
SUMS = ("mlm_loss", "mlm_right", "masked", "nsp_loss", "nsp_right", "labelled", "sequences")


def evaluate(
    model: torch.nn.Module, batches: Iterable[dict], device: torch.device | str | None = None, precision: str = "fp32"
) -> dict:
    """Means over all masked tokens and all sequence pairs of ``batches``, in evaluation mode.

    ``model`` is a BertForPreTraining or a BertForMaskedLM, left in the mode it was in; ``batches`` are packed
    batches (items of ``bert_fast.data.PackedBatches``), moved to ``device`` (None: the model's). ``precision`` is
    "fp32" (the weights' own dtype) or "bf16" (autocast). Returns

    mlm_loss, mlm_accuracy   over the masked tokens; perplexity is exp(mlm_loss); None where no token is masked, as may
                             be in few sequences with whole words
    nsp_loss, nsp_accuracy   over the labelled pairs; None without next-sentence labels or without that head
    masked, sequences        how many masked tokens and how many sequences there were

    Each term is computed in float32, sums are kept in float64, so the result does not depend on how samples were
    dealt into batches, to rounding. Raises ValueError where there is no sequence.
    """
    return summarize(sums(model, batches, device, precision))


def sums(
    model: torch.nn.Module, batches: Iterable[dict], device: torch.device | str | None = None, precision: str = "fp32"
) -> Tensor:
    """float64 (7,) on ``device``: the sums that :func:`summarize` takes, to add up over processes; see ``SUMS``."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    device = next(model.parameters()).device if device is None else torch.device(device)
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with _evaluating(model), torch.no_grad(), autocast:
        for batch in batches:
            total += _batch_sums(model, batch, device)
    return total


def _batch_sums(model: Any, batch: dict, device: torch.device) -> Tensor:
    batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    rows = Rows(places=batch["masked_positions"])
    outputs = model.bert(**{name: batch[name] for name in INPUTS if name in batch}, rows=rows, return_dict=True)
    assert rows.hidden is not None  # the forward filled it
    head = model.cls.predictions
    found = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    for hidden, labels in zip(*(t.split(ROWS_AT_ONCE) for t in (rows.hidden, batch["masked_labels"])), strict=True):
        scores = head.decoder(head.transform(hidden))
        found[0:3] += _cross_entropy_sums(scores, labels)
    labels = batch.get("next_sentence_label")
    if labels is not None and hasattr(model.cls, "seq_relationship"):
        found[3:6] = _cross_entropy_sums(model.cls.seq_relationship(outputs.pooler_output), labels)
    found[6] = (batch["cu_seq_lens_q"].diff() > 0).sum()
    return found


def _cross_entropy_sums(scores: Tensor, labels: Tensor) -> Tensor:
    """float64 (3,): summed loss, right answers and number of the ``labels`` (n,) that are not -100."""
    losses = F.cross_entropy(scores.float(), labels, ignore_index=-100, reduction="none")
    right = (scores.argmax(dim=-1) == labels).sum()
    return torch.stack([losses.double().sum(), right.double(), (labels != -100).sum().double()])


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def summarize(total: Tensor) -> dict:
    """Means from the sums (7,) of one or more processes; see :func:`evaluate`."""
    mlm_loss, mlm_right, masked, nsp_loss, nsp_right, labelled, sequences = total.tolist()
    if not sequences:
        raise ValueError("nothing to evaluate: the batches hold no sequence")
    mean = mlm_loss / masked if masked else None
    return {
        "mlm_loss": mean,
        "perplexity": perplexity(mean),
        "mlm_accuracy": mlm_right / masked if masked else None,
        "nsp_loss": nsp_loss / labelled if labelled else None,
        "nsp_accuracy": nsp_right / labelled if labelled else None,
        "masked": int(masked),
        "sequences": int(sequences),
    }


def perplexity(loss: float | None) -> float | None:
    """Of a mean loss; infinite where that is no number."""
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf  # NaN compares false


def token_counts(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """int64 (vocab_size,): how often each token occurs in the documents of ``corpus``."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first, last in corpus.documents:
        begin, end = int(corpus.sentence_ends[first]), int(corpus.sentence_ends[last])
        values, numbers = np.unique(np.asarray(corpus.tokens[begin:end]), return_counts=True)
        if values[-1] >= vocab_size:
            require_known(corpus, [(begin, end)], vocab_size)
        counts[values] += numbers
    return counts


def unigram_loss(
    train_counts: np.ndarray, batches: Iterable[dict], vocabulary: np.ndarray | None = None
) -> float | None:
    """Mean cross-entropy of predicting every masked token by how frequent it is: what a model must beat.

    ``train_counts`` (rows,) are the tokens' counts in the training text. Each of ``vocabulary``, the ids that have a
    token (None: all rows), gets one added, so that a token never seen costs much, not infinitely much (Laplace
    smoothing). None where no token is masked.
    """
    smoothed = np.asarray(train_counts, dtype=np.float64) + 1
    costs = np.log(smoothed[slice(None) if vocabulary is None else vocabulary].sum()) - np.log(smoothed)
    labels: Counter = Counter()
    for batch in batches:
        masked = batch["masked_labels"]
        values, numbers = np.unique(masked[masked != -100].numpy(), return_counts=True)
        labels.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    return sum(costs[token] * number for token, number in labels.items()) / labels.total() if labels else None
