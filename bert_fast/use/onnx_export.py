"""A model as an ONNX graph for other runtimes: exported from transformers' class, checked against this engine.

PyTorch's exporter cannot read this engine's packed forward, so the graph is made of transformers' class with the
checkpoint's weights. It takes a padded batch of any size and length. In int8 it is what onnxruntime's dynamic
quantisation makes of it: weights once, activations batch by batch.
"""

import dataclasses
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn

import bert_fast.model
from bert_fast import extras
from bert_fast.data import read_documents
from bert_fast.data.files import new_folder
from bert_fast.data.tokenizer import own_tokenizer, save_tokenizer, special_ids
from bert_fast.output import Output
from bert_fast.run.weights import read_weights
from bert_fast.use.inference import cutting, encode_sentences, load_model, model_folder, prompted, sentence_recipe
from bert_fast.use.pooling import Recipe, pooled_padded, recipe_of

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # each int64 (batch, sequence), padded on the right
# Of the largest difference from this engine, relative to its largest number: products in float32 have about 1e-6.
BOUND = 1e-4
BATCH = 16
CHECKED = 64  # sentences of the Python language reference, where no data is given


class Kind(NamedTuple):
    """What a graph gives: the class it is made of, and its outputs by name."""

    model: str
    outputs: tuple[str, ...]


KINDS = {
    "encoder": Kind("BertModel", ("last_hidden_state",)),
    "vectors": Kind("BertModel", ("sentence_embedding",)),
    "classifier": Kind("BertForSequenceClassification", ("logits",)),
    "tokens": Kind("BertForTokenClassification", ("logits",)),
    "answers": Kind("BertForQuestionAnswering", ("start_logits", "end_logits")),
    "words": Kind("BertForMaskedLM", ("logits",)),
}
FINE_TUNED = ("classifier", "tokens", "answers")  # heads of other classes have weights of the same names and shapes


class Encoded(NamedTuple):
    """A text, or a pair of them, as the model reads it."""

    ids: list[int]
    segments: list[int]


def guess_kind(path: str | Path) -> str:
    """What a graph of ``path`` gives where the user does not say: vectors of a sentence-transformers folder, what the
    head of a fine-tuned model gives, else hidden states."""
    source = model_folder(path)
    if recipe_of(source) is not None:
        return "vectors"
    named = _saved_class(source)
    return next((kind for kind in FINE_TUNED if KINDS[kind].model == named), "encoder")


def _saved_class(source: Path) -> str | None:
    made = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return next(iter(made.get("architectures") or []), None)


