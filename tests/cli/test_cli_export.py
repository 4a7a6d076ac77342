"""bert-fast export: graphs that onnxruntime runs, against transformers, sentence-transformers and known answers."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers

import bert_fast
from bert_fast import data
from bert_fast.use import onnx_export
from bert_fast.use.pooling import POOLINGS, pooled, pooled_padded
from tests.support.child import ROOT, WITHOUT
from tests.support.child import run as child

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HEADS = {
    "encoder": "BertModel",
    "classifier": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "answers": "BertForQuestionAnswering",
    "words": "BertForMaskedLM",
}


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_of_a_padded_batch_is_that_of_packed_sequences(mode, skip):
    lengths = torch.tensor([5, 9, 4, 7])
    hidden = torch.randn(4, 9, 6)
    mask = (torch.arange(9) < lengths[:, None]).long()
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    modes = (mode, "mean")
    expected = pooled(hidden[mask.bool()], ends, modes, skip)
    hidden[mask == 0] = 1e6  # what a runtime has at padding
    torch.testing.assert_close(pooled_padded(hidden, mask, modes, skip), expected)


def model_of(folder, name: str, made, **settings):
    """A tiny model of class ``name`` with a tokenizer in the folder ``made``."""
    torch.manual_seed(3)
    config = bert_fast.BertConfig.from_pretrained(folder / "model", **settings)
    getattr(bert_fast, name)(config).save_pretrained(made)
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), made)
    return made


def graph_of(made, name: str = "model.onnx"):
    return onnxruntime.InferenceSession(str(made / name), providers=["CPUExecutionProvider"])


def inputs_of(folder, texts) -> dict[str, np.ndarray]:
    batch = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=64, return_tensors="np"
    )
    return {key: value.astype(np.int64) for key, value in batch.items()}


TEXTS = ["The value of a name.", "It is bound by an assignment, which may be a call or an import.", "One"]


@pytest.mark.parametrize(
    "what", ["classifier", *(pytest.param(name, marks=pytest.mark.slow) for name in HEADS if name != "classifier")]
)
def test_a_graph_says_what_transformers_says_whatever_the_batch(run, folder, tmp_path, what):
    model = model_of(folder, HEADS[what], tmp_path / "model", num_labels=2 if what == "answers" else 3)
    flags = ("--what", "words") if what == "words" else ()
    done = run("export", model, "--onnx", tmp_path / "made", "--json", *flags)
    assert done.code == 0, done.err
    assert done.result["what"] == what
    assert done.result["difference"] < 1e-5
    assert json.loads((tmp_path / "made" / "export.json").read_text())["texts"] == onnx_export.CHECKED
    reference = getattr(transformers, HEADS[what]).from_pretrained(model).eval()
    graph = graph_of(tmp_path / "made")
    for texts in (TEXTS, TEXTS[:1], [*TEXTS, *TEXTS, "word " * 62]):
        batch = inputs_of(tmp_path / "made", texts)
        with torch.no_grad():
            expected = reference(**{key: torch.from_numpy(value) for key, value in batch.items()})
        real = batch["attention_mask"].astype(bool)
        for name, found in zip(done.result["outputs"], graph.run(done.result["outputs"], batch), strict=True):
            theirs, per_token = expected[name].numpy(), what != "classifier"
            pairs = (found[real], theirs[real]) if per_token else (found, theirs)
            np.testing.assert_allclose(*pairs, atol=2e-5, rtol=1e-4)


RECIPES = [
    pytest.param({"pooling_mode": "mean"}, {}, True, id="mean, scaled", marks=pytest.mark.slow),
    pytest.param({"pooling_mode": ["cls", "max"], "include_prompt": False}, {"q": "ask me "}, False, id="prompt",
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("pooling", "prompts", "normalize"), RECIPES)
def test_vectors_of_a_graph_are_those_of_sentence_transformers(run, folder, tmp_path, pooling, prompts, normalize):
    library = pytest.importorskip("sentence_transformers")
    root = tmp_path / "sentences"
    shutil.copytree(folder / "model", root)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    written = {
        "modules.json": [
            {"name": kind, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
            for i, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 32, **pooling},
        "sentence_bert_config.json": {"max_seq_length": 24},
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": next(iter(prompts), None)},
    }  # fmt: skip
    for name, content in written.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps(content))
    (root / "2_Normalize").mkdir()
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 3))
    done = run("export", root, "--onnx", tmp_path / "made", "--int8", "--data", tmp_path / "texts.txt", "--json")
    assert done.code == 0, done.err
    assert (done.result["what"], done.result["texts"], done.result["max_length"]) == ("vectors", 9, 24)
    prompt = next(iter(prompts.values()), "")
    assert done.result["recipe"]["prompt"] == prompt
    batch = inputs_of(tmp_path / "made", [prompt + text for text in TEXTS])
    (found,) = graph_of(tmp_path / "made").run(["sentence_embedding"], batch)
    np.testing.assert_allclose(found, library.SentenceTransformer(str(root), device="cpu").encode(TEXTS), atol=2e-5)
    (small,) = graph_of(tmp_path / "made", "model_int8.onnx").run(["sentence_embedding"], batch)
    cosine = (found * small).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(small, axis=1)
    assert done.result["int8"]["cosine"]["lowest"] == pytest.approx(cosine.min(), abs=2e-3)
    assert done.result["int8"]["cosine"]["mean"] == pytest.approx(cosine.mean(), abs=2e-3)
    assert cosine.max() < 1 - 1e-7


@pytest.fixture(scope="module")
def classifier(folder, tmp_path_factory):
    """A tiny classifier of three labels."""
    made = tmp_path_factory.mktemp("classifier") / "model"
    names = {0: "bad", 1: "good", 2: "neither"}
    return model_of(folder, HEADS["classifier"], made, num_labels=3, id2label=names)


def test_the_accuracy_on_labelled_pairs_is_told_also_of_int8(run, classifier, tmp_path):
    """Of pairs whose labels are the model's own answers, but for every fourth."""
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    model = transformers.BertForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        scores = model(**tokenizer(texts, texts[::-1], padding=True, return_tensors="pt")).logits
    best, worst = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    rows = [
        {"text": text, "other": other, "label": model.config.id2label[(worst if i % 4 == 0 else best)[i]]}
        for i, (text, other) in enumerate(zip(texts, texts[::-1], strict=True))
    ]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("--onnx", tmp_path / "made", "--data", tmp_path / "dev.jsonl", "--pair", "other", "--int8", "--json")
    found = run("export", classifier, *argv).result
    assert found["accuracy"] == 0.75
    assert found["int8"]["agreement"] > 0.8
    assert abs(found["int8"]["accuracy"] - 0.75) <= 1 - found["int8"]["agreement"] + 1e-9
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert saved(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert saved.model_max_length == found["max_length"] == 64


@pytest.mark.parametrize("written", [["1", "0.0", " 2"], ["LABEL_1", "LABEL_0", "LABEL_2"]])
def test_rows_without_names_are_those_of_numbers(run, folder, tmp_path, monkeypatch, written):
    """As in evaluate: transformers' LABEL_1, and 1 in a file."""
    model = model_of(folder, HEADS["classifier"], tmp_path / "model", num_labels=3)
    (tmp_path / "dev.tsv").write_text("".join(f"a text\t{label}\n" for label in written))
    given = {}
    monkeypatch.setattr(
        onnx_export, "export_onnx", lambda *_, **more: given.update(more) or {"difference": 0.0, "texts": 3}
    )
    done = run("export", model, "--onnx", tmp_path / "made", "--data", tmp_path / "dev.tsv")
    assert done.code == 0, done.err
    assert (given["labels"], given["texts"]) == ([1, 0, 2], ["a text"] * 3)
    (tmp_path / "dev.tsv").write_text("a text\t3\n")
    done = run("export", model, "--onnx", tmp_path / "made", "--data", tmp_path / "dev.tsv")
    assert "line 1: the label '3' is none of the model's: 0, 1, 2" in done.err


@pytest.mark.slow
def test_a_graph_that_says_something_else_is_not_kept(run, classifier, tmp_path, monkeypatch):
    theirs = onnx_export._theirs

    def wrong(*arguments):
        model = theirs(*arguments)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.LayerNorm.bias += 0.1
        return model

    monkeypatch.setattr(onnx_export, "_theirs", wrong)
    done = run("export", classifier, "--onnx", tmp_path / "made")
    assert done.code == 1
    assert "the graph's logits differs from this engine's by" in done.err
    assert "it was not kept" in done.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "dev.tsv"), "dev.tsv, line 2: the label 'awful' is none of the model's: bad, good, neither"),
        (("--text", "0"), "--text is for --data, which is missing"),
        (("--data", "lines.txt", "--label", "1"), "--label is for a classifier's labelled examples"),
        (("--data", "empty.txt"), "empty.txt holds no text"),
        (("--pooling", "mean"), "pooling, scaling and prompts are for vectors, not for classifier"),
        (("--seq", "65"), "the model's 64 positions, got 65"),
        (("--what", "tokens"), "holds a BertForSequenceClassification: its head is not that of"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(run, classifier, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dev.tsv").write_text("fine\tgood\nnot fine\tawful\n")
    (tmp_path / "lines.txt").write_text("a text\n")
    (tmp_path / "empty.txt").write_text("\n")
    done = run("export", classifier, "--onnx", tmp_path / "made", *argv)
    assert done.code == 1
    assert message in done.err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_a_difference(value):
    expected = [np.ones((2, 3)), np.ones((4, 3)), np.ones((1, 3))]
    for place in range(3):
        found = [rows.copy() for rows in expected]
        found[place][-1, 1] = value
        assert not onnx_export._difference(found, expected) <= onnx_export.BOUND


def test_a_classifier_without_its_pooler_is_refused(run, folder, classifier, tmp_path):
    """Its answers would be those of numbers drawn at random."""
    model = transformers.BertForSequenceClassification.from_pretrained(classifier)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    shutil.copytree(classifier, tmp_path / "bare")
    model.save_pretrained(tmp_path / "bare", state_dict=kept)
    done = run("export", tmp_path / "bare", "--onnx", tmp_path / "made")
    assert done.code == 1
    assert "bert.pooler.dense" in done.err


def test_nothing_is_overwritten(run, classifier, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").write_text("kept")
    done = run("export", classifier, "--onnx", tmp_path / "made")
    assert (done.code, [path.name for path in (tmp_path / "made").iterdir()]) == (1, ["mine"])
    assert "is there already" in done.err


@pytest.mark.slow
def test_what_is_missing_is_named_with_its_extra(classifier, tmp_path):
    code = WITHOUT.format(missing=["onnxscript"])
    code += f"from bert_fast.cli import main\nsys.exit(main(['export', {str(classifier)!r}, '--onnx', 'made']))"
    done = child(sys.executable, "-c", code, check=False, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'bert_fast[onnx]'")
