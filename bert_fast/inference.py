"""After pre-training: loading a run or a Hugging Face folder, filling masks, vectors of sentences."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bert_fast.data.tokenizer import bare_tokenizer, load_tokenizer, special_ids, token_ids, vocabulary_rows
from bert_fast.output import Output
from bert_fast.train import checkpoint
from bert_fast.weights import read_weights

# Sentences that are sorted by length together; their vectors are held until all of them are there.
WINDOW = 8192


def model_folder(path: str | Path, output: Output | None = None) -> Path:
    """The Hugging Face folder of ``path``: itself (a checkpoint of a run is one), or the ``model`` of a run.

    Of a run that has not ended it is the newest checkpoint that is whole, which ``output`` (None: an Output()) is
    told, as of newer ones that are damaged. FileNotFoundError where there is no model, CheckpointError where all
    checkpoints are damaged.
    """
    path, output = Path(path), output or Output()
    for folder in (path / "model", path):
        if _is_model(folder):
            return folder
    if not (path / "checkpoints").is_dir() and not (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{path} is neither a run of `bert-fast pretrain` nor a Hugging Face folder with a model"
        )
    found, complaints = checkpoint.newest(path)
    for complaint in complaints:
        output.warn(complaint)
    if found is None:
        raise FileNotFoundError(f"{path} has no model and no checkpoint yet: start its pre-training again")
    if not _is_model(found.folder):
        raise FileNotFoundError(
            f"{path} has no model yet, and its newest checkpoint, {found.folder.name}, was written without the model's "
            "configuration and tokenizer: start its pre-training again, the next checkpoint has them"
        )
    output.note(f"{path} has not ended: read at update {found.step}, its newest whole checkpoint")
    return found.folder


def _is_model(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))


def load_model(
    cls: type,
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    output: Output | None = None,
    **arguments,
):
    """(model in evaluation mode, tokenizer, names of the weights that were drawn at random) from a run or folder.

    ``path`` and ``output`` are as in :func:`model_folder`. ``cls`` is one of this package's model classes,
    ``arguments`` are those of :func:`bert_fast.weights.read_weights`, ``optional`` and ``drawn`` among them. Raises
    ValueError where the checkpoint's weights are not all that the class needs and of its shapes, where they cannot be
    read, and where it has no BERT's configuration or vocabulary.
    """
    folder = model_folder(path, output)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind != "bert":
        raise ValueError(f"{folder} holds a model of type {kind!r}; this engine runs BERT")
    tokenizer = load_tokenizer(folder, tell=(output or Output()).warn)
    model, missing, _ = read_weights(cls, folder, **arguments)
    rows = vocabulary_rows(tokenizer)
    if rows > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer's ids go up to {rows - 1}, the model has {model.config.vocab_size} rows: they "
            "do not belong together"
        )
    return model.eval().to(device), tokenizer, missing


class Candidate(NamedTuple):
    """A token for a [MASK]."""

    token: str
    id: int
    probability: float


def fill_mask(model, tokenizer: Tokenizer, text: str, top_k: int = 5) -> list[list[Candidate]]:
    """The ``top_k`` most probable tokens for each [MASK] of ``text``, best first, from a BertForMaskedLM.

    Rows of the model that have no token (a padded vocabulary, gaps in its ids) are no candidates. Raises ValueError
    where the text has no [MASK] or more tokens than the model has positions.
    """
    tokenizer = bare_tokenizer(tokenizer)
    ids = tokenizer.encode(text).ids
    places = [place for place, number in enumerate(ids) if number == special_ids(tokenizer).mask]
    if not places:
        raise ValueError(f"no [MASK] in {text!r}")
    if len(ids) > model.config.max_position_embeddings:
        raise ValueError(f"the text has {len(ids)} tokens, the model {model.config.max_position_embeddings} positions")
    device = next(model.parameters()).device
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids], device=device)).logits[0, places]
    candidates = torch.from_numpy(token_ids(tokenizer)).to(device)
    best, found = scores.float().softmax(dim=-1)[:, candidates].topk(min(top_k, len(candidates)))
    return [
        [Candidate(tokenizer.id_to_token(i), i, p) for p, i in zip(row.tolist(), numbers.tolist(), strict=True)]
        for row, numbers in zip(best, candidates[found], strict=True)
    ]


def encode_sentences(
    model,
    tokenizer: Tokenizer,
    sentences: Iterable[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    max_length: int | None = None,
    tokens: int = 8192,
) -> Iterator[np.ndarray]:
    """Yields float32 (n, hidden) arrays, one row a sentence, in the order of ``sentences``.

    ``model`` is a BertModel in evaluation mode. ``pooling`` is "mean", over all tokens of the sentence with [CLS]
    and [SEP], or "cls", the last hidden state at [CLS]; ``normalize`` scales rows to length 1. Sentences are cut to
    ``max_length`` tokens (None: the model's positions). Within windows of 8192 they are sorted by length and packed,
    about ``tokens`` of them a batch, without padding; memory does not grow with their number.
    """
    if pooling not in ("mean", "cls"):
        raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
    positions = model.config.max_position_embeddings
    length = positions if max_length is None else max_length
    if not 3 <= length <= positions:
        raise ValueError(f"max_length must be between 3 and the model's {positions} positions, got {length}")
    tokenizer = Tokenizer.from_str(bare_tokenizer(tokenizer).to_str())
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    sentences = iter(sentences)
    while window := list(islice(sentences, WINDOW)):
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(window)]
        vectors = np.empty((len(encoded), model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        while order:
            count, size = 0, 0
            while count < len(order) and (count == 0 or size + len(encoded[order[count]]) <= tokens):
                size += len(encoded[order[count]])
                count += 1
            batch, order = order[:count], order[count:]
            vectors[batch] = _pooled(model, [encoded[i] for i in batch], pooling, normalize).cpu().numpy()
        yield vectors


def _pooled(model, ids: list[list[int]], pooling: str, normalize: bool) -> Tensor:
    """float32 (n, hidden): the vectors of ``ids``, packed into one row."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(sequence) for sequence in ids], device=device)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    with torch.no_grad():
        hidden = model(
            input_ids=torch.tensor([token for sequence in ids for token in sequence], device=device)[None],
            cu_seq_lens_q=ends.int(),
            max_length_q=max(map(len, ids)),
        ).last_hidden_state[0]
    if pooling == "mean":
        vectors = torch.segment_reduce(hidden.float(), "mean", lengths=lengths, axis=0)
    else:
        vectors = hidden.index_select(0, ends[:-1]).float()
    return torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