class Graph(nn.Module):
    """transformers' model as three tensors to those of a Kind, which is what is exported."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...], recipe: Recipe | None, skip: int):
        super().__init__()
        self.model, self.outputs, self.recipe, self.skip = model, outputs, recipe, skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        if self.recipe is None:
            return tuple(found[name] for name in self.outputs)
        vectors = pooled_padded(found.last_hidden_state, attention_mask, self.recipe.pooling, self.skip)
        return (nn.functional.normalize(vectors, dim=1) if self.recipe.normalize else vectors,)


def export_onnx(
    path: str | Path, folder: str | Path, *, what: str = "auto", int8: bool = False,
    texts: Sequence[str | tuple[str, str]] | None = None, labels: Sequence[int] | None = None,
    max_length: int | None = None, output: Output | None = None, **vectors: Any,
) -> dict[str, Any]:  # fmt: skip
    """Writes ``folder``: model.onnx, with ``int8`` model_int8.onnx, the tokenizer, config.json and export.json.

    ``path`` is a run or a folder, ``what`` one of KINDS, ``vectors`` are the arguments of
    :meth:`bert_fast.use.pooling.Recipe.changed` for what "vectors" pools. ``texts``, sentences or pairs (None: some of
    the Python language reference), cut to ``max_length`` tokens, are what the graph is compared on; ``labels``, a row
    of the head for each, let the accuracy of a classifier be told. Returns what export.json holds: "difference" is the
    largest from this engine, relative to its largest number; of int8 "cosine" (mean and lowest, of vectors or hidden
    states) or "agreement" (the share of equal answers), and "accuracy". ValueError where the difference is above BOUND,
    where ``folder`` is there, and for what does not fit; nothing is written then.
    """
    output = output or Output()
    source = model_folder(path, output)  # once: of a run that goes on it may be another later
    what = guess_kind(source) if what == "auto" else what
    _check(source, what, texts, labels)
    kind = KINDS[what]
    optional = ("pooler.",) if kind.model == "BertModel" else ()  # no output reads an encoder's
    cls = getattr(bert_fast.model, kind.model)
    ours, tokenizer, _ = load_model(cls, source, optional=optional, output=output, dtype=torch.float32)
    read = _readings(ours, tokenizer, what, texts or _reference_texts(), vectors | {"max_length": max_length})
    facts: dict[str, Any] = {
        "what": what, "inputs": list(INPUTS), "outputs": list(kind.outputs), "texts": len(read.encoded),
        "max_length": read.max_length, "recipe": read.recipe and dataclasses.asdict(read.recipe),
    }  # fmt: skip
    with new_folder(Path(folder)) as part:
        graph = Graph(_theirs(kind, source, optional), kind.outputs, read.recipe, read.skip)
        _export(graph.eval(), part / "model.onnx", ours.config)
        if int8:
            quantize(part / "model.onnx", part / "model_int8.onnx")
        facts |= _measured(part, what, ours.config, read, labels, special_ids(tokenizer).pad, int8=int8)
        save_tokenizer(tokenizer, part, max_length=read.max_length)
        (part / "config.json").write_text(ours.config.to_json_string(), encoding="utf-8")
        (part / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _check(source: Path, what: str, texts: Sequence | None, labels: Sequence | None) -> None:
    """Raise ValueError for what does not fit together, ExtraMissing for a package that is not there."""
    if what not in KINDS:
        raise ValueError(f"what must be auto or one of {', '.join(KINDS)}, got {what!r}")
    if labels is not None and what != "classifier":
        raise ValueError(f"labels are for a classifier, not for {what}")
    if texts is not None and not texts:
        raise ValueError("there are no texts to compare on")
    needed = KINDS[what].model
    if what in FINE_TUNED and (saved := _saved_class(source)) != needed:
        raise ValueError(f"{source} holds a {saved}: its head is not that of a {needed}, which {what} needs")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extras.load(package)


def _measured(
    part: Path, what: str, config: Any, read: "_Readings", labels: Sequence[int] | None, pad: int, *, int8: bool
) -> dict[str, Any]:
    """The difference of the graph, what int8 costs, accuracies; ValueError where the difference is above BOUND."""
    kind = KINDS[what]
    found = list(_run(part / "model.onnx", read.encoded, kind, pad))
    facts: dict[str, Any] = {"difference": _difference(found, read.expected)}
    if not facts["difference"] <= BOUND:
        raise ValueError(
            f"the graph's {kind.outputs[0]} differs from this engine's by {facts['difference']:.1e} of its largest "
            f"number, more than {BOUND:.0e}: it was not kept"
        )
    if labels is not None:
        facts["accuracy"] = _accuracy(found, labels)
    if int8:
        small = list(_run(part / "model_int8.onnx", read.encoded, kind, pad))
        facts["int8"] = _cost(what, config, found, small)
        if labels is not None:
            facts["int8"]["accuracy"] = _accuracy(small, labels)
    return facts


def _reference_texts() -> list[str]:
    """Sentences of the Python language reference, from all over it."""
    found = [sentence for document in read_documents(None) for sentence in document]
    return found[:: max(1, len(found) // CHECKED)][:CHECKED]


class _Readings(NamedTuple):
    """Texts as the model reads them, at most ``max_length`` tokens, and what this engine says of them."""

    encoded: list[Encoded]
    expected: list[np.ndarray]
    max_length: int
    recipe: Recipe | None = None
    skip: int = 0


def _readings(ours: Any, tokenizer: Tokenizer, what: str, texts: Sequence, given: dict[str, Any]) -> _Readings:
    kind, positions = KINDS[what], ours.config.max_position_embeddings
    if what == "vectors":
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("vectors are of single texts, not of pairs")
        recipe = sentence_recipe(ours, **given)
        cut, skip, _ = cutting(tokenizer, recipe, "first", Counter())
        encoded = _encoded(cut, prompted(list(texts), recipe.prompt, Counter()))
        vectors = np.concatenate(list(encode_sentences(ours, tokenizer, texts, **given)))
        return _Readings(encoded, list(vectors), cast(int, recipe.max_length), recipe, skip)
    length = given.pop("max_length") or positions
    if any(value is not None for value in given.values()):
        raise ValueError(f"pooling, scaling and prompts are for vectors, not for {what}")
    if not 3 <= length <= positions:
        raise ValueError(f"max_length must be between 3 and the model's {positions} positions, got {length}")
    cut = own_tokenizer(tokenizer)
    cut.enable_truncation(length)
    encoded = _encoded(cut, texts)
    return _Readings(encoded, list(_ours(ours, kind, encoded, special_ids(tokenizer).pad)), length)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]]) -> list[Encoded]:
    return [Encoded(encoding.ids, encoding.type_ids) for encoding in tokenizer.encode_batch(list(texts))]


def _batches(encoded: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    return (encoded[i : i + BATCH] for i in range(0, len(encoded), BATCH))


def _padded(batch: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
    """INPUTS of ``batch``."""
    longest = max(len(one.ids) for one in batch)

    def rows(of, fill: int) -> Tensor:
        return torch.tensor([[*values, *[fill] * (longest - len(values))] for values in map(of, batch)])

    parts = rows(lambda x: x.ids, pad), rows(lambda x: [1] * len(x.ids), 0), rows(lambda x: x.segments, 0)
    return dict(zip(INPUTS, parts, strict=True))


def _by_text(outputs: Sequence[np.ndarray], kind: Kind, batch: Sequence[Encoded]) -> Iterator[np.ndarray]:
    """What a batch's outputs say of each text: a row, or one for each of its tokens, side by side."""
    whole = kind.model == "BertForSequenceClassification" or kind.outputs == ("sentence_embedding",)
    for number, one in enumerate(batch):
        rows = [output[number] if whole else output[number, : len(one.ids)] for output in outputs]
        yield rows[0] if len(rows) == 1 else np.stack(rows, axis=-1)


