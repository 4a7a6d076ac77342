"""After pre-training: loading a run or a Hugging Face folder, filling masks, vectors of sentences."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer, normalizers
from torch import Tensor

from bert_fast.data.bins import batches_by_length
from bert_fast.data.tokenizer import (
    bare_tokenizer,
    load_tokenizer,
    own_tokenizer,
    special_ids,
    token_ids,
    vocabulary_rows,
)
from bert_fast.output import Output
from bert_fast.run import checkpoint
from bert_fast.run.weights import read_weights
from bert_fast.text import well_formed
from bert_fast.use.pooling import Recipe, pooled, recipe_of, transformer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound="PreTrainedModel")

# Sentences that are sorted by length together; their vectors are held until all of them are there.
WINDOW = 8192


def model_folder(path: str | Path, output: Output | None = None) -> Path:
    """The Hugging Face folder of ``path``: itself (a checkpoint of a run is one), or the ``model`` of a run.

    Of a sentence-transformers folder it is that of its transformer.

    Of a run that has not ended it is the newest checkpoint that is whole, which ``output`` (None: an Output()) is
    told, as of newer ones that are damaged. FileNotFoundError where there is no model, CheckpointError where all
    checkpoints are damaged.
    """
    path, output = Path(path), output or Output()
    for folder in (path / "model", path, transformer_folder(path)):
        if folder is not None and _is_model(folder):
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
    cls: type[M],
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    output: Output | None = None,
    **arguments,
) -> tuple[M, Tokenizer, list[str]]:
    """(model in evaluation mode, tokenizer, names of the weights that were drawn at random) from a run or folder.

    ``path`` and ``output`` are as in :func:`model_folder`. ``cls`` is one of this package's model classes,
    ``arguments`` are those of :func:`bert_fast.run.weights.read_weights`, ``optional`` and ``drawn`` among them. Raises
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
    where the text has no [MASK], or more tokens than the model has positions, or where the scores are not finite. Lone
    surrogates become U+FFFD.
    """
    tokenizer, text = bare_tokenizer(tokenizer), well_formed(text)[0]
    ids = tokenizer.encode(text).ids
    places = [place for place, number in enumerate(ids) if number == special_ids(tokenizer).mask]
    if not places:
        raise ValueError(f"no [MASK] in {text if len(text) <= 200 else f'{text[:200]}...'!r}")
    if len(ids) > model.config.max_position_embeddings:
        raise ValueError(f"the text has {len(ids)} tokens, the model {model.config.max_position_embeddings} positions")
    device = next(model.parameters()).device
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids], device=device)).logits[0, places]
    candidates = torch.from_numpy(token_ids(tokenizer)).to(device)
    best, found = scores.float().softmax(dim=-1)[:, candidates].topk(min(top_k, len(candidates)))
    if not best.isfinite().all():
        raise ValueError(f"the model's scores are not finite: it overflows in {model.dtype} on this text")
    return [
        [
            Candidate(cast(str, tokenizer.id_to_token(i)), i, p)
            for p, i in zip(row.tolist(), numbers.tolist(), strict=True)
        ]
        for row, numbers in zip(best, candidates[found], strict=True)
    ]


def sentence_recipe(model, **given) -> Recipe:
    """How :func:`encode_sentences` makes vectors by ``model``, a BertModel.

    It is what the sentence-transformers folder says that ``model`` was loaded from, else the mean over all tokens, cut
    to the model's positions; ``given`` (see :meth:`.pooling.Recipe.changed`) goes before that where not None.
    """
    positions = model.config.max_position_embeddings
    own = (recipe_of(model.name_or_path) if model.name_or_path else None) or Recipe()
    recipe = replace(own, max_length=min(own.max_length or positions, positions)).changed(**given)
    if recipe.max_length is None or not 3 <= recipe.max_length <= positions:
        raise ValueError(f"max_length must be between 3 and the model's {positions} positions, got {recipe.max_length}")
    return recipe


def encode_sentences(
    model,
    tokenizer: Tokenizer,
    sentences: Iterable[str],
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    long: str = "first",
    tokens: int = 8192,
    counts: Counter | None = None,
) -> Iterator[np.ndarray]:
    """Yields float32 (n, hidden) arrays, one row a sentence, in the order of ``sentences``.

    ``model`` is a BertModel in evaluation mode. None stands for what :func:`sentence_recipe` says: ``pooling`` is
    "mean", over all tokens of the sentence with [CLS] and [SEP], "cls", the last hidden state at [CLS], or another of
    :data:`bert_fast.use.pooling.POOLINGS`; ``normalize`` scales rows to length 1; ``prompt``, or that of the model's
    with ``prompt_name``, goes before each. Of a sentence of more than ``max_length`` tokens ``long`` "first" encodes
    the first of them; "mean" cuts it into windows of so many, each with the special tokens and the prompt, and gives
    the mean of their vectors, weighted by how many tokens each pools, scaled after. 8192 sentences at a time are sorted
    by length and packed, about ``tokens`` tokens a batch, without padding; memory does not grow with their number.
    ``counts`` gets "cut" (sentences) and "cut_tokens", or "windowed" (sentences) and "windows" of these, "empty", and
    "surrogates", which became U+FFFD. Raises ValueError for a vector that is not finite.
    """
    if long not in ("first", "mean"):
        raise ValueError(f"long must be 'first' or 'mean', got {long!r}")
    recipe = sentence_recipe(
        model, pooling=pooling, normalize=normalize, max_length=max_length, prompt=prompt, prompt_name=prompt_name
    )
    counts = Counter() if counts is None else counts
    tokenizer, in_front, windows_of = cutting(tokenizer, recipe, long, counts)
    sentences, done = iter(sentences), 0
    while window := list(islice(sentences, WINDOW)):
        encodings = tokenizer.encode_batch_fast(prompted(window, recipe.prompt, counts))
        parts = [windows_of(encoding) for encoding in encodings]
        encoded = [ids for windows in parts for ids in windows]
        vectors = np.empty((len(encoded), len(recipe.pooling) * model.config.hidden_size), dtype=np.float32)
        for batch in batches_by_length([len(ids) for ids in encoded], tokens):
            vectors[batch] = _vectors(model, [encoded[i] for i in batch], recipe, in_front).cpu().numpy()
        vectors = _joined(vectors, parts, in_front)
        if recipe.normalize:
            vectors = torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1).numpy()
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            number = done + int(finite.argmin()) + 1
            raise ValueError(
                f"the vector of sentence {number} is not finite: by {model.dtype} the model overflows there"
            )
        done += len(window)
        yield vectors


def prompted(window: list[str], prompt: str, counts: Counter) -> list[str]:
    """What is encoded of ``window``; counts the empty ones and lone surrogates."""
    texts = []
    for sentence in window:
        text, replaced = well_formed(sentence)
        counts["surrogates"] += replaced
        counts["empty"] += not text.strip()
        texts.append(prompt + text)
    return texts


def cutting(
    tokenizer: Tokenizer, recipe: Recipe, long: str, counts: Counter
) -> tuple[Tokenizer, int, Callable[[Encoding], list[list[int]]]]:
    """(a tokenizer that lower-cases as ``recipe`` says, how many tokens in front of each are not pooled, and what makes
    the windows of an encoding: one, but where ``long`` is "mean")."""
    tokenizer = own_tokenizer(tokenizer)
    if recipe.lowercase:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    length = recipe.max_length
    assert length is not None  # sentence_recipe gives one
    whole = len(tokenizer.encode(recipe.prompt).ids)  # [CLS], the prompt, [SEP]
    if whole >= length and recipe.prompt and (long == "mean" or not recipe.include_prompt):
        raise ValueError(f"the prompt has {whole - 1} tokens, all are cut to {length}: no other is left")
    in_front = 0 if recipe.include_prompt or not recipe.prompt else whole - 1
    again = len(tokenizer.encode(recipe.prompt, add_special_tokens=False).ids)
    if long == "first":
        tokenizer.enable_truncation(length)

    def first(encoding: Encoding) -> list[list[int]]:
        counts["cut"] += bool(encoding.overflowing)
        counts["cut_tokens"] += sum(rest.special_tokens_mask.count(0) for rest in encoding.overflowing)
        return [encoding.ids]

    def every(encoding: Encoding) -> list[list[int]]:
        ids, special = encoding.ids, encoding.special_tokens_mask
        if len(ids) <= length:
            return [ids]
        begin, end = special.index(0) + again, len(ids) - special[::-1].index(0)
        step = length - begin - (len(ids) - end)
        windows = [ids[:begin] + ids[i : min(i + step, end)] + ids[end:] for i in range(begin, end, step)]
        counts["windowed"] += 1
        counts["windows"] += len(windows)
        return windows

    return tokenizer, in_front, first if long == "first" else every


def _vectors(model, ids: list[list[int]], recipe: Recipe, skip: int) -> Tensor:
    """float32 (n, width): the vectors of ``ids``, packed into one row."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(sequence) for sequence in ids], device=device)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    with torch.no_grad():
        hidden = model(
            input_ids=torch.tensor([token for sequence in ids for token in sequence], device=device)[None],
            cu_seq_lens_q=ends.int(),
            max_length_q=max(map(len, ids)),
        ).last_hidden_state[0]
    return pooled(hidden, ends, recipe.pooling, skip)


def _joined(vectors: np.ndarray, parts: list[list[list[int]]], skip: int) -> np.ndarray:
    """A row for each of ``parts``, sentences in windows, whose vectors are ``vectors`` one after the other: the mean,
    weighted by the tokens that a window pools."""
    if len(parts) == len(vectors):
        return vectors
    firsts = np.cumsum([0, *map(len, parts[:-1])])
    weights = np.array([len(ids) - skip for windows in parts for ids in windows], dtype=np.float32)[:, None]
    joined = np.add.reduceat(vectors * weights, firsts) / np.add.reduceat(weights, firsts)
    alone = np.array([len(windows) == 1 for windows in parts])
    joined[alone] = vectors[firsts[alone]]
    return joined