def _ours(model: Any, kind: Kind, encoded: Sequence[Encoded], pad: int) -> Iterator[np.ndarray]:
    for batch in _batches(encoded):
        with torch.no_grad():
            found = model(**_padded(batch, pad))
        yield from _by_text([found[name].numpy() for name in kind.outputs], kind, batch)


def _theirs(kind: Kind, source: Path, optional: tuple[str, ...]) -> nn.Module:
    """transformers' model; a BertModel without a pooler, which no output reads."""
    arguments: dict[str, Any] = {"add_pooling_layer": False} if kind.model == "BertModel" else {}
    cls = getattr(transformers, kind.model)
    model, *_ = read_weights(cls, source, optional=optional, dtype=torch.float32, **arguments)
    return model


def _export(graph: Graph, file: Path, config: Any) -> None:
    """By torch.onnx's exporter; the example has a padded sequence, as a mask of ones could be left out."""
    ids = torch.arange(32).view(2, 16) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=config.max_position_embeddings)
    with _quiet():
        torch.onnx.export(
            graph, (ids, mask, 0 * ids), str(file), input_names=INPUTS, output_names=graph.outputs, dynamo=True,
            dynamic_shapes=({0: batch, 1: sequence},) * 3, external_data=False, verbose=False,
        )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that are not installed and of names that two inputs share, the quantiser of an
    optimisation that this graph does not need."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def session(file: Path) -> Any:
    """An InferenceSession on the CPU with as many threads as torch."""
    onnxruntime = extras.load("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # else its threads wait for the next run for so long, busy, that they slow whoever comes next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def quantize(file: Path, small: Path) -> None:
    """``file`` in int8 as ``small``: weights by channel, activations batch by batch."""
    quantization, onnx = extras.load("onnxruntime.quantization"), extras.load("onnx")
    graph = onnx.load(str(file))
    # The quantiser transposes the weights of a Gemm and keeps the shape that the exporter noted of them.
    del graph.graph.value_info[:]
    with _quiet():
        quantization.quantize_dynamic(
            graph, str(small), weight_type=quantization.QuantType.QInt8, per_channel=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of results whose type ONNX cannot infer
        )  # fmt: skip


def _run(file: Path, encoded: Sequence[Encoded], kind: Kind, pad: int) -> Iterator[np.ndarray]:
    """What the graph says of each text."""
    graph = session(file)
    for batch in _batches(encoded):
        inputs = {name: tensor.numpy() for name, tensor in _padded(batch, pad).items()}
        yield from _by_text(graph.run(list(kind.outputs), inputs), kind, batch)


def _difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest, relative to the largest expected number; NaN where one is not finite."""
    worst = np.max([np.abs(a - b).max() for a, b in zip(found, expected, strict=True)])  # of Python's max NaN is lost
    return float(worst / np.max([np.abs(b).max() for b in expected]))


def _cost(what: str, config: Any, found: Sequence[np.ndarray], small: Sequence[np.ndarray]) -> dict[str, Any]:
    """What int8 changes: cosine similarities, or the share of answers that stay."""
    if what in ("encoder", "vectors"):
        a, b = (np.concatenate([np.atleast_2d(rows) for rows in some]).astype(np.float64) for some in (found, small))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return {"cosine": {"mean": float(cosine.mean()), "lowest": float(cosine.min())}}
    if what == "classifier" and config.num_labels == 1:
        return {"difference": _difference(small, found)}
    several = what == "classifier" and config.problem_type == "multi_label_classification"
    equal = [_answer(a, what, several) == _answer(b, what, several) for a, b in zip(found, small, strict=True)]
    return {"agreement": float(np.concatenate([np.atleast_1d(x) for x in equal]).mean())}


def _answer(scores: np.ndarray, what: str, several: bool) -> np.ndarray:
    """The labels of a text or of its tokens, and of scores (tokens, 2) the best start and end."""
    if several:
        return scores > 0
    return scores.argmax(0) if what == "answers" else scores.argmax(-1)


def _accuracy(found: Sequence[np.ndarray], labels: Sequence[int]) -> float:
    return float(np.mean([scores.argmax() == label for scores, label in zip(found, labels, strict=True)]))
